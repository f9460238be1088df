"""Out of the box: how far each method is from the best of each setting, over all settings that have all methods.

    python research/out_of_the_box/table.py docs/results/out-of-the-box/rows.jsonl [--half choose|show] [--without METHOD] [--more ROWS.jsonl] [--each]

Accuracy is the mean of 20-NN and linear. A run that diverged has 10 %, which is chance. Columns: mean distance to the best
method of the setting, the distance that a tenth of the settings exceed, the share of runs that collapsed or diverged, and
EMIM's default less the method. Brackets are 95 % intervals by bootstrap over settings, from six settings on. Settings that some method
lacks are left out and counted; methods without any row are named. With --more, rows of candidates are compared in the same way; the best of a setting stays that of the
methods, so a candidate's distance can be negative. With --float32, what float32 changes and candidates in float32 less MMCR. A second table chooses among the methods of a setting without labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from methods import METHODS

from emim_solo.results.statistics import estimate

CHANCE, RESAMPLES, FEWEST, REFERENCE = 10.0, 10_000, 6, "emim"  # FEWEST: settings needed for an interval


def accuracy(row: dict[str, Any]) -> float:
    return CHANCE if "failed" in row else (row["knn"] + row["linear"]) / 2


def read(path: Path, half: str | None, seed: int = 0) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by method and setting."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if half in (None, row["half"]) and row["seed"] == seed:
            found.setdefault(row["method"], {})[row["setting"]] = row
    return found


def interval(values: np.ndarray, statistic: Any = np.mean, digits: int = 1) -> str:
    """The statistic and its interval; no interval for fewer than FEWEST settings."""
    if len(values) < FEWEST:
        return f"{statistic(values):.{digits}f}"
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[chosen], axis=1), [0.025, 0.975])
    return f"{statistic(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def worst_tenth(values: np.ndarray, axis: int = 0) -> Any:
    return np.quantile(values, 0.9, axis=axis)


def compare_choice(by_setting: dict[int, list[dict[str, Any]]]) -> None:
    """Print how measures without labels rank the methods of a setting, and how far the method with the highest value is from the best."""
    from scipy.stats import spearmanr

    print("\n| without labels | rank correlation with accuracy | distance of its choice to the best |\n|---|---:|---:|")
    for key, name in (("view_information", "view information"), ("backbone_rank", "effective rank of the features")):
        correlations, distances = [], []
        for rows in by_setting.values():
            whole = [row for row in rows if "failed" not in row]
            values, accuracies = [row[key] for row in whole], [accuracy(row) for row in whole]
            correlations.append(spearmanr(values, accuracies).statistic)
            distances.append(max(accuracies) - accuracies[int(np.argmax(values))])
        print(f"| {name} | {interval(np.array(correlations), digits=2)} | {interval(np.array(distances))} |")


def compare_forwards(together: dict[int, dict[str, Any]], each: dict[int, dict[str, Any]]) -> None:
    """Print what one forward of all views costs against one for each, by setting and in the mean."""
    print(
        "| setting | data | views | batch | one forward | one for each | difference |\n|---|---|---:|---:|---:|---:|---:|"
    )
    differences = {number: accuracy(together[number]) - accuracy(row) for number, row in each.items()}
    for number, row in each.items():
        own, accuracies = row["settings"], [f"{accuracy(other):.1f}" for other in (together[number], row)]
        cells = (number, own["data"], own["views"], own["batch"], *accuracies, f"{differences[number]:+.1f}")
        print(f"| {' | '.join(map(str, cells))} |")
    found = estimate(differences.values())
    print(f"\n{found.n} settings: {found.mean:+.2f} ± {found.half_width:.2f} points (95 % t-interval over settings).")


def compare_in_float32(in_bfloat16: dict[int, dict[str, Any]], found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Print MMCR in float32 less MMCR in bfloat16, and each candidate less MMCR, both in float32."""
    print("| in float32 | settings | difference |\n|---|---:|---:|")
    for name, rows in found.items():
        base = in_bfloat16 if name == "mmcr" else found["mmcr"]
        less = estimate(accuracy(row) - accuracy(base[setting]) for setting, row in rows.items() if setting in base)
        label = "mmcr less mmcr in bfloat16" if name == "mmcr" else f"{name} less mmcr"
        print(f"| {label} | {less.n} | {less.mean:+.2f} ± {less.half_width:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--half", choices=("choose", "show"))
    parser.add_argument("--without", nargs="+", default=[], choices=METHODS, help="as if they had no rows")
    parser.add_argument("--more", type=Path, nargs="+", default=[], help="rows of candidates")
    parser.add_argument("--each", action="store_true", help="the accuracies of each setting, too")
    parser.add_argument("--forwards", type=Path, help="rows of run.py --each: EMIM's default with both forwards, alone")
    parser.add_argument("--float32", type=Path, help="rows of MMCR and candidates in float32, alone")
    arguments = parser.parse_args()
    if arguments.float32:
        found = read(arguments.float32, arguments.half)
        compare_in_float32(read(arguments.rows, arguments.half)["mmcr"], found)
        return
    if arguments.forwards:
        compare_forwards(*(read(path, arguments.half)["emim"] for path in (arguments.rows, arguments.forwards)))
        return
    rows = {name: of for name, of in read(arguments.rows, arguments.half).items() if name not in arguments.without}
    complete = sorted(set.intersection(*(set(by_setting) for by_setting in rows.values())))
    every = {setting for by_setting in rows.values() for setting in by_setting}
    best = {setting: max(accuracy(rows[name][setting]) for name in rows) for setting in complete}
    methods = list(rows)
    for path in arguments.more:
        rows |= read(path, arguments.half)
    if arguments.each:
        print(f"| setting | {' | '.join(rows)} |\n|---|{'---:|' * len(rows)}")
        for setting in complete:
            s = next(iter(rows.values()))[setting]["settings"]
            head = f"{setting}: {s['data']}, d {s['dim']}, N {s['batch']}, K {s['views']}, lr {s['lr']:g}, {s['steps']} steps, clip {s['clip']:g}"
            cells = []
            for by_setting in rows.values():
                row = by_setting.get(setting)
                cell = "" if row is None else f"{accuracy(row):.1f}"
                cells.append(f"**{cell}**" if row is not None and accuracy(row) == best[setting] else cell)
            print(f"| {head} | {' | '.join(cells)} |")
        print()
    print(f"{len(complete)} settings with all of {len(methods)} methods; {len(every) - len(complete)} not complete.")
    if without := [name for name in METHODS if name not in (*methods, *arguments.without)]:
        print(f"Partial: no rows of {', '.join(without)}.")
    print()
    print(
        "| method | settings | mean distance to the best | worst decile | collapsed | diverged | EMIM's default less it |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    lines = []
    for name, by_setting in rows.items():
        own = [setting for setting in complete if setting in by_setting]
        if not own:
            continue
        values = np.array([accuracy(by_setting[setting]) for setting in own])
        distance = np.array([best[setting] for setting in own]) - values
        shares = [
            100 * np.mean([test(by_setting[setting]) for setting in own])
            for test in (lambda row: bool(row.get("collapsed")), lambda row: "failed" in row)
        ]
        reference = np.array([accuracy(rows[REFERENCE][setting]) for setting in own])
        paired = "" if name == REFERENCE else interval(reference - values)
        cells = [interval(distance), interval(distance, worst_tenth), *(f"{share:.0f} %" for share in shares), paired]
        lines.append((distance.mean(), f"| {name} | {len(own)} | {' | '.join(cells)} |"))
    print("\n".join(line for _, line in sorted(lines)))
    compare_choice({setting: [rows[name][setting] for name in methods] for setting in complete})


if __name__ == "__main__":
    main()
