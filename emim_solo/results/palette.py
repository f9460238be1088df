"""Colours and shapes of classes, in every picture alike."""

from __future__ import annotations

import matplotlib
from matplotlib.colors import to_hex

PALETTE = tuple(to_hex(colour) for colour in matplotlib.color_sequences["petroff10"])
"""Ten colours chosen for colour-vision deficiency (M. Petroff, arXiv 2107.02270). In CAM02-UCS the closest two are
14.5 apart under full protanopia, deuteranopia or tritanopia; of matplotlib's tab10 they are 1.6 apart."""

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "p", "<", "h")
"""Beyond ten classes the colours repeat with another shape: 100 classes differ in colour or shape."""

DISTINCT_STYLES = len(PALETTE) * len(MARKERS)


def class_styles(classes: int) -> list[tuple[str, str]]:
    """Colour and matplotlib marker of each class; they repeat after ``DISTINCT_STYLES``."""
    return [(PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]) for i in range(classes)]
