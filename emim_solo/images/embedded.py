"""Freely available real images, written as image folders: ``emim-solo images NAME DIR``."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from emim_solo.ground.errors import UsageError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""From Debian's package dataset-fashion-mnist."""

Written = Iterator[tuple[str, str, int, Image.Image]]  # split, class, number of the image, image


def _digits() -> Written:
    """1,797 scans of 8x8 pixels (E. Alpaydin and C. Kaynak, 1998), resized to 32x32. A fixed, stratified 20 % are for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    for split, indices in (("train", train), ("val", val)):
        for index in indices:
            grey = Image.fromarray((digits.images[index] * (255 / 16)).round().astype("uint8"))
            image = grey.resize((32, 32), Image.Resampling.BICUBIC)
            yield split, str(digits.target[index]), int(index), image


def _fashion_mnist(*, few: bool = False) -> Written:
    """70,000 images of 28x28 pixels (H. Xiao, K. Rasul, R. Vollgraf, 2017). The 10,000 test images are for validation."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import extract_archive

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, _ in FashionMNIST.resources:
            if (FASHION_FOLDER / name).is_file():  # unpacked, as Debian's .gz fail torchvision's checksums
                extract_archive(str(FASHION_FOLDER / name), str(raw))
        try:
            splits = [(FashionMNIST(folder, train=train, download=True), train) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            text = f"Fashion-MNIST could not be downloaded ({' '.join(str(error).split())[:200]})"
            raise UsageError("images.download", f"{text}: on Debian try 'apt install dataset-fashion-mnist'") from error
    for dataset, train in splits:
        taken: Counter[int] = Counter()
        most = (600 if train else 200) if few else len(dataset)  # of each class
        for index, (pixels, label) in enumerate(zip(dataset.data, dataset.targets.tolist(), strict=True)):
            taken[label] += 1
            if taken[label] <= most:
                name = dataset.classes[label].replace("/", " or ")
                yield "train" if train else "val", name, index, Image.fromarray(pixels.numpy())


DATASETS: dict[str, Callable[[], Written]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "fashion-mnist-few": partial(_fashion_mnist, few=True),
}


def write_images(name: str, folder: str | os.PathLike[str]) -> Path:
    """Write one of :data:`DATASETS` as RGB PNG in ``train/<class>/`` and ``val/<class>/``; returns the folder.

    Training and validation images: ``digits`` (scikit-learn's) has 1,437 and 360, ``fashion-mnist`` 60,000 and 10,000,
    ``fashion-mnist-few`` the first 600 and 200 of each class. Folders that exist are not changed.

    Raises:
        UsageError: an unknown name, another file in the way, a full disk, or no download. No partial folder is left.
    """
    if name not in DATASETS:
        raise UsageError("images.name", f"no images '{name}': there are {', '.join(DATASETS)}")
    folder = Path(os.path.expanduser(folder))
    targets = [folder / split for split in ("val", "train")]
    if all(target.is_dir() for target in targets):
        return folder
    above = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    blocking = [target for target in targets if os.path.lexists(target)] or [above] * (not above.is_dir())
    if blocking:
        text = f"'{blocking[0]}' is in the way of the {name}: move it away, or name another folder"
        raise UsageError("images.folder", text)
    try:
        # Written to a temporary folder on the same disk and renamed, so that after a kill no partial folder looks complete.
        with tempfile.TemporaryDirectory(prefix=".", suffix=".unfinished", dir=above) as unfinished:
            for split, label, number, image in DATASETS[name]():
                path = Path(unfinished) / split / label / f"{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.convert("RGB").save(path)
            folder.mkdir(parents=True, exist_ok=True)
            for target in targets:  # "train" is last, so if it exists, "val" exists, too
                try:
                    (Path(unfinished) / target.name).rename(target)
                except OSError:
                    if not target.is_dir():  # if it is a folder, another process was faster
                        raise
    except OSError as error:
        text = f"cannot write the {name} to '{folder}' ({error.strerror or error}): make room, or name another folder"
        raise UsageError("images.folder", text) from error
    return folder
