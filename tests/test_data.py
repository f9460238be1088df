"""The embedded digits are the digits, whole, and written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from emim_solo.data import load_rgb, write_digits
from emim_solo.errors import UsageError


def test_digits_are_all_there_and_split_by_class(digits: Path) -> None:
    target = load_digits().target
    for digit in range(10):
        train, val = (len(list((digits / split / str(digit)).glob("*.png"))) for split in ("train", "val"))
        assert train + val == (target == digit).sum()
        assert val / (train + val) == pytest.approx(0.2, abs=0.01)


def test_an_image_is_its_scan(digits: Path) -> None:
    scans = load_digits()
    for path in sorted((digits / "val").rglob("*.png"))[::60]:
        image = Image.open(path)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
        scan = scans.images[int(path.stem)]
        assert scans.target[int(path.stem)] == int(path.parent.name)
        assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.97


def test_digits_are_written_once(digits: Path) -> None:
    path = next((digits / "train").rglob("*.png"))
    before = path.stat().st_mtime_ns
    assert write_digits(digits) == digits
    assert path.stat().st_mtime_ns == before
    assert not list(digits.parent.glob("*unfinished*"))


def test_same_split_every_time(digits: Path, tmp_path: Path) -> None:
    again = write_digits(tmp_path / "again")
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) for folder in (digits, again)]
    assert names[0] == names[1]


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "digits" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="in the way"):
        write_digits(tmp_path / "digits")


def test_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"broken\.png"):
        load_rgb(str(tmp_path / "broken.png"))
