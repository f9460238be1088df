"""Features of every image from a checkpoint: of the frozen backbone and of the projector, in evaluation mode."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from emim_solo.checkpoints.opening import Checkpoint
from emim_solo.evaluation.protocol import PARTS
from emim_solo.evaluation.views import view_datasets, view_loader
from emim_solo.ground.errors import UsageError
from emim_solo.ground.files import whole
from emim_solo.suite import load_suite
from emim_solo.suite.api import device_of, in_one_line

IN_MEMORY = 2**29
"""A matrix of features of at most so many bytes in float32 stays in memory. A larger one goes to a file, in float16 if that is
precise enough, and is used piece by piece."""

_PIECE = 2**28  # bytes, in float32
_ROUNDING = 0.01  # largest error of float16, as a share of a feature's standard deviation


@dataclass(frozen=True)
class Split:
    """Features of one split; row i is image i of its dataset. In float32, or float16 if large: read them by :func:`pieces`."""

    backbone: Tensor  # (N, d)
    projector: Tensor | None  # (N, p); None if the method has no projector for single images
    labels: Tensor  # (N,); all -1 if the images have no labels

    def parts(self) -> dict[str, Tensor]:
        """The matrices that exist, by name."""
        return {part: matrix for part in PARTS if (matrix := getattr(self, part)) is not None}


@dataclass(frozen=True)
class Features:
    """Features of a run's training images and, if any, validation images. ``classes`` are the names by label; empty without labels."""

    train: Split
    val: Split | None
    classes: list[str]

    def to_judge(self) -> Split:
        """The validation split, on which accuracies are computed; UsageError if there is none, or no labels."""
        if self.val is None or not self.classes:
            raise UsageError("data.val_path", "accuracies need labels: expected data.val_path with class folders")
        return self.val

    def save(self, path: Path) -> None:
        """Write the features to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        val = None if self.val is None else vars(self.val)
        # To an open file: with a path, torch reports a full disk only by the position where it failed.
        with whole(path) as unfinished, open(unfinished, "wb") as file:
            try:
                torch.save({"train": vars(self.train), "val": val, "classes": self.classes}, file)
            except RuntimeError as error:  # the reason is only in the error's context
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    @staticmethod
    def load(path: Path) -> Features:
        """Open a file of :meth:`save`, mapped into memory: it is read from disk when used. UsageError if it is damaged."""
        with in_one_line("features.damaged", f"features '{path}' are damaged", "remove the file"):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            val = None if content["val"] is None else Split(**content["val"])
            return Features(Split(**content["train"]), val, content["classes"])


def fits_in_memory(matrix: Tensor) -> bool:
    """Whether a matrix is small enough to be used at once."""
    return 4 * matrix.numel() <= IN_MEMORY


def pieces(matrix: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix in order, in float32: all at once up to :data:`IN_MEMORY` bytes, else about 256 MB at a time."""
    rows = len(matrix) if fits_in_memory(matrix) else _PIECE // (4 * matrix.shape[1])
    for piece in matrix.split(max(1, rows)):
        yield piece.float()


def all_finite(*matrices: Tensor) -> bool:
    """Whether no matrix has NaN or infinite values."""
    return all(bool(torch.isfinite(piece).all()) for matrix in matrices for piece in pieces(matrix))


class _Rows:
    """Collects batches of features into one matrix. A large one is in a nameless file, which is deleted with the matrix."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.batches: list[Tensor] = []
        self.count = self.written = 0
        self.file: Any = None
        self.dtype = torch.float16
        self.mean: Any = 0.0  # of each feature over the rows that are written
        self.squares: Any = 0.0  # sum of squared distances from the mean

    def append(self, batch: Tensor) -> None:
        self.batches.append(batch.float().cpu())
        self.count += len(batch)
        if self.folder is not None and 4 * self.count * batch.shape[1] > IN_MEMORY:
            self._write()

    def _write(self) -> None:
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - open as long as the matrix
        for batch in self.batches:
            if self.dtype == torch.float16 and not self._fits_half(batch):
                self._widen()
            self._put(batch)
            self.written += len(batch)
        self.batches.clear()

    def _widen(self) -> None:
        """Go on in float32: copy the rows that are written in float16 into a new file."""
        written = pieces(self.matrix()) if self.written else []
        self.dtype, self.file = torch.float32, tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - as above
        for piece in written:
            self._put(piece)

    def _put(self, batch: Tensor) -> None:
        # Not through the memory map: on a full disk that would end the process without an error.
        self.file.write(batch.to(self.dtype).contiguous().numpy())

    def _fits_half(self, batch: Tensor) -> bool:
        """Whether the error of float16 in a batch is small for each feature, compared with its spread over the images so far."""
        exact = batch.double()
        share = len(batch) / (self.written + len(batch))
        between = exact.mean(dim=0) - self.mean
        self.squares += (exact - exact.mean(dim=0)).square().sum(dim=0) + between.square() * share * self.written
        self.mean += between * share
        spread = (self.squares / (self.written + len(batch))).sqrt()
        error = (batch.half().double() - exact).square().mean(dim=0).sqrt()
        return bool(((error <= _ROUNDING * spread) | (spread == 0)).all())

    def matrix(self) -> Tensor:
        """``(N, d)``."""
        if self.file is None:
            return torch.cat(self.batches)
        self.file.flush()
        width, kind = len(self.mean), np.float16 if self.dtype == torch.float16 else np.float32
        return torch.from_numpy(np.memmap(self.file, dtype=kind, mode="c", shape=(self.written, width)))


@torch.no_grad()
def extract(
    model: LightningModule, loader: Iterable[Any], title: str | None, *, folder: Path | None = None, views: int = 1
) -> Split:
    """Features of every image of a loader of images and labels, in its order, on the CPU. OSError if the disk is full.

    The model stays in evaluation mode afterwards. ``title`` is the title of the progress bar; None: no bar. Features of more than
    :data:`IN_MEMORY` bytes go to the disk of ``folder``, if given. The loader gives ``views`` views of an image after each other;
    their features are averaged.
    """
    model.eval()
    named = [*model.named_parameters(), *model.named_buffers()]
    floating = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    show: Any = model
    if any(tensor.dtype != torch.float32 for tensor in floating.values()):
        # A run in precision=bf16-true. Its checkpoint will be evaluated in float32, so its features are computed in float32 here, too.
        show = partial(functional_call, model, {name: tensor.float() for name, tensor in floating.items()})
    backbone, projector = _Rows(folder), _Rows(folder)
    labels: list[Tensor] = []
    for images, targets in tqdm(loader, desc=title, unit="batch", leave=False, disable=title is None):
        out = show(images.to(model.device, torch.float32, non_blocking=True))
        for rows, part in ((backbone, "feats"), (projector, "z")):
            if part in out:
                rows.append(out[part] if views == 1 else out[part].unflatten(0, (-1, views)).mean(dim=1))
        labels.append(torch.as_tensor(targets).long()[::views])
    return Split(backbone.matrix(), projector.matrix() if projector.count else None, torch.cat(labels))


def extract_features(checkpoint: Checkpoint, folder: Path | None = None, views: int | None = None) -> Features:
    """Features of all images of a run, with solo-learn's transform for evaluation. Large ones go to the disk of ``folder``.

    With ``views`` an image's features are the mean over so many random views of it, drawn by the run's first augmentation, for
    training and validation images alike. This is EMP-SSL's evaluation (arXiv 2304.03977, bag of features).

    UsageError if training and validation have different classes, or for ``views`` of weights without an augmentation. OSError if
    the disk is full.
    """
    cfg, folder, images = checkpoint.cfg, folder or checkpoint.rows_file.parent, checkpoint.images
    if views is not None and "rrc" not in cfg.augmentations[0]:
        raise UsageError(
            "views", f"views={views}: {cfg.name} is a file of weights, which has no augmentation; leave it out"
        )
    images.check_classes()
    train: Any
    if views is None:
        train, val = load_suite().evaluation_loaders(cfg, images)
    else:
        datasets = view_datasets(cfg, cfg.augmentations[0], views, images)
        train, val = (each if each is None else view_loader(cfg, each, views, cfg.seed) for each in datasets)
    dataset = train.dataset if views is None else train.dataset.dataset
    names = getattr(dataset, "classes", range(cfg.data.num_classes or 0))
    of = partial(extract, checkpoint.model().to(device_of(cfg)), folder=folder, views=views or 1)
    return Features(
        of(train, f"{cfg.name}: training images"),
        None if val is None else of(val, f"{cfg.name}: validation images"),
        [] if cfg.data.get("no_labels", False) else [str(name) for name in names],
    )
