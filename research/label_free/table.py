"""Tables and picture of docs/label-free.md, from rows alone: how well scores without labels put runs in order.

    python research/label_free/table.py docs/results/label-free/cifar10.jsonl > docs/results/label-free/cifar10.md
    python research/label_free/table.py docs/results/label-free/digits.jsonl > docs/results/label-free/digits.md
    python research/label_free/table.py ROWS.jsonl ROWS.jsonl --picture docs/images/label-free.png

Rows are the laboratory's or a benchmark's. Quality is (20-NN + linear) / 2. Intervals are the 2.5 % and 97.5 % quantiles of a
bootstrap over runs, differences are paired: both scores on the same resample.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from emim_solo.results.tables import SCORES

THE_SCORE = "view_information, backbone"
TITLES = {metric.key: metric.label for metric in SCORES if not metric.key.endswith("_null")}
BETTER: dict[str, Callable[[float], float]] = {  # maps to higher is better, as each score's authors have it
    "alpha_req": lambda alpha: -abs(alpha - 1),
    "alignment": lambda distance: -distance,
    "uniformity": lambda potential: -potential,
}
RESAMPLES = 2000
METHODS = ("emim", "vicreg", "barlow_twins", "simclr", "byol", "simsiam", "swav")


@dataclass
class Run:
    """One run: its quality in percent and its scores by name, the higher the better."""

    name: str
    method: str
    quality: float
    control: bool  # not one of the recipes that were drawn
    scores: dict[str, float] = field(default_factory=dict)


def read(path: Path) -> tuple[list[Run], list[str]]:
    """The runs of a file, and the names of diverged runs, which have no score and no accuracy."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found, diverged = [], []
    laboratory = "trial" in rows[0]
    for name, method, quality, scores in _lab(rows) if laboratory else _benchmark(rows):
        if math.isnan(quality):
            diverged.append(name)
            continue
        drawn = method in METHODS and re.search("_(search|any)", name)
        run = Run(name, method, quality, control=laboratory and not drawn)
        for features, values in scores.items():
            for score in TITLES.keys() & values.keys():
                run.scores[f"{score}, {features}"] = BETTER.get(score, float)(values[score])
        found.append(run)
    return found, diverged


def _lab(rows: list[dict]) -> Iterator[tuple[str, str, float, dict]]:
    for row in rows:
        quality = math.nan if row.get("failed") else (row["knn"] + row["linear"]) / 2
        yield row["trial"], row["settings"]["loss"], quality, row.get("scores", {})


def _benchmark(rows: list[dict]) -> Iterator[tuple[str, str, float, dict]]:
    stages: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        stages.setdefault((row["name"], row["seed"]), {})[row["stage"]] = row
    for (name, _), own in stages.items():
        if own["pretrain"].get("failed"):
            yield name, own["pretrain"]["method"], math.nan, {}
            continue
        knn, linear = own["knn"]["metrics"]["backbone_cosine_k20"], own["linear"]["metrics"]["acc1"]
        yield name, own["pretrain"]["method"], (knn + linear) / 2, {"backbone": own["score"]["metrics"]}


# -- measures ------------------------------------------------------------------------------------------------------


def spearman(scores: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis; NaN if all values are equal."""
    a, b = (stats.rankdata(values, axis=-1) for values in (scores, quality))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def kendall(scores: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Kendall's tau-b along the last axis, from the signs of all pairwise differences."""
    if scores.ndim > 1:
        return np.array([kendall(one, other) for one, other in zip(scores, quality, strict=True)])
    a, b = (np.sign(values[:, None] - values).ravel() for values in (scores, quality))
    return a @ b / np.sqrt((a @ a) * (b @ b))


def regret(scores: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Best quality minus that of the run with the highest score (mean over ties), in points, along the last axis."""
    first = scores == scores.max(-1, keepdims=True)
    return quality.max(-1) - (quality * first).sum(-1) / first.sum(-1)


def within(measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """The mean of a measure over methods. The methods of the runs are the same in every resample."""

    def mean(scores: np.ndarray, quality: np.ndarray, methods: np.ndarray) -> np.ndarray:
        groups = [methods == method for method in np.unique(methods)]
        return np.nanmean([measure(scores[..., group], quality[..., group]) for group in groups], axis=0)

    return mean


def resamples(methods: np.ndarray) -> np.ndarray:
    """Indices of runs, one resample per line, ordered by method; each method keeps its number of runs."""
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(methods == method) for method in np.unique(methods)]
    return np.array([np.concatenate([rng.choice(group, len(group)) for group in groups]) for _ in range(RESAMPLES)])


def interval(values: np.ndarray, digits: int) -> str:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return f"{low:.{digits}f} to {high:.{digits}f}"


# -- tables --------------------------------------------------------------------------------------------------------


def correlations(runs: list[Run]) -> list[str]:
    """Correlation with quality over all runs and within methods, and regret, for every score."""
    quality, methods = np.array([run.quality for run in runs]), np.array([run.method for run in runs])
    draws = resamples(methods)
    names = [name for name in dict.fromkeys(name for run in runs for name in run.scores) if usual(name)]
    names.sort(key=lambda name: (name != THE_SCORE, list(TITLES).index(name.split(",")[0]), name))
    ours, some = None, draws[:500]
    lines = [
        "| score | features | Spearman, all | THE minus it | Kendall, all | Spearman within, mean | regret | regret within, mean |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        scores = np.array([run.scores[name] for run in runs])
        drawn = spearman(scores[draws], quality[draws])
        ours = drawn if ours is None else ours
        less = interval(ours - drawn, 2) if name != THE_SCORE else "–"
        title, features = name.split(", ", 1)
        cells = [
            f"{spearman(scores, quality):.2f} ({interval(drawn, 2)})",
            less,
            f"{kendall(scores, quality):.2f} ({interval(kendall(scores[some], quality[some]), 2)})",
            *(
                f"{measure(scores, quality, methods):.{digits}f} "
                f"({interval(measure(scores[some], quality[some], methods[some[0]]), digits)})"
                for measure, digits in (
                    (within(spearman), 2),
                    (lambda s, q, _: regret(s, q), 1),
                    (within(regret), 1),
                )
            ),
        ]
        cells = [cell.replace("-", "−") for cell in cells]
        bold = "**" if name == THE_SCORE else ""
        lines.append(f"| {bold}{TITLES[title]}{bold} | {features} | {' | '.join(cells)} |")
    return [line.replace("THE minus it", "the first minus it (95 %)") for line in lines]


def usual(name: str) -> bool:
    """Whether a score is of the default views, on which all scores are compared."""
    return "views" not in name


def methods_of(runs: list[Run]) -> list[str]:
    """The methods of these runs: those of METHODS in its order, then others."""
    found = {run.method for run in runs}
    return [method for method in METHODS if method in found] + sorted(found.difference(METHODS))


def by_method(runs: list[Run]) -> list[str]:
    """The score within each method, beside RankMe."""
    lines = ["| method | runs | quality (%) | Spearman | regret | RankMe's |", "|---|---:|---:|---:|---:|---:|"]
    for method in methods_of(runs):
        own = [run for run in runs if run.method == method]
        quality = np.array([run.quality for run in own])
        scores, rankme = (np.array([run.scores[name] for run in own]) for name in (THE_SCORE, "rankme, backbone"))
        draws = resamples(np.array([run.method for run in own]))
        drawn = spearman(scores[draws], quality[draws])
        cells = f"{spearman(scores, quality):.2f} ({interval(drawn, 2)}) | {regret(scores, quality):.1f}"
        rank = f"{spearman(rankme, quality):.2f}"
        cells, rank = cells.replace("-", "−"), rank.replace("-", "−")
        lines.append(f"| {method} | {len(own)} | {quality.min():.1f} to {quality.max():.1f} | {cells} | {rank} |")
    return lines


def choices(runs: list[Run]) -> list[str]:
    """What the score chooses in each search of eight recipes, and the best recipe by labels."""
    searches: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if found := re.search(r"_search(\d)_", run.name):
            searches.setdefault((run.method, found.group(1)), []).append(run)
    if not searches:
        return []
    lines = [
        "| method | search | worst | median | best, by labels | by the score | regret |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    regrets = []
    for (method, number), own in sorted(searches.items()):
        quality = np.array([run.quality for run in own])
        regrets.append(regret(np.array([run.scores[THE_SCORE] for run in own]), quality))
        cells = [quality.min(), np.median(quality), quality.max(), quality.max() - regrets[-1], regrets[-1]]
        lines.append(f"| {method} | {number} of {len(own)} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    mean = stats.bootstrap((regrets,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0).confidence_interval
    return [
        *lines,
        "",
        f"Mean regret {np.mean(regrets):.2f} points ({mean.low:.2f} to {mean.high:.2f}), worst {max(regrets):.1f}.",
    ]


def controls(pool: list[Run], others: list[Run]) -> list[str]:
    """Errors of the score on controls: their quality, and the quality that other runs with that score suggest."""
    from sklearn.isotonic import IsotonicRegression

    if not others:
        return []
    fit = IsotonicRegression(out_of_bounds="clip").fit(
        [run.scores[THE_SCORE] for run in pool], [run.quality for run in pool]
    )
    lines = [
        "| control | score (nats) | quality (%) | quality by the score | off (points) |",
        "|---|---:|---:|---:|---:|",
    ]
    for run in others:
        expected = float(fit.predict([run.scores[THE_SCORE]])[0])
        off = f"{expected - run.quality:+.1f}".replace("-", "−")
        lines.append(f"| {run.name} | {run.scores[THE_SCORE]:.1f} | {run.quality:.1f} | {expected:.1f} | {off} |")
    usual_error = np.mean([abs(fit.predict([run.scores[THE_SCORE]])[0] - run.quality) for run in pool])
    return [*lines, "", f"Runs of the pool are off by {usual_error:.1f} points in the mean."]


# -- picture -------------------------------------------------------------------------------------------------------


def picture(pools: dict[str, list[Run]], path: Path, made_from: str) -> None:
    """Plot quality against the score and RankMe, with one row for each file. A test finds a stale picture by ``made_from``."""
    from matplotlib.figure import Figure

    from emim_solo.results.palette import PALETTE

    methods = methods_of([run for runs in pools.values() for run in runs])  # one colour each, in all panels
    figure = Figure(figsize=(8.4, 3.4 * len(pools)), layout="constrained")
    panels = figure.subplots(len(pools), 2, squeeze=False)
    for line, (title, runs) in zip(panels, pools.items(), strict=True):
        quality = np.array([run.quality for run in runs])
        for axes, name, label in zip(
            line, (THE_SCORE, "rankme, backbone"), ("view information (nats)", "RankMe"), strict=True
        ):
            for number, method in enumerate(methods):
                own = [run for run in runs if run.method == method]
                axes.plot(
                    [run.scores[name] for run in own],
                    [run.quality for run in own],
                    *("o",),
                    markersize=4,
                    alpha=0.8,
                    color=PALETTE[number],
                    label=method,
                )
            rho = spearman(np.array([run.scores[name] for run in runs]), quality)
            axes.set_title(f"{title}: Spearman {f'{rho:.2f}'.replace('-', '−')}, {len(runs)} runs", fontsize=9)
            axes.set_xlabel(label)
            axes.set_ylabel("(20-NN + linear) / 2 (%)")
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"rows": made_from})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    pools: dict[str, list[Run]] = {}
    for path in given.rows:
        runs, diverged = read(path)
        pools[path.stem] = main_pool = [run for run in runs if not run.control]
        if given.picture:
            continue
        print(
            f"{len(main_pool)} runs of {len({run.method for run in main_pool})} methods; diverged: {', '.join(diverged) or 'none'}.\n"
        )
        for lines in (
            correlations(main_pool),
            by_method(main_pool),
            choices(main_pool),
            controls(main_pool, [run for run in runs if run.control]),
        ):
            if lines:
                print("\n".join(lines), end="\n\n")
    if given.picture:
        made_from = hashlib.sha256(b"".join(path.read_bytes() for path in given.rows)).hexdigest()
        picture(pools, given.picture, made_from)


if __name__ == "__main__":
    main()
