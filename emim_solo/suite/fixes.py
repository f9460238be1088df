"""Fixes for faults of solo-learn's methods in training, as classes in front of the methods' own: none of its files changes.

"In front" means earlier in the bases: ``self.log`` then finds this class first. So one class serves both generations.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from emim_solo.ground.errors import UsageError
from emim_solo.suite.loaders import replaced
from emim_solo.suite.views import ViewsTogether

_OF_LABELS = re.compile(r"(^|_)(acc\d*|class_loss|val_loss)$")


def zero_over_nothing(loss: Tensor, targets: Tensor) -> Tensor:
    """A mean loss, shape (), over the targets other than -1; 0 instead of NaN if there are none."""
    return torch.where((targets != -1).any(), loss, loss.new_zeros(()))


class LabelsOptional(LightningModule):
    """In front of a generation's base method: without labels the class loss is 0 instead of NaN and is not logged."""

    no_labels: bool = False
    knn_eval: bool

    def without_labels(self) -> None:
        """From now on log no accuracy or class loss, and keep no features for k-NN."""
        self.no_labels = True
        self.knn_eval = False

    def _base_shared_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        out = super()._base_shared_step(X, targets)  # type: ignore[misc]
        return out | {"loss": zero_over_nothing(out["loss"], targets)}

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        out = super()._shared_step_momentum(X, targets)  # type: ignore[misc]
        return out | {"loss": zero_over_nothing(out["loss"], targets)} if "loss" in out else out  # none: no classifier

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Lightning's, which ``log_dict`` calls too, except for values that mean nothing without labels."""
        if not (self.no_labels and _OF_LABELS.search(name)):
            super().log(name, *args, **kwargs)


class Fixes(LabelsOptional):
    """In front of any method: it is saved as plain data, and a resumed run equals the uninterrupted one.

    With several processes, all resume with the queues and memory banks of rank zero, the only one that saves.
    """

    knn: Any  # with knn_eval
    momentum_updater: Any  # of momentum methods
    kmeans: Any  # of DeepClusterV2
    whitening: Any  # of W-MSE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(self, "whitening"):
            self.whitening.forward = _named_where_singular(self.whitening.forward)
        self._of_a_fresh_model = frozenset(self.state_dict())
        self._restored: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        """The method's own, but rates that a schedule does not change are kept as data, not as a function."""
        configured = super().configure_optimizers()
        schedules = configured[1] if isinstance(configured, tuple | list) else []
        for schedule in schedules:
            _keep_static_rates_as_data(schedule["scheduler"] if isinstance(schedule, dict) else schedule)
        return configured

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move buffers that only training creates (queues, memory banks) aside; a new model can load the rest strictly."""
        super().on_save_checkpoint(checkpoint)
        weights = checkpoint["state_dict"]
        made = [name for name in weights if name not in self._of_a_fresh_model]
        checkpoint["made_in_training"] = {name: weights.pop(name) for name in made}
        if hasattr(self, "momentum_updater"):
            checkpoint["cur_tau"] = self.momentum_updater.cur_tau

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the buffers that :meth:`on_save_checkpoint` moved aside."""
        super().on_load_checkpoint(checkpoint)
        self._restored = checkpoint.get("made_in_training", {})
        for schedule in checkpoint.get("lr_schedulers", []):
            schedule.pop("max_epochs", None)  # main's schedule would end at the old run's end
        if "cur_tau" in checkpoint and hasattr(self, "momentum_updater"):
            self.momentum_updater.cur_tau = checkpoint["cur_tau"]

    def on_train_start(self) -> None:
        """The method's own, which creates queues and memory banks; then fill them from the checkpoint, if they fit."""
        with torch.random.fork_rng(devices=[]):  # only a resumed run draws random numbers here again
            super().on_train_start()
        for name, value in self._restored.items():
            fresh = self._buffers.get(name)
            if fresh is None:  # a cache; its owner makes it again
                continue
            if fresh.shape != value.shape:
                shapes = f"has shape {tuple(value.shape)}, this run's {tuple(fresh.shape)}"
                todo = "resume with the same images, optimizer.batch_size and devices"
                raise UsageError("resume_from_checkpoint", f"the checkpoint's {name} {shapes}: {todo}")
            fresh.copy_(value)
        self._restored = {}
        if hasattr(self, "momentum_updater"):
            self.last_step = self.trainer.global_step  # solo-learn's 0 would count an unfinished step as finished
        if hasattr(self, "kmeans"):
            self.kmeans.cluster_memory = _on_one_device(self.kmeans.cluster_memory, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
        """The method's own; k-means draws its first centroids from the epoch's seed, whatever was drawn before."""
        if self.knn_eval:  # epochs without a validation (check_val_every_n_epoch) leave their features behind
            self.knn.reset()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            super().on_train_epoch_start()


@cache
def with_fixes(method: type[LightningModule]) -> type[LightningModule]:
    """A method's class under the same name, with :class:`Fixes` in front of it and :class:`ViewsTogether` behind it."""
    module = sys.modules[method.__module__]
    if hasattr(module, "deepclusterv2_loss_func"):
        _first_epoch_of_deepcluster(module)
    base: Any = importlib.import_module("solo.methods.base").BaseMethod
    behind = type(base.__name__, (ViewsTogether, base), {})
    return type(method.__name__, (Fixes, method, behind), {"__module__": method.__module__})


def _first_epoch_of_deepcluster(module: ModuleType) -> None:
    """Before the first epoch's end no image has a cluster: the loss over no images is 0; solo-learn has NaN."""
    loss_func = module.deepclusterv2_loss_func

    def deepclusterv2_loss_func(outputs: Tensor, assignments: Tensor, temperature: float = 0.1) -> Tensor:
        return zero_over_nothing(loss_func(outputs, assignments, temperature), assignments)

    module.deepclusterv2_loss_func = deepclusterv2_loss_func  # type: ignore[attr-defined]


@cache
def knn_of_all_classes() -> None:
    """Make solo-learn's online k-NN count all classes: it counts those of the validation images, and fails if others are near.

    ``limit_val_batches`` shows the first images only, and those of a folder come class by class.
    """
    module = importlib.import_module("solo.utils.knn")
    kind = module.WeightedKNNClassifier
    compute = kind.compute

    def compute_of_all(self: Any) -> Any:
        labels = [*self.train_targets, *self.test_targets]
        classes = torch.arange(int(torch.cat(labels).max()) + 1 if labels else 0)
        with replaced(module, torch=SimpleNamespace(**{**vars(torch), "unique": lambda _: classes})):
            return compute(self)

    kind.compute = compute_of_all


def _on_one_device(cluster_memory: Callable[..., Any], processes: int) -> Callable[..., Any]:
    """k-means' assignments are on the CPU and index its memory, which may be on a GPU: put both on one device."""

    def cluster(index: Tensor, embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
        device = embeddings.device
        if processes == 1:  # with several processes solo-learn itself gathers on the CPU
            index, embeddings = index.cpu(), embeddings.cpu()
        assignments, centroids = cluster_memory(index, embeddings)
        return assignments.to(device), [each.to(device) for each in centroids]

    return cluster


def _named_where_singular(whiten: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """W-MSE's Cholesky factor may not exist: too few images for its dimensions, or collapsed ones. Name the cause."""

    def whiten_or_say(x: Tensor) -> Tensor:
        try:
            return whiten(x)
        except torch.linalg.LinAlgError as error:
            text = f"wmse cannot whiten {x.shape[1]} dimensions with {x.shape[0]} images, their covariance is singular"
            todo = "lower method_kwargs.proj_output_dim to half of whitening_size, or set whitening_eps above 0"
            raise FloatingPointError(f"{text}: {todo}") from error

    return whiten_or_say


class _StaticRates(LRScheduler):
    """In front of a schedule: some parameter groups keep their learning rate (SimSiam's predictor)."""

    static_rates: dict[int, float]

    def get_lr(self) -> list[Any]:
        return [self.static_rates.get(group, rate) for group, rate in enumerate(super().get_lr())]


def _keep_static_rates_as_data(schedule: Any) -> None:
    """solo-learn replaces ``get_lr`` on the object: a checkpoint would contain that function, and the optimizer with it."""
    replaced = schedule.__dict__.pop("get_lr", None)
    if replaced is not None:
        groups, rates = (replaced.keywords[name] for name in ("param_group_indexes", "lrs_to_replace"))
        schedule.static_rates = dict(zip(groups, rates, strict=True))
        schedule.__class__ = type(type(schedule).__name__, (_StaticRates, type(schedule)), {})
