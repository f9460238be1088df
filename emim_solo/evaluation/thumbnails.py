"""Small pictures of a dataset's images, all in one file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from emim_solo.ground.files import whole

QUALITY = 70


def write_sprite_sheet(dataset: Any, indices: Sequence[int], path: Path, *, side: int = 32) -> int:
    """Write images as square tiles, row by row, into one WebP file.

    Args:
        dataset: of torchvision's kind, whose ``transform`` takes the PIL image.
        indices: which images, in the order of the tiles.
        path: of the file.
        side: of a tile, in pixels; larger images are shrunk and cropped to the middle square.

    Returns:
        The number of tiles in a row.
    """
    columns = max(1, math.ceil(math.sqrt(len(indices))))
    sheet = Image.new("RGB", (columns * side, math.ceil(len(indices) / columns) * side), "white")
    plain = _with_transform(dataset, lambda image: _tile(image, side))
    for position, index in enumerate(indices):
        tile = plain[int(index)][0]
        sheet.paste(tile, (position % columns * side, position // columns * side))
    with whole(path) as unfinished:
        sheet.save(unfinished, quality=QUALITY, method=4)
    return columns


def _with_transform(dataset: Any, transform: Callable[[Image.Image], Image.Image]) -> Any:
    """The same images without the tensors and normalisation that the model is fed with."""
    plain = copy.copy(dataset)
    if hasattr(plain, "transform"):
        plain.transform = transform
    else:  # a Subset or the like
        plain.dataset = _with_transform(plain.dataset, transform)
    return plain


def _tile(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    left, top = (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
    square = image.crop((left, top, left + min(image.size), top + min(image.size)))
    return square.resize((side, side), Image.Resampling.LANCZOS)
