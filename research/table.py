"""Tables of the laboratory's rows: means over seeds with 95 % intervals, and differences paired by seed.

python research/table.py ROWS.jsonl [--split test] [--trials emim vicreg ...] [--against emim]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from emim_solo.results.statistics import Estimate, estimate, paired

METRICS = {"knn": "20-NN top-1 (%)", "linear": "linear top-1 (%)"}
UNLABELLED = {"mi": "MI (nats)", "mi_null": "its null", "effective_rank": "effective rank", "collapsed": "collapsed"}


def shown(value: Estimate, sign: str = "") -> str:
    spread = "" if value.half_width is None else f" ± {value.half_width:.2f}"
    return f"{value.mean:{sign}.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--trials", nargs="+", help="these only, in this order")
    parser.add_argument("--unlabelled", action="store_true", help="what can be seen without labels, too")
    parser.add_argument("--against", help="a trial: the difference of it to every other, paired by seed")
    arguments = parser.parse_args()
    rows = [row for row in map(json.loads, arguments.rows.read_text().splitlines()) if row["split"] == arguments.split]
    trials = arguments.trials or list(dict.fromkeys(row["trial"] for row in rows))
    shown_metrics = METRICS | UNLABELLED if arguments.unlabelled else METRICS
    values = {
        name: {
            metric: {row["seed"]: row.get(metric, float("nan")) for row in rows if row["trial"] == name}
            for metric in shown_metrics
        }
        for name in trials
    }
    print(f"| trial | seeds | {' | '.join(shown_metrics.values())} |")
    print(f"|---|---:|{'---:|' * len(shown_metrics)}")
    for name, metrics in values.items():
        cells = [shown(estimate(by_seed.values())) for by_seed in metrics.values()]
        print(f"| {name} | {len(metrics['knn'])} | {' | '.join(cells)} |")
    if arguments.against:
        print(f"\n| {arguments.against} minus | seeds | 20-NN | linear |\n|---|---:|---:|---:|")
        for name in trials:
            if name != arguments.against:
                pairs = [estimate(paired(values[arguments.against][m], values[name][m]).values()) for m in METRICS]
                print(f"| {name} | {pairs[0].n} | {' | '.join(shown(pair, '+') for pair in pairs)} |")


if __name__ == "__main__":
    main()
