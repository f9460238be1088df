"""Small pictures of a dataset's images, all in one file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from emim_solo.ground.files import whole

QUALITY, LANCZOS = 70, Image.Resampling.LANCZOS


def write_sprite_sheet(dataset: Any, indices: Sequence[int], path: Path, *, side: int = 32) -> int:
    """Write images as square tiles of ``side`` pixels, row by row, into one WebP file; returns the number in a row.

    ``dataset`` is of torchvision's kind: its ``transform`` takes the PIL image, which is cropped to the middle square.
    """
    columns = max(1, math.ceil(math.sqrt(len(indices))))
    sheet = Image.new("RGB", (columns * side, math.ceil(len(indices) / columns) * side), "white")
    tiles = _with_transform(dataset, lambda image: ImageOps.fit(image.convert("RGB"), (side, side), LANCZOS))
    for position, index in enumerate(indices):
        sheet.paste(tiles[int(index)][0], (position % columns * side, position // columns * side))
    with whole(path) as unfinished:
        sheet.save(unfinished, quality=QUALITY, method=4)
    return columns


def _with_transform(dataset: Any, transform: Callable[[Image.Image], Image.Image]) -> Any:
    """The same images without the tensors and normalisation that the model is fed with."""
    changed = copy.copy(dataset)
    if hasattr(changed, "transform"):
        changed.transform = transform
    else:  # a Subset or the like
        changed.dataset = _with_transform(changed.dataset, transform)
    return changed
