"""Tables of the final runs from their rows: the mean of each entry over its seeds, and the first entry less each other one.

    python research/real_size/finals.py docs/results/real-size/two-views.jsonl

± is the half width of the 95 % t-interval over seeds; differences are paired by seed. The best accuracies are bold.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from emim_solo.results import rows
from emim_solo.results.statistics import Estimate, estimate, paired

ACCURACIES = {
    "20-NN top-1 (%)": ("knn", "backbone_cosine_k20"),
    "linear top-1 (%)": ("linear", "acc1"),
    "logistic regression top-1 (%)": ("logistic", "backbone_acc1"),
}
COLUMNS = {
    **ACCURACIES,
    "view information (nats)": ("score", "view_information"),
    "RankMe": ("score", "rankme"),
}


def cell(value: Estimate, sign: str = "") -> str:
    half_width = "" if value.half_width is None else f" ± {value.half_width:.1f}"
    return f"{value.mean:{sign}.1f}{half_width}"


def table(title: str, columns: list[str], lines: dict[str, list[str]]) -> list[str]:
    head = [f"| {title} | seeds | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 1)]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))  # by column, entry, seed
    for row in rows.read(parser.parse_args().rows):
        name, seed = row["name"], row["seed"]
        if row["stage"] == "pretrain":
            values["minutes"][name][seed] = row["cpu_seconds"] / 60
        for column, (stage, key) in COLUMNS.items():
            if row["stage"] == stage:
                values[column][name][seed] = row["metrics"][key]

    names = list(values["minutes"])
    means = {column: {name: estimate(values[column][name].values()) for name in names} for column in COLUMNS}
    lines = {}
    for name in names:
        cells = []
        for column, of in means.items():
            best = column in ACCURACIES and of[name].mean == max(each.mean for each in of.values())
            cells.append(f"**{cell(of[name])}**" if best else cell(of[name]))
        minutes = values["minutes"][name]
        lines[name] = [str(len(minutes)), *cells, f"{min(minutes.values()):.0f} to {max(minutes.values()):.0f}"]
    print("\n".join(table("method", [*COLUMNS, "pretraining, CPU minutes"], lines)))
    first, *others = names
    lines = {}
    for name in others:
        differences = [paired(values[column][first], values[column][name]) for column in ACCURACIES]
        lines[name] = [str(len(differences[0])), *(cell(estimate(each.values()), "+") for each in differences)]
    print("\n" + "\n".join(table(f"{first} less", list(ACCURACIES), lines)))


if __name__ == "__main__":
    main()
