"""One HTML file about one benchmark, made from what lies in its folder and nothing else.

The file holds its pictures, data, style and script, asks nothing of any network, and stays under 10 MB.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape

from emim_solo import __version__
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.report import charts
from emim_solo.results import rows
from emim_solo.results.curves import read_curves
from emim_solo.results.palette import MARKERS, PALETTE
from emim_solo.results.tables import (
    ACCURACIES,
    DIAGNOSTICS,
    HEADLINE,
    KNN,
    SCORES,
    Cell,
    Results,
    Table,
    collect,
    dataset_name,
    differences,
    headline,
    to_latex,
    to_markdown,
)

ROWS, REPORT = "rows.jsonl", "report.html"
SIZE_LIMIT = 10 * 2**20
SPLITS = {"val": "Validation images", "train": "Training images"}
_DARK_GROUND = "#1b1f23"
_LEAST_CONTRAST = 3.0


@dataclass(frozen=True)
class Written:
    """What a report was made into."""

    html: Path
    markdown: Path
    latex: Path
    results: Results


def write_report(folder: Path) -> Written:
    """Make ``report.html``, ``table.{md,tex}`` and ``differences.{md,tex}`` in the folder of a benchmark.

    The last two are the differences paired by seed; one method has none.

    Args:
        folder: holds ``rows.jsonl``; curves, spectra and layouts that the stages left there are shown if present.

    Raises:
        UsageError: no rows, no finished run, rows of different datasets, or rows of another schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"no folder '{folder}': expected the folder of a benchmark, with {ROWS} in it")
    results = collect(rows.read(folder / ROWS))
    table = headline(results)
    written = Written(folder / REPORT, folder / "table.md", folder / "table.tex", results)
    files.write_text(written.markdown, to_markdown(table))
    files.write_text(written.latex, to_latex(table))
    paired = differences(results)
    if paired.lines:
        files.write_text(folder / "differences.md", to_markdown(paired))
        files.write_text(folder / "differences.tex", to_latex(paired))
    files.write_text(written.html, render(folder, results, table, paired))
    return written


def render(folder: Path, results: Results, table: Table, paired: Table) -> str:
    """The HTML of the report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emim_solo.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "json_for_html": _json_for_html,
        "cell_html": _cell_html,
        "head_cell": _head_cell,
        "number": lambda value: "NaN" if math.isnan(value) else repr(float(value)),
    }
    umap = _umap(folder, results)
    context = {
        "version": __version__,
        "title": _title(results),
        "facts": _facts(results),
        "css": Markup(_template("report.css")),
        "script": Markup(_template("report.js")),
        "method_colours": charts.METHOD_COLOURS,
        "position": {name: position for position, name in enumerate(results.names)},
        "flags": {name: _flags(results, name) for name in results.names},
        "headline": table,
        "differences": paired,
        "focus": results.focus(),
        "several_seeds": len(results.all_seeds()) > 1,
        "accuracy_charts": _accuracy_charts(results),
        "umap": umap,
        "split_names": SPLITS,
        "chart_sections": _chart_sections(folder, results),
        "tables": _more_tables(results),
        "runs": _runs(results),
        "environment": _environment(results),
        "configs": _configs(results),
        "copies": {"markdown": to_markdown(table), "latex": to_latex(table)},
        "finished": max(str(row.get("finished", "")) for stages in results.rows.values() for row in stages.values()),
    }
    page = environment.get_template("report.html.j2").render(context)
    if len(page.encode()) > SIZE_LIMIT and umap is not None:
        # Pictures are the bulk: the training images go first, then the thumbnails of the others.
        for split in reversed(list(umap["data"]["splits"].values())):
            split["sprite"] = None
            page = environment.get_template("report.html.j2").render(context)
            if len(page.encode()) <= SIZE_LIMIT:
                break
    return page


def _template(name: str) -> str:
    return (resources.files("emim_solo.report") / "templates" / name).read_text(encoding="utf-8")


def _json_for_html(value: Any) -> Markup:
    # A closing tag inside the data would end the script element.
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _head_cell(text: str) -> Markup:
    label, _, unit = text.replace("top-1", "top\u20111").partition(" (")  # not to be broken at its hyphen
    return Markup("{}<small>{}</small>").format(label, unit.rstrip(")")) if unit else escape(label)


def _cell_html(cell: Cell) -> Markup:
    mean, _, width = cell.text.partition(" ± ")
    if mean == "NaN":
        return Markup('<span class="nan">NaN</span>')
    html = Markup('<span class="mean">{}</span>').format(mean)
    if width:
        html += Markup(' <span class="pm">± {}</span>').format(width)
    if cell.flag:
        html += Markup(' <span class="nan">{}</span>').format(cell.flag)
    return html


def _title(results: Results) -> str:
    names = list(results.names)
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} on {results.dataset}"


def _facts(results: Results) -> list[str]:
    first = next(results.pretrained())
    config = first["config"]
    epochs = sorted({int(row["epochs"]) for row in results.pretrained()})
    seeds = len(results.all_seeds())
    facts = [
        f"{len(results.names)} method{'s' if len(results.names) > 1 else ''}",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        f"{' to '.join(map(str, epochs[:: max(1, len(epochs) - 1)]))} epoch{'s' if epochs != [1] else ''}",
        str(config.get("backbone", {}).get("name", "")),
        f"batch {config.get('optimizer', {}).get('batch_size', '?')}",
        f"solo-learn {' and '.join(sorted({str(row['suite']['version']) for row in results.pretrained()}))}",
        ", ".join(sorted({str(row["device"]) for row in results.pretrained()})),
    ]
    return [fact for fact in facts if fact]


def _flags(results: Results, name: str) -> list[dict[str, str]]:
    flags = []
    collapsed = results.collapsed(name)
    if collapsed:
        seeds = ", ".join(map(str, collapsed))
        of = f" {len(collapsed)}/{len(results.seeds(name))}" if len(results.seeds(name)) > 1 else ""
        flags.append(
            {"kind": "collapsed", "text": f"collapsed{of}", "title": f"embeddings collapsed with seed {seeds}"}
        )
    differing = results.deviations.get(name)
    if differing:
        flags.append({"kind": "deviates", "text": "deviates", "title": f"not on equal terms: {', '.join(differing)}"})
    return flags


def _accuracy_charts(results: Results) -> list[dict[str, str]]:
    if not results.shown(ACCURACIES):
        return []
    several = len(results.all_seeds()) > 1
    found = [
        {
            "title": "Accuracy",
            "note": "mean, 95 % interval and single seeds" if several else "one seed",
            "svg": Markup(charts.accuracies(results, "accuracy")),
        }
    ]
    if results.baselines():
        note = "95 % interval and single seeds; left of zero the baseline is ahead" if several else "one seed"
        title = f"{results.focus()} less each baseline"
        found.append({"title": title, "note": note, "svg": Markup(charts.difference_chart(results, "difference"))})
    return found


_CURVES = (
    ("val_acc1", ("", ""), "Online linear top-1", "%"),
    ("val_knn_acc1", ("", ""), "Online k-NN top-1", "%"),
    ("train_mi", ("train_mi_null", "null"), "MI of the embeddings, dashed its null", "nats"),
    ("train_entropy", ("train_residual_entropy", "H(Z|Z')"), "EMIM's terms: H(Z), dashed H(Z|Z')", "nats"),
    ("score_view_information", ("", ""), "View information, the score without labels", "nats"),
)


def _chart_sections(folder: Path, results: Results) -> list[dict[str, Any]]:
    sections = []
    curves = {run: read_curves(_run_folder(folder, stages)) for run, stages in results.rows.items()}
    found = [
        {
            "title": title,
            "note": "",
            "svg": Markup(charts.learning_curve(results, curves, metric, unit, f"curve-{metric}", dashed=dashed)),
        }
        for metric, dashed, title, unit in _CURVES
        if any(metric in own for own in curves.values())
    ]
    if found:
        lead = "While training; accuracies are the suite's own online evaluation on validation images."
        if len(results.all_seeds()) > 1:
            lead += " Thick: mean over seeds. Thin: each seed."
        sections.append({"id": "curves", "title": "Learning curves", "lead": lead, "charts": found})

    parts = [
        part
        for part in ("projector", "backbone")
        if results.shown([m for m in DIAGNOSTICS if m.source == f"{part}_pair_information"])
    ]
    if parts:
        lead = (
            "Second-moment estimate between two augmented views of an image, in nats. Hollow: its null, the same estimate "
            "with the pairs shuffled, which is bias. The number is the difference, and the one to read."
        )
        found = [
            {"title": part.capitalize(), "note": "", "svg": Markup(charts.information(results, part, f"mi-{part}"))}
            for part in parts
        ]
        sections.append({"id": "mi", "title": "Mutual information against its null", "lead": lead, "charts": found})

    if scored := charts.scored_runs(results):
        lead = (
            "Each point is a run: the information of a view about its image, in nats, computed without any label, and the mean "
            "of linear and 20-NN accuracy. The score is meant to put runs in the order that labels would."
        )
        picture = Markup(charts.score_against_accuracy(results, scored, "score"))
        found = [{"title": "View information", "note": charts.rank_correlation(scored), "svg": picture}]
        sections.append(
            {"id": "score", "title": "Score without labels against accuracy", "lead": lead, "charts": found}
        )

    values = _read_spectra(folder, results)
    parts = [part for part in ("projector", "backbone") if any(part in own for own in values.values())]
    if parts:
        lead = (
            "Eigenvalues of the covariance of the features. A spectrum that falls off early uses few of its dimensions; "
            "flat is isotropic."
        )
        found = [
            {
                "title": part.capitalize(),
                "note": "",
                "svg": Markup(charts.spectra(results, values, part, f"spectrum-{part}")),
            }
            for part in parts
        ]
        sections.append({"id": "spectra", "title": "Spectra", "lead": lead, "charts": found})
    return sections


def _run_folder(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> Path:
    """Where a run's files are now: the benchmark's folder may have been moved since the row was written."""
    row = stages.get("pretrain", {})
    if not row.get("checkpoint"):
        return folder / "absent"
    recorded = Path(row["checkpoint"])
    moved = folder / recorded.parent.name / recorded.name
    return moved if moved.is_dir() else recorded


def spectrum_file(folder: Path, name: str, seed: int) -> Path:
    """Where the diagnostics stage leaves the spectra of a run."""
    return folder / "spectra" / f"{name}-seed{seed}.json"


def _read_spectra(folder: Path, results: Results) -> dict[tuple[str, int], dict[str, list[float]]]:
    found = {}
    for name, seed in results.rows:
        path = spectrum_file(folder, name, seed)
        if path.is_file():
            found[name, seed] = files.read_json(path)
    return found


def _umap(folder: Path, results: Results) -> dict[str, Any] | None:
    splits = {}
    for split in SPLITS:
        path = folder / "umap" / f"{split}.json"
        if not path.is_file():
            continue
        content = files.read_json(path)
        sprite = path.with_suffix(".webp")
        if sprite.is_file():
            content["sprite"] = "data:image/webp;base64," + base64.b64encode(sprite.read_bytes()).decode()
        else:
            content["sprite"] = None
        splits[split] = content
    if not splits:
        return None
    first = next(iter(splits.values()))
    caption = (
        f"Features of the backbone{_of_seed(first)} in one aligned UMAP layout: an image keeps its place from panel to panel "
        "as far as the methods agree on its neighbours. Distances between far clusters mean little. "
        "Trustworthiness: how far neighbours here are neighbours in the features."
    )
    if first["classes"]:
        caption += " Silhouette: how far classes are apart here."
    data = {"splits": splits, "colours": class_colours(), "shapes": _shapes()}
    return {"splits": list(splits), "caption": caption, "data": data}


def _of_seed(content: Mapping[str, Any]) -> str:
    return f" with seed {content['seed']}" if "seed" in content else ""


def class_colours() -> list[tuple[str, str]]:
    """Colour of each class on the light and on the dark ground, there lightened until it stands out."""
    return [(colour, _lightened(colour)) for colour in PALETTE]


def _lightened(colour: str) -> str:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    while contrast(text := "#" + "".join(f"{channel:02x}" for channel in rgb), _DARK_GROUND) < _LEAST_CONTRAST:
        rgb = [min(255, channel + math.ceil((255 - channel) / 12)) for channel in rgb]
    return text


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.1), 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _shapes() -> list[list[list[float]] | None]:
    """Outlines of matplotlib's markers in units of their radius, for the panels; None is a circle."""
    from matplotlib.markers import MarkerStyle

    shapes: list[list[list[float]] | None] = []
    for marker in MARKERS:
        if marker == "o":
            shapes.append(None)
            continue
        style = MarkerStyle(marker)
        outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=float)
        radius = np.abs(outline).max()
        shapes.append([[round(float(x / radius), 3), round(float(y / radius), 3)] for x, y in outline])
    return shapes


def _more_tables(results: Results) -> list[dict[str, Any]]:
    return [
        {"id": identifier, "title": title, "table": table}
        for identifier, title, metrics in (
            ("knn", "k-NN, every k, distance and feature", KNN),
            ("diagnostics", "Diagnostics of the features", DIAGNOSTICS),
            ("scores", "Scores without labels", SCORES),
        )
        if len((table := replace(headline(results, metrics), notes=())).heads) > 2
    ]


def _runs(results: Results) -> dict[str, Any]:
    shown = results.shown(HEADLINE)
    heads = ["Run", "seed", *(metric.label for metric in shown), "collapsed", "finished", "config"]
    lines = []
    for (name, seed), stages in results.rows.items():
        cells = []
        for metric in shown:
            value = metric.value(stages[metric.stage]) if metric.stage in stages else None
            cells.append("–" if value is None else f"{value:.{metric.digits}f}".replace("nan", "NaN"))
        flag = stages.get("diagnostics", {}).get("metrics", {}).get("projector_collapsed")
        collapsed = {1: "yes", 0: "no"}.get(flag, "–")
        row = stages["pretrain"]
        lines.append([name, seed, *cells, collapsed, row.get("finished", "–"), row["config_hash"]])
    return {"heads": heads, "lines": lines}


def _environment(results: Results) -> dict[str, str]:
    """Every version that made a row; more than one of a thing is listed as such."""
    seen: dict[str, set[str]] = {}
    for stages in results.rows.values():
        for row in stages.values():
            facts = {
                "solo-learn": f"{row['suite']['version']} ({row['suite']['generation']})",
                "device": row["device"],
                **row["versions"],
            }
            for key, value in facts.items():
                seen.setdefault(key, set()).add(str(value))
    environment = {key: ", ".join(sorted(values)) for key, values in seen.items()}
    environment["images"] = ", ".join(
        sorted(
            {
                f"{dataset_name(row)}: {row['config'].get('data', {}).get('train_path', '')}"
                for row in results.pretrained()
            }
        )
    )
    return environment


def _configs(results: Results) -> list[dict[str, str]]:
    return [
        {"title": f"{name}, seed {seed}", "text": yaml.safe_dump(stages["pretrain"]["config"], sort_keys=False)}
        for (name, seed), stages in results.rows.items()
    ]


def main(arguments: Sequence[str]) -> None:
    """``emim-solo report DIR``."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UsageError("expected one folder: emim-solo report DIR, where DIR holds a benchmark's rows.jsonl")
    written = write_report(Path(arguments[0]))
    print(f"report in '{written.html}', tables in '{written.markdown}' and '{written.latex}'")
