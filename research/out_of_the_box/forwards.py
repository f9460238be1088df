"""One forward of all views less one for each view: EMIM's default, the same settings and seed, from rows alone.

    python research/out_of_the_box/forwards.py docs/results/out-of-the-box/rows.jsonl docs/results/out-of-the-box/forwards.jsonl

The second file is made by `run.py --each --half choose --methods emim`. Accuracy is the mean of 20-NN and the linear classifier.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from emim_solo.results.statistics import estimate


def accuracies(path: Path, method: str) -> dict[int, float]:
    rows = (row for row in map(json.loads, path.read_text().splitlines()) if row["method"] == method)
    return {row["setting"]: (row["knn"] + row["linear"]) / 2 for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("together", type=Path)
    parser.add_argument("each", type=Path)
    arguments = parser.parse_args()
    settings = {row["setting"]: row["settings"] for row in map(json.loads, arguments.each.read_text().splitlines())}
    together, each = accuracies(arguments.together, "emim"), accuracies(arguments.each, "emim")
    print(
        "| setting | data | views | batch | one forward | one for each | difference |\n|---:|---|---:|---:|---:|---:|---:|"
    )
    for number, own in settings.items():
        cells = (number, own["data"], own["views"], own["batch"], f"{together[number]:.1f}", f"{each[number]:.1f}")
        print(f"| {' | '.join(map(str, cells))} | {together[number] - each[number]:+.1f} |")
    found = estimate([together[number] - each[number] for number in settings])
    print(f"\n{found.n} settings: {found.mean:+.2f} ± {found.half_width:.2f} points (95 % interval over settings).")


if __name__ == "__main__":
    main()
