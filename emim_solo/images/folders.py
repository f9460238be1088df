"""Folders of images: what in them is an image, and its pixels. Loaders are the suite's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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
    """The images of a folder.

    Attributes:
        paths: of the image files, class by class where folders are classes.
        labels: of each image, the position of its class; -1 throughout without labels.
        classes: names of the class folders, sorted; none without labels.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def without(self, positions: Sequence[int]) -> Images:
        """The others, of the same classes."""
        left_out = set(positions)
        kept = [position for position in range(len(self)) if position not in left_out]
        return Images([self.paths[one] for one in kept], [self.labels[one] for one in kept], self.classes)


@dataclass(frozen=True)
class HeldOut:
    """Training images that a run is not trained on, to score it on: chosen by a seed, recorded in its config.

    Attributes:
        images: how many are held out.
        of: how many there were in ``data.train_path``, those included.
        seed: of the choice.
    """

    images: int
    of: int
    seed: int

    @staticmethod
    def recorded(cfg: DictConfig) -> HeldOut | None:
        """Those of a completed config; None where all training images are trained on."""
        kept = OmegaConf.select(cfg, "score.held_out")
        return None if kept is None else HeldOut(**kept)

    def positions(self, found: int) -> list[int]:
        """Which they are among all of the folder's images, in the order of :func:`find_images`, sorted.

        Raises:
            UsageError: the folder has another number of images than when they were chosen.
        """
        if found != self.of:
            raise UsageError(
                f"data.train_path has {found} images, and had {self.of} when {self.images} of them were held out of "
                "training: which ones is no longer known; put the folder back as it was, or start a new run"
            )
        return sorted(np.random.default_rng(self.seed).permutation(self.of)[: self.images].tolist())


def training_images(cfg: DictConfig) -> Images:
    """The images in ``data.train_path`` that a run is trained on: :func:`find_images` less those held out.

    Raises:
        UsageError: as :func:`find_images` and :meth:`HeldOut.positions`.
    """
    images = find_images(cfg.data.train_path, labelled=not cfg.data.get("no_labels", False))
    held_out = HeldOut.recorded(cfg)
    return images if held_out is None else images.without(held_out.positions(len(images)))


def find_images(folder: str | os.PathLike[str], *, labelled: bool) -> Images:
    """The images below a folder, as loaders, DALI, checks and counts all find them.

    An image is a file at any depth with a suffix of torchvision's. What lies beside images is passed over and counted in
    one line: other files, hidden ones (``.DS_Store``, ``._x.jpg``), hidden folders and those that systems make.

    Args:
        folder: holds images, or class folders of images.
        labelled: whether the folders in it are classes. If not, all images below it are one heap.

    Raises:
        UsageError: a folder cannot be listed, there are no class folders or no images, or a class has none.
    """
    classes = class_folders(folder) if labelled else []
    passed_over: Counter[str] = Counter()
    by_class: dict[str, list[str]] = {name: [] for name in classes or [""]}
    for name in _walk(folder, passed_over):
        own = by_class.get(name.partition(os.sep)[0] if labelled else "")
        if own is None:
            passed_over["outside the class folders"] += 1
        else:
            own.append(os.path.join(folder, name))
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    if empty := [name for name, paths in by_class.items() if not paths]:
        where = (
            f"class folder{'s' if len(empty) > 1 else ''} {', '.join(empty)} of '{folder}'"
            if labelled
            else f"'{folder}'"
        )
        raise UsageError(
            f"no images in {where}{f' (passed over: {others})' if others else ''}: expected files ending in "
            f"{' '.join(IMAGE_SUFFIXES)}; add some{' or remove it' if labelled else ''}"
        )
    paths = [path for own in by_class.values() for path in own]
    labels = [label if labelled else -1 for label, own in enumerate(by_class.values()) for _ in own]
    if others:
        # Its whole path: of the suite's generations one is given that, the other the config's.
        _say_once(f"'{os.path.abspath(folder)}': {len(paths)} images; passed over: {others}")
    return Images(paths, labels, [_readable(name) for name in classes])


def class_folders(folder: str | os.PathLike[str], name: str = "") -> list[str]:
    """Names of the folders in a folder that stand for classes, sorted.

    Raises:
        UsageError: there is no such folder, or none in it; ``name`` goes in front.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_systems(entry.name))
    except OSError as error:
        raise UsageError(f"{name}cannot list folder '{folder}' ({error.strerror}): {_EXPECTED}") from error
    if not found:
        raise UsageError(
            f"{name}'{folder}' has no class folders: expected '{folder}/<class>/<image>', "
            "or data.no_labels=True for images without labels"
        )
    return found


def image_names(folder: str | os.PathLike[str]) -> list[str]:
    """The images at any depth below a folder, named from it."""
    return list(_walk(folder, Counter()))


def _walk(folder: str | os.PathLike[str], passed_over: Counter[str]) -> Iterator[str]:
    """Images at any depth below a folder, named from it, in order; counts the rest by kind."""

    def refuse(error: OSError) -> None:  # os.walk would go on without the folder
        raise UsageError(f"cannot list folder '{error.filename}' ({error.strerror}): {_EXPECTED}") from error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back up would bring every image again
            folders.clear()
            continue
        seen.add(real)
        passed_over.update(f"folder {name}" for name in folders if _is_systems(name))
        folders[:] = sorted(name for name in folders if not _is_systems(name))
        inside = os.path.relpath(place, folder)
        for name in sorted(files):
            if _is_systems(name) or not name.lower().endswith(IMAGE_SUFFIXES):
                passed_over["hidden" if _is_systems(name) else Path(name).suffix or name] += 1
            else:
                yield name if inside == os.curdir else os.path.join(inside, name)


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


def reads_folders(cfg: DictConfig) -> bool:
    """Whether a config's images are files in folders, as opposed to a dataset that is downloaded or packed."""
    return cfg.data.dataset in _FOLDER_DATASETS and cfg.data.get("format", "image_folder") != "h5"


def check_folders(cfg: DictConfig) -> None:
    """Check the image folders that a config names, before anything is built from them.

    Raises:
        UsageError: a folder is missing or has no class folders.
    """
    if not reads_folders(cfg):
        return
    for key in ("train_path", "val_path"):
        folder = cfg.data.get(key)
        if folder is None:
            continue
        if not cfg.data.get("no_labels", False):
            classes = class_folders(folder, f"data.{key}: ")
            if cfg.data.dataset == "imagenet100" and key == "train_path":  # validation images must have the same
                _compare_with_imagenet100(folder, frozenset(classes))
        elif not Path(folder).is_dir():
            raise UsageError(f"data.{key}: no folder '{folder}': {_EXPECTED}")


@cache
def _compare_with_imagenet100(folder: str, classes: frozenset[str]) -> None:
    """Warn where the classes are not those of the published list: others have drawn a hundred of their own."""
    text = Path(__file__).with_name("imagenet100.txt").read_text()
    published = {line for line in text.splitlines() if not line.startswith("#")}
    if classes == published:
        return
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    differing = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for names, kind in ((classes - published, "not on it"), (published - classes, "missing"))
        if names
    ]
    rank_zero_warn(
        f"data.train_path: the {len(classes)} class folders of '{folder}' are not the published list of ImageNet-100 "
        f"(Tian et al. 2020, which solo-learn's results are on): {'; '.join(_readable(each) for each in differing)}. "
        "Results are not comparable with others on ImageNet-100: take its classes (emim_solo/images/imagenet100.txt), or say "
        "which these are"
    )


def why_no_accuracy(data: Mapping[str, Any]) -> str | None:
    """Why accuracies of a run would say nothing, or None where they would; ``data`` is of its completed config."""
    if data.get("no_labels"):
        return "images without labels"
    if data.get("val_path") is None:
        return "no validation images (data.val_path)"
    return "a single class" if data.get("num_classes") == 1 else None


def check_dataset(dataset: Any, name: str) -> None:
    """:func:`check_images` of a dataset of the suite, if its images are files in folders."""
    if hasattr(dataset, "loader") and hasattr(dataset, "samples"):
        check_images([path for path, _ in dataset.samples], name)


def check_images(paths: Sequence[str], name: str) -> None:
    """Decode images once, so that a broken one is named before training; in a large folder, when it is read.

    Args:
        paths: of the images.
        name: what to call them in an error.

    Raises:
        UsageError: an image that cannot be read, with its path.
    """
    if len(paths) > _LARGEST_DECODED:
        return
    deep = brightest = 0
    for path in paths:
        image, scaled = _read(path, f"{name}: ")
        if scaled:
            deep, brightest = deep + 1, max(brightest, int(np.asarray(image).max()))
    if deep and brightest < 128:
        _say_once(
            f"{name}: {deep} images have more than 8 bits and use {(brightest + 1) / 256:.2g} of the range of their type, by "
            "which they are scaled: they look dark; stretch their values if they should not"
        )


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
        raise UsageError(f"{prefix}cannot read image '{path}' ({error}): convert, replace or remove it") from error


def _full_scale(image: Image.Image) -> int | None:
    """The largest value of an image of more than 8 bits; None where Pillow makes 8 of them itself."""
    tags: Any = getattr(image, "tag_v2", {})
    signed_or_float = set(np.ravel(tags.get(_SAMPLE_FORMAT, _UNSIGNED))) - {_UNSIGNED, _UNDEFINED}
    # 16-bit PNG and PGM may be of mode I, too, filled to 16 bits.
    if image.mode == "F" or signed_or_float or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"mode {image.mode}: signed, 32-bit or floating values, whose range is not known; expected 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return None
    return 2 ** int(np.max(tags.get(_BITS_PER_SAMPLE, 16))) - 1


def check_same_classes(train: Any, val: Any) -> None:
    """Labels are folder names in order: both splits must have the same.

    Raises:
        UsageError: names that only one split has.
    """
    ours, theirs = getattr(train, "classes", None), getattr(val, "classes", None)
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    odd = sorted(name for name, count in Counter([*ours, *theirs]).items() if count == 1)
    raise UsageError(
        f"train and val folders have different classes: {', '.join(odd)} is in one only; make them the same"
    )
