"""Embedded images, and the checks that a folder of images passes before any training starts. Loading is the suite's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image, UnidentifiedImageError

from emim_solo.errors import UsageError

DIGITS_SIDE = 32
_FOLDER_DATASETS = ("custom", "imagenet", "imagenet100")
# Decoding every image first takes seconds up to here; a larger folder's broken image is named when it is read.
_LARGEST_DECODED = 20_000


def write_digits(folder: str | os.PathLike[str]) -> Path:
    """Write scikit-learn's handwritten digits as image folders, once.

    1,797 real 8x8 scans (E. Alpaydin and C. Kaynak, 1998) as 32x32 RGB PNG in ``train/<digit>/`` (80 %) and
    ``val/<digit>/`` (20 %), stratified by digit, the same split every time.

    Args:
        folder: where ``train`` and ``val`` are wanted; left alone if they are there.
    """
    folder = Path(folder)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return folder
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    # Written beside and renamed: a kill leaves no half-written folder that looks whole.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    for split, indices in (("train", train), ("val", val)):
        for index in indices:
            grey = Image.fromarray((digits.images[index] * (255 / 16)).round().astype("uint8"))
            path = unfinished / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey.resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC).convert("RGB").save(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.rename(folder)
    except OSError as error:
        if not (folder / "val").is_dir():  # another process may have been faster
            raise UsageError(
                f"'{folder}' is in the way of the digits: expected no such folder; move it away"
            ) from error
    return folder


def check_folders(cfg: DictConfig) -> None:
    """Check the image folders that a config names, before anything is built from them.

    Raises:
        UsageError: a folder is missing or has no class folders.
    """
    if cfg.data.dataset not in _FOLDER_DATASETS or cfg.data.get("format", "image_folder") == "h5":
        return
    for key in ("train_path", "val_path"):
        path = cfg.data.get(key)
        if path is None:
            continue
        folder = Path(path)
        if not folder.is_dir():
            raise UsageError(f"data.{key}: no folder '{folder}': expected one folder of images for each class in it")
        if cfg.data.get("no_labels", False):
            continue
        if not any(entry.is_dir() for entry in folder.iterdir()):
            raise UsageError(f"data.{key}: '{folder}' has no class folders: expected '{folder}/<class>/<image>'")


def why_no_accuracy(data: Mapping[str, Any]) -> str | None:
    """Why accuracies of a run would say nothing, or None where they would; ``data`` is of its completed config."""
    if data.get("no_labels"):
        return "images without labels"
    if data.get("val_path") is None:
        return "no validation images (data.val_path)"
    return "a single class" if data.get("num_classes") == 1 else None


def check_dataset(dataset: Any, name: str) -> None:
    """Check the images that a dataset of the suite has found, and have a broken one named when it is read.

    Args:
        dataset: a torchvision ``ImageFolder`` (anything else passes).
        name: what to call it in an error.

    Raises:
        UsageError: an image that cannot be decoded, with its path.
    """
    if not hasattr(dataset, "loader") or not hasattr(dataset, "samples"):
        return
    dataset.loader = load_rgb
    if len(dataset.samples) <= _LARGEST_DECODED:
        for path, _ in dataset.samples:
            load_rgb(path, f"{name}: ")


def load_rgb(path: str, prefix: str = "") -> Image.Image:
    """Decode one image to RGB.

    Raises:
        UsageError: the file is not an image, or is cut short; it is named.
    """
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"{prefix}cannot read image '{path}' ({error}): replace or remove it") from error


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
