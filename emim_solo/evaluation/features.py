"""Features of a checkpoint: the frozen backbone's and the projector's, in evaluation mode, of every image."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
"""Bytes of one matrix of features in float32 up to which it is kept and used whole. A larger one lies in a file, in
float16 where that is fine enough, and is used piece by piece."""

_PIECE = 2**28  # bytes, in float32
_ROUNDING = 0.01  # of a feature's standard deviation: what float16 may add to it


@dataclass(frozen=True)
class Split:
    """Features of one split, row i being image i of its dataset; in float32, or float16 if large (:func:`pieces`)."""

    backbone: Tensor  # (N, d)
    projector: Tensor | None  # (N, p), or None where the method has no projector to call on single images
    labels: Tensor  # (N,); -1 throughout where the images have none

    def parts(self) -> dict[str, Tensor]:
        """Features by name, as far as there are any."""
        return {part: matrix for part in PARTS if (matrix := getattr(self, part)) is not None}


@dataclass(frozen=True)
class Features:
    """Features of a run's training and, if any, validation images; ``classes`` are names by label, if any."""

    train: Split
    val: Split | None
    classes: list[str]

    def to_judge(self) -> Split:
        """The validation images, whose labels accuracies are made of; UsageError if there are none."""
        if self.val is None or not self.classes:
            raise UsageError("data.val_path", "accuracies need labels: expected data.val_path with class folders")
        return self.val

    def save(self, path: Path) -> None:
        """Write to a file that is either whole or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        val = None if self.val is None else vars(self.val)
        # To an open file: given a path, torch says nothing of a full disk but the position where it failed.
        with whole(path) as unfinished, open(unfinished, "wb") as file:
            try:
                torch.save({"train": vars(self.train), "val": val, "classes": self.classes}, file)
            except RuntimeError as error:  # torch says where in the file it was, and why only in what came before
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    @staticmethod
    def load(path: Path) -> Features:
        """What :meth:`save` has written, mapped into memory: read from disk as it is used; UsageError if damaged."""
        with in_one_line("features.damaged", f"features '{path}' are damaged", "remove the file"):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            val = None if content["val"] is None else Split(**content["val"])
            features = Features(Split(**content["train"]), val, content["classes"])
        return features


def is_whole(matrix: Tensor) -> bool:
    """Whether a matrix is small enough to be used at once."""
    return 4 * matrix.numel() <= IN_MEMORY


def pieces(matrix: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix in order, in float32: all at once up to :data:`IN_MEMORY` bytes, some 256 MB at a time beyond."""
    rows = len(matrix) if is_whole(matrix) else _PIECE // (4 * matrix.shape[1])
    for piece in matrix.split(max(1, rows)):
        yield piece.float()


def all_finite(*matrices: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in any of the matrices."""
    return all(bool(torch.isfinite(piece).all()) for matrix in matrices for piece in pieces(matrix))


class _Rows:
    """Batches of features that become one matrix; many go to a file without a name, which goes with the matrix."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.batches: list[Tensor] = []
        self.count = self.written = 0
        self.file: Any = None
        self.dtype = torch.float16
        self.mean: Any = 0.0  # of each feature over the rows that are written
        self.squares: Any = 0.0  # sum of squared distances from it

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
        """Go on in float32, in another file that begins with what was written in float16."""
        written = pieces(self.matrix()) if self.written else []
        self.dtype, self.file = torch.float32, tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - as above
        for piece in written:
            self._put(piece)

    def _put(self, batch: Tensor) -> None:
        # Not through the mapping: writing there to a full disk ends the process without a word.
        self.file.write(batch.to(self.dtype).contiguous().numpy())

    def _fits_half(self, batch: Tensor) -> bool:
        """Whether float16 changes each feature of a batch by little of its spread over the images up to now."""
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
    """Features of every image of a loader of images and labels, in its order, on the CPU; OSError for a full disk.

    The model is left in evaluation mode. ``title`` is that of the progress bar, None for none. Features of more than
    :data:`IN_MEMORY` go on the disk of ``folder``, if there is one. With ``views`` the loader gives so many images of one
    label after each other, whose features are averaged.
    """
    model.eval()
    named = [*model.named_parameters(), *model.named_buffers()]
    floating = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    show: Any = model
    if any(tensor.dtype != torch.float32 for tensor in floating.values()):
        # A run in precision=bf16-true: in float32 it has the features that its checkpoint will have.
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
    """Features of all images of a run, as the suite shows them in evaluation; large ones go on the disk of ``folder``.

    With ``views`` they are, of training and validation images, the mean of the features of so many random views of each
    image, drawn as the run's first augmentation says: EMP-SSL's evaluation (arXiv 2304.03977, bag of features).

    UsageError for other classes in validation than in training, or ``views`` of weights without an augmentation; OSError
    for a full disk.
    """
    cfg, folder, images = checkpoint.cfg, folder or checkpoint.rows_file.parent, checkpoint.images
    if views is not None and "rrc" not in cfg.augmentations[0]:
        raise UsageError("views", f"views={views}: {cfg.name} is of no run, so it has no augmentation; leave it out")
    images.check_classes()
    train: Any
    if views is None:
        train, val = load_suite().evaluation_loaders(cfg, images)
    else:
        datasets = view_datasets(cfg, cfg.augmentations[0], views, images)
        train, val = (each if each is None else view_loader(cfg, each, views, cfg.seed) for each in datasets)
    of = partial(extract, checkpoint.model().to(device_of(cfg)), folder=folder, views=views or 1)
    return Features(
        of(train, f"{cfg.name}: training images"),
        None if val is None else of(val, f"{cfg.name}: validation images"),
        [] if cfg.data.get("no_labels", False) else class_names(train.dataset, cfg.data.num_classes or 0),
    )


def class_names(dataset: Any, number: int) -> list[str]:
    """Names of the classes by label: the dataset's own where it has them."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names: Sequence[Any] = getattr(dataset, "classes", range(number))
    return [str(name) for name in names]
