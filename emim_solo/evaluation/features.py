"""Features of a checkpoint: the frozen backbone's and the projector's, in evaluation mode, of every image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from emim_solo.checkpoints import Checkpoint
from emim_solo.data import check_same_classes
from emim_solo.errors import UsageError
from emim_solo.files import whole
from emim_solo.suite import load_suite

PARTS = ("backbone", "projector")


@dataclass(frozen=True)
class Split:
    """Features of one split, row i being image i of its dataset.

    Attributes:
        backbone: ``(N, d)``.
        projector: ``(N, p)``, or None where the method has no projector to call on single images.
        labels: ``(N,)``; -1 throughout where the images have none.
    """

    backbone: Tensor
    projector: Tensor | None
    labels: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Features by name, as far as there are any."""
        return {part: matrix for part in PARTS if (matrix := getattr(self, part)) is not None}


@dataclass(frozen=True)
class Features:
    """Features of the images of one run.

    Attributes:
        train: of the training images.
        val: of the validation images, or None where there are none.
        classes: names by label; empty where the images have no labels.
    """

    train: Split
    val: Split | None
    classes: list[str]

    def to_judge(self) -> Split:
        """The validation images, whose labels accuracies are made of.

        Raises:
            UsageError: there are none, or no labels.
        """
        if self.val is None or not self.classes:
            raise UsageError("accuracies need validation images with labels: expected data.val_path with class folders")
        return self.val

    def save(self, path: Path) -> None:
        """Write to a file that is either whole or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # To an open file: given a path, torch says nothing of a full disk but the position where it failed.
        with whole(path) as unfinished, open(unfinished, "wb") as file:
            torch.save(asdict(self), file)

    @staticmethod
    def load(path: Path) -> Features:
        """Read what :meth:`save` has written.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            val = None if content["val"] is None else Split(**content["val"])
            return Features(Split(**content["train"]), val, content["classes"])
        except Exception as error:  # torch.load raises many types on a file that is not whole
            raise UsageError(f"features '{path}' are damaged ({type(error).__name__}): remove the file") from error


def device_of(cfg: DictConfig) -> torch.device:
    """The first GPU where there is one and the run was not told to stay on the CPU."""
    on_gpu = torch.cuda.is_available() and cfg.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if on_gpu else "cpu")


@torch.no_grad()
def extract(model: LightningModule, loader: Iterable[Any], title: str | None) -> Split:
    """Features of every image of a loader, in its order, in float32 on the CPU.

    Args:
        model: of any method of the suite, on its device; it is left in evaluation mode.
        loader: batches of images and labels.
        title: of the progress bar; None for none.
    """
    model.eval()
    # half, while a run trains in precision=bf16-true; none in ONNX
    precision = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    backbone: list[Tensor] = []
    projector: list[Tensor] = []
    labels: list[Tensor] = []
    for images, targets in tqdm(loader, desc=title, unit="batch", leave=False, disable=title is None):
        out = model(images.to(model.device, precision, non_blocking=True))
        backbone.append(out["feats"].float().cpu())
        if "z" in out:
            projector.append(out["z"].float().cpu())
        labels.append(torch.as_tensor(targets).long())
    return Split(torch.cat(backbone), torch.cat(projector) if projector else None, torch.cat(labels))


def extract_features(checkpoint: Checkpoint) -> Features:
    """Features of all images of a run, as the suite shows them in evaluation."""
    cfg = checkpoint.cfg
    model = checkpoint.model().to(device_of(cfg))
    train, val = load_suite().evaluation_loaders(cfg)
    if val is not None:  # may be others than those that it was trained on, which were checked then
        check_same_classes(train.dataset, val.dataset)
    return Features(
        extract(model, train, f"{cfg.name}: training images"),
        None if val is None else extract(model, val, f"{cfg.name}: validation images"),
        [] if cfg.data.get("no_labels", False) else class_names(train.dataset, cfg.data.num_classes or 0),
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
    model = checkpoint.model().to(device_of(checkpoint.cfg))
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
