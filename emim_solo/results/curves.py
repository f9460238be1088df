"""Learning curves from the CSV files that Lightning's logger left in the folders of the runs."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from emim_solo.ground import files
from emim_solo.ground.errors import UsageError

Curve = dict[int, float]
"""Value by epoch, counted from 1."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Last value of each metric in each epoch.

    Args:
        folder: of one run. ``metrics.csv`` is its last part; a run that was resumed has earlier parts beside it, as
            ``metrics.0.csv``, ``metrics.1.csv`` and so on.

    Returns:
        Curves by metric; empty where there are no files.
    """
    parts = sorted(
        (path for path in folder.glob("metrics.*.csv") if path.suffixes[0][1:].isdecimal()),
        key=lambda path: int(path.suffixes[0][1:]),
    )
    curves: dict[str, Curve] = {}
    for path in [*parts, folder / "metrics.csv"]:
        if not path.is_file():
            continue
        try:
            for line in csv.DictReader(files.read_text(path).splitlines()):
                _take(line, curves)
        except csv.Error as error:
            raise UsageError(f"'{path}' is damaged ({error}): remove it, the report is made without it") from error
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _take(line: dict[str, str], curves: dict[str, Curve]) -> None:
    try:
        epoch = int(float(line["epoch"])) + 1
    except (KeyError, TypeError, ValueError):  # a line that a kill cut short
        return
    for name, text in line.items():
        if name in ("epoch", "step") or not text:
            continue
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            curves.setdefault(name, {})[epoch] = value
