"""Tables from rows: one line per method, an estimate over its seeds in each cell, and differences paired by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import differing_images, why_no_accuracy
from emim_solo.results.rows import newest_stages
from emim_solo.results.statistics import Estimate, estimate, paired
from emim_solo.results.terms import deviations

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column: the source of its values and their format.

    ``source`` is an entry of ``metrics`` in rows of ``stage``, or a cost of the row itself. ``key`` is a unique name
    for HTML and files, by default ``source``. Costs have no best: they depend on the other load of the machine.
    """

    stage: str
    source: str
    key: str = ""
    label: str = ""
    unit: str = ""
    digits: int = 1
    best_is_highest: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.source)

    @property
    def head(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def value(self, row: Row) -> float | None:
        """Value in a row of its stage; NaN if the row has null, None if the row lacks the metric."""
        if self.source == "seconds_per_epoch":
            return row["seconds"] / row["epochs"] if row.get("seconds") and row.get("epochs") else None
        if self.source == "peak_memory_mb":
            return row.get(self.source)
        metrics = row.get("metrics", {})
        if self.source not in metrics:
            return None
        # Standard JSON has no NaN; some writers store null instead.
        return math.nan if metrics[self.source] is None else float(metrics[self.source])


LINEAR, LOGISTIC, NEAREST = ACCURACIES = tuple(
    Metric(key=stage, label=f"{label} top-1", unit="%", stage=stage, source=source, best_is_highest=True)
    for stage, label, source in (
        ("linear", "Linear", "acc1"),
        ("logistic", "Logistic", "backbone_acc1"),
        ("knn", "20-NN", "backbone_cosine_k20"),
    )
)
SCORE = Metric(
    key="score", label="View information", unit="nats", stage="score", source="view_information", best_is_highest=True
)
_OF_FEATURES = (
    Metric(key="mi", label="MI − null", unit="nats", stage="diagnostics", source="projector_pair_information"),
    Metric(key="rank", label="Effective rank", stage="diagnostics", source="backbone_rankme"),
)
_COSTS = (
    Metric(key="epoch", label="Epoch", unit="s", stage="pretrain", source="seconds_per_epoch"),
    Metric(key="memory", label="Peak memory", unit="MB", stage="pretrain", source="peak_memory_mb", digits=0),
    Metric(label="Loss in step", unit="%", stage="diagnostics", source="loss_share"),
)
HEADLINE = (*ACCURACIES, SCORE, *_OF_FEATURES, *_COSTS)

KNN = tuple(
    Metric(
        stage="knn", source=f"{part}_{distance}_k{k}", label=f"{part} {distance} k={k}", unit="%", best_is_highest=True
    )
    for part in ("backbone", "projector")
    for distance in ("cosine", "euclidean")
    for k in (1, 5, 20, 200)
)

_MEASURES: dict[str, tuple[str, str, int]] = {  # label, unit, digits
    "view_information": ("view information", "nats", 1),
    "view_information_null": ("its null", "nats", 2),
    "pair_information": ("MI of two views", "nats", 1),
    "pair_information_null": ("its null", "nats", 1),
    "rankme": ("RankMe", "", 1),
    "lidar": ("LiDAR", "", 1),
    "alpha_req": ("alpha-ReQ", "", 2),
    "alignment": ("alignment", "", 3),
    "uniformity": ("uniformity", "", 3),
    "spread": ("spread", "", 3),
    "non_gaussianity": ("non-Gaussianity", "", 5),
    "non_gaussianity_null": ("its null", "", 5),
}
_NOT_OF_SCORE = ("pair_information_null", "spread", "non_gaussianity", "non_gaussianity_null")


def _measure(stage: str, name: str, part: str = "") -> Metric:
    label, unit, digits = _MEASURES[name]
    source, label, best = f"{part}_{name}".lstrip("_"), f"{part} {label}".lstrip(), name == "view_information"
    return Metric(stage=stage, source=source, label=label, unit=unit, digits=digits, best_is_highest=best)


SCORES = tuple(_measure("score", name) for name in _MEASURES if name not in _NOT_OF_SCORE)
DIAGNOSTICS = tuple(_measure("diagnostics", name, part) for part in ("backbone", "projector") for name in _MEASURES)


@dataclass(frozen=True)
class Note:
    """A Markdown line below a table. With ``warns``, it warns against taking the numbers at face value."""

    text: str
    warns: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass
class Results:
    """All runs of one benchmark: for each (name, seed), the newest row of each stage with the pretraining's config."""

    rows: dict[tuple[str, int], dict[str, Row]]
    names: list[str]

    @property
    def dataset(self) -> str:
        return dataset_name(self.pretrained()[0])

    @cached_property
    def deviations(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        """See :func:`emim_solo.results.terms.deviations`."""
        return deviations({name: self.first(name)["config"] for name in self.names})

    def pretrained(self) -> list[Row]:
        """The pretraining rows, in order."""
        return [stages["pretrain"] for stages in self.rows.values()]

    def seeds(self, name: str) -> list[int]:
        return sorted(seed for method, seed in self.rows if method == name)

    def all_seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.rows})

    def first(self, name: str) -> Row:
        """The pretraining row of the method's first run."""
        return next(stages["pretrain"] for (method, _), stages in self.rows.items() if method == name)

    def values(self, name: str, metric: Metric) -> dict[int, float]:
        """A metric by seed, for the runs that have it; NaN for a run that diverged."""
        diverged = self.diverged(name)
        values = {
            seed: math.nan if seed in diverged else metric.value(self.rows[name, seed].get(metric.stage, {}))
            for seed in self.seeds(name)
        }
        return {seed: value for seed, value in values.items() if value is not None}

    def estimate(self, name: str, metric: Metric) -> Estimate:
        return estimate(self.values(name, metric).values())

    def paired(self, name: str, baseline: str, metric: Metric) -> dict[int, float]:
        """A metric of one method minus that of another, for each seed that both have."""
        return paired(self.values(name, metric), self.values(baseline, metric))

    def collapsed(self, name: str) -> list[int]:
        """Seeds whose embeddings collapsed."""
        flag = Metric(stage="diagnostics", source="projector_collapsed")
        return [seed for seed, value in self.values(name, flag).items() if value == 1]

    def diverged(self, name: str) -> list[int]:
        """Seeds whose loss became NaN or infinite."""
        return [seed for seed in self.seeds(name) if self.rows[name, seed]["pretrain"].get("failed")]

    def focus(self) -> str:
        """The method that is compared with the others (the baselines): the first EMIM, else the first method."""
        return next((name for name in self.names if self.first(name)["method"] == "emim"), self.names[0])

    def baselines(self) -> list[str]:
        return [name for name in self.names if name != self.focus()]

    def best(self, metric: Metric) -> set[str]:
        """Methods with the highest rounded mean; empty for metrics without a best, or fewer than two finite means."""
        means = {name: self.estimate(name, metric).mean for name in self.names}
        shown = {name: round(mean, metric.digits) for name, mean in means.items() if math.isfinite(mean)}
        if not metric.best_is_highest or len(shown) < 2:
            return set()
        return {name for name, mean in shown.items() if mean == max(shown.values())}

    def shown(self, metrics: Sequence[Metric]) -> list[Metric]:
        """Those metrics that at least one run has."""
        return [metric for metric in metrics if any(self.values(name, metric) for name in self.names)]


def dataset_name(row: Row) -> str:
    """Dataset name of a row: solo-learn's name, or the name of the user's image folder."""
    if row["dataset"] != "custom":
        return str(row["dataset"])
    path = str(row.get("config", {}).get("data", {}).get("train_path", ""))
    # The folder is often called train; then its parent names the dataset.
    parts = [part for part in path.split("/") if part not in ("", ".", "..", "train", "training")]
    return parts[-1] if parts else "custom"


def collect(rows: Sequence[Row]) -> Results:
    """Group rows, oldest first, into runs. A UsageError if no pretraining has finished or the images differ."""
    newest = {(row["name"], row["seed"]): row for row in rows if row["stage"] == "pretrain"}
    if not newest:
        text = f"no finished run among {len(rows)} rows: start the benchmark again, it goes on where it stopped"
        raise UsageError("rows.missing", text)
    mixed, images = "", [row["images"] for row in newest.values() if row.get("images")]  # none in version 0.2
    datasets = sorted({dataset_name(row) for row in newest.values()})
    if len(datasets) > 1:
        mixed = f"different datasets are mixed: {', '.join(datasets)}"
    elif differing := next(filter(None, (differing_images(images[0], other) for other in images[1:])), None):
        mixed = f"different images are mixed: {', '.join(differing)}"
    if mixed:
        raise UsageError("rows.mixed", f"rows of {mixed}; keep each benchmark in a folder of its own")
    runs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        run = row["name"], row["seed"]
        if run in newest and row["config_hash"] == newest[run]["config_hash"]:
            runs.setdefault(run, []).append(row)
    stages = {run: newest_stages(of_run) for run, of_run in runs.items()}
    return Results(stages, list(dict.fromkeys(name for name, _ in runs)))


@dataclass(frozen=True)
class Cell:
    """Text of one cell, its estimate, whether that is the best of the column, and the number of seeds of its line."""

    text: str
    estimate: Estimate | None = None
    best: bool = False
    seeds: int = 0

    @property
    def flag(self) -> str:
        """How many seeds have a value that is not finite, or, if some have none, of how many seeds the estimate is."""
        if self.estimate is None:
            return ""
        if self.estimate.not_finite:
            return f"{self.estimate.not_finite} NaN"
        fewer = 1 < self.estimate.n < self.seeds  # a cell of one seed has no interval, which shows
        return f"n = {self.estimate.n}" if fewer else ""

    def __str__(self) -> str:
        return self.text if not self.flag or self.text == "NaN" else f"{self.text} ({self.flag})"


@dataclass(frozen=True)
class Table:
    """A table for all output formats. The first column is a name."""

    heads: list[str]
    lines: list[tuple[str, list[Cell]]]
    notes: Sequence[Note | str] = ()
    keys: Sequence[str] = ()


def show(value: Estimate, digits: int, *, signed: bool = False) -> str:
    """``91.3 ± 0.8``, ``91.3`` for one seed, ``NaN`` if no value was finite, a dash for no value."""
    if value.n == 0:
        return "NaN" if value.not_finite else "–"
    text = f"{value.mean:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return text if value.half_width is None else f"{text} ± {value.half_width:.{digits}f}"


def headline(results: Results, metrics: Sequence[Metric] = HEADLINE) -> Table:
    """One line per method: number of seeds, then mean and 95 % interval of each metric; warnings in the notes."""
    shown = results.shown(metrics)
    lines = []
    for name in results.names:
        seeds = len(results.seeds(name))
        cells = [Cell(str(seeds))]
        for metric in shown:
            value = results.estimate(name, metric)
            cells.append(Cell(show(value, metric.digits), value, name in results.best(metric), seeds))
        lines.append((name, cells))
    return _table("Method", shown, lines, [*notes(results)])


def differences(results: Results, metrics: Sequence[Metric] = HEADLINE) -> Table:
    """One line per baseline: the focus method minus the baseline, paired by seed, with 95 % interval."""
    shown = [metric for metric in results.shown(metrics) if metric.key not in ("memory", "loss_share")]
    focus = results.focus()
    lines = []
    for baseline in results.baselines():
        seeds = len({*results.seeds(focus)} & {*results.seeds(baseline)})
        cells = [Cell(str(seeds))]
        for metric in shown:
            value = estimate(results.paired(focus, baseline, metric).values())
            cells.append(Cell(show(value, metric.digits, signed=True), value, seeds=seeds))
        lines.append((f"{focus} − {baseline}", cells))
    return _table("Difference", shown, lines, [])


def _table(kind: str, shown: Sequence[Metric], lines: list[tuple[str, list[Cell]]], notes: Sequence[Note]) -> Table:
    heads = [kind, "n", *(metric.head for metric in shown)]
    return Table(heads, lines, notes, ["n", *(metric.key for metric in shown)])


def notes(results: Results) -> Iterator[Note]:
    """What a reader of the table must know: intervals, collapsed runs, unequal terms, missing stages."""
    if len(results.all_seeds()) > 1:
        yield Note("± is the half width of the 95 % t-interval of the mean over n seeds.")
    else:
        yield Note("One seed: no interval can be given, and small differences mean nothing.")
    if results.shown(ACCURACIES):
        yield Note("Accuracies: frozen backbone, validation images.")
    elif reasons := sorted(
        {reason for row in results.pretrained() if (reason := why_no_accuracy(row["config"]["data"]))}
    ):
        yield Note(f"No accuracies: {', '.join(reasons)}.")
    if protocols := sorted({_protocol(stages["score"]) for stages in results.rows.values() if "score" in stages}):
        yield Note(f"View information: the score without labels (docs/label-free.md), {'; '.join(protocols)}.")
    if len(protocols) > 1:
        text = "Not finished: scores of different protocols are not to be compared; start the benchmark again."
        yield Note(text, warns=True)
    if results.shown(_OF_FEATURES):
        yield Note("MI: embeddings of the projector, two views of an image. Effective rank: RankMe of the backbone.")
    yield from _unlike_rows(results)
    for name in results.names:
        yield from _notes_of(results, name)
    if not any(results.deviations.values()):
        yield Note("Equal terms: same augmentation, backbone, projector width, optimiser, batch and epochs.")
    for name in results.names:
        config, method = results.first(name)["config"], results.first(name)["method"]
        processes = compare.processes(config)
        if method == "barlow_twins" and processes > 1:
            text = f"solo-learn's Barlow Twins has 1/{processes} of the gradient in {processes} processes"
            yield Note(f"{name}: {text} (docs/distributed.md).")
    fewest = Metric(stage="knn", source="fewest_val_images")
    few = [value for name in results.names for value in results.values(name, fewest).values() if value < 3]
    if few:
        yield Note(f"Few validation images: {min(few):.0f} in the rarest class, too few to judge by.", warns=True)
    scored = any("score" in stages for stages in results.rows.values())
    waiting = [
        f"{name} seed {seed} ({', '.join(missing)})"
        for (name, seed), stages in results.rows.items()
        if seed not in results.diverged(name)
        and (missing := sorted(set(evaluation_stages(stages["pretrain"]["config"], scored=scored)) - stages.keys()))
    ]
    if waiting:
        yield Note(f"Not finished: {'; '.join(waiting)}.", warns=True)


def _unlike_rows(results: Results) -> Iterator[Note]:
    """Seeds of one method with different configs, and evaluations of one stage with different settings."""
    for name in results.names:
        configs = [results.rows[name, seed]["pretrain"]["config"] for seed in results.seeds(name)]
        may_differ = ("seed", *compare.MAY_DIFFER)
        found = [compare.differences(configs[-1], config, but=may_differ) for config in configs[:-1]]
        if differing := next(filter(None, found), None):
            text = f"{name}: seeds of different configs, {', '.join(differing[:3])}; run all seeds with one"
            yield Note(text, warns=True)
    for stage in ("knn", "linear"):
        rows = [stages[stage] for stages in results.rows.values() if stage in stages]
        if len({json.dumps(row.get("settings"), sort_keys=True) for row in rows}) > 1:
            yield Note(f"{stage}: evaluations with different settings; start the benchmark again.", warns=True)


NO_DECAY = "no alpha-ReQ (NaN): it needs 7 eigenvalues above 0, so 8 images or more."


def no_decay(metrics: Mapping[str, Any]) -> bool:
    """Whether finite features have too few positive eigenvalues for alpha-ReQ, see :data:`NO_DECAY`."""
    exponents = {key for key, value in metrics.items() if key.endswith("alpha_req") and value != value}
    return any(math.isfinite(metrics.get(key.replace("alpha_req", "rankme"), math.nan)) for key in exponents)


def _notes_of(results: Results, name: str) -> Iterator[Note]:
    """Notes on one method: collapse, divergence, NaN, and deviations from equal terms."""
    if collapsed := results.collapsed(name):
        yield Note(f"{name}: collapsed with seed {', '.join(map(str, collapsed))}.", warns=True)
    if diverged := results.diverged(name):
        text = f"{name}: diverged with seed {', '.join(map(str, diverged))}; NaN in all of its cells."
        yield Note(text, warns=True)
    metrics = (*HEADLINE, *KNN, *DIAGNOSTICS)
    broken = {metric.label for metric in metrics if results.estimate(name, metric).not_finite > len(diverged)}
    if broken:
        listed = f"{', '.join(sorted(broken)[:4])}{' and more' if len(broken) > 4 else ''}"
        yield Note(f"{name}: NaN left out of {listed}.", warns=True)
    stages = [row for seed in results.seeds(name) for row in results.rows[name, seed].values()]
    if any(no_decay(row.get("metrics", {})) for row in stages):
        yield Note(f"{name}: {NO_DECAY}")
    if differing := results.deviations.get(name, {}):
        listed = ", ".join(f"{key} {_text(own)} (others {_text(common)})" for key, (own, common) in differing.items())
        yield Note(f"{name} deviates from equal terms: {listed}.", warns=True)


def evaluation_stages(config: Mapping[str, Any], *, scored: bool) -> tuple[str, ...]:
    """The stages that evaluate a run. Where accuracies mean nothing, only the stages that need no labels."""
    labelled = () if why_no_accuracy(config["data"]) else ("knn", "logistic", "linear")
    return (*labelled, "diagnostics", *(("score",) if scored else ()))


def _protocol(row: Row) -> str:
    settings = row["settings"]
    images = f"{settings['views']} views of {row['images']} {row['of']} images"
    return f"{settings['features']}, {images}, protocol {row['protocol']}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    lines = [table.heads, *([name, *map(str, cells)] for name, cells in table.lines)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["─" * width for width in widths])
    aligned = [
        "  ".join(text.rjust(width) if column else text.ljust(width) for column, (text, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join([*aligned, *map(str, table.notes)])


_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\|`*<$"})


def to_markdown(table: Table) -> str:
    """A Markdown table, best means in bold, notes below."""

    def shown(cell: Cell) -> str:
        return f"**{cell}**" if cell.best else str(cell)

    lines = [
        f"| {' | '.join(table.heads)} |",
        f"| --- |{' ---: |' * (len(table.heads) - 1)}",
        *(f"| {' | '.join([name.translate(_MARKDOWN), *map(shown, cells)])} |" for name, cells in table.lines),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]).rstrip() + "\n"


_LATEX = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%_#${}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "−": r"$-$",
        "–": "--",
    }
)


def to_latex(table: Table) -> str:
    """A booktabs tabular, best means in bold, notes as comments."""

    def line(texts: Iterable[str]) -> str:
        return " & ".join(texts) + r" \\"

    def shown(cell: Cell) -> str:
        text = str(cell).translate(_LATEX)
        return rf"\textbf{{{text}}}" if cell.best else text

    lines = [
        r"% needs \usepackage{booktabs}",
        *(f"% {note}" for note in table.notes),
        rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}",
        r"\toprule",
        line(text.translate(_LATEX) for text in table.heads),
        r"\midrule",
        *(line([name.translate(_LATEX), *map(shown, cells)]) for name, cells in table.lines),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"
