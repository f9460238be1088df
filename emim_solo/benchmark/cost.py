"""What a method's loss costs within its training step, measured on real steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch import Tensor

from emim_solo.evaluation.features import device_of
from emim_solo.evaluation.linear import quiet_trainer
from emim_solo.suite import load_suite

STEPS = 4
_REPEATS = 3


class _StepTimes(Callback):
    """Seconds of each training step: forward, backward and optimiser, without the loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start = _now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(_now() - self.start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(cfg: DictConfig, *, steps: int = STEPS) -> dict[str, float]:
    """Time a few training steps of a fresh model, and its loss alone on the same tensors.

    Args:
        cfg: completed config of a pretraining.
        steps: number of steps; the first one warms up.

    Returns:
        ``step_seconds``, and where the method computes its loss in one function of the suite's naming
        (``*_loss_func``) ``loss_share``: forward and backward of that function in percent of a step.
    """
    suite = load_suite()
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = suite.build(cfg)
    times = _StepTimes()
    trainer = quiet_trainer(
        max_epochs=1,
        limit_train_batches=steps,
        accelerator="gpu" if device_of(cfg).type == "cuda" else "cpu",
        precision=cfg.get("precision", 32),
        enable_progress_bar=False,
        callbacks=[times],
    )
    with _recorded_loss(type(model)) as calls:
        trainer.fit(model, suite.train_loader(cfg))
    measured = times.seconds[1:] or times.seconds
    metrics = {"step_seconds": statistics.median(measured)}
    if calls:
        per_step = len(calls) / len(times.seconds)
        metrics["loss_share"] = 100 * _loss_seconds(calls[-1]) * per_step / metrics["step_seconds"]
    return metrics


@contextmanager
def _recorded_loss(method: type[LightningModule]) -> Iterator[list[tuple[Callable[..., Tensor], Any, Any]]]:
    """Notes the arguments of the ``*_loss_func`` that the training step of a method calls by that name."""
    step: Any = method.training_step
    names = [name for name in step.__code__.co_names if name.endswith("_loss_func")]
    calls: list[tuple[Callable[..., Tensor], Any, Any]] = []
    if len(names) != 1:
        yield calls
        return
    (name,) = names
    function = step.__globals__[name]

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((function, args, kwargs))
        return function(*args, **kwargs)

    step.__globals__[name] = noting
    try:
        yield calls
    finally:
        step.__globals__[name] = function


def _loss_seconds(call: tuple[Callable[..., Tensor], Any, Any]) -> float:
    """Seconds of one forward and backward of the loss alone, on copies of the tensors it was called with."""
    function, args, kwargs = call

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    seconds = []
    for _ in range(_REPEATS + 1):
        own_args, own_kwargs = [leaf(value) for value in args], {key: leaf(value) for key, value in kwargs.items()}
        start = _now()
        loss = function(*own_args, **own_kwargs)
        if loss.requires_grad:
            loss.backward()
        seconds.append(_now() - start)
    return statistics.median(seconds[1:])
