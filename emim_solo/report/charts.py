"""Charts of the report: matplotlib draws them, CSS sets their colours.

The page follows the reader's light or dark mode, so its pictures cannot have fixed colours. Each chart is drawn with
stand-in colours; in the SVG, CSS variables such as ``var(--ink)`` and ``var(--method-0)`` then replace them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy import stats
from sklearn.isotonic import isotonic_regression

from emim_solo.results.curves import Curve
from emim_solo.results.palette import MARKERS
from emim_solo.results.statistics import estimate
from emim_solo.results.tables import ACCURACIES, LINEAR, NEAREST, SCORE, Metric, Results

METHOD_COLOURS: tuple[tuple[str, str], ...] = (
    ("#0072b2", "#56b4e9"),
    ("#c4500a", "#f0894a"),
    ("#00795a", "#2fc296"),
    ("#a3488a", "#dd92c4"),
    ("#7d6200", "#d9b430"),
    ("#4d4d4d", "#b8b8b8"),
)
"""Colour of each method on a light and on a dark ground: the hues of Okabe and Ito, darkened or lightened until each
has a contrast of at least 4.5 to its ground. They repeat after six methods; each line also has a label."""

INK, FAINT, GRID, GROUND = "#010101", "#010102", "#010103", "#010104"  # the first three as in charts.mplstyle
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid", GROUND: "--ground"}
_STYLE = Path(__file__).parent / "templates" / "charts.mplstyle"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_WIDTH, _HEIGHT = 4.6, 3.0
_AROUND = 0.7  # part of the height, in inches, outside the axes

Ends = dict[str, tuple[float, float, str]]  # by label of a line: x and y of its end, and its colour


def draw(name: str, title: str, paint: Callable[[Axes], None], *, height: float = _HEIGHT) -> str:
    """One chart as an ``<svg>`` element, with ``title`` for screen readers; ``name`` is unique on the page."""
    with matplotlib.rc_context(fname=_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg")
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # In tags only: the text between them may be a user's name for a method.
    svg = re.sub(r"<[^>]*>", lambda tag: _tag_on_page(tag.group(), name), svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(title)}">{rest.strip()}'


def _tag_on_page(tag: str, name: str) -> str:
    """A tag with ids unique on the page, the font of the page, and variables for stand-in colours."""
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", tag)
    for stand_in, variable in _VARIABLES.items():
        tag = tag.replace(stand_in, f"var({variable})")
    return re.sub(r"#0202([0-9a-f]{2})", lambda colour: f"var(--method-{int(colour.group(1), 16)})", tag)


def _colour(results: Results, name: str) -> str:
    """Stand-in colour of a method."""
    return f"#0202{results.names.index(name) % len(METHOD_COLOURS):02x}"


def _repetition(results: Results, name: str) -> int:
    """How often the colours repeat before a method; the count selects its dash or marker."""
    return results.names.index(name) // len(METHOD_COLOURS)


def _line_style(results: Results, name: str) -> Any:
    return ("-", "--", ":", "-.")[_repetition(results, name) % 4]


def _label_ends(axes: Axes, ends: Ends) -> None:
    """Write each line's label at its end, to the right of the axes. Many labels make the chart higher."""
    if not ends:
        return
    room = max(_HEIGHT - _AROUND, 0.22 * len(ends))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(room + _AROUND)
    axes.autoscale_view()  # matplotlib sets the limits lazily
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = np.array([float(to_axes.transform((x, y))[1]) for x, y, _ in ends.values()])
    # Labels move as little as possible (least squares) to keep these gaps and stay within 0 and 1.
    order, gaps = np.argsort(heights, kind="stable"), 0.195 / room * np.arange(len(ends))
    heights[order] = isotonic_regression(heights[order] - gaps, y_min=0.0, y_max=1.0 - gaps[-1]) + gaps
    style: Any = {"xycoords": "axes fraction", "va": "center", "fontsize": 9, "annotation_clip": False}
    for (label, (_, _, colour)), height in zip(ends.items(), heights, strict=True):
        axes.annotate(label, (1.02, height), color=colour, **style)


Curves = Mapping[tuple[str, int], Mapping[str, Curve]]  # by (method, seed), then by metric


def learning_curve(results: Results, curves: Curves, metric: str, unit: str, dashed: tuple[str, str]) -> str:
    """Mean over seeds by epoch, and a thin line for each seed; ``dashed`` is (name, label) of a second metric."""

    def runs_of(method: str, measured: str) -> list[Curve]:
        runs = [curves.get((method, seed), {}).get(measured, {}) for seed in results.seeds(method)]
        return [run for run in runs if run]

    def paint(axes: Axes) -> None:
        ends: Ends = {}
        for method in results.names:
            colour = _colour(results, method)
            if len(runs := runs_of(method, metric)) > 1:
                for run in runs:
                    axes.plot(list(run), list(run.values()), color=colour, linewidth=0.7, alpha=0.45)
            for label, measured, marker, look in (
                (method, metric, "o", {"linestyle": _line_style(results, method)}),
                (f"{method} {dashed[1]}", dashed[0], "x", {"linestyle": "--", "linewidth": 1.2}),
            ):
                runs = runs_of(method, measured)
                epochs = sorted(set.intersection(*map(set, runs))) if runs else []
                if epochs:
                    means = [float(np.mean([run[epoch] for run in runs])) for epoch in epochs]
                    look["marker"] = marker if len(epochs) < 3 else None
                    axes.plot(epochs, means, color=colour, markersize=4, **look)
                    ends[label] = (epochs[-1], means[-1], colour)
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _label_ends(axes, ends)

    return draw(f"curve-{metric}", f"Learning curves: {metric} by epoch for {', '.join(results.names)}", paint)


def accuracies(results: Results) -> str:
    """Mean, interval and single seeds of each accuracy in the headline."""
    title = "Top-1 accuracies, mean and 95 % interval of each method"
    return _interval_chart(results, "accuracy", title, "top-1 accuracy (%)", results.names, results.values)


def difference_chart(results: Results) -> str:
    """The focus method less each baseline, paired by seed, with zero marked."""
    focus = results.focus()
    title = f"Differences of {focus} to each baseline, paired by seed"
    label = f"points of top-1 accuracy, {focus} less the other"
    paired = partial(results.paired, focus)
    return _interval_chart(results, "difference", title, label, results.baselines(), paired, zero=True)


def _interval_chart(
    results: Results,
    name: str,
    title: str,
    label: str,
    methods: Sequence[str],
    values: Callable[[str, Metric], Mapping[int, float]],
    *,
    zero: bool = False,
) -> str:
    """Dots with horizontal intervals; each accuracy has a group of lines. ``values`` are by seed."""
    shown, height = results.shown(ACCURACIES), len(methods) + 0.8

    def paint(axes: Axes) -> None:
        if zero:
            axes.axvline(0, color=FAINT, linewidth=1)
        for group, metric in enumerate(shown):
            for place, method in enumerate(methods):
                _interval(axes, group * height + place, method, values(method, metric), _colour(results, method))
        ticks = [group * height + (len(methods) - 1) / 2 for group in range(len(shown))]
        _name_lines(axes, ticks, [metric.label.replace(" top-1", "") for metric in shown])
        axes.set_ylim(len(shown) * height - 0.4, -0.8)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)

    return draw(name, title, paint, height=0.75 + 0.2 * len(shown) * height)


def _interval(axes: Axes, line: float, method: str, values: Mapping[int, float], colour: str) -> None:
    value, points = estimate(values.values()), [point for point in values.values() if math.isfinite(point)]
    if points:
        axes.plot(points, [line] * len(points), "|", color=colour, markersize=7, alpha=0.55, markeredgewidth=1.1)
        if value.interval is not None:
            axes.plot(value.interval, [line, line], color=colour, linewidth=1.8)
        axes.plot([value.mean], [line], "o", color=colour, markersize=6.5, markeredgecolor=GROUND)
        place = (max([value.mean, *points, *(value.interval or ())]), line)
        ground = {"boxstyle": "square,pad=0.1", "facecolor": GROUND, "edgecolor": "none"}  # hides the line at zero
        style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": colour, "bbox": ground}
        axes.annotate(method, place, (6, 0), **style)


def _name_lines(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """A y axis of names, with the grid across it."""
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def information(results: Results, features: str) -> str:
    """Mutual information of two views and its null. The hollow dot is the null: the value for independent pairs."""
    above = Metric(stage="diagnostics", source=f"{features}_pair_information")
    null = Metric(stage="diagnostics", source=f"{features}_pair_information_null")

    def paint(axes: Axes) -> None:
        for line, method in enumerate(results.names):
            value, zero = results.estimate(method, above), results.estimate(method, null)
            style: Any = {"color": _colour(results, method)}
            if not (value.n and zero.n):
                axes.text(0, line, "NaN" if value.not_finite else "–", va="center", **style)
                continue
            start, end = zero.mean, zero.mean + value.mean
            hollow: Any = {"color": GROUND, "markeredgecolor": style["color"], "markeredgewidth": 1.6}
            axes.plot([start, end], [line, line], linewidth=2.6, alpha=0.5, **style)
            axes.plot([start], [line], "o", markersize=7, **hollow)
            axes.plot([end], [line], "o", markersize=7, **style)
            text, middle = f"{value.mean:+.1f}".replace("-", "−"), ((start + end) / 2, line)
            axes.annotate(text, middle, (0, 6), textcoords="offset points", ha="center", fontsize=9, **style)
        _name_lines(axes, range(len(results.names)), results.names)
        axes.set_ylim(len(results.names) - 0.5, -0.7)
        axes.set_xlabel("nats")
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    title = f"Mutual information of {features} features of two views, beside its null"
    return draw(f"mi-{features}", title, paint, height=0.75 + 0.42 * len(results.names))


ScoredRun = tuple[str, float, float, float]


def scored_runs(results: Results) -> list[ScoredRun]:
    """Method, score, half width of its interval and accuracy of each run with a score and accuracies."""
    width = Metric(stage="score", source="view_information_half_width")
    runs = []
    for method in results.names:
        score, half, linear, knn = (results.values(method, metric) for metric in (SCORE, width, LINEAR, NEAREST))
        for seed in score.keys() & half.keys() & linear.keys() & knn.keys():
            runs.append((method, score[seed], half[seed], (linear[seed] + knn[seed]) / 2))
    return [run for run in runs if all(map(math.isfinite, run[1:]))]


def rank_correlation(scored: Sequence[ScoredRun]) -> str:
    """Spearman's rank correlation as text; empty for three runs or fewer, or for constant values."""
    scores, accuracies = [run[1] for run in scored], [run[3] for run in scored]
    if len(scored) < 4 or len(set(scores)) == 1 or len(set(accuracies)) == 1:
        return ""
    rho = stats.spearmanr(scores, accuracies).statistic
    return f"Spearman’s rank correlation {rho:.2f} over {len(scored)} runs".replace("-", "−")


def score_against_accuracy(results: Results, scored: Sequence[ScoredRun]) -> str:
    """The accuracy of every run against its score, with the score's interval over images."""

    def paint(axes: Axes) -> None:
        ends: Ends = {}
        for method in dict.fromkeys(run[0] for run in scored):
            _, scores, widths, accuracies = zip(*(run for run in scored if run[0] == method), strict=True)
            colour, marker = _colour(results, method), MARKERS[_repetition(results, method) % len(MARKERS)]
            look: Any = {"fmt": marker, "markersize": 5, "elinewidth": 0.8, "alpha": 0.85}
            axes.errorbar(scores, accuracies, xerr=widths, color=colour, **look)
            ends[method] = (max(scores), sum(accuracies) / len(accuracies), colour)
        axes.set_xlabel("view information (nats)")
        axes.set_ylabel("mean of linear and 20-NN top-1 (%)")
        axes.grid(axis="x")
        _label_ends(axes, ends)

    return draw("score", f"Score without labels against accuracy of the runs of {', '.join(results.names)}", paint)


Spectra = Mapping[tuple[str, int], Mapping[str, Sequence[float]]]  # by (method, seed), then by part


def spectra(results: Results, values: Spectra, features: str) -> str:
    """Eigenvalues of the covariance, divided by the largest, by rank; geometric mean over seeds."""

    def paint(axes: Axes) -> None:
        ends: Ends = {}
        for method in results.names:
            runs = [np.asarray(values.get((method, seed), {}).get(features, [])) for seed in results.seeds(method)]
            runs = [run / run[0] for run in runs if len(run) and run[0] > 0]
            if not runs:
                continue
            length = min(map(len, runs))
            mean = stats.gmean([run[:length] for run in runs])
            ranks = np.arange(1, length + 1)[mean > 1e-8]
            mean = mean[mean > 1e-8]
            colour = _colour(results, method)
            axes.plot(ranks, mean, color=colour, linestyle=_line_style(results, method))
            ends[method] = (float(ranks[-1]), float(mean[-1]), colour)
        lowest = min((end for _, end, _ in ends.values()), default=1.0)
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue / largest")
        axes.set_ylim(max(lowest / 2, 1e-8), 1.6)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib's default labels need math text, which is off
            axis.set_major_formatter(lambda value, _: "10" + str(round(math.log10(value))).translate(_SUPERSCRIPT))
            axis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        _label_ends(axes, ends)

    return draw(
        f"spectrum-{features}",
        f"Spectrum of the covariance of {features} features for {', '.join(results.names)}",
        paint,
    )
