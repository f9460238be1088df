"""Tables of the final runs from their rows: means over seeds, and EMIM less each other method, paired by seed.

    python research/real_size/finals.py docs/results/real-size/two-views.jsonl

They are the report's tables, with the columns of the page, and the CPU time of a pretraining, which run.py puts in the rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emim_solo.results import rows
from emim_solo.results.tables import LINEAR, LOGISTIC, NEAREST, SCORES, collect, differences, headline, to_markdown

ACCURACIES = (NEAREST, LINEAR, LOGISTIC)
OF_SCORE = tuple(metric for metric in SCORES if metric.key in ("view_information", "rankme"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    results = collect(rows.read(parser.parse_args().rows))
    print(to_markdown(headline(results, (*ACCURACIES, *OF_SCORE))))
    print(to_markdown(differences(results, ACCURACIES)))
    minutes = sorted({round(row["cpu_seconds"] / 60) for row in results.pretrained()})
    print(f"Pretraining takes {' to '.join(map(str, minutes[:: len(minutes) - 1 or 1]))} minutes of one core")


if __name__ == "__main__":
    main()
