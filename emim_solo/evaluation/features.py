"""Features of a checkpoint: the frozen backbone's and the projector's, in evaluation mode, of every image."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from emim_solo.errors import UsageError
from emim_solo.pretraining import check_checkpoint, last_checkpoint
from emim_solo.suite import load_suite

PARTS = ("backbone", "projector")


@dataclass(frozen=True)
class Split:
    """Features of one split, row i being image i of its dataset.

    Attributes:
        backbone: ``(N, d)``.
        projector: ``(N, p)``, or None where the method has no projector to call on single images.
        labels: ``(N,)``.
    """

    backbone: Tensor
    projector: Tensor | None
    labels: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Features by name, as far as there are any."""
        return {part: matrix for part in PARTS if (matrix := getattr(self, part)) is not None}


@dataclass(frozen=True)
class Features:
    """Features of the training and the validation images of one run."""

    train: Split
    val: Split
    classes: list[str]

    def save(self, path: Path) -> None:
        """Write to a file that is either whole or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        torch.save(asdict(self), unfinished)
        unfinished.rename(path)

    @staticmethod
    def load(path: Path) -> Features:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return Features(Split(**content["train"]), Split(**content["val"]), content["classes"])


@dataclass(frozen=True)
class Checkpoint:
    """A run as it lies on disk.

    Attributes:
        folder: ``<checkpoint.dir>/<method>/<version>``, with ``args.json``.
        path: its latest ``.ckpt`` file.
        cfg: the completed config it was trained with.
    """

    folder: Path
    path: Path
    cfg: DictConfig

    def model(self) -> LightningModule:
        """The trained method in evaluation mode, on the device to evaluate on."""
        suite = load_suite()
        check_checkpoint(self.path, self.cfg, suite.build(self.cfg))
        return suite.load_checkpoint(self.path, self.cfg).to(device_of(self.cfg)).eval()


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Find the config and the latest checkpoint in a run's folder.

    Raises:
        UsageError: not such a folder, of another method than this solo-learn has, or without validation labels.
    """
    folder = Path(folder)
    arguments = folder / "args.json"
    if not arguments.is_file():
        raise UsageError(
            f"no args.json in '{folder}': expected the folder of a run, <checkpoint.dir>/<method>/<version>, "
            "as the pretraining prints it"
        )
    path = last_checkpoint(folder)
    if path is None:
        raise UsageError(
            f"no checkpoint in '{folder}': expected a .ckpt file; train again with checkpoint.enabled=True"
        )
    cfg = OmegaConf.create(json.loads(arguments.read_text()))
    suite = load_suite()
    if cfg.method not in suite.methods():
        raise UsageError(f"'{folder}' is of method '{cfg.method}', which solo-learn {suite.version} does not have")
    if cfg.data.val_path is None or cfg.data.get("no_labels", False):
        raise UsageError(f"'{folder}' was trained without labels or validation images: evaluation needs data.val_path")
    return Checkpoint(folder, path, cfg)


def device_of(cfg: DictConfig) -> torch.device:
    """The first GPU where there is one and the run was not told to stay on the CPU."""
    on_gpu = torch.cuda.is_available() and cfg.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if on_gpu else "cpu")


@torch.no_grad()
def extract(model: LightningModule, loader: DataLoader, title: str) -> Split:
    """Features of every image of a loader, in its order, in float32 on the CPU."""
    model.eval()
    backbone: list[Tensor] = []
    projector: list[Tensor] = []
    labels: list[Tensor] = []
    for images, targets in tqdm(loader, desc=title, unit="batch", leave=False):
        out = model(images.to(model.device, non_blocking=True))
        backbone.append(out["feats"].float().cpu())
        if "z" in out:
            projector.append(out["z"].float().cpu())
        labels.append(torch.as_tensor(targets).long())
    return Split(torch.cat(backbone), torch.cat(projector) if projector else None, torch.cat(labels))


def extract_features(checkpoint: Checkpoint) -> Features:
    """Features of all training and validation images of a run, as the suite shows them in evaluation."""
    model = checkpoint.model()
    train, val = load_suite().evaluation_loaders(checkpoint.cfg)
    assert val is not None  # open_checkpoint has refused a run without them
    name = checkpoint.cfg.name
    return Features(
        extract(model, train, f"{name}: training images"),
        extract(model, val, f"{name}: validation images"),
        class_names(val.dataset, int(checkpoint.cfg.data.num_classes)),
    )


@torch.no_grad()
def extract_views(checkpoint: Checkpoint, *, limit: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of two augmented views of the same training images.

    Args:
        checkpoint: of the run.
        limit: number of images at most.
        seed: of the order and of the augmentations.

    Returns:
        By part (backbone, projector): the two views, ``(N, d)`` each.
    """
    model = checkpoint.model()
    seed_everything(seed, workers=True, verbose=False)
    loader = load_suite().train_loader(checkpoint.cfg)
    batches = max(1, math.ceil(min(limit, len(loader.dataset)) / loader.batch_size))  # type: ignore[arg-type, operator]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    progress = tqdm(
        loader, desc=f"{checkpoint.cfg.name}: views", unit="batch", leave=False, total=min(batches, len(loader))
    )
    for (_, views, *_), _ in zip(progress, range(batches), strict=False):
        outs = [model(view.to(model.device, non_blocking=True)) for view in views[:2]]
        for part, key in zip(PARTS, ("feats", "z"), strict=True):
            if key in outs[0]:
                found.setdefault(part, []).append((outs[0][key].float().cpu(), outs[1][key].float().cpu()))
    return {
        part: (torch.cat([one for one, _ in pairs])[:limit], torch.cat([other for _, other in pairs])[:limit])
        for part, pairs in found.items()
    }


def class_names(dataset: Any, number: int) -> list[str]:
    """Names of the classes by label: the dataset's own where it has them."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names: Sequence[Any] = getattr(dataset, "classes", range(number))
    return [str(name) for name in names]
