"""solo-learn 1.0.2 (November 2021) on today's torch and Lightning. No installed file changes."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch
import torch
from torch.optim.lr_scheduler import LambdaLR

from emim_solo.suite.loaders import replaced


def install() -> None:
    """Make ``import solo`` work and its models train. Call it once, before that import."""
    # With the submodules, or they would be loaded twice.
    for name in ("", ".callbacks", ".loggers"):
        sys.modules["pytorch_lightning" + name] = importlib.import_module("lightning.pytorch" + name)
    # lightning-bolts, needed for one scheduler, does not install beside Lightning 2.
    bolts: Any = ModuleType("pl_bolts")
    bolts.LinearWarmupCosineAnnealingLR = linear_warmup_cosine_annealing
    for name in ("", ".optimizers", ".optimizers.lr_scheduler"):
        sys.modules["pl_bolts" + name] = bolts
    # solo-learn imports these if UMAP and DALI are installed, for 4 s: left out here, they can be imported later.
    optional: Any = dict.fromkeys(("solo.utils.auto_umap", "solo.utils.dali_dataloader", "solo.methods.dali"))
    sys.modules.update(optional)
    base = importlib.import_module("solo.methods.base")
    for name in optional:
        del sys.modules[name]
    linear = importlib.import_module("solo.methods.linear")
    for model in (base.BaseMethod, linear.LinearModel):
        _modernise_validation(model)
        _step_schedules(model)
    base.BaseMomentumMethod.on_train_batch_end.__defaults__ = (0,)  # Lightning 2 passes no dataloader_idx
    _run_closure_before_lars(importlib.import_module("solo.utils.lars").LARSWrapper)
    _tell_clippings_apart(importlib.import_module("solo.methods.dino").DINO)
    # W-MSE whitens with torch.cholesky, now torch.linalg.cholesky: replaced in that module only.
    of_today = SimpleNamespace(**vars(torch) | {"cholesky": torch.linalg.cholesky})
    importlib.import_module("solo.utils.whitening").torch = of_today  # type: ignore[attr-defined]
    # 1.0.2 sets compute_on_step=False, which torchmetrics no longer has: calling the metric must only update it.
    knn = importlib.import_module("solo.utils.knn").WeightedKNNClassifier
    knn.forward = lambda self, *args, **kwargs: self.update(*args, **kwargs)


def linear_warmup_cosine_annealing(
    optimizer: Any, warmup_epochs: float, max_epochs: float, warmup_start_lr: float = 0.0, eta_min: float = 0.0
) -> LambdaLR:
    """Linear warm-up from ``warmup_start_lr`` to each group's rate, then half a cosine down to ``eta_min``."""

    def factor_of(peak: float) -> Callable[[int], float]:
        def factor(epoch: int) -> float:
            if epoch < warmup_epochs:
                rate = warmup_start_lr + epoch * (peak - warmup_start_lr) / max(1, warmup_epochs - 1)
            else:
                progress = (epoch - warmup_epochs) / max(1, max_epochs - warmup_epochs)
                rate = eta_min + 0.5 * (peak - eta_min) * (1 + math.cos(math.pi * progress))
            return rate / peak if peak else 1.0

        return factor

    return LambdaLR(optimizer, [factor_of(group["lr"]) for group in optimizer.param_groups])


def _modernise_validation(model: Any) -> None:
    """Lightning 2 refuses ``validation_epoch_end(outputs)``: collect the outputs and call it at the epoch's end."""
    init = model.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # Hides the hook from Lightning's check; super().validation_epoch_end of momentum methods still finds the class's.
        self.validation_epoch_end = None
        self.validation_outputs = []

    def on_validation_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_outputs.append(outputs)

    def on_validation_epoch_end(self: Any) -> None:
        type(self).validation_epoch_end(self, self.validation_outputs)
        self.validation_outputs = []

    model.__init__ = __init__
    model.on_validation_batch_end = on_validation_batch_end
    model.on_validation_epoch_end = on_validation_epoch_end


def _step_schedules(model: Any) -> None:
    """main's ``scheduler.interval: step``, set by ``Release102Suite``: warm-up and cosine advance at every step."""
    configure_optimizers = model.configure_optimizers

    def configure(self: Any) -> Any:
        if self.scheduler not in ("warmup_cosine", "cosine") or getattr(self, "scheduler_interval", "epoch") != "step":
            return configure_optimizers(self)
        epochs = {name: vars(self)[name] for name in ("max_epochs", "warmup_epochs") if name in vars(self)}
        steps = self.trainer.estimated_stepping_batches / self.max_epochs
        with replaced(self, **{name: number * steps for name, number in epochs.items()}):
            optimizers, (scheduler,) = configure_optimizers(self)
        return optimizers, [{"scheduler": scheduler, "interval": "step"}]

    model.configure_optimizers = configure


def _run_closure_before_lars(wrapper: Any) -> None:
    """Lightning 2 computes the gradients inside ``step(closure)``. LARS must scale these, not those of the last step."""
    step = wrapper.step

    def step_after_closure(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step(self, None)
        return loss

    wrapper.step = step_after_closure


def _tell_clippings_apart(dino: Any) -> None:
    """DINO has its own ``clip_gradients(clip)``; Lightning 2 calls a method of the same name with an optimizer."""
    clip_gradients = dino.clip_gradients

    def clip_own_or_any(self: Any, clip: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(clip, torch.optim.Optimizer):
            lightning.pytorch.LightningModule.clip_gradients(self, clip, *args, **kwargs)
        else:
            clip_gradients(self, clip)

    dino.clip_gradients = clip_own_or_any
