"""One HTML file about one benchmark, made only from the files in its folder.

The HTML file contains its pictures, data, style and script. It needs no network and stays under 10 MiB.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.markers import MarkerStyle

from emim_solo import __version__
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.report import charts
from emim_solo.results import rows, tables
from emim_solo.results.curves import read_curves
from emim_solo.results.palette import MARKERS, PALETTE
from emim_solo.results.tables import Results, Table

ROWS, REPORT = "rows.jsonl", "report.html"
SIZE_LIMIT = 10 * 2**20
SPLITS = {"val": "Validation images", "train": "Training images"}
_PARTS = ("projector", "backbone")
_LIGHTENED = {"#bd1f01": "#c74329", "#832db6": "#974fc2"}  # until the contrast to the dark ground is at least 3


@dataclass(frozen=True)
class Written:
    """The files of a report, and the results in them."""

    html: Path
    markdown: Path
    latex: Path
    results: Results


def write_report(folder: Path) -> Written:
    """Make ``report.html``, ``table.{md,tex}`` and, for two methods or more, ``differences.{md,tex}``, paired by seed.

    The folder must hold ``rows.jsonl``. The report also shows curves, spectra and layouts from the folder if present.
    """
    if not folder.is_dir():
        raise UsageError(
            "report.folder", f"no folder '{folder}': expected the folder of a benchmark, with {ROWS} in it"
        )
    results = tables.collect(rows.read(folder / ROWS))
    table, paired = tables.headline(results), tables.differences(results)
    for name, content in (("table", table), ("differences", paired)):
        if content.lines:
            files.write_text(folder / f"{name}.md", tables.to_markdown(content))
            files.write_text(folder / f"{name}.tex", tables.to_latex(content))
    files.write_text(folder / REPORT, render(folder, results, table, paired))
    return Written(folder / REPORT, folder / "table.md", folder / "table.tex", results)


def render(folder: Path, results: Results, table: Table, paired: Table) -> str:
    """The HTML of the report."""
    loader = jinja2.PackageLoader("emim_solo.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "number": lambda value: "NaN" if math.isnan(value) else repr(float(value)),
        "digits": lambda value, digits: "–" if value is None else f"{value:.{digits}f}".replace("nan", "NaN"),
        "yaml": partial(yaml.safe_dump, sort_keys=False),
    }
    umap = _umap(folder)
    template = environment.get_template("report.html.j2")
    context = {
        "version": __version__,
        "results": results,
        "method_colours": charts.METHOD_COLOURS,
        "headline": table,
        "differences": paired,
        "several_seeds": len(results.all_seeds()) > 1,
        "umap": umap,
        "split_names": SPLITS,
        "charts": _charts(folder, results),
        "tables": _more_tables(results),
        "shown": results.shown(tables.HEADLINE),
        "environment": _environment(results),
        "copies": {"markdown": tables.to_markdown(table), "latex": tables.to_latex(table)},
        "finished": max(str(row.get("finished", "")) for stages in results.rows.values() for row in stages.values()),
    }
    page = template.render(context)
    # Thumbnails make up most of the size: those of the training images are dropped first, then the others.
    for split in reversed(umap["splits"].values() if umap else ()):
        if len(page.encode()) > SIZE_LIMIT:
            split["sprite"] = None
            page = template.render(context)
    return page


_CURVES = (
    ("val_acc1", ("", ""), "Online linear top-1", "%"),
    ("val_knn_acc1", ("", ""), "Online k-NN top-1", "%"),
    ("train_mi", ("train_mi_null", "null"), "MI of the embeddings, dashed its null", "nats"),
    ("train_entropy", ("train_residual_entropy", "H(Z|Z')"), "EMIM's terms: H(Z), dashed H(Z|Z')", "nats"),
    ("score_view_information", ("", ""), "View information, the score without labels", "nats"),
)


def _charts(folder: Path, results: Results) -> dict[str, Sequence[tuple[str, ...]]]:
    """Title, SVG and perhaps a note of each chart, by section of the page; none for a section without measurements."""
    several = len(results.all_seeds()) > 1
    accuracies = []
    if results.shown(tables.ACCURACIES):
        note = "mean, 95 % interval and single seeds" if several else "one seed"
        accuracies.append(("Accuracy", charts.accuracies(results), note))
        if results.baselines():
            note = "95 % interval and single seeds; left of zero the baseline is ahead" if several else "one seed"
            accuracies.append((f"{results.focus()} less each baseline", charts.difference_chart(results), note))
    curves = {run: read_curves(_run_folder(folder, stages)) for run, stages in results.rows.items()}
    spectra = {run: files.read_json(path) for run in results.rows if (path := spectrum_file(folder, *run)).is_file()}
    scored = charts.scored_runs(results)
    score = charts.score_against_accuracy(results, scored) if scored else ""
    measured = {metric.source for metric in results.shown(tables.DIAGNOSTICS)}
    return {
        "accuracies": accuracies,
        "curves": [
            (title, charts.learning_curve(results, curves, metric, unit, dashed))
            for metric, dashed, title, unit in _CURVES
            if any(metric in of_run for of_run in curves.values())
        ],
        "mi": [
            (part.capitalize(), charts.information(results, part))
            for part in _PARTS
            if f"{part}_pair_information" in measured
        ],
        "score": [("View information", score, charts.rank_correlation(scored))] if score else [],
        "spectra": [
            (part.capitalize(), charts.spectra(results, spectra, part))
            for part in _PARTS
            if any(part in of_run for of_run in spectra.values())
        ],
    }


def _run_folder(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> Path:
    """The folder of a run now; the benchmark's folder may have been moved since the row was written."""
    recorded = Path(stages["pretrain"].get("checkpoint") or folder / "absent")
    moved = folder / recorded.parent.name / recorded.name
    return moved if moved.is_dir() else recorded


def spectrum_file(folder: Path, name: str, seed: int) -> Path:
    """The file into which the diagnostics stage writes the spectra of a run."""
    return folder / "spectra" / f"{name}-seed{seed}.json"


def _umap(folder: Path) -> dict[str, Any] | None:
    """The data for the script of the UMAP panels."""
    splits = {}
    for split in SPLITS:
        path = folder / "umap" / f"{split}.json"
        if path.is_file():
            splits[split] = files.read_json(path) | {"sprite": None}
            if (sprite := path.with_suffix(".webp")).is_file():
                splits[split]["sprite"] = f"data:image/webp;base64,{base64.b64encode(sprite.read_bytes()).decode()}"
    return {"splits": splits, "colours": class_colours(), "shapes": _shapes()} if splits else None


def class_colours() -> list[tuple[str, str]]:
    """Colour of each class on the light and on the dark ground."""
    return [(colour, _LIGHTENED.get(colour, colour)) for colour in PALETTE]


def _shapes() -> list[list[list[float]] | None]:
    """Outlines of matplotlib's markers in units of their radius, for the panels; None is a circle."""
    shapes: list[list[list[float]] | None] = []
    for style in map(MarkerStyle, MARKERS):
        outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=float)
        shapes.append(None if style.get_marker() == "o" else (outline / np.abs(outline).max()).round(3).tolist())
    return shapes


def _more_tables(results: Results) -> list[dict[str, Any]]:
    return [
        {"id": identifier, "title": title, "table": replace(tables.headline(results, metrics), notes=())}
        for identifier, title, metrics in (
            ("knn", "k-NN, every k, distance and feature", tables.KNN),
            ("diagnostics", "Diagnostics of the features", tables.DIAGNOSTICS),
            ("scores", "Scores without labels", tables.SCORES),
        )
        if results.shown(metrics)
    ]


def _environment(results: Results) -> dict[str, str]:
    """Every version, device and image folder in the rows; several values of one key are listed together."""
    seen: dict[str, set[str]] = {}
    for row in (row for stages in results.rows.values() for row in stages.values()):
        suite = f"{row['suite']['version']} ({row['suite']['generation']})"
        for key, value in {"solo-learn": suite, "device": row["device"], **row["versions"]}.items():
            seen.setdefault(key, set()).add(str(value))
    for row in results.pretrained():
        path = row["config"].get("data", {}).get("train_path", "")
        seen.setdefault("images", set()).add(f"{tables.dataset_name(row)}: {path}")
    return {key: ", ".join(sorted(values)) for key, values in seen.items()}


def main(arguments: Sequence[str]) -> None:
    """``emim-solo report DIR``."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UsageError(
            "report.folder", "expected one folder: emim-solo report DIR, where DIR holds a benchmark's rows.jsonl"
        )
    written = write_report(Path(arguments[0]))
    print(f"report in '{written.html}', tables in '{written.markdown}' and '{written.latex}'")
