"""The embedded digits; what in a folder is an image, and what its pixels are, in every loader of the suite."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import resource
import struct
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets.folder import IMG_EXTENSIONS

import emim_solo.images.folders
from emim_solo import cli
from emim_solo.evaluation.thumbnails import thumbnail, write_sprite_sheet
from emim_solo.ground import configs
from emim_solo.images.embedded import DATASETS, FASHION_FOLDER, write_images
from emim_solo.images.folders import IMAGE_SUFFIXES, check_images, expand_home, find_images, load_rgb
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import prepare

Refused = Callable[..., AbstractContextManager[Any]]


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
    assert write_images("digits", digits) == digits
    assert path.stat().st_mtime_ns == before
    assert not list(digits.parent.glob("*unfinished*"))


def test_same_split_every_time(digits: Path, tmp_path: Path) -> None:
    again = write_images("digits", tmp_path / "again")
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) for folder in (digits, again)]
    assert names[0] == names[1]


def test_images_are_written_into_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    cli.main(["images", "digits", "."])
    assert sorted(os.listdir(".")) == ["notes.txt", "train", "val"], "from the very folder, which is not replaced"
    assert len(find_images("train", labelled=True)) == 1437
    assert "digits in './{train,val}'" in capsys.readouterr().out


@pytest.mark.parametrize("in_the_way", ["train", "val"])
def test_folders_in_the_way_are_refused_before_any_work(in_the_way: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "digits" / in_the_way).mkdir(parents=True)
    before = os.stat(tmp_path / "digits").st_mtime_ns
    with refused("images.folder", f"'{tmp_path / 'digits' / in_the_way}' is in the way"):
        write_images("digits", tmp_path / "digits")
    assert os.stat(tmp_path / "digits").st_mtime_ns == before, "nothing was written there, nor removed"
    assert [path.name for path in tmp_path.rglob("*")] == ["digits", in_the_way]
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with refused("images.folder", f"'{tmp_path / 'file'}' is in the way"):
            write_images("digits", folder)


def test_a_full_disk_leaves_no_images_behind(tmp_path: Path, refused: Refused) -> None:
    """Here by a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with refused("images.folder", tmp_path / "new" / "digits", "File too large"):
            write_images("digits", tmp_path / "new" / "digits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


SolidImage = Callable[[Path], Path]
Refused = Callable[..., AbstractContextManager[Any]]
IMAGES = ("0.png", "a b/1.JPG", "a b/tief/2.jpeg", "ünï/3.tif", "ünï/4.webp")
JUNK = (
    *(".DS_Store", "Thumbs.db", "notes.txt", "._0.png", "a b/._1.JPG", "a b/list.csv"),
    *("__MACOSX/5.png", ".ipynb_checkpoints/6.png", "ünï/@eaDir/7.jpg"),
)


@pytest.fixture
def messy(tmp_path: Path, solid_image: SolidImage) -> Path:
    """Five images at three depths, among what systems and people leave beside images."""
    for name in IMAGES:
        solid_image(tmp_path / "messy" / name)
    for name in JUNK:
        (tmp_path / "messy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "messy" / name).write_bytes(b"no image")
    return tmp_path / "messy"


def test_suffixes_are_torchvisions() -> None:
    assert set(IMAGE_SUFFIXES) == set(IMG_EXTENSIONS)


def test_images_are_found_at_any_depth_and_junk_is_counted_once(
    messy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (os.path.relpath(messy), messy, messy):
        found = find_images(folder, labelled=False)
        assert sorted(map(os.path.abspath, found.paths)) == sorted(str(messy / name) for name in IMAGES)
        assert set(found.labels) == {-1} and len(found) == 5 and found.classes == []
    (line,) = capsys.readouterr().out.splitlines()
    assert f"'{messy}': 5 images" in line
    for kind in ("3 hidden", "1 .db", "1 .txt", "1 .csv", "1 folder __MACOSX", "1 folder .ipynb_checkpoints"):
        assert kind in line
    assert "folder a b" not in line


def test_class_folders_are_those_with_a_name_of_their_own(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find_images(messy, labelled=True)
    assert found.classes == ["a b", "ünï"]
    assert [(Path(path).name, label) for path, label in zip(found.paths, found.labels, strict=True)] == [
        *(("1.JPG", 0), ("2.jpeg", 0), ("3.tif", 1), ("4.webp", 1))
    ]
    assert "1 outside the class folders" in capsys.readouterr().out


def test_names_that_are_no_utf8_are_read_and_can_be_written(tmp_path: Path, solid_image: SolidImage) -> None:
    for name in (os.fsdecode(b"M\xfcller"), "other"):
        solid_image(tmp_path / name / os.fsdecode(b"\xe4.png"))
    found = find_images(tmp_path, labelled=True)
    assert found.classes == ["M\ufffdller", "other"]
    assert [load_rgb(path).size for path in found.paths] == [(32, 32)] * 2


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path, solid_image: SolidImage, refused: Refused) -> None:
    """A file in its place stands for whatever may keep a folder from being listed: rights do not hold for root."""
    file = solid_image(tmp_path / "images.png")
    for labelled in (False, True):
        with refused("data.val_path", f"cannot list folder '{file}'"):
            find_images(file, labelled=labelled, name="data.val_path")


def test_links_are_followed_and_end(messy: Path, tmp_path: Path, solid_image: SolidImage) -> None:
    (messy / "a b" / "up").symlink_to(messy)
    (messy / "elsewhere").symlink_to(solid_image(tmp_path / "other" / "9.png").parent)
    (messy / "8.png").symlink_to(messy / "0.png")
    names = [Path(path).name for path in find_images(messy, labelled=False).paths]
    assert sorted(names) == ["0.png", "1.JPG", "2.jpeg", "3.tif", "4.webp", "8.png", "9.png"]


@pytest.mark.parametrize("labelled", [True, False])
def test_folder_without_images_says_what_is_in_it(labelled: bool, tmp_path: Path, refused: Refused) -> None:
    for number in range(3):
        path = tmp_path / "cat" / f"{number}.heic"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    with refused("images", "no images in", "3 .heic", "expected files ending in .jpg"):
        find_images(tmp_path, labelled=labelled)
    with refused("images", "nowhere"):
        find_images(tmp_path / "nowhere", labelled=labelled)


def colour_of(path: Path) -> tuple[int, int, int]:
    """A colour by a file's name: one-coloured images are told apart in every crop of them."""
    number = int(path.stem)
    return 40 * number, 255 - 40 * number, 10 * number


def mean_colour(view: torch.Tensor) -> tuple[int, ...]:
    """The colour of a normalised view of one colour."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.228, 0.224, 0.225])
    return tuple(((view.mean(dim=(1, 2)) * std + mean) * 255).round().int().tolist())


PLAIN_VIEW = {
    "rrc": {"enabled": True, "crop_min_scale": 0.4, "crop_max_scale": 1.0},
    **{name: {"prob": 0.0} for name in ("grayscale", "gaussian_blur", "solarization", "equalization")},
    "color_jitter": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.0},
    "crop_size": 32,
    "num_crops": 2,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.228, 0.224, 0.225],
}


@pytest.mark.parametrize("dataset", ["custom", "imagenet", "imagenet100"])
def test_unlabelled_folder_in_training_and_evaluation(
    dataset: str, messy: Path, make_cfg: Callable[..., DictConfig]
) -> None:
    for name in IMAGES:
        Image.new("RGB", (40, 36), colour_of(Path(name))).save(messy / name, quality=100, lossless=True)
    run = prepare(
        make_cfg(
            data={"dataset": dataset, "train_path": str(messy), "val_path": None, "no_labels": True},
            augmentations=[PLAIN_VIEW],
            optimizer__batch_size=5,
        )
    )
    expected = sorted(colour_of(Path(name)) for name in IMAGES)
    suite = load_suite()
    ((indices, views, labels),) = suite.train_loader(run.config, run.images)
    assert sorted(indices.tolist()) == [0, 1, 2, 3, 4] and labels.tolist() == [-1] * 5
    for view in views:
        np.testing.assert_allclose(sorted(map(mean_colour, view)), expected, atol=3)
    train, val = suite.evaluation_loaders(run.config, run.images)
    assert val is None and train.dataset.classes == []
    ((view, labels),) = train
    assert labels.tolist() == [-1] * 5
    np.testing.assert_allclose(sorted(map(mean_colour, view)), expected, atol=3)


def test_labelled_folder_among_junk_trains_and_evaluates_on_its_classes(
    messy: Path, make_cfg: Callable[..., DictConfig]
) -> None:
    suite = load_suite()
    run = prepare(make_cfg(data__train_path=str(messy), data__val_path=str(messy), optimizer__batch_size=4))
    assert run.config.data.num_classes == 2
    ((_, _, labels),) = suite.train_loader(run.config, run.images)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    for loader in suite.evaluation_loaders(run.config, run.images):
        assert loader is not None and loader.dataset.classes == ["a b", "ünï"]
        assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 1, 1]


def test_classes_that_are_not_imagenet_100s_are_warned_of_once(
    tmp_path: Path, make_cfg: Callable[..., DictConfig], recwarn: pytest.WarningsRecorder
) -> None:
    lines = Path(emim_solo.images.folders.__file__).with_name("imagenet100.txt").read_text().splitlines()
    published = [line for line in lines if not line.startswith("#")]
    assert len(set(published)) == 100 and lines[0].startswith("#")
    # of imagenet100.txt of HobbitLong/CMC at bc687a2, sorted, one a line
    digest = hashlib.sha256("".join(f"{name}\n" for name in sorted(published)).encode()).hexdigest()
    assert digest == "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
    load_suite()  # 1.0.2 imports only after it
    suites = Path(importlib.import_module("solo").__path__[0], "data", "dataset_subset", "imagenet100_classes.txt")
    if suites.is_file():  # in main
        assert sorted(published) == sorted(suites.read_text().split())

    def said(classes: list[str], dataset: str = "imagenet100") -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in classes:
            (folder / name).mkdir(parents=True)
            (folder / name / "0.png").touch()  # which nothing opens here
        recwarn.clear()
        for _ in range(2):
            data = {"dataset": dataset, "train_path": str(folder), "val_path": None, "num_workers": 0}
            prepare(make_cfg(data=data))
        return [str(warning.message) for warning in recwarn if "ImageNet-100" in str(warning.message)]

    assert said([*published, ".DS_Store"]) == []
    (line,) = said([*published[1:], "n01440764"])
    assert f"1 not on it (n01440764); 1 missing ({published[0]})" in line and "not comparable" in line
    (line,) = said([f"class {number}" for number in range(100)])
    assert "100 not on it (class 0, class 1, class 10, ...); 100 missing" in line
    (line,) = said([*published, "n01440764", "n01443537"])
    assert "102 class folders" in line and "missing" not in line
    assert said(published[1:], dataset="custom") == []


def test_a_fraction_that_cannot_be_drawn_is_one_line(make_cfg: Callable[..., DictConfig], refused: Refused) -> None:
    assert prepare(make_cfg(data__fraction=1)).config.data.fraction == -1, "all images: solo-learn's word for 1"
    if load_suite().generation != "main":
        pytest.skip("1.0.2 has no data.fraction")
    run = prepare(make_cfg(data__fraction=0.01))
    with refused("data.fraction", "data.fraction=0.01"):
        load_suite().train_loader(run.config, run.images)


def test_fraction_of_an_unlabelled_folder(messy: Path, make_cfg: Callable[..., DictConfig]) -> None:
    suite = load_suite()
    if suite.generation != "main":
        pytest.skip("1.0.2 has no data.fraction")
    cfg = make_cfg(data__train_path=str(messy), data__val_path=None, data__no_labels=True, data__fraction=0.6)
    run = prepare(cfg)
    assert len(suite.train_loader(run.config, run.images).dataset) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_image_broken_in_evaluation_is_named_on_one_line(
    workers: int, messy: Path, make_cfg: Callable[..., DictConfig], refused: Refused
) -> None:
    (messy / "ünï" / "3.tif").write_bytes(b"")
    run = prepare(make_cfg(data__train_path=str(messy), data__val_path=str(messy), data__num_workers=workers))
    key = None if workers else "images.unreadable"  # of a worker's error the text alone comes through
    with refused(key, f"cannot read image '{messy / 'ünï' / '3.tif'}'"):
        list(load_suite().evaluation_loaders(run.config, run.images)[0])


def test_broken_image_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with refused("images.unreadable", "broken.png"):
        load_rgb(str(tmp_path / "broken.png"))


# -- pixels ------------------------------------------------------------------------------------------------------

GREY = np.linspace(0, 65535, 40 * 30).reshape(30, 40).round()
RED = np.stack([np.linspace(0, 255, 40)[None].repeat(30, 0), np.full((30, 40), 90), np.full((30, 40), 20)], -1)
COLOURED = Image.fromarray(RED.astype("uint8"))


def write_tiff(path: Path, pixels: bytes, *, bits: int, sample_format: int = 1, order: str = "<") -> Path:
    """A TIFF of 40x30 grey values that Pillow itself cannot write."""
    tags = {256: 40, 257: 30, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 30, 279: len(pixels), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(head + entries + struct.pack(f"{order}I", 0) + pixels)
    return path


def twelve_bits(values: np.ndarray) -> bytes:
    pairs = values.astype(int).reshape(-1, 2)
    packed = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    return np.stack(packed, 1).astype("uint8").tobytes()


DEEP: dict[str, Callable[[Path], Any]] = {
    "grey.png": lambda path: Image.fromarray(GREY.astype("uint16")).save(path),
    "grey.tif": lambda path: Image.fromarray(GREY.astype("uint16")).save(path),
    "lzw.tiff": lambda path: Image.fromarray(GREY.astype("uint16")).save(path, compression="tiff_lzw"),
    "grey.pgm": lambda path: path.write_bytes(b"P5 40 30 65535\n" + GREY.astype(">u2").tobytes()),
    "big-endian.tif": lambda path: write_tiff(path, GREY.astype(">u2").tobytes(), bits=16, order=">"),
    "12-bit.tif": lambda path: write_tiff(path, twelve_bits(GREY / 65535 * 4095), bits=12),
    "12-bit.pgm": lambda path: path.write_bytes(
        b"P5 40 30 4095\n" + (GREY / 65535 * 4095).astype("uint16").astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_scaled_by_the_range_of_their_type(name: str, tmp_path: Path) -> None:
    DEEP[name](tmp_path / name)
    pixels = np.asarray(load_rgb(str(tmp_path / name)), dtype=float)
    assert pixels.shape == (30, 40, 3)
    np.testing.assert_allclose(pixels, (GREY / 65535 * 255)[..., None].repeat(3, -1), atol=0.6)


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "float.tif": lambda path: Image.fromarray((GREY / 65535).astype("float32")).save(path),
    "double.tif": lambda path: write_tiff(path, (GREY / 65535).astype("<f8").tobytes(), bits=64, sample_format=3),
    "int32.tif": lambda path: Image.fromarray(GREY.astype("int32")).save(path),
    "uint32.tif": lambda path: write_tiff(path, (GREY * 60000).astype("<u4").tobytes(), bits=32),
    "int16.tif": lambda path: write_tiff(path, (GREY - 32768).astype("<i2").tobytes(), bits=16, sample_format=2),
    "int8.tif": lambda path: write_tiff(path, (GREY / 257 - 128).astype("i1").tobytes(), bits=8, sample_format=2),
    "huge.png": lambda path: Image.new("1", (20000, 9500)).save(path),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_bytes(b"<html>not found</html>"),
    "folder.png": lambda path: path.mkdir(),
    "link.png": lambda path: path.symlink_to("nowhere.png"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_has_no_known_range_or_is_no_image_is_refused_by_name(name: str, tmp_path: Path, refused: Refused) -> None:
    UNREADABLE[name](tmp_path / name)
    with refused("images.unreadable", f"data.train_path: cannot read image '{tmp_path / name}'"):
        load_rgb(str(tmp_path / name), "data.train_path: ")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "P transparent", "L transparent"])
def test_alpha_is_left_out_and_every_mode_keeps_its_colours(mode: str, tmp_path: Path) -> None:
    mode, _, transparent = mode.partition(" ")
    image = COLOURED.quantize(16) if mode == "P" else COLOURED.convert(mode)
    expected = image.convert("RGBA").convert("RGB")
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    options: dict[str, Any] = {"transparency": bytes(range(0, 256, 16)) if mode == "P" else 90} if transparent else {}
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_rgb(str(path)), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("deep", [False, True])
def test_image_is_shown_upright(suffix: str, deep: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned a quarter clockwise
    image = Image.fromarray(GREY.astype("uint16")) if deep and suffix in ("png", "tif") else COLOURED
    path = tmp_path / f"image.{suffix}"
    image.save(path, exif=exif, quality=95)
    shown = np.asarray(load_rgb(str(path)), dtype=float)
    flat = GREY[..., None].repeat(3, -1) / 257 if image.mode.startswith("I") else RED
    assert shown.shape == (40, 30, 3)
    np.testing.assert_allclose(shown, np.rot90(flat, -1), atol=8)


def test_training_evaluation_and_thumbnails_show_the_same_side_up(
    tmp_path: Path, make_cfg: Callable[..., DictConfig]
) -> None:
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 20, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down: blue belongs on top
    for number in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{number}.jpg", exif=exif, quality=100, subsampling=0)
    view = {**PLAIN_VIEW, "rrc": {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}}
    data = {"train_path": str(tmp_path / "images"), "val_path": None, "no_labels": True}
    run = prepare(make_cfg(data=data, augmentations=[view], optimizer__batch_size=4))
    suite = load_suite()
    ((_, (trained, *_), _),) = suite.train_loader(run.config, run.images)
    loader, _ = suite.evaluation_loaders(run.config, run.images)
    ((evaluated, _),) = loader
    for shown in (*trained, *evaluated):
        red, _, blue = shown[:, :12].mean(dim=(1, 2))
        assert blue > red + 1
    small, _ = suite.evaluation_datasets(run.config, run.images, thumbnail)
    write_sprite_sheet(small, [0], tmp_path / "sheet.webp")
    sheet = np.asarray(Image.open(tmp_path / "sheet.webp").convert("RGB"), dtype=float)
    red, _, blue = sheet[:12].mean(axis=(0, 1))
    assert blue > red + 100


def test_dark_images_of_many_bits_are_said_to_be_dark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve bits in sixteen: the type does not tell, and sixteen levels of grey are left."""
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path in paths:
        Image.fromarray((GREY // 16).astype("uint16")).save(path)
    check_images(paths, "data.train_path")
    said = capsys.readouterr().out
    assert "data.train_path: 3 images" in said and "0.066 of the range" in said
    Image.fromarray(GREY.astype("uint16")).save(paths[0])
    check_images(paths, "data.train_path")
    assert not capsys.readouterr().out


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = OmegaConf.create(
        {"data": {"train_path": "~/a", "val_path": None}, "checkpoint": {"dir": "~/runs"}, "dir": "plain", "name": "~"}
    )
    expand_home(cfg)
    assert OmegaConf.to_container(cfg) == {
        "data": {"train_path": str(tmp_path / "a"), "val_path": None},
        "checkpoint": {"dir": str(tmp_path / "runs")},
        "dir": "plain",
        "name": "~",
    }


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_that_of_the_package(tmp_path: Path) -> None:
    folder = write_images("fashion-mnist-few", tmp_path / "fashion")
    raw = {
        split: np.frombuffer(
            gzip.decompress((FASHION_FOLDER / f"{stem}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16
        )
        for split, stem in (("train", "train"), ("val", "t10k"))
    }
    labels = gzip.decompress((FASHION_FOLDER / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    names = [
        "T-shirt or top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    for split, number in (("train", 600), ("val", 200)):
        images = find_images(folder / split, labelled=True)
        assert sorted(images.classes) == sorted(names)
        assert np.bincount(images.labels).tolist() == [number] * 10
        for path in map(Path, images.paths[::997]):
            scan = raw[split].reshape(-1, 28, 28)[int(path.stem)]
            assert np.array_equal(np.asarray(load_rgb(path)), np.stack([scan] * 3, axis=-1))
            if split == "train":
                assert names[labels[int(path.stem)]] == path.parent.name
    (view,) = OmegaConf.load(configs.root() / "benchmark" / "fashion-mnist.yaml").run.augmentations
    pixels = np.stack([np.asarray(load_rgb(path)) for path in (folder / "train").rglob("*.png")]) / 255
    assert list(view.mean) == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=5e-4)
    assert list(view.std) == pytest.approx(pixels.std((0, 1, 2)).tolist(), abs=5e-4)


def test_no_network_and_no_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr("emim_solo.images.embedded.FASHION_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of its first call
    with refused("images.download", "could not be downloaded", "apt install dataset-fashion-mnist"):
        write_images("fashion-mnist-few", tmp_path / "fashion")
    assert list(tmp_path.iterdir()) == []
    with refused("images.name", f"there are {', '.join(DATASETS)}"):
        write_images("mnist", tmp_path / "mnist")
