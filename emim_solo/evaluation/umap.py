"""UMAP pictures of features: one aligned layout (AlignedUMAP: McInnes, umap-learn) for all methods.

An image has about the same place in all panels if the methods agree on its neighbours. So a difference between panels is a
difference between methods. Separate layouts would always differ by a rotation or reflection, too.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from emim_solo.evaluation.thumbnails import thumbnail, write_sprite_sheet
from emim_solo.ground.errors import UsageError
from emim_solo.ground.files import whole, write_figure, write_text
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
    """One method's part of a layout. All values are NaN if the features were not finite."""

    coordinates: NDArray[np.float32]  # (N, 2)
    trustworthiness: float  # are neighbours in the picture neighbours in the features? 0 to 1
    silhouette: float  # are classes apart in the picture? -1 to 1; NaN for a single class or without labels

    @property
    def is_finite(self) -> bool:
        """Whether there are coordinates to draw."""
        return bool(np.isfinite(self.coordinates).all())


def subset(size: int, limit: int, seed: int) -> NDArray[np.intp]:
    """Sorted positions of at most ``limit`` out of ``size`` images, drawn with the seed."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:limit])


def aligned_layout(features: Mapping[str, Tensor], labels: Tensor, *, seed: int) -> dict[str, Panel]:
    """Lay out ``(N, d)`` features by method so that images keep their place. Row i is image i in each method.

    ``labels`` ``(N,)`` only serve the silhouette. The same seed gives the same coordinates. UsageError for too few images.
    """
    images = len(labels)
    if images < _FEWEST_IMAGES:
        raise UsageError("umap", f"{images} images are too few for a layout: expected at least {_FEWEST_IMAGES}")
    arrays = {name: matrix.float().cpu().numpy() for name, matrix in features.items()}
    finite = {name: matrix for name, matrix in arrays.items() if np.isfinite(matrix).all()}
    settings: dict[str, Any] = {"n_neighbors": min(NEIGHBOURS, images - 1), "random_state": seed}
    layouts: list[Any] = []
    with warnings.catch_warnings(), ExitStack() as stack:
        # Numba changes the number of threads of the whole process, which would change the rounding of later training in torch.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        import umap

        warnings.filterwarnings("ignore", message="n_jobs value .* overridden", module="umap")
        warnings.filterwarnings("ignore", message="Spectral initialisation failed", module="umap")
        if len(finite) == 1:
            layouts = [umap.UMAP(**settings).fit_transform(*finite.values())]
        elif finite:
            identity = [{i: i for i in range(images)}] * (len(finite) - 1)
            # random_state seeds the neighbour search and the initial layout, transform_seed the optimisation.
            model = umap.AlignedUMAP(**settings, transform_seed=seed)
            layouts = list(model.fit(list(finite.values()), relations=identity).embeddings_)
    by_name = dict(zip(finite, layouts, strict=True))
    return {name: _panel(matrix, by_name.get(name), labels.cpu().numpy()) for name, matrix in arrays.items()}


def _panel(features: NDArray[Any], layout: NDArray[Any] | None, labels: NDArray[Any]) -> Panel:
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import silhouette_score

    if layout is None:
        return Panel(np.full((len(features), 2), math.nan, dtype=np.float32), math.nan, math.nan)
    coordinates = np.asarray(layout, dtype=np.float32)
    # scikit-learn needs fewer neighbours than half the images, and 2 to N - 1 classes.
    neighbours = min(NEIGHBOURS, (len(features) - 1) // 2)
    has_classes = 2 <= len(np.unique(labels)) < len(labels)
    return Panel(
        coordinates,
        float(trustworthiness(features, coordinates, n_neighbors=neighbours)),
        float(silhouette_score(coordinates, labels)) if has_classes else math.nan,
    )


@matplotlib.rc_context({"text.parse_math": False})  # a $ in a name starts no formula
def draw(panels: Mapping[str, Panel], labels: Tensor, class_names: Sequence[str], stem: Path, title: str = "") -> None:
    """Draw panels side by side as ``stem``.png and ``stem``.pdf.

    Up to twenty classes are named in their middle, more of them in a legend below the panels. More than a hundred share colours
    and shapes, so they have no legend. Without class names all images have one colour.
    """
    targets = labels.cpu().numpy()
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    width, height = 4.2 * columns, 4.6 * lines + 0.5
    names = [_short(name) for name in class_names]
    styles = class_styles(len(names))
    in_legend = names if _LABELLED_CLASSES < len(names) <= DISTINCT_STYLES else []
    legend_columns = max(1, int(72 * width / (_LEGEND_SIZE * (0.65 * max(map(len, names), default=0) + 5))))
    height += math.ceil(len(in_legend) / legend_columns) * 1.6 * _LEGEND_SIZE / 72
    figure = Figure(figsize=(width, height), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    finite = [panel.coordinates for panel in panels.values() if panel.is_finite]
    frame = _square(np.concatenate(finite)) if finite else {}
    for axes, (name, panel) in zip(places, panels.items(), strict=False):
        axes.set(xticks=[], yticks=[], aspect="equal", **frame)
        axes.spines[:].set_color("#dddddd")
        _draw_panel(axes, panel, targets, names, styles)
        axes.set_title(_short(name), fontsize=11, loc="left", fontweight="bold")
        quality = f"trustworthiness {_number(panel.trustworthiness)}"
        quality += f"   silhouette {_number(panel.silhouette)}" if names else ""
        axes.set_xlabel(quality, fontsize=9, color="#555555", loc="left")
    for axes in places[len(panels) :]:
        axes.remove()
    if in_legend:
        figure.legend(
            [Line2D([], [], color=colour, marker=marker, ls="", markersize=4) for colour, marker in styles],
            in_legend,
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


def _square(points: NDArray[Any]) -> dict[str, tuple[float, float]]:
    """Limits of a square around points, with a small margin. All panels share it, so that places can be compared."""
    middle, half = (points.max(axis=0) + points.min(axis=0)) / 2, np.ptp(points, axis=0).max() * 0.53
    return {key: (float(at - half), float(at + half)) for key, at in zip(("xlim", "ylim"), middle, strict=True)}


def _draw_panel(
    axes: Any, panel: Panel, targets: NDArray[Any], class_names: Sequence[str], styles: Sequence[tuple[str, str]]
) -> None:
    if not panel.is_finite:
        axes.text(0.5, 0.5, "NaN features", transform=axes.transAxes, ha="center", color="#b00020")
        return
    look: dict[str, Any] = {"s": float(np.clip(4000 / len(targets), 3, 14)), "linewidths": 0, "alpha": 0.85}
    if not class_names:
        axes.scatter(*panel.coordinates.T, color=PALETTE[0], **look)
    for label, name in enumerate(class_names):
        points = panel.coordinates[targets == label]
        if len(points) == 0:
            continue
        colour, marker = styles[label]
        axes.scatter(*points.T, color=colour, marker=marker, **look)
        if len(class_names) <= _LABELLED_CLASSES:
            # At the image closest to the median, because the median itself may lie between two clusters.
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
    """Write coordinates to ``stem``.csv, a line for each method and image, and to .json with ``about``, for the report.

    ``indices`` are those of the images in their dataset. Without labels, ``labels`` are -1 and ``class_names`` is empty.
    """
    targets = labels.tolist()
    with whole(f"{stem}.csv") as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "image", "class", "x", "y"])
        for name, panel in panels.items():
            for index, label, (x, y) in zip(indices, targets, panel.coordinates.tolist(), strict=True):
                writer.writerow([name, index, class_names[label] if class_names else "", f"{x:.5f}", f"{y:.5f}"])
    shown = [
        {
            "name": name,
            "points": panel.coordinates.astype(float).round(3).tolist() if panel.is_finite else None,
            "trustworthiness": _or_none(panel.trustworthiness),
            "silhouette": _or_none(panel.silhouette),
        }
        for name, panel in panels.items()
    ]
    content = about | {"classes": list(class_names), "labels": targets, "images": list(indices), "panels": shown}
    write_text(f"{stem}.json", json.dumps(content))


def _or_none(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def check_installed() -> None:
    """Raise UsageError if umap-learn, an optional dependency, is missing."""
    if importlib.util.find_spec("umap") is None:
        raise UsageError("umap", "UMAP pictures need umap-learn: pip install 'emim-solo[umap]'")


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
    """Draw several methods' features of the same images in aligned layouts, and write coordinates and thumbnails.

    ``cfg`` and ``images`` are those of one of the runs. ``run_seed`` is the seed of the training, if all runs have the same. ``seed``
    is for the layouts and for the choice of at most ``limit`` images. The folder gets ``<split>.{png,pdf,csv,json,webp}`` for the
    splits val (if there are validation images) and train. Returns for each method ``<split>_trustworthiness`` and, with classes,
    ``<split>_silhouette``. UsageError if the labels of the runs differ.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    train, val = load_suite().evaluation_datasets(cfg, images, thumbnail)
    metrics: dict[str, dict[str, float]] = {name: {} for name in features}
    classes = next(iter(features.values())).classes
    for split, dataset in (("val", val), ("train", train)):
        if dataset is None:
            continue
        splits = {name: getattr(of_run, split) for name, of_run in features.items()}
        labels = next(iter(splits.values())).labels
        if any(not torch.equal(labels, other.labels) for other in splits.values()):
            raise UsageError(
                "umap", "the runs have images with other labels: expected the same images; make a picture of each alone"
            )
        chosen = subset(len(labels), limit, seed)
        shown, positions = labels[chosen], chosen.tolist()
        panels = aligned_layout({name: own.backbone[chosen] for name, own in splits.items()}, shown, seed=seed)
        draw(panels, shown, classes, folder / split, title=f"{split} images, {len(chosen)} of {len(labels)}")
        columns = write_sprite_sheet(dataset, positions, folder / f"{split}.webp")
        about = {"columns": columns, "total": len(labels)} | ({} if run_seed is None else {"seed": run_seed})
        write_layout(panels, shown, positions, classes, folder / split, **about)
        for name, panel in panels.items():
            metrics[name][f"{split}_trustworthiness"] = panel.trustworthiness
            if classes:
                metrics[name][f"{split}_silhouette"] = panel.silhouette
    return metrics
