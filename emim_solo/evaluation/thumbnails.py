"""Small pictures of a dataset's images, all in one file (a sprite sheet)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from emim_solo.ground.files import whole

QUALITY, SIDE = 70, 32  # pixels
MOST_IMAGES = 250_000  # of a sheet: WebP has 16,383 pixels a side


def thumbnail(image: Image.Image) -> Image.Image:
    """The middle square of an image, :data:`SIDE` pixels wide: the ``transform`` of the dataset for a sprite sheet."""
    return ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)


def write_sprite_sheet(thumbnails: Any, indices: Sequence[int], path: Path) -> int:
    """Write images of a dataset of :func:`thumbnail` into one WebP file, row by row; returns the number of columns."""
    columns = math.ceil(math.sqrt(len(indices)))
    sheet = Image.new("RGB", (columns * SIDE, math.ceil(len(indices) / columns) * SIDE), "white")
    for position, index in enumerate(indices):
        sheet.paste(thumbnails[index][0], (position % columns * SIDE, position // columns * SIDE))
    with whole(path) as unfinished:
        sheet.save(unfinished, quality=QUALITY, method=4)
    return columns
