"""Linear evaluation of frozen features, which are computed once: solo-learn's LinearModel, and a logistic regression."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from emim_solo.evaluation.features import Features, Split, all_finite, fits_in_memory, pieces
from emim_solo.ground.settings import read, setting
from emim_solo.suite import as_dict, load_suite
from emim_solo.suite.api import device_of

LOGISTIC_ITERATIONS = 300


@dataclass(frozen=True)
class OptimizerSettings:
    """As solo-learn's ``optimizer``. None means solo-learn's default."""

    name: str = "sgd"
    batch_size: int = setting(256, least=1, most=2**31 - 1)
    lr: float = setting(0.3, least=0)
    weight_decay: float = setting(1e-2, least=0)
    kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class SchedulerSettings:
    """As solo-learn's ``scheduler``. None means solo-learn's default."""

    name: str = "step"
    lr_decay_steps: list[int] | None = setting([60, 80], least=1)
    min_lr: float | None = setting(None, least=0)
    warmup_start_lr: float | None = setting(None, least=0)
    warmup_epochs: float | None = setting(None, least=0)
    interval: str | None = setting(None, choices=("step", "epoch"))


@dataclass(frozen=True)
class LinearSettings:
    """Settings of linear evaluation, in solo-learn's schema.

    The defaults are those of solo-learn's scripts/linear/imagenet-100/vicreg.yaml, with two changes. First, a weight decay. Without
    it the digits' 1,437 images are overfitted: their accuracy is 2.2 points below the logistic regression's, with it 0.6. Second,
    features are standardised: after a ReLU their mean is several times their spread, which is ill-conditioned. ``standardise:
    False`` is solo-learn's protocol.
    """

    standardise: bool = True
    max_epochs: int = setting(100, least=1)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)


def complete_settings(changes: Any) -> dict[str, Any]:
    """Complete and check changes of :class:`LinearSettings` (a config or a mapping) before features are computed.

    UsageError for an unknown key, or a value that solo-learn's LinearModel cannot take.
    """
    settings = OmegaConf.create(_without_none(asdict(read(LinearSettings, {} if changes is None else changes))))
    load_suite().check_values(settings, linear=True)
    return as_dict(settings)


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value is not None
    }


class _Known(nn.Module):
    """Stands in for the backbone that solo-learn expects. It only standardises features that are already computed."""

    mean: Tensor
    scale: Tensor

    def __init__(self, train: Tensor, *, standardise: bool) -> None:
        super().__init__()
        self.num_features = train.shape[1]
        mean, scale = _moments(train)
        self.register_buffer("mean", mean if standardise else torch.zeros_like(mean))
        self.register_buffer("scale", torch.where(scale > 0, scale, 1) if standardise else torch.ones_like(scale))

    def forward(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.scale


def _moments(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, combined from those of the pieces."""
    of_pieces = [
        (torch.tensor(len(piece) / len(matrix)), *torch.std_mean(piece, dim=0, correction=0))
        for piece in pieces(matrix)
    ]
    shares, scales, means = (torch.stack(parts).double() for parts in zip(*of_pieces, strict=True))
    share = shares[:, None]
    mean = (share * means).sum(dim=0)
    scale = (share * (scales.square() + (means - mean).square())).sum(dim=0).sqrt()
    return mean.float(), scale.float()


def _batches(split: Split, size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Batches of features and labels, shuffled if there is a generator. A batch is one read of many rows, which is faster."""
    images = TensorDataset(split.backbone, split.labels)
    order = SequentialSampler(images) if generator is None else RandomSampler(images, generator=generator)
    return DataLoader(images, batch_size=None, sampler=BatchSampler(order, size, drop_last=False), generator=generator)


def linear(features: Features, cfg: DictConfig, settings: Any = None, *, seed: int = 0) -> dict[str, float]:
    """Train solo-learn's LinearModel on the features of the backbone. ``settings`` are changes of :class:`LinearSettings`.

    ``cfg`` is the completed config of the pretraining. The seed determines the classifier's first weights and the order of images.
    Returns, in percent, ``acc1`` and ``acc5`` on the validation images after the last epoch, and ``train_acc1`` in this epoch. All
    are NaN if features are not finite.
    """
    train, val = features.train, features.to_judge()
    if not all_finite(train.backbone, val.backbone):
        return dict.fromkeys(("acc1", "acc5", "train_acc1"), math.nan)
    suite = load_suite()
    complete = suite.complete_linear(_linear_config(cfg, complete_settings(settings)))
    seed_everything(seed, workers=True, verbose=False)
    batch = complete.optimizer.batch_size
    train_loader, val_loader = _batches(train, batch, torch.Generator().manual_seed(seed)), _batches(val, batch)
    model = suite.linear_model(_Known(train.backbone, standardise=complete.standardise), complete)
    trainer = quiet_trainer(
        max_epochs=complete.max_epochs,
        accelerator="gpu" if device_of(cfg).type == "cuda" else "cpu",
        # Many bars of a fraction of a second each: of use on a terminal, not in a log file.
        enable_progress_bar=bool(cfg.get("enable_progress_bar", True)) and sys.stdout.isatty(),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=complete.max_epochs,
    )
    trainer.fit(model, train_loader, val_loader)
    metrics = trainer.callback_metrics
    return {
        "acc1": float(metrics["val_acc1"]),
        "acc5": float(metrics["val_acc5"]),
        "train_acc1": float(metrics.get("train_acc1_epoch", metrics.get("train_acc1", math.nan))),
    }


def quiet_trainer(**kwargs: Any) -> Trainer:
    """A Trainer on one device that writes no files and prints no lines, because it is one step of a larger command."""
    lines = logging.getLogger("lightning.pytorch")
    level = lines.level
    lines.setLevel(logging.ERROR)
    try:
        return Trainer(devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, **kwargs)
    finally:
        lines.setLevel(level)


def _linear_config(cfg: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """A config in the schema of linear evaluation, from the pretraining's config and complete settings."""
    keys = ("dataset", "train_path", "val_path", "num_workers", "no_labels", "num_classes")
    base = {
        "name": f"{cfg.name}-linear",
        "pretrain_method": cfg.method,
        "pretrained_feature_extractor": "features.ckpt",  # the schema needs it, but nothing reads it
        "backbone": {"name": "resnet18"},  # the same
        "data": {key: cfg.data[key] for key in keys if key in cfg.data} | {"format": "image_folder"},
        "devices": [0],
        "performance": {"disable_channel_last": True},  # features have no channels
        "finetune": False,
    }
    return OmegaConf.create(base | dict(settings))


def logistic(features: Features, *, device: torch.device | str = "cpu") -> dict[str, float]:
    """Multinomial logistic regression (L2, C = 1) on standardised features of the backbone, by scikit-learn in float64.

    Features of more than :data:`emim_solo.evaluation.features.IN_MEMORY` bytes would need several times their memory there. For
    them L-BFGS minimises the same function to the same tolerance in float32, piece by piece on ``device``. Returns
    ``backbone_acc1``, the top-1 accuracy on the validation images in percent; NaN if features are not finite.
    """
    train, val = features.train, features.to_judge()
    if not all_finite(train.backbone, val.backbone):
        return {"backbone_acc1": math.nan}
    accuracy = _regress_whole(train, val) if fits_in_memory(train.backbone) else _regress_in_pieces(train, val, device)
    return {"backbone_acc1": 100 * accuracy}


def _regress_whole(train: Split, val: Split) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=LOGISTIC_ITERATIONS))
    with warnings.catch_warnings():  # collapsed features converge slowly, and their accuracy says nothing
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train.backbone.double().numpy(), train.labels.numpy())
    return float(classifier.score(val.backbone.double().numpy(), val.labels.numpy()))


def _regress_in_pieces(train: Split, val: Split, device: torch.device | str) -> float:
    classifier = nn.Linear(train.backbone.shape[1], int(train.labels.max()) + 1)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    model = nn.Sequential(_Known(train.backbone, standardise=True), classifier).to(device)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(),
        max_iter=LOGISTIC_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-4,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = classifier.weight.square().sum() / (2 * len(train.labels))
        loss.backward()
        for piece, labels in _labelled(train, device):
            part = F.cross_entropy(model(piece), labels, reduction="sum") / len(train.labels)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        correct = sum(int((model(piece).argmax(dim=1) == labels).sum()) for piece, labels in _labelled(val, device))
    return correct / len(val.labels)


def _labelled(split: Split, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for piece in pieces(split.backbone):
        yield piece.to(device), split.labels[start : start + len(piece)].to(device)
        start += len(piece)
