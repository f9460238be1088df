"""Colours and marker shapes of classes, the same in every picture."""

from __future__ import annotations

import matplotlib
from matplotlib.colors import to_hex

PALETTE = tuple(to_hex(colour) for colour in matplotlib.color_sequences["petroff10"])
"""Ten colours chosen for colour-vision deficiency (M. Petroff, arXiv 2107.02270). Under full protanopia, deuteranopia
or tritanopia, the closest two have a CAM02-UCS distance of 14.5. For matplotlib's tab10 this distance is 1.6."""

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "p", "<", "h")
"""After each ten classes the colours repeat with the next shape, so 100 classes differ in colour or shape."""

DISTINCT_STYLES = len(PALETTE) * len(MARKERS)


def class_styles(classes: int) -> list[tuple[str, str]]:
    """Colour and matplotlib marker of each class; the pairs repeat after ``DISTINCT_STYLES`` classes."""
    return [(PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]) for i in range(classes)]
