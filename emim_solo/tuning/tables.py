"""The trials of a search as rows, as a ranked table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from emim_solo.ground import files
from emim_solo.results.tables import Cell, Table, to_text
from emim_solo.training.live_score import MONITOR
from emim_solo.tuning.search import Search

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended: finished ones by score, best first, then stopped ones, then failed ones."""
    order = list(STATES)
    found = study.get_trials(deepcopy=False, states=tuple(order))
    return sorted(found, key=lambda trial: (order.index(trial.state), -(score_of(trial) or 0.0), trial.number))


def score_of(trial: FrozenTrial) -> float | None:
    """The last one of a trial that is known, in nats."""
    score: float | None = row_of(trial).get("metrics", {}).get(MONITOR)
    return score


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """Its row; empty for one that another program put into the storage."""
    row: dict[str, Any] = trial.user_attrs.get("row", {})
    return row


def short(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def counts(trials: Sequence[FrozenTrial]) -> str:
    """``8 finished, 3 stopped early, 1 failed``."""
    numbers = {name: sum(trial.state == state for trial in trials) for state, name in STATES.items()}
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if number)


def table(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> str:
    """The trials in their order, with their values of ``keys``; why they failed below."""
    lines = []
    for place, trial in enumerate(trials, start=1):
        row, score = row_of(trial), score_of(trial)
        cells = ["–" if score is None else f"{score:.2f}", *(short(trial.params.get(key, "–")) for key in keys)]
        cells += [short(row.get(key, "–")) for key in ("epochs", "seconds")]
        lines.append((str(place), [Cell(cell) for cell in (*cells, STATES[trial.state], str(trial.number + 1))]))
    heads = ["", "view information (nats)", *keys, "epochs", "seconds", "", "trial"]
    notes = [f"trial {row['trial']}: {row['reason']}" for row in map(row_of, trials) if row.get("reason")]
    return to_text(Table(heads, lines, notes, []))


def draw(trials: Sequence[FrozenTrial], search: Search, stem: Path) -> None:
    """The score by trial, and by each key that was searched; stopped trials are hollow.

    Args:
        trials: those that ended.
        search: whose keys are shown.
        stem: of the picture, to which .png and .pdf are added.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    from emim_solo.results.palette import PALETTE

    shown = sorted((trial for trial in trials if score_of(trial) is not None), key=lambda trial: trial.number)
    scores = np.array([score_of(trial) for trial in shown], dtype=float)
    finished = np.array([trial.state == TrialState.COMPLETE for trial in shown])
    numbers = np.array([trial.number + 1 for trial in shown])
    keys = list(search.params)
    with matplotlib.rc_context({"text.parse_math": False}):  # a value with a $ in it is a value
        columns = min(3, 1 + len(keys))
        lines = math.ceil((1 + len(keys)) / columns)
        figure = Figure(figsize=(3.4 * columns, 2.7 * lines), layout="constrained")
        first, *others = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        best = np.maximum.accumulate(scores[finished])
        first.step(numbers[finished], best, where="post", color=PALETTE[1], label="best")
        first.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels = [(first, "trial", numbers)]
        for axes, key in zip(others, keys, strict=False):
            distribution, values = search.distribution(key), [trial.params[key] for trial in shown]
            if isinstance(distribution, CategoricalDistribution):
                axes.set_xticks(range(len(distribution.choices)), [short(value) for value in distribution.choices])
                values = [distribution.choices.index(value) for value in values]
            elif getattr(distribution, "log", False):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")  # its own is mathematics, which is off
                axes.xaxis.set_minor_formatter(NullFormatter())
            panels.append((axes, key, np.array(values)))
        for axes, label, places in panels:
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
            for chosen, fill, state in ((finished, PALETTE[0], "finished"), (~finished, "none", "stopped early")):
                axes.scatter(places[chosen], scores[chosen], s=16, facecolor=fill, edgecolor=PALETTE[0], label=state)
        for axes in others[len(keys) :]:
            axes.remove()
        first.set_ylabel("view information (nats)")
        first.legend(frameon=False, fontsize=7)
        files.write_figure(stem, figure)
