"""Folders of images: what in them is an image, and its pixels. Loaders are the suite's."""

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
"""Torchvision's, which is not imported here: torch takes seconds to load."""
_FOLDER_DATASETS = ("custom", "imagenet", "imagenet100")
# Left by macOS, Synology and Windows beside what people put there.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
_PATHS = ("data.train_path", "data.val_path", "checkpoint.dir", "auto_umap.dir", "resume_from_checkpoint", "dir")
# Decoding every image first takes seconds up to here; a larger folder's broken image is named when it is read.
_LARGEST_DECODED = 20_000
_EXPECTED = "expected one folder of images for each class in it, or images in it with data.no_labels=True"
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # TIFF tags
_UNSIGNED, _UNDEFINED = 1, 4  # values of the latter


@dataclass(frozen=True)
class Images:
    """The images of a folder, as they were listed once.

    Attributes:
        folder: that was listed.
        paths: of the image files, class by class where folders are classes.
        labels: of each image, the position of its class; -1 throughout without labels.
        classes: names of the class folders, sorted; none without labels.
        folders: the class folders as they are on disk: a name of theirs may be no UTF-8.
    """

    folder: str
    paths: list[str]
    labels: list[int]
    classes: list[str]
    folders: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, positions: Sequence[int]) -> Images:
        """Those at some positions, of the same classes."""
        paths = [self.paths[place] for place in positions]
        return replace(self, paths=paths, labels=[self.labels[place] for place in positions])

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of the images' names below the folder and their sizes in bytes; no image is opened."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                size = os.stat(path).st_size
            except OSError as error:  # a link to nowhere, a file that was removed meanwhile
                raise _unreadable(path, error) from error
            name = path[len(self.folder) :].lstrip(os.sep)
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:12]

    @property
    def record(self) -> dict[str, Any]:
        """What a row and a checkpoint say of them."""
        return {"images": len(self), "classes": len(self.classes), "digest": self.digest}


@dataclass(frozen=True)
class HeldOut:
    """How many training images, ``of`` all there are, a run is not trained on but scored on: chosen by a seed."""

    images: int
    of: int
    seed: int

    @staticmethod
    def recorded(cfg: DictConfig) -> HeldOut | None:
        """Those of a completed config; None where all training images are trained on."""
        recorded = OmegaConf.select(cfg, "score.held_out")
        return None if recorded is None else HeldOut(**recorded)

    def positions(self, listed: int) -> list[int]:
        """Which they are among all listed, sorted; a UsageError where there was another number of images."""
        if listed != self.of:
            text = f"data.train_path has {listed} images, and had {self.of} when {self.images} of them were held out"
            todo = "which ones is no longer known; put the folder back as it was, or start a new run"
            raise UsageError("images.held_out", f"{text}: {todo}")
        return sorted(np.random.default_rng(self.seed).permutation(self.of)[: self.images].tolist())


@dataclass(frozen=True)
class RunImages:
    """Which images a run is of, each folder listed once.

    Attributes:
        listed: all in ``data.train_path``; None where the config's images are no files in folders.
        val: those in ``data.val_path``; None where there are none, or no files in folders.
        held: positions in ``listed`` of the images that are not trained on.
    """

    listed: Images | None = None
    val: Images | None = None
    held: tuple[int, ...] = ()

    @cached_property
    def train(self) -> Images | None:
        """Those that are trained on."""
        if self.listed is None or not self.held:
            return self.listed
        return self.listed.at(sorted({*range(len(self.listed))} - {*self.held}))

    @cached_property
    def held_out(self) -> Images | None:
        """Those that are not, for the score."""
        return self.listed.at(self.held) if self.listed is not None and self.held else None

    @cached_property
    def record(self) -> dict[str, dict[str, Any]]:
        """Number, classes and digest of each part, for rows and checkpoints."""
        parts = {"train": self.train, "val": self.val, "held_out": self.held_out}
        return {name: part.record for name, part in parts.items() if part is not None}

    def check_classes(self) -> None:
        """Labels are folder names in order: both splits must have the same, else a UsageError names the differing."""
        if self.listed is not None and self.val is not None and self.listed.classes != self.val.classes:
            differing = ", ".join(sorted({*self.listed.classes} ^ {*self.val.classes}))
            text = f"train and val folders have different classes: {differing} is in one only; make them the same"
            raise UsageError("data.val_path", text)

    @staticmethod
    def of(cfg: DictConfig, listings: Listings | None = None) -> RunImages:
        """List the folders that a config names, each once; errors are those of :func:`find_images`."""
        if cfg.data.dataset not in _FOLDER_DATASETS or cfg.data.get("format") == "h5":
            return RunImages()  # a dataset that is downloaded or packed
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
    """Folders listed so far, so that several runs on the same images list them once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, bool], Images] = {}

    def of(self, folder: str | os.PathLike[str], *, labelled: bool, name: str) -> Images:
        """The images of a folder; ``name`` is what an error calls it."""
        key = (os.path.abspath(folder), labelled)
        if key not in self.known:
            self.known[key] = find_images(folder, labelled=labelled, name=name)
        return self.known[key]


def check_held_out(recorded: Mapping[str, Any], images: RunImages, checkpoint: Path) -> None:
    """Refuse held-out images that are not, by name, those of a checkpoint's record; version 0.2 recorded none."""
    before, now = recorded.get("held_out"), images.held_out
    if before is not None and now is not None and before["digest"] != now.digest:
        text = f"data.train_path '{now.folder}' was changed since '{checkpoint}' was trained"
        lost = f"which images were held out is no longer known ({len(now)} would be scored, most of them trained on)"
        raise UsageError("images.held_out", f"{text}: {lost}; put the folder back as it was, or give data.val_path")


def differing_images(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two records of images differ in; a part that only one of them has is not compared."""
    words = {"images": "images", "classes": "classes", "digest": "names or sizes of images"}
    said = []
    for part in sorted(there.keys() & here.keys()):
        one, two = there[part], here[part]
        if differing := ", ".join(word for key, word in words.items() if one.get(key) != two.get(key)):
            path = f"data.{part.replace('held_out', 'train')}_path"
            said.append(f"{path} ({differing} differ: {one.get('images')} images there, {two.get('images')} here)")
    return said


def find_images(folder: str | os.PathLike[str], *, labelled: bool, name: str = "images") -> Images:
    """The images below a folder, as loaders, DALI, checks and counts all have them.

    An image is a file at any depth with a suffix of torchvision's. What lies beside images is passed over and counted
    in one line: other files, hidden ones (``.DS_Store``, ``._x.jpg``), hidden folders and those that systems make.

    Args:
        folder: holds images, or class folders of images.
        labelled: whether the folders in it are classes. If not, all images below it are one heap.
        name: key of the config that names the folder, for errors.

    Raises:
        UsageError: a folder cannot be listed, there are no class folders or no images, or a class has none.
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
    """``os.walk`` through links, each real folder once; a folder that cannot be listed is an OSError."""

    def refuse(error: OSError) -> None:  # os.walk would go on without the folder
        raise error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back up would bring every image again
            folders.clear()
            continue
        seen.add(real)
        yield place, folders, files


def _is_systems(name: str) -> bool:
    """Whether a file or folder was put there by a system or a tool, not by the one who gathered the images."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


@cache
def _say_once(line: str) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(_readable(line), flush=True)


def _readable(name: str) -> str:
    """A name from an old archive may be no UTF-8, which can be opened and not be written."""
    return os.fsencode(name).decode(errors="replace")


def expand_home(cfg: DictConfig) -> None:
    """Replace a leading ``~`` in every path of a config, which no shell expands after a ``=``. Changes ``cfg``."""
    for key in _PATHS:
        if isinstance(path := OmegaConf.select(cfg, key), str):
            OmegaConf.update(cfg, key, os.path.expanduser(path))


@cache
def _compare_with_imagenet100(folder: str, classes: frozenset[str]) -> None:
    """Warn where the classes are not those of the published list: others have drawn a hundred of their own."""
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
    """Why accuracies of a run would say nothing, or None where they would; ``data`` is of its completed config."""
    if data.get("no_labels"):
        return "images without labels"
    if data.get("val_path") is None:
        return "no validation images (data.val_path)"
    return "a single class" if data.get("num_classes") == 1 else None


def check_images(paths: Sequence[str], name: str) -> None:
    """Decode images once, so that a broken one is named before training; in a large folder, when it is read."""
    if len(paths) > _LARGEST_DECODED:
        return
    deep = brightest = 0
    for path in paths:
        image, scaled = _read(path, f"{name}: ")
        if scaled:
            deep, brightest = deep + 1, max(brightest, int(np.asarray(image).max()))
    if deep and brightest < 128:
        use = f"{deep} images have more than 8 bits and use {(brightest + 1) / 256:.2g} of the range of their type"
        _say_once(f"{name}: {use}, by which they are scaled: they look dark; stretch their values if they should not")


def load_rgb(path: str, prefix: str = "") -> Image.Image:
    """Decode one image to 8-bit RGB: upright by its EXIF orientation, without alpha, the first of several pages.

    Up to 16 bits are scaled to 8 by the range of their type.

    Raises:
        UsageError: the file is not an image, cut short, larger than Pillow opens, or of signed, 32-bit or floating
            values, which have no range to be scaled by; it is named.
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
            elif "transparency" in image.info:  # straight to RGB, Pillow warns of each palette
                image = image.convert("RGBA")
            return image if image.mode == "RGB" else image.convert("RGB"), full is not None
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        raise _unreadable(path, error, prefix) from error


def _unreadable(path: str, error: Exception, prefix: str = "") -> UsageError:
    text = f"{prefix}cannot read image '{path}' ({error}): convert, replace or remove it"
    return UsageError("images.unreadable", text)


def _full_scale(image: Image.Image) -> int | None:
    """The largest value of an image of more than 8 bits; None where Pillow makes 8 of them itself."""
    tags: Any = getattr(image, "tag_v2", {})
    signed_or_float = set(np.ravel(tags.get(_SAMPLE_FORMAT, _UNSIGNED))) - {_UNSIGNED, _UNDEFINED}
    # 16-bit PNG and PGM may be of mode I, too, filled to 16 bits.
    if image.mode == "F" or signed_or_float or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"mode {image.mode}: signed, 32-bit or floating values, whose range is not known")
    if not image.mode.startswith("I"):
        return None
    return 2 ** int(np.max(tags.get(_BITS_PER_SAMPLE, 16))) - 1
