"""The trials of a search as rows, as a ranked table and as a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from emim_solo.ground import files
from emim_solo.results.tables import Cell, Table, to_text
from emim_solo.training.live_score import MONITOR

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended: finished ones by score, best first, then stopped ones, then failed ones."""
    order = list(STATES)
    found = study.get_trials(deepcopy=False, states=tuple(order))
    return sorted(found, key=lambda trial: (order.index(trial.state), -(score_of(trial) or 0.0), trial.number))


def score_of(trial: FrozenTrial) -> float | None:
    """The last known score of a trial, in nats."""
    return row_of(trial).get("metrics", {}).get(MONITOR)


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """The row of a trial; empty if another program put the trial into the storage."""
    return trial.user_attrs.get("row", {})


def short(value: Any) -> str:
    """A value as text of a table cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def counts(trials: Sequence[FrozenTrial]) -> str:
    """``8 finished, 3 stopped early, 1 failed``."""
    numbers = {name: sum(trial.state == state for trial in trials) for state, name in STATES.items()}
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if number)


def table(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> str:
    """The trials in the given order, with their values of ``keys``; below, the reasons of failed trials."""
    lines = []
    for place, trial in enumerate(trials, start=1):
        row, score = row_of(trial), score_of(trial)
        cells = ["–" if score is None else f"{score:.2f}", *(short(trial.params.get(key, "–")) for key in keys)]
        cells += [short(row.get(key, "–")) for key in ("epochs", "seconds")]
        lines.append((str(place), [Cell(cell) for cell in (*cells, STATES[trial.state], str(trial.number + 1))]))
    heads = ["", "view information (nats)", *keys, "epochs", "seconds", "", "trial"]
    notes = [f"trial {row['trial']}: {row['reason']}" for row in map(row_of, trials) if row.get("reason")]
    return to_text(Table(heads, lines, notes))


def draw(study: optuna.Study, keys: Sequence[str], stem: Path) -> None:
    """Optuna's plot of the score of finished trials by each key that was searched, as ``stem``.png and .pdf."""
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter
    from optuna.visualization.matplotlib import plot_slice

    # Values may contain a $, so math text is off. Tick labels of log axes are math text, so they need other formatters.
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        warnings.simplefilter("ignore")  # plot_slice is experimental; a single value has no range
        plotted: Any = plot_slice(study, list(keys), target_name="view information (nats)")
        panels = np.ravel(plotted)
        for axes in panels:
            if axes.get_xscale() == "log":
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        panels[0].figure.axes[-1].yaxis.set_major_formatter(lambda number, _: f"{number + 1:g}")  # Optuna counts from 0
        files.write_figure(stem, panels[0].figure)
        pyplot.close(panels[0].figure)
