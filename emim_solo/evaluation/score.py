"""``emim-solo score``: ranks checkpoints without labels, all by one protocol."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from emim_solo.checkpoints import opening as checkpoints
from emim_solo.checkpoints.opening import Checkpoint, DamagedCheckpoint
from emim_solo.emim.measures import half_widths, scores
from emim_solo.evaluation.commands import distinct_names, evaluation_row, folders_parser, rows_file, split
from emim_solo.evaluation.features import extract, extract_features
from emim_solo.evaluation.knn import knn
from emim_solo.evaluation.protocol import FEWEST_IMAGES, VIEWS, Protocol
from emim_solo.evaluation.views import view_datasets, view_loader
from emim_solo.ground import compare, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import checked
from emim_solo.images.folders import RunImages, why_no_accuracy
from emim_solo.results import rows
from emim_solo.results.tables import NO_DECAY, SCORES, Cell, Table, no_decay, to_text
from emim_solo.suite.api import device_of, whole_size

NEIGHBOURS = 20
_COLUMNS = {score.key: score.label for score in SCORES} | {"knn_acc1": f"{NEIGHBOURS}-NN (%)"}
_COLUMNS["view_information"] += " (nats)"


class ScoredViews:
    """A protocol's views of a run's validation images. Without these: of its held-out images, else of its training images.

    ``which`` is ``validation``, ``held-out`` or ``training``; ``chosen`` are the images' positions in their dataset. UsageError for
    too few images, or for an augmentation that the installed solo-learn lacks.
    """

    def __init__(self, cfg: DictConfig, protocol: Protocol, images: RunImages) -> None:
        of_run = {key: cfg.augmentations[0][key] for key in ("mean", "std") if key in cfg.augmentations[0]}
        of_run["crop_size"] = whole_size(cfg)
        view = OmegaConf.create({**asdict(protocol.augmentation), **of_run, "num_crops": protocol.views})
        train, val = view_datasets(cfg, view, protocol.views, images)
        dataset: Any = train if val is None else val
        self.which = "validation" if val is not None else "held-out" if images.held_positions else "training"
        candidates = images.held_positions if self.which == "held-out" else range(len(dataset))
        if len(candidates) < FEWEST_IMAGES:
            key = "data.val_path" if val is not None else "data.train_path"
            images_it_has = f"{cfg.name} has {len(candidates)} {self.which} images"
            raise UsageError(key, f"{images_it_has}: scores need at least {FEWEST_IMAGES}; add some")
        order = np.random.default_rng(protocol.seed).permutation(len(candidates))[: protocol.images]
        self.chosen = [candidates[place] for place in order]
        self.cfg, self.protocol = cfg, protocol
        self._loader = view_loader(cfg, dataset, protocol.views, protocol.seed, self.chosen)

    def parts(self, model: LightningModule, title: str | None = None) -> dict[str, Tensor]:
        """Features ``(N, q, d)`` of the backbone and, if the method has one, the projector, by name; float32, on the CPU.

        ``title`` is the title of the progress bar; None: no bar. The model stays in evaluation mode afterwards.
        """
        found = extract(model, self._loader, title).parts()
        return {part: features.unflatten(0, (-1, self.protocol.views)) for part, features in found.items()}

    def features(self, model: LightningModule) -> Tensor:
        """Those of :meth:`parts` that the protocol scores; UsageError if the method lacks them."""
        return _scored(self.parts(model), self.protocol, self.cfg)

    def check_features(self, model: LightningModule) -> None:
        """Raise the UsageError of :meth:`features` before any work. The model stays in evaluation mode afterwards."""
        size = whole_size(self.cfg)
        found = extract(model, [(torch.zeros(2, 3, size, size), torch.zeros(2))], None)
        _scored(found.parts(), self.protocol, self.cfg)


def _scored(parts: Mapping[str, Tensor], protocol: Protocol, cfg: DictConfig) -> Tensor:
    if protocol.features not in parts:
        raise UsageError("protocol.features", f"{cfg.method} has no {protocol.features}: take features=backbone")
    return parts[protocol.features]


@dataclass(frozen=True)
class SeenViews:
    """Features ``(N, q, d)`` of a protocol's views by part of the model; ``of`` says which images (see :class:`ScoredViews`)."""

    parts: Mapping[str, Tensor]
    of: str


def see(checkpoint: Checkpoint, protocol: Protocol) -> SeenViews:
    """Compute a checkpoint's features of a protocol's views. UsageError as :class:`ScoredViews`, or if its weights do not fit."""
    cfg = checkpoint.cfg
    views = ScoredViews(cfg, protocol, checkpoint.images)
    return SeenViews(views.parts(checkpoint.model().to(device_of(cfg)), f"{cfg.name}: views"), views.which)


def score_checkpoint(
    checkpoint: Checkpoint,
    protocol: Protocol,
    *,
    neighbours: bool = True,
    neighbour_views: int | None = None,
    seen: SeenViews | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Score one checkpoint of any method of solo-learn. Returns a row of stage ``score``.

    Its metrics are :func:`emim_solo.emim.measures.scores` and ``<name>_half_width``, half the width of each 95 % interval. With
    labels and ``neighbours`` there is ``knn_acc1``, too: the 20-NN accuracy (cosine) on features of the whole images, or on their
    mean over ``neighbour_views`` views. Large features go to the disk of ``folder``. ``seen`` is the result of :func:`see`, if
    known. UsageError as :func:`see`, or if the method lacks the protocol's features.
    """
    start, cfg = time.perf_counter(), checkpoint.cfg
    seen = seen or see(checkpoint, protocol)
    features = _scored(seen.parts, protocol, cfg)
    metrics = scores(features, **protocol.settings)
    widths = half_widths(features, splits=protocol.splits, **protocol.settings)
    metrics |= {f"{name}_half_width": width for name, width in widths.items() if not name.endswith("_null")}
    if neighbours and why_no_accuracy(cfg.data) is None:
        try:
            images = extract_features(checkpoint, folder, neighbour_views)
            accuracies = knn(images, ks=[NEIGHBOURS], distances=["cosine"], device=device_of(cfg))
            metrics["knn_acc1"] = accuracies[f"{protocol.features}_cosine_k{NEIGHBOURS}"]
        except UsageError as error:  # a score needs no labels, so wrong labels must not stop it
            warnings.warn(f"{cfg.name}: no {NEIGHBOURS}-NN beside the score: {error}", stacklevel=2)
    row = evaluation_row("score", cfg, checkpoint.folder, metrics, start, asdict(protocol), checkpoint.epochs)
    row |= {"protocol": protocol.hash, "images": len(features), "of": seen.of, "width": features.shape[2]}
    return row | ({} if neighbour_views is None else {"knn_views": neighbour_views})


def score_main(arguments: Sequence[str]) -> None:
    """``emim-solo score FOLDER ... [key=value ...]``."""
    about = """Rank checkpoints of any method without labels: how many nats one view of an image tells about the image.

Views are drawn by one protocol for all checkpoints. Prints each score with half the width of its 95 % interval."""
    keys = {"views=4 augmentation.grayscale.prob=0": "another protocol"}
    parser = folders_parser("score", about, "emim-solo score trained_models/emim/0 trained_models/vicreg/0", keys)
    parser.add_argument("--protocol", default="default", help="a YAML file, or a shipped one: default, digits")
    parser.add_argument("--another-protocol", action="store_true", help="append rows beside those of other protocols")
    parser.add_argument("--epochs", action="store_true", help="score every checkpoint of each run, and draw a curve")
    parser.add_argument("--output", type=Path, default=Path("score"), help="folder for the curve")
    text = f"leave out the {NEIGHBOURS}-NN accuracy, which needs labels"
    parser.add_argument("--no-knn", action="store_true", help=text)
    text = f"average the features of the {NEIGHBOURS}-NN over K views of each image"
    parser.add_argument("--knn-views", type=int, metavar="K", help=text)
    parser.add_argument("--json", action="store_true", help="print protocol and ranked rows in JSON, nothing else")
    flags, of_protocol, changes = split(arguments)
    options = parser.parse_args(flags)
    checked(options.knn_views, int | None, "--knn-views", VIEWS)
    protocol, output = Protocol.read(options.protocol, of_protocol), options.output.expanduser()

    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        print(f"protocol {protocol.hash}: {json.dumps(asdict(protocol))}")
        runs = checkpoints.open_checkpoints(options.folders, changes)
        names = distinct_names(runs)
        places = [rows_file(run, options.rows) for run in runs]
        for place in () if options.another_protocol else places:
            _check_earlier(place, protocol)
        if options.epochs:
            files.writable_folder(output, "--output")
        scored = []
        for name, run, place in zip(names, runs, places, strict=True):
            for checkpoint in _each_epoch(run) if options.epochs else [run]:
                row = score_checkpoint(
                    checkpoint,
                    protocol,
                    neighbours=not options.no_knn,
                    neighbour_views=options.knn_views,
                    folder=place.parent,
                )
                rows.append(place, row)
                scored.append((name, row))
        if not scored:
            reason = "--epochs: no checkpoint of a whole epoch that can be read"
            raise UsageError("checkpoint.missing", f"{reason}; leave it out to score what was saved within an epoch")
        ranked = sorted(scored, key=lambda pair: np.nan_to_num(-pair[1]["metrics"]["view_information"], nan=np.inf))
        print(_table(ranked))
        if options.epochs:
            draw_curves(scored, output / "view-information")
            print(f"curve (PNG, PDF) in '{options.output}'")
        print(f"rows in {', '.join(sorted({str(place) for place in places}))}")
    if options.json:
        document: dict[str, Any] = {"protocol_hash": protocol.hash, "protocol": asdict(protocol)}
        document["rows"] = [row | {"metrics": _without_nan(row["metrics"])} for _, row in ranked]
        print(json.dumps(document, indent=1))


def _without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """NaN becomes None, because JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _check_earlier(file: Path, protocol: Protocol) -> None:
    """Refuse to add rows to a file with rows of another protocol: scores of two protocols cannot be compared."""
    earlier = [row["settings"] for row in rows.read(file) if row["stage"] == "score"] if file.is_file() else []
    ours = asdict(protocol)
    if earlier and ours not in earlier:
        reason = f"'{file}' has rows of another protocol: {', '.join(compare.differences(earlier[-1], ours))}"
        raise UsageError("protocol", f"{reason}; take theirs, or add --another-protocol and do not compare the scores")


def _each_epoch(run: Checkpoint) -> Iterator[Checkpoint]:
    if run.folder == run.path:  # a file of weights, not a run
        yield run
    for _, path in checkpoints.by_epoch(run.folder):
        try:
            checkpoints.load(path, weights_alone=True)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; it is passed over", stacklevel=2)
            continue
        yield replace(run, path=path)


def _table(ranked: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    columns = {key: title for key, title in _COLUMNS.items() if any(key in row["metrics"] for _, row in ranked)}
    lines = []
    for place, (name, row) in enumerate(ranked, start=1):
        about = (name, str(row["epochs"]), str(row["width"]), f"{row['images']} {row['of']}")
        lines.append((str(place), [Cell(text) for text in (*about, *(_cell(row["metrics"], key) for key in columns))]))
    notes = [NO_DECAY] if any(no_decay(row["metrics"]) for _, row in ranked) else []
    return to_text(Table(["", "run", "epochs", "width", "images", *columns.values()], lines, notes))


def _cell(metrics: Mapping[str, float], key: str) -> str:
    if key not in metrics:
        return "–"
    half_width = metrics.get(f"{key}_half_width")
    return f"{metrics[key]:.2f}" + ("" if half_width is None else f" ± {half_width:.2f}")


def draw_curves(scored: Sequence[tuple[str, Mapping[str, Any]]], stem: Path) -> None:
    """Draw ``stem``.png and .pdf: a view's information by epoch and, with labels, the 20-NN accuracy below; one line per run.

    ``scored`` are pairs of a run's name and a row of stage ``score``, in the order of epochs.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from emim_solo.results.palette import PALETTE

    keys = [key for key in ("view_information", "knn_acc1") if any(key in row["metrics"] for _, row in scored)]
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name starts no formula
        figure = Figure(figsize=(5.2, 2.6 * len(keys) + 0.4), layout="constrained")
        panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
        for axes, key in zip(panels, keys, strict=True):
            for number, name in enumerate(dict(scored)):
                own = [row for run, row in scored if run == name and key in row["metrics"]]
                epochs = [row["epochs"] for row in own]
                values = np.array([row["metrics"][key] for row in own])
                widths = np.array([row["metrics"].get(f"{key}_half_width", 0.0) for row in own])
                colour = PALETTE[number % len(PALETTE)]
                axes.plot(epochs, values, marker="o", markersize=3.5, color=colour, label=name)
                axes.fill_between(epochs, values - widths, values + widths, color=colour, alpha=0.2, linewidth=0)
            axes.set_ylabel(_COLUMNS[key])
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].legend(frameon=False, fontsize=8)
        panels[-1].set_xlabel("epochs")
        files.write_figure(stem, figure)
