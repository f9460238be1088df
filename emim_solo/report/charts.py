"""Charts of the report: matplotlib draws them, CSS gives them their colours.

A page that follows the reader's light or dark mode cannot have fixed colours in its pictures. So each chart is drawn
with stand-in colours, and in the SVG these are replaced by CSS variables: ``var(--ink)``, ``var(--method-0)``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from emim_solo.results.curves import Curve
from emim_solo.results.palette import MARKERS
from emim_solo.results.statistics import Estimate
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
has a contrast of at least 4.5 to its ground. They repeat after six; labels at the lines say which is which."""

INK, FAINT, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid", SURFACE: "--surface"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_WIDTH, _HEIGHT = 4.6, 3.0
_AROUND = 0.7  # of the height, what is not the axes


def method_colour(position: int) -> str:
    """Stand-in for the colour of a method."""
    return f"#0202{position % len(METHOD_COLOURS):02x}"


def _style() -> Any:
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "emim-solo",  # the same chart has the same ids each time
            "font.family": "sans-serif",
            "font.size": 9.5,
            "text.parse_math": False,  # a name with a $ in it is a name
            "text.color": INK,
            "axes.edgecolor": GRID,
            "axes.labelcolor": FAINT,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.unicode_minus": True,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
            "xtick.color": GRID,
            "ytick.color": GRID,
            "xtick.labelcolor": FAINT,
            "ytick.labelcolor": FAINT,
            "ytick.major.size": 0,
            "xtick.major.size": 3,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
        }
    )


def draw(name: str, title: str, paint: Callable[[Axes], None], *, height: float = _HEIGHT) -> str:
    """One chart as an ``<svg>`` element.

    Args:
        name: unique on the page, in front of every id.
        title: for those who cannot see the picture.
        paint: draws into the axes.
        height: in inches, of a width of 4.6.
    """
    with _style():
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _to_page(file.getvalue(), name, title)


def _to_page(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # In tags only: what stands between them may be anybody's name.
    svg = re.sub(r"<[^>]*>", lambda tag: _tag_on_page(tag.group(), name), svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(title)}">{rest.strip()}'


def _tag_on_page(tag: str, name: str) -> str:
    tag = re.sub(r' id="', f' id="{name}-', tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    tag = re.sub(r"font: (bold|\d+) ([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", tag)
    for stand_in, variable in _VARIABLES.items():
        tag = tag.replace(stand_in, f"var({variable})")
    return re.sub(r"#0202([0-9a-f]{2})", lambda found: f"var(--method-{int(found.group(1), 16)})", tag)


def _spread_labels(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart until no two are closer than ``gap``, as little as possible, within ``low`` to ``high``."""
    order = np.argsort(positions, kind="stable")
    placed = np.asarray(positions, dtype=float)[order]
    for _ in range(1000):
        close = np.diff(placed) < gap - 1e-12
        if not close.any():
            break
        for i in np.flatnonzero(close):
            push = (gap - (placed[i + 1] - placed[i])) / 2
            placed[i] -= push
            placed[i + 1] += push
        placed = np.clip(placed, low, high)
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each line's name at its end ``(x, y, colour)``, to the right of the axes; many make the chart higher."""
    if not ends:
        return
    room = max(_HEIGHT - _AROUND, 0.22 * len(ends))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(room + _AROUND)
    axes.autoscale_view()  # limits are set lazily
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((x, y))[1]) for x, y, _ in ends.values()]
    places = _spread_labels(heights, 0.195 / room, 0.0, 1.0)
    for (name, (_, _, colour)), height in zip(ends.items(), places, strict=True):
        axes.annotate(
            name,
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            ha="left",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )


def colours(results: Results) -> dict[str, str]:
    """Stand-in colour by method."""
    return {name: method_colour(position) for position, name in enumerate(results.names)}


def _line_style(results: Results, name: str) -> Any:
    """Beyond six methods the colours repeat with another dash."""
    return ("-", "--", ":", "-.")[results.names.index(name) // len(METHOD_COLOURS) % 4]


def learning_curve(
    results: Results,
    curves: Mapping[tuple[str, int], Mapping[str, Curve]],
    metric: str,
    unit: str,
    name: str,
    *,
    dashed: tuple[str, str] = ("", ""),
) -> str:
    """Mean over seeds by epoch, a thin line for each seed; the mean of a second metric dashed, by its name and its label."""
    own = colours(results)

    def paint(axes: Axes) -> None:
        ends: dict[str, tuple[float, float, str]] = {}
        for method in results.names:
            runs = [curves.get((method, seed), {}).get(metric, {}) for seed in results.seeds(method)]
            runs = [run for run in runs if run]
            if not runs:
                continue
            if len(runs) > 1:
                for run in runs:
                    axes.plot(list(run), list(run.values()), color=own[method], linewidth=0.7, alpha=0.45)
            dash = {"linestyle": "--", "linewidth": 1.2}
            for label, own_metric, look in (
                (method, metric, {"linestyle": _line_style(results, method)}),
                (f"{method} {dashed[1]}", dashed[0], dash),
            ):
                runs = [
                    curve for seed in results.seeds(method) if (curve := curves.get((method, seed), {}).get(own_metric))
                ]
                epochs = sorted(set.intersection(*map(set, runs))) if runs else []
                if epochs:
                    means = [float(np.mean([run[epoch] for run in runs])) for epoch in epochs]
                    marker = ("x" if look is dash else "o") if len(epochs) < 3 else None
                    axes.plot(epochs, means, color=own[method], marker=marker, markersize=4, **look)
                    ends[label] = (epochs[-1], means[-1], own[method])
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _label_ends(axes, ends)

    return draw(name, f"Learning curves: {metric} by epoch for {', '.join(results.names)}", paint)


def _interval_chart(
    axes: Axes, groups: Sequence[tuple[str, Sequence[tuple[str, Estimate, Sequence[float]]]]], own: Mapping[str, str]
) -> None:
    """Horizontal dots with their intervals: a group of lines for each label on the y axis."""
    line = 0.0
    ticks, labels = [], []
    for label, entries in groups:
        start = line
        for method, value, points in entries:
            colour = own[method]
            if points:
                axes.plot(
                    points, [line] * len(points), "|", color=colour, markersize=7, alpha=0.55, markeredgewidth=1.1
                )
            if value.n:
                if value.interval is not None:
                    axes.plot(value.interval, [line, line], color=colour, linewidth=1.8)
                axes.plot([value.mean], [line], "o", color=colour, markersize=6.5, markeredgecolor=SURFACE)
                right = max([value.mean, *points, *(value.interval or ())])
                axes.annotate(
                    method, (right, line), (6, 0), textcoords="offset points", va="center", fontsize=8.5, color=colour
                )
            line += 1
        ticks.append((start + line - 1) / 2)
        labels.append(label)
        line += 0.8
    _label_lines(axes, ticks, labels)
    axes.set_ylim(line - 0.4, -0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _label_lines(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    """A y axis of names, with the grid across it."""
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def accuracies(results: Results, name: str) -> str:
    """Mean, interval and single seeds of each accuracy in the headline."""
    shown = results.shown(ACCURACIES)
    own = colours(results)

    def paint(axes: Axes) -> None:
        groups = [
            (
                metric.label.replace(" top-1", ""),
                [
                    (method, results.estimate(method, metric), _finite(results.values(method, metric).values()))
                    for method in results.names
                ],
            )
            for metric in shown
        ]
        _interval_chart(axes, groups, own)
        axes.set_xlabel("top-1 accuracy (%)")

    lines = len(shown) * (len(results.names) + 0.8)
    return draw(name, "Top-1 accuracies, mean and 95 % interval of each method", paint, height=_tall(lines))


def difference_chart(results: Results, name: str) -> str:
    """The focus method less each baseline, paired by seed, with zero marked."""
    shown = results.shown(ACCURACIES)
    own, focus = colours(results), results.focus()

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=FAINT, linewidth=1)
        groups = []
        for metric in shown:
            entries = []
            for baseline in results.baselines():
                ours, theirs = results.values(focus, metric), results.values(baseline, metric)
                points = _finite(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())
                entries.append((baseline, results.difference(focus, baseline, metric), points))
            groups.append((metric.label.replace(" top-1", ""), entries))
        _interval_chart(axes, groups, own)
        axes.set_xlabel(f"points of top-1 accuracy, {focus} less the other")

    lines = len(shown) * (len(results.baselines()) + 0.8)
    return draw(name, f"Differences of {focus} to each baseline, paired by seed", paint, height=_tall(lines))


def _tall(lines: float) -> float:
    return 0.75 + 0.2 * lines


def information(results: Results, features: str, name: str) -> str:
    """Mutual information of two views beside its null: hollow is what independent pairs would give."""
    above = Metric(stage="diagnostics", source=f"{features}_pair_information")
    null = Metric(stage="diagnostics", source=f"{features}_pair_information_null")
    own = colours(results)

    def paint(axes: Axes) -> None:
        for line, method in enumerate(results.names):
            value, zero = results.estimate(method, above), results.estimate(method, null)
            if not (value.n and zero.n):
                axes.text(0, line, "NaN" if value.not_finite else "–", va="center", color=own[method])
                continue
            ends = [zero.mean, zero.mean + value.mean]
            axes.plot(ends, [line, line], color=own[method], linewidth=2.6, alpha=0.5)
            axes.plot(
                ends[:1], [line], "o", color=SURFACE, markeredgecolor=own[method], markersize=7, markeredgewidth=1.6
            )
            axes.plot(ends[1:], [line], "o", color=own[method], markersize=7)
            axes.annotate(
                f"{value.mean:+.1f}".replace("-", "−"),
                (sum(ends) / 2, line),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=own[method],
            )
        _label_lines(axes, range(len(results.names)), results.names)
        axes.set_ylim(len(results.names) - 0.5, -0.7)
        axes.set_xlabel("nats")
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    title = f"Mutual information of {features} features of two views, beside its null"
    return draw(name, title, paint, height=0.75 + 0.42 * len(results.names))


ScoredRun = tuple[str, float, float, float]


def scored_runs(results: Results) -> list[ScoredRun]:
    """Method, score, half width of its interval and accuracy of each run that has been scored and has labels."""
    width = Metric(stage="score", source="view_information_half_width")
    found = []
    for method in results.names:
        score, half, linear, knn = (results.values(method, metric) for metric in (SCORE, width, LINEAR, NEAREST))
        for seed in score.keys() & half.keys() & linear.keys() & knn.keys():
            run = (method, score[seed], half[seed], (linear[seed] + knn[seed]) / 2)
            if all(map(math.isfinite, run[1:])):
                found.append(run)
    return found


def rank_correlation(scored: Sequence[ScoredRun]) -> str:
    """Spearman's, in words; with three runs or fewer it says nothing."""
    if len(scored) < 4 or len({run[1] for run in scored}) == 1 or len({run[3] for run in scored}) == 1:
        return ""
    rho = stats.spearmanr([run[1] for run in scored], [run[3] for run in scored]).statistic
    return f"Spearman’s rank correlation {rho:.2f} over {len(scored)} runs".replace("-", "−")


def score_against_accuracy(results: Results, scored: Sequence[ScoredRun], name: str) -> str:
    """Every run by its score, with the interval over images, and its accuracy."""
    own = colours(results)

    def paint(axes: Axes) -> None:
        ends: dict[str, tuple[float, float, str]] = {}
        for method in dict.fromkeys(run[0] for run in scored):
            _, scores, widths, accuracies = zip(*(run for run in scored if run[0] == method), strict=True)
            marker = MARKERS[results.names.index(method) // len(METHOD_COLOURS) % len(MARKERS)]
            axes.errorbar(
                scores, accuracies, xerr=widths, fmt=marker, markersize=5, elinewidth=0.8, alpha=0.85, color=own[method]
            )
            ends[method] = (max(scores), sum(accuracies) / len(accuracies), own[method])
        axes.set_xlabel("view information (nats)")
        axes.set_ylabel("mean of linear and 20-NN top-1 (%)")
        axes.grid(axis="x")
        _label_ends(axes, ends)

    title = f"Score without labels against accuracy of the runs of {', '.join(results.names)}"
    return draw(name, title, paint)


def spectra(
    results: Results, values: Mapping[tuple[str, int], Mapping[str, Sequence[float]]], features: str, name: str
) -> str:
    """Eigenvalues of the covariance over the largest, by rank, geometric mean over seeds."""
    own = colours(results)

    def paint(axes: Axes) -> None:
        ends: dict[str, tuple[float, float, str]] = {}
        lowest = 1.0
        for method in results.names:
            runs = [np.asarray(values.get((method, seed), {}).get(features, [])) for seed in results.seeds(method)]
            runs = [run / run[0] for run in runs if len(run) and run[0] > 0]
            if not runs:
                continue
            length = min(map(len, runs))
            with np.errstate(divide="ignore"):
                mean = np.exp(np.mean([np.log(run[:length]) for run in runs], axis=0))
            visible = mean > 1e-8
            ranks = np.arange(1, length + 1)[visible]
            axes.plot(ranks, mean[visible], color=own[method], linestyle=_line_style(results, method))
            ends[method] = (float(ranks[-1]), float(mean[visible][-1]), own[method])
            lowest = min(lowest, ends[method][1])
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue / largest")
        axes.set_ylim(max(lowest / 2, 1e-8), 1.6)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib's own labels are mathematics, which is off
            axis.set_major_formatter(lambda value, _: "10" + str(round(math.log10(value))).translate(_SUPERSCRIPT))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        _label_ends(axes, ends)

    return draw(name, f"Spectrum of the covariance of {features} features for {', '.join(results.names)}", paint)


def _finite(values: Any) -> list[float]:
    return [value for value in values if math.isfinite(value)]
