"""The best recipe of each method, by the rule of docs/predictions.md, as overrides of the benchmark's command line.

    python research/real_size/choose.py ROWS.jsonl            # prints methods.emim.run.optimizer.lr=0.006 ...
    python research/real_size/choose.py ROWS.jsonl --table    # what was found, as Markdown

The rule: the highest mean of 20-NN (cosine, k = 20) and of the linear classifier on images that were not trained on. A
recipe that diverged has no such mean. Recipes are named METHOD_ANYTHING. A recipe without a result is an error.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

OWN: dict[str, str | None] = {  # the weight of each method that is searched
    "emim": "weight",
    "emim_bound": "noise_variance",
    "emim_mean": None,
    "vicreg": "sim_loss_weight",
    "barlow_twins": "lamb",
    "simclr": "temperature",
    "emp_ssl": "inv_coef",
    "mmcr": "lmda",
    "vicreg_views": "similarity",
    "frossl": "invariance_weight",
    "lejepa": "lambda_param",
}


def method_of(recipe: str) -> str:
    """The method of a recipe METHOD_ANYTHING; of two that fit, such as emim and emim_bound, the longer name."""
    return max((method for method in OWN if recipe.startswith(f"{method}_")), key=len)


def recipes(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By method, then recipe: 20-NN, linear, their mean, and the row of the pretraining."""
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for row in map(json.loads, path.read_text().splitlines()):
        entry = found[method_of(row["name"]), row["name"]]
        if row["stage"] == "pretrain":
            entry |= {"pretrain": row, "failed": row.get("failed")}
        elif row["stage"] == "knn":
            entry["knn"] = row["metrics"]["backbone_cosine_k20"]
        elif row["stage"] == "linear":
            entry["linear"] = row["metrics"]["acc1"]
    by_method: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (method, name), entry in found.items():
        if {"knn", "linear"} <= entry.keys():
            entry["mean"] = (entry["knn"] + entry["linear"]) / 2
        elif not entry.get("failed"):
            continue
        by_method[method][name] = entry
    return by_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    by_method = recipes(arguments.rows)
    if arguments.table:
        print("| recipe | 20-NN top-1 (%) | linear top-1 (%) | mean |\n|---|---:|---:|---:|")
        for entries in by_method.values():
            best = max(entries, key=lambda name: entries[name].get("mean", 0.0))
            for name, entry in entries.items():
                cells = [f"{entry[key]:.1f}" if key in entry else "diverged" for key in ("knn", "linear", "mean")]
                mark = "**" if name == best else ""
                print(f"| {mark}{name}{mark} | {' | '.join(cells)} |")
        return
    done = {name for entries in by_method.values() for name in entries}
    searches = [
        set(yaml.safe_load(path.read_text())["methods"]) for path in Path(__file__).parent.glob("*-recipes.yaml")
    ]
    if not (fitting := [search for search in searches if done <= search]):
        parser.error(f"{arguments.rows} has recipes of no *-recipes.yaml beside this file")
    if missing := fitting[0] - done:
        parser.error(f"{arguments.rows} has no result so far of {', '.join(sorted(missing))}")
    for method, entries in by_method.items():
        best = max(entries.values(), key=lambda entry: entry.get("mean", 0.0))
        if len({_rate(entry) for entry in entries.values()}) > 1:
            print(f"methods.{method}.run.optimizer.lr={_rate(best):g}")
        if own := OWN[method]:
            print(f"methods.{method}.method_kwargs.{own}={best['pretrain']['config']['method_kwargs'][own]:g}")


def _rate(entry: dict[str, Any]) -> float:
    """The learning rate as configs have it, for a batch of 256."""
    optimizer = entry["pretrain"]["config"]["optimizer"]
    return float(f"{optimizer['lr'] * 256 / optimizer['batch_size']:g}")


if __name__ == "__main__":
    main()
