"""Time of a training step and share of the loss in it, measured on this machine, and a forecast of an epoch's time."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from emim_solo.evaluation.linear import quiet_trainer
from emim_solo.suite import load_suite
from emim_solo.suite.api import device_of
from emim_solo.suite.views import check_memory
from emim_solo.training.run import Run

_REPEATS = 3
_LOADED = 8  # images whose loading is timed


@dataclass(frozen=True)
class Cost:
    """What a method costs on this machine.

    ``metrics`` has ``step_seconds``. If the method computes its loss in one function ``*_loss_func``, it also has
    ``loss_share``: forward and backward of that function, in percent of a step.
    """

    metrics: dict[str, float]
    epoch_seconds: float  # with loading, without validation


class _StepTimes(Callback):
    """Seconds of each training step: forward, backward and optimiser, without the loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = _now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(_now() - self.start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(run: Run, *, steps: int = 4) -> Cost:
    """Time a few training steps of a new model, the first as warm-up, then its loss alone on the same tensors."""
    suite, cfg = load_suite(), run.config
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = suite.build(cfg)
    check_memory(suite.backbone(model), cfg, device_of(cfg))
    times = _StepTimes()
    loader = suite.train_loader(cfg, run.images)
    with warnings.catch_warnings(), _recorded_loss(type(model)) as calls:
        warnings.simplefilter("ignore")  # they are about a training; this is a measurement
        trainer = quiet_trainer(
            max_epochs=1,
            limit_train_batches=steps,
            accelerator="gpu" if device_of(cfg).type == "cuda" else "cpu",
            precision=cfg.get("precision", 32),
            enable_progress_bar=False,
            callbacks=[times],
        )
        trainer.fit(model, loader)
    step = statistics.median(times.seconds[1:] or times.seconds)
    metrics = {"step_seconds": step}
    if calls:
        metrics["loss_share"] = 100 * _loss_seconds(calls[-1]) * len(calls) / len(times.seconds) / step
    if cfg.data.format != "dali":  # DALI does not use the loader above
        loading = loading_seconds(loader)
        step = max(step, loading) if loader.num_workers else step + loading
    return Cost(metrics, step * len(loader) / run.processes)


def loading_seconds(loader: DataLoader) -> float:
    """Seconds in which a loader's workers load one batch, estimated from its first images."""
    dataset: Any = loader.dataset
    start = time.perf_counter()
    for index in range(number := min(_LOADED, len(dataset))):
        dataset[index]
    each = (time.perf_counter() - start) / number
    return each * (loader.batch_size or 1) / max(1, min(loader.num_workers, os.cpu_count() or 1))


@contextmanager
def _recorded_loss(method: type[LightningModule]) -> Iterator[list[tuple[Callable[..., Tensor], Any, Any]]]:
    """Record the calls of a training step's ``*_loss_func``, if it has exactly one. DINO has none: its loss is a module."""
    step: Any = method.training_step
    names = [name for name in step.__code__.co_names if name.endswith("_loss_func") and name in step.__globals__]
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
    function, *arguments = call

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)

    seconds = []
    for _ in range(_REPEATS + 1):
        args, kwargs = apply_to_collection(arguments, Tensor, leaf)  # SwAV passes lists of tensors
        start = _now()
        loss = function(*args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        seconds.append(_now() - start)
    return statistics.median(seconds[1:])
