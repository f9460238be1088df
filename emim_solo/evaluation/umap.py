"""UMAP pictures of features: one aligned layout for all methods.

In an aligned layout (AlignedUMAP: McInnes, umap-learn) the same image keeps its place from panel to panel as far as
the methods agree on its neighbours, so that a difference between panels is a difference between methods, not the
rotation or reflection that two separate layouts always differ by.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from emim_solo.evaluation.features import Features
from emim_solo.evaluation.thumbnails import write_sprite_sheet
from emim_solo.ground.errors import UsageError
from emim_solo.ground.files import beside, whole, write_figure, write_text
from emim_solo.images.folders import RunImages
from emim_solo.results.palette import DISTINCT_STYLES, PALETTE, class_styles
from emim_solo.suite import load_suite

NEIGHBOURS = 15
_FEWEST_IMAGES = 5
_LABELLED_CLASSES = 20
_LONGEST_NAME = 28  # in a picture
_LEGEND_SIZE = 6  # points


@dataclass(frozen=True)
class Panel:
    """One method's share of a layout.

    Attributes:
        coordinates: ``(N, 2)``; NaN throughout where the features were not finite.
        trustworthiness: how far neighbours in the picture are neighbours in the features, 0 to 1.
        silhouette: how far classes are apart in the picture, -1 to 1; NaN for a single class and without labels.
    """

    coordinates: NDArray[np.float32]
    trustworthiness: float
    silhouette: float


def subset(size: int, limit: int, seed: int) -> NDArray[np.intp]:
    """Positions, in order, of at most ``limit`` out of ``size`` images, drawn with the seed."""
    if size <= limit:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).permutation(size)[:limit])


def aligned_layout(features: Mapping[str, Tensor], labels: Tensor, *, seed: int) -> dict[str, Panel]:
    """Lay out the features of several methods for the same images so that images keep their place.

    Args:
        features: ``(N, d)`` by method, row i being image i in each; d may differ.
        labels: ``(N,)``, used for the silhouette alone.
        seed: of the layout; the same features and seed give the same coordinates.

    Returns:
        One panel by method, in the given order.

    Raises:
        UsageError: too few images.
    """
    import umap

    images = len(labels)
    if images < _FEWEST_IMAGES:
        raise UsageError(
            "umap",
            f"{images} images are too few for a UMAP layout, expected at least {_FEWEST_IMAGES}: use more images",
        )
    arrays = {name: matrix.float().cpu().numpy() for name, matrix in features.items()}
    sound = {name: matrix for name, matrix in arrays.items() if np.isfinite(matrix).all()}
    neighbours = min(NEIGHBOURS, images - 1)
    layouts: list[Any] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value .* overridden", module="umap")
        warnings.filterwarnings("ignore", message="Spectral initialisation failed", module="umap")
        if len(sound) == 1:
            (matrix,) = sound.values()
            layouts = [umap.UMAP(n_neighbors=neighbours, random_state=seed).fit_transform(matrix)]
        elif sound:
            identity = [{i: i for i in range(images)}] * (len(sound) - 1)
            # random_state seeds the neighbour search and the start, transform_seed the optimisation.
            model = umap.AlignedUMAP(n_neighbors=neighbours, random_state=seed, transform_seed=seed)
            layouts = list(model.fit(list(sound.values()), relations=identity).embeddings_)
    by_name = dict(zip(sound, layouts, strict=True))
    return {name: _panel(matrix, by_name.get(name), labels.cpu().numpy()) for name, matrix in arrays.items()}


def _panel(features: NDArray[Any], layout: NDArray[Any] | None, labels: NDArray[Any]) -> Panel:
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import silhouette_score

    if layout is None:
        return Panel(np.full((len(features), 2), math.nan, dtype=np.float32), math.nan, math.nan)
    coordinates = np.asarray(layout, dtype=np.float32)
    # scikit-learn wants fewer neighbours than half the images, and between 2 and N - 1 classes.
    neighbours = min(NEIGHBOURS, (len(features) - 1) // 2)
    classes = len(np.unique(labels))
    return Panel(
        coordinates,
        float(trustworthiness(features, coordinates, n_neighbors=neighbours)),
        float(silhouette_score(coordinates, labels)) if 2 <= classes < len(labels) else math.nan,
    )


@matplotlib.rc_context({"text.parse_math": False})  # a name with a $ in it is a name
def draw(panels: Mapping[str, Panel], labels: Tensor, class_names: Sequence[str], stem: Path, title: str = "") -> None:
    """Draw panels side by side as ``stem``.png and ``stem``.pdf.

    Classes are named in their middle, more than twenty in a legend below the panels. More than a hundred repeat colours
    and shapes: no legend could tell them apart. Without class names all images have one colour.
    """
    targets = labels.cpu().numpy()
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    width, height = 4.2 * columns, 4.6 * lines + 0.5
    names = [_short(name) for name in class_names]
    in_legend = names if _LABELLED_CLASSES < len(names) <= DISTINCT_STYLES else []
    legend_columns = max(1, int(72 * width / (_LEGEND_SIZE * (0.65 * max(map(len, names), default=0) + 5))))
    height += math.ceil(len(in_legend) / legend_columns) * 1.6 * _LEGEND_SIZE / 72
    figure = Figure(figsize=(width, height), layout="constrained")
    styles = class_styles(len(names))
    everywhere = [panel.coordinates for panel in panels.values() if np.isfinite(panel.coordinates).all()]
    frame = _square(np.concatenate(everywhere)) if everywhere else ((0.0, 1.0), (0.0, 1.0))
    for axes, (name, panel) in zip(
        np.ravel(figure.subplots(lines, columns, squeeze=False)), panels.items(), strict=False
    ):
        axes.set(xticks=[], yticks=[], aspect="equal", xlim=frame[0], ylim=frame[1])
        axes.spines[:].set_color("#dddddd")
        _draw_panel(axes, panel, targets, names, styles)
        axes.set_title(_short(name), fontsize=11, loc="left", fontweight="bold")
        quality = f"trustworthiness {_number(panel.trustworthiness)}"
        quality += f"   silhouette {_number(panel.silhouette)}" if names else ""
        axes.set_xlabel(quality, fontsize=9, color="#555555", loc="left")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    if in_legend:
        handles = [Line2D([], [], color=colour, marker=marker, ls="", markersize=4) for colour, marker in styles]
        figure.legend(
            *(handles, in_legend),
            loc="outside lower center",
            ncols=min(legend_columns, len(in_legend)),
            fontsize=_LEGEND_SIZE,
            frameon=False,
        )
    if title:
        figure.suptitle(title, fontsize=10, color="#555555", x=0.01, ha="left")
    write_figure(stem, figure)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _square(points: NDArray[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of a square with a small margin around points: one for all panels, so that places can be compared."""
    middle, half = (points.max(axis=0) + points.min(axis=0)) / 2, np.ptp(points, axis=0).max() * 0.53
    (left, bottom), (right, top) = middle - half, middle + half
    return (float(left), float(right)), (float(bottom), float(top))


def _draw_panel(
    axes: Any, panel: Panel, targets: NDArray[Any], class_names: Sequence[str], styles: Sequence[tuple[str, str]]
) -> None:
    if not np.isfinite(panel.coordinates).all():
        axes.text(0.5, 0.5, "NaN features", transform=axes.transAxes, ha="center", color="#b00020")
        return
    size = float(np.clip(4000 / len(targets), 3, 14))
    if not class_names:
        axes.scatter(*panel.coordinates.T, s=size, color=PALETTE[0], linewidths=0, alpha=0.85)
    for label, name in enumerate(class_names):
        points = panel.coordinates[targets == label]
        if len(points) == 0:
            continue
        colour, marker = styles[label]
        axes.scatter(*points.T, s=size, color=colour, marker=marker, linewidths=0, alpha=0.85)
        if len(class_names) <= _LABELLED_CLASSES:
            # At the image closest to the median: the median itself may lie between two clusters.
            middle = points[np.linalg.norm(points - np.median(points, axis=0), axis=1).argmin()]
            text = axes.text(*middle, name, fontsize=9.5, ha="center", va="center")
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def write_layout(
    panels: Mapping[str, Panel],
    labels: Tensor,
    indices: Sequence[int],
    class_names: Sequence[str],
    stem: Path,
    **about: Any,
) -> None:
    """Write coordinates as ``stem``.csv (one line for each method and image) and ``stem``.json (for the report).

    Args:
        panels: by method.
        labels: ``(N,)``; -1 throughout without labels.
        indices: of the images in their dataset.
        class_names: by label; none without labels.
        stem: path without suffix.
        **about: what else the report is told.
    """
    targets = [int(label) for label in labels]
    with whole(beside(stem, ".csv")) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "image", "class", "x", "y"])
        for name, panel in panels.items():
            for index, label, (x, y) in zip(indices, targets, panel.coordinates.tolist(), strict=True):
                writer.writerow([name, index, class_names[label] if class_names else "", f"{x:.5f}", f"{y:.5f}"])
    content = {
        **about,
        "classes": list(class_names),
        "labels": targets,
        "images": [int(index) for index in indices],
        "panels": [
            {
                "name": name,
                "points": [[round(x, 3), round(y, 3)] for x, y in panel.coordinates.tolist()]
                if np.isfinite(panel.coordinates).all()
                else None,
                "trustworthiness": _or_none(panel.trustworthiness),
                "silhouette": _or_none(panel.silhouette),
            }
            for name, panel in panels.items()
        ],
    }
    write_text(beside(stem, ".json"), json.dumps(content))


def _or_none(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


@contextmanager
def _torchs_threads_kept() -> Iterator[None]:
    """Numba sets the number of threads of the whole process: what torch trains in it later would be rounded otherwise."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_installed() -> None:
    """Raises UsageError where umap-learn, an extra, is missing."""
    if importlib.util.find_spec("umap") is None:
        raise UsageError("umap", "UMAP pictures need umap-learn: pip install 'emim-solo[umap]'")


@_torchs_threads_kept()
def make_pictures(
    features: Mapping[str, Features],
    cfg: DictConfig,
    images: RunImages,
    folder: Path,
    *,
    seed: int,
    limit: int,
    run_seed: int | None = None,
) -> dict[str, dict[str, float]]:
    """Pictures of several methods in aligned layouts, with coordinates and thumbnails.

    Args:
        features: by method, of the same images.
        cfg: completed config of one of the runs.
        images: of that run.
        folder: gets ``<split>.{png,pdf,csv,json,webp}`` for val, if there are validation images, and train.
        seed: of the layouts and of the choice of images.
        limit: number of images at most in each picture.
        run_seed: seed that the runs were trained with, if it is one.

    Returns:
        By method: ``<split>_trustworthiness`` and, of classes, ``<split>_silhouette``.

    Raises:
        UsageError: umap-learn is not installed, or the methods did not see the same images.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    train, val = load_suite().evaluation_datasets(cfg, images)
    metrics: dict[str, dict[str, float]] = {name: {} for name in features}
    for split, dataset in (("val", val), ("train", train)):
        if dataset is None:
            continue
        own = {name: getattr(found, split) for name, found in features.items()}
        classes = next(iter(features.values())).classes
        labels = next(iter(own.values())).labels
        if any(not torch.equal(labels, other.labels) for other in own.values()):
            raise UsageError(
                "umap", "the runs were not trained on the same images: expected one dataset; picture them apart"
            )
        chosen = subset(len(labels), limit, seed)
        shown = labels[chosen]
        panels = aligned_layout({name: found.backbone[chosen] for name, found in own.items()}, shown, seed=seed)
        draw(panels, shown, classes, folder / split, title=f"{split} images, {len(chosen)} of {len(labels)}")
        columns = write_sprite_sheet(dataset, chosen.tolist(), folder / f"{split}.webp")
        about = {"columns": columns, "total": len(labels)} | ({} if run_seed is None else {"seed": run_seed})
        write_layout(panels, shown, chosen.tolist(), classes, folder / split, **about)
        for name, panel in panels.items():
            metrics[name][f"{split}_trustworthiness"] = panel.trustworthiness
            if classes:
                metrics[name][f"{split}_silhouette"] = panel.silhouette
    return metrics
