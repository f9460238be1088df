"""A picture of the laboratory's test rows: each method's mean of 20-NN and linear accuracy, its 95 % interval, best on top.

python research/picture.py ROWS.jsonl PICTURE.png [--split test]

Trials whose names begin with small_ have two small crops beside the two views, and a panel of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from emim_solo.results.statistics import Estimate, estimate

PANELS = {"": "two views", "small_": "two views and two small crops"}
OURS, OTHERS = "#0b6e4f", "#5b6470"


def quality(rows: list[dict], trial: str) -> Estimate:
    return estimate([(row["knn"] + row["linear"]) / 2 for row in rows if row["trial"] == trial])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    arguments = parser.parse_args()
    rows = [row for row in map(json.loads, arguments.rows.read_text().splitlines()) if row["split"] == arguments.split]
    small = {row["trial"] for row in rows if row["trial"].startswith("small_")}
    panels = {"": {row["trial"] for row in rows} - small, "small_": small}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, layout="constrained")
    for axis, (prefix, trials) in zip(axes, panels.items(), strict=True):
        found = sorted(((quality(rows, trial), trial) for trial in trials), key=lambda pair: pair[0].mean)
        for place, (value, trial) in enumerate(found):
            name = trial.removeprefix(prefix)
            colour = OURS if name.startswith(("emim", "bound")) and name != "emp_ssl" else OTHERS
            axis.errorbar(value.mean, place, xerr=value.half_width or 0, fmt="o", color=colour, capsize=3, markersize=5)
        axis.set_yticks(range(len(found)), [trial.removeprefix(prefix) for _, trial in found])
        axis.set_title(PANELS[prefix], fontsize=10, loc="left")
        axis.grid(axis="x", color="#e3e6ea")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("mean of 20-NN and linear top-1 (%)", fontsize=9)
    made_from = hashlib.sha256(arguments.rows.read_bytes()).hexdigest()  # a test finds a stale picture by it
    figure.savefig(
        arguments.picture, dpi=110, metadata={"rows": made_from} if arguments.picture.suffix == ".png" else {}
    )


if __name__ == "__main__":
    main()
