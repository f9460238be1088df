"""Learning curves from the CSV files that Lightning's logger writes into the folders of the runs."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from emim_solo.ground import files
from emim_solo.ground.errors import UsageError

Curve = dict[int, float]
"""Value by epoch, counted from 1."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Last value of each metric in each epoch; empty for a folder without files.

    ``metrics.csv`` holds the last part of a run. A resumed run has its earlier parts in ``metrics.0.csv`` and so on.
    """
    earlier = sorted(folder.glob("metrics.[0-9]*.csv"), key=lambda path: (len(path.name), path.name))
    curves: dict[str, Curve] = {}
    for path in filter(Path.is_file, [*earlier, folder / "metrics.csv"]):
        try:
            lines = list(csv.DictReader(files.read_text(path).splitlines()))
        except csv.Error as error:
            raise UsageError(
                "curve.damaged", f"'{path}' is damaged ({error}): remove it, the report is made without it"
            ) from error
        for line in lines:
            epoch = _number(line.get("epoch"))
            for name, text in line.items():
                value = _number(text)
                if name not in ("epoch", "step") and math.isfinite(epoch) and math.isfinite(value):
                    curves.setdefault(name, {})[int(epoch) + 1] = value
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _number(text: str | None) -> float:
    """NaN for an empty or damaged value, as in a line that a kill cut short."""
    try:
        return float(text or "nan")
    except (TypeError, ValueError):
        return math.nan
