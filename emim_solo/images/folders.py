"""Folders of images: lists the images in them and decodes their pixels. The loaders are solo-learn's."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps

from emim_solo.ground.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision, which is not imported here because loading torch takes seconds."""
FOLDER_DATASETS = ("custom", "imagenet", "imagenet100")
# Made by macOS, Synology, Windows and Linux beside the user's files.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
_PATHS = ("data.train_path", "data.val_path", "checkpoint.dir", "auto_umap.dir", "resume_from_checkpoint", "dir")
# Up to so many images, decoding all before training takes seconds. In a larger folder a broken image is found when it is read.
_LARGEST_DECODED = 20_000
_EXPECTED = "expected one folder of images for each class in it, or images in it with data.no_labels=True"
BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # TIFF tags
_UNSIGNED, _UNDEFINED = 1, 4  # values of _SAMPLE_FORMAT


@dataclass(frozen=True)
class Images:
    """The images of a folder, listed once.

    Attributes:
        folder: the listed folder.
        paths: of the image files; class by class, if folders are classes.
        labels: for each image the position of its class; all -1 without labels.
        classes: sorted names of the class folders; empty without labels.
        folders: names of the class folders as on disk, which may be no UTF-8.
    """

    folder: str
    paths: list[str]
    labels: list[int]
    classes: list[str]
    folders: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, positions: Sequence[int]) -> Images:
        """The images at some positions, with the same classes."""
        paths = [self.paths[place] for place in positions]
        return replace(self, paths=paths, labels=[self.labels[place] for place in positions])

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits: a hash of the images' paths below the folder and their sizes in bytes. No image is opened."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                size = os.stat(path).st_size
            except OSError as error:  # a broken link, or a file removed meanwhile
                raise _unreadable(path, error) from error
            name = path[len(self.folder) :].lstrip(os.sep)
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:12]

    @property
    def record(self) -> dict[str, Any]:
        """What rows and checkpoints store about the images."""
        return {"images": len(self), "classes": len(self.classes), "digest": self.digest}


@dataclass(frozen=True)
class HeldOut:
    """Held-out images: so many of the ``of`` training images are scored and not trained on. The seed chooses them."""

    images: int
    of: int
    seed: int

    @staticmethod
    def recorded(cfg: DictConfig) -> HeldOut | None:
        """Those in a completed config; None if all training images are trained on."""
        recorded = OmegaConf.select(cfg, "score.held_out")
        return None if recorded is None else HeldOut(**recorded)

    def positions(self, listed: int) -> list[int]:
        """Their sorted positions among all listed images. UsageError if the number of listed images has changed."""
        if listed != self.of:
            text = f"data.train_path has {listed} images, and had {self.of} when {self.images} of them were held out"
            todo = "which ones is no longer known; put the folder back as it was, or start a new run"
            raise UsageError("images.held_out", f"{text}: {todo}")
        return sorted(np.random.default_rng(self.seed).permutation(self.of)[: self.images].tolist())


@dataclass(frozen=True)
class RunImages:
    """The images of a run; each folder is listed once.

    Attributes:
        listed: all images in ``data.train_path``; None if the config's images are no files in folders.
        val: the images in ``data.val_path``; None if there are none, or if they are no files in folders.
        held_positions: positions in ``listed`` of the held-out images, which are not trained on.
    """

    listed: Images | None = None
    val: Images | None = None
    held_positions: tuple[int, ...] = ()

    @cached_property
    def train(self) -> Images | None:
        """The images that are trained on."""
        if self.listed is None or not self.held_positions:
            return self.listed
        return self.listed.at(sorted({*range(len(self.listed))} - {*self.held_positions}))

    @cached_property
    def held_out(self) -> Images | None:
        """The images that are held out of training, for the score; None if there are none."""
        return self.listed.at(self.held_positions) if self.listed is not None and self.held_positions else None

    @cached_property
    def record(self) -> dict[str, dict[str, Any]]:
        """Number, classes and digest of each part, for rows and checkpoints."""
        parts = {"train": self.train, "val": self.val, "held_out": self.held_out}
        return {name: part.record for name, part in parts.items() if part is not None}

    def check_classes(self) -> None:
        """UsageError if the class folders of both splits differ, because a label is the position of its folder's name."""
        if self.listed is not None and self.val is not None and self.listed.classes != self.val.classes:
            differing = ", ".join(sorted({*self.listed.classes} ^ {*self.val.classes}))
            text = f"train and val folders have different classes: {differing} is in one only; make them the same"
            raise UsageError("data.val_path", text)

    @staticmethod
    def of(cfg: DictConfig, listings: Listings | None = None) -> RunImages:
        """List the folders that a config names, each once. Errors as in :func:`find_images`."""
        if cfg.data.dataset not in FOLDER_DATASETS or cfg.data.get("format") == "h5":
            return RunImages()  # a dataset that is downloaded, or in an HDF5 file
        listings, labelled = listings or Listings(), not cfg.data.get("no_labels", False)
        listed = listings.of(cfg.data.train_path, labelled=labelled, name="data.train_path")
        val = None
        if cfg.data.get("val_path") is not None:
            val = listings.of(cfg.data.val_path, labelled=labelled, name="data.val_path")
        if cfg.data.dataset == "imagenet100" and labelled:
            _compare_with_imagenet100(str(cfg.data.train_path), frozenset(listed.folders))
        held_out = HeldOut.recorded(cfg)
        return RunImages(listed, val, () if held_out is None else tuple(held_out.positions(len(listed))))


class Listings:
    """Keeps the folders that are listed, so that several runs on the same images list each folder once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, bool], Images] = {}

    def of(self, folder: str | os.PathLike[str], *, labelled: bool, name: str) -> Images:
        """The images of a folder. Errors call the folder ``name``."""
        key = (os.path.abspath(folder), labelled)
        if key not in self.known:
            self.known[key] = find_images(folder, labelled=labelled, name=name)
        return self.known[key]


def check_held_out(recorded: Mapping[str, Any], images: RunImages, checkpoint: Path) -> None:
    """Refuse held-out images whose digest differs from a checkpoint's record. Checkpoints of version 0.2 have no record."""
    before, now = recorded.get("held_out"), images.held_out
    if before is not None and now is not None and before["digest"] != now.digest:
        text = f"data.train_path '{now.folder}' was changed since '{checkpoint}' was trained"
        lost = f"which images were held out is no longer known ({len(now)} would be scored, most of them trained on)"
        raise UsageError("images.held_out", f"{text}: {lost}; put the folder back as it was, or give data.val_path")


def differing_images(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Differences between two records of images. A part that only one record has is not compared."""
    words = {"images": "images", "classes": "classes", "digest": "names or sizes of images"}
    said = []
    for part in sorted(there.keys() & here.keys()):
        one, two = there[part], here[part]
        if differing := ", ".join(word for key, word in words.items() if one.get(key) != two.get(key)):
            path = f"data.{part.replace('held_out', 'train')}_path"
            said.append(f"{path} ({differing} differ: {one.get('images')} images there, {two.get('images')} here)")
    return said


def find_images(folder: str | os.PathLike[str], *, labelled: bool, name: str = "images") -> Images:
    """The images below a folder. Loaders, DALI, checks and counts all use this list.

    An image is a file at any depth with a suffix that torchvision reads. Everything else is skipped, and one line on stdout counts
    it: other files, hidden files (``.DS_Store``, ``._x.jpg``), hidden folders and those that systems make.

    Args:
        folder: holds images, or class folders of images.
        labelled: whether the folders in it are classes. If not, all images below it are one list without classes.
        name: key of the config that names the folder, for errors.

    Raises:
        UsageError: a folder cannot be listed, there are no class folders or no images, or a class has no image.
    """
    passed_over: Counter[str] = Counter()
    by_class: dict[str, list[str]] = {} if labelled else {"": []}
    try:
        for place, folders, files in _walk(folder):
            inside = os.path.relpath(place, folder)
            passed_over.update(f"folder {each}" for each in folders if _is_systems(each))
            folders[:] = sorted(each for each in folders if not _is_systems(each))
            if inside == os.curdir and labelled:
                by_class = {each: [] for each in folders}
            of_class = by_class.get(inside.partition(os.sep)[0] if labelled else "")
            for each in sorted(files):
                if _is_systems(each) or not each.lower().endswith(IMAGE_SUFFIXES):
                    passed_over["hidden" if _is_systems(each) else Path(each).suffix or each] += 1
                elif of_class is None:
                    passed_over["outside the class folders"] += 1
                else:
                    of_class.append(os.path.join(place, each))
    except OSError as error:
        where = f"'{os.fsdecode(error.filename or folder)}' ({error.strerror})"
        raise UsageError(name, f"{name}: cannot list folder {where}: {_EXPECTED}") from error
    if not by_class:
        raise UsageError(name, f"{name}: '{folder}' has no class folders: {_EXPECTED}")
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    if empty := [each for each, paths in by_class.items() if not paths]:
        where = f"class folders {', '.join(empty)} of '{folder}'" if labelled else f"'{folder}'"
        where += f" (passed over: {others})" if others else ""
        expected = f"expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        todo = "add some or remove it" if labelled else "add some"
        raise UsageError(name, f"{name}: no images in {where}: {expected}; {todo}")
    paths = [path for of_class in by_class.values() for path in of_class]
    labels = [label if labelled else -1 for label, of_class in enumerate(by_class.values()) for _ in of_class]
    if others:
        _say_once(f"'{os.path.abspath(folder)}': {len(paths)} images; passed over: {others}")
    folders = list(by_class) if labelled else []
    return Images(os.fspath(folder), paths, labels, [_readable(each) for each in folders], folders)


def _walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` that follows links, visits each real folder once, and raises OSError if a folder cannot be listed."""

    def refuse(error: OSError) -> None:  # otherwise os.walk would skip the folder
        raise error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a parent folder would list all images again
            folders.clear()
            continue
        seen.add(real)
        yield place, folders, files


def _is_systems(name: str) -> bool:
    """Whether a file or folder was made by an operating system or a tool, not by the user."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


@cache
def _say_once(line: str) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(_readable(line), flush=True)


def _readable(name: str) -> str:
    """A name that can be printed. Names from old archives may be no UTF-8: such a file opens, but its name cannot be printed."""
    return os.fsencode(name).decode(errors="replace")


def expand_home(cfg: DictConfig) -> None:
    """Expand a leading ``~`` in every path of a config, because a shell does not expand it after ``=``. Changes ``cfg``."""
    for key in _PATHS:
        if isinstance(path := OmegaConf.select(cfg, key), str):
            OmegaConf.update(cfg, key, os.path.expanduser(path))


@cache
def _compare_with_imagenet100(folder: str, classes: frozenset[str]) -> None:
    """Warn if the classes are not those of the published list: other choices of 100 classes are in use."""
    text = Path(__file__).with_name("imagenet100.txt").read_text()
    published = {line for line in text.splitlines() if not line.startswith("#")}
    differing = []
    for names, kind in ((classes - published, "not on it"), (published - classes, "missing")):
        if names:
            listed = _readable(", ".join(sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
            differing.append(f"{len(names)} {kind} ({listed})")
    if differing:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        rank_zero_warn(
            f"data.train_path: the {len(classes)} class folders of '{folder}' are not ImageNet-100's (Tian et al. "
            f"2020, emim_solo/images/imagenet100.txt): {'; '.join(differing)}. Results are not comparable with others"
        )


def why_no_accuracy(data: Mapping[str, Any]) -> str | None:
    """Why a run's accuracies would mean nothing, or None if they mean something. ``data`` is from its completed config."""
    if data.get("no_labels"):
        return "images without labels"
    if data.get("val_path") is None:
        return "no validation images (data.val_path)"
    return "a single class" if data.get("num_classes") == 1 else None


def check_images(paths: Sequence[str], name: str) -> None:
    """Decode all images, so that a broken one is found before training. A large folder is not decoded."""
    if len(paths) > _LARGEST_DECODED:
        return
    deep = brightest = 0
    for path in paths:
        image, scaled = _read(path, f"{name}: ")
        if scaled:
            deep, brightest = deep + 1, max(brightest, int(np.asarray(image).max()))
    if deep and brightest < 128:
        use = f"{deep} images have more than 8 bits and use {(brightest + 1) / 256:.2g} of the range of their type"
        _say_once(f"{name}: {use}, scaled to 8 bits they look dark; stretch their values first if they should not")


def load_rgb(path: str, prefix: str = "") -> Image.Image:
    """Decode one image to 8-bit RGB: upright by its EXIF orientation, without alpha, the first page if there are several.

    Values of 9 to 16 bits are scaled to 8 bits by the range of their type.

    Raises:
        UsageError: the file is no image, is cut short, is larger than Pillow opens, or has signed, 32-bit or floating values,
            whose range is not known. The message names the file.
    """
    return _read(path, prefix)[0]


def _read(path: str, prefix: str) -> tuple[Image.Image, bool]:
    """The image, and whether it was scaled to 8 bits."""
    try:
        with open(path, "rb") as file, Image.open(file) as opened:
            opened.load()
            full = _full_scale(opened)
            image = ImageOps.exif_transpose(opened)
            if full is not None:
                image = Image.fromarray(np.rint(np.asarray(image) * (255 / full)).astype(np.uint8))
            elif "transparency" in image.info:  # because Pillow warns when it converts such a palette to RGB
                image = image.convert("RGBA")
            return image if image.mode == "RGB" else image.convert("RGB"), full is not None
    except Exception as error:  # Pillow's plugins raise errors of many types
        raise _unreadable(path, error, prefix) from error


def _unreadable(path: str, error: Exception, prefix: str = "") -> UsageError:
    text = f"{prefix}cannot read image '{path}' ({error}): convert, replace or remove it"
    return UsageError("images.unreadable", text)


def _full_scale(image: Image.Image) -> int | None:
    """The largest possible value of an image of more than 8 bits; None if Pillow itself converts the image to 8 bits."""
    tags: Any = getattr(image, "tag_v2", {})
    signed_or_float = set(np.ravel(tags.get(_SAMPLE_FORMAT, _UNSIGNED))) - {_UNSIGNED, _UNDEFINED}
    # 16-bit PNG and PGM may have mode I, too. Pillow scales them to 16 bits.
    if image.mode == "F" or signed_or_float or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"mode {image.mode}: signed, 32-bit or floating values, whose range is not known")
    if not image.mode.startswith("I"):
        return None
    return 2 ** int(np.max(tags.get(BITS_PER_SAMPLE, 16))) - 1
