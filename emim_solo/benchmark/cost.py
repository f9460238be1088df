"""What a method costs on this machine, measured on real steps: its loss within a step, an epoch beforehand."""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from emim_solo.evaluation.features import device_of
from emim_solo.evaluation.linear import quiet_trainer
from emim_solo.images.folders import why_no_accuracy
from emim_solo.suite import load_suite
from emim_solo.training.run import Run

STEPS = 4
_REPEATS = 3
_LOADED = 8  # images, to time the loading of one


@dataclass(frozen=True)
class Cost:
    """What a method costs on this machine.

    Attributes:
        metrics: ``step_seconds``, and where the method computes its loss in one function of the suite's naming
            (``*_loss_func``) ``loss_share``: forward and backward of that function in percent of a step.
        epoch_seconds: of one epoch, loading and validation included.
    """

    metrics: dict[str, float]
    epoch_seconds: float


class _StepTimes(Callback):
    """Seconds of each training step: forward, backward and optimiser, without the loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start = _now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(_now())
        self.seconds.append(self.ends[-1] - self.start)

    def pace(self) -> float:
        """Seconds from step to step, loading included as far as the training waits for it; the first one warms up."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.ends)) if self.ends[1:] else self.seconds[0]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(run: Run, *, steps: int = STEPS) -> Cost:
    """Time a few training steps of a fresh model, and its loss alone on the same tensors.

    Args:
        run: prepared.
        steps: number of steps; the first one warms up.
    """
    suite, cfg = load_suite(), run.config
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = suite.build(cfg)
    times = _StepTimes()
    loader = suite.train_loader(cfg, run.images)
    with _silence(), _recorded_loss(type(model)) as calls:
        trainer = quiet_trainer(
            max_epochs=1,
            limit_train_batches=steps,
            accelerator="gpu" if device_of(cfg).type == "cuda" else "cpu",
            precision=cfg.get("precision", 32),
            enable_progress_bar=False,
            callbacks=[times],
        )
        trainer.fit(model, loader)
    measured = times.seconds[1:] or times.seconds
    metrics = {"step_seconds": statistics.median(measured)}
    if calls:
        per_step = len(calls) / len(times.seconds)
        metrics["loss_share"] = 100 * _loss_seconds(calls[-1]) * per_step / metrics["step_seconds"]

    # DALI loads on its own: the loader above is not its.
    pace = metrics["step_seconds"] if cfg.data.format == "dali" else max(times.pace(), loading_seconds(loader))
    image_seconds = pace / cfg.optimizer.batch_size / (cfg.data.num_large_crops + cfg.data.num_small_crops)
    val = suite.evaluation_datasets(cfg, run.images)[1]
    validated = 0 if val is None or why_no_accuracy(cfg.data) else len(val)  # type: ignore[arg-type]
    return Cost(metrics, pace * len(loader) / run.processes + validated * image_seconds)


def loading_seconds(loader: DataLoader) -> float:
    """Seconds between two batches of a loader's workers: the first batches of a training are there before they are asked for."""
    dataset: Any = loader.dataset
    start = time.perf_counter()
    for index in range(number := min(_LOADED, len(dataset))):
        dataset[index]
    each = (time.perf_counter() - start) / number
    return each * (loader.batch_size or 1) / max(1, min(loader.num_workers, os.cpu_count() or 1))


@contextmanager
def _silence() -> Iterator[None]:
    """Lightning's lines about a Trainer that is a measurement only."""
    lines = logging.getLogger("lightning.pytorch")
    level = lines.level
    lines.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        lines.setLevel(level)


@contextmanager
def _recorded_loss(method: type[LightningModule]) -> Iterator[list[tuple[Callable[..., Tensor], Any, Any]]]:
    """Notes the arguments of the ``*_loss_func`` that the training step of a method calls by that name.

    DINO's is a module of the model with a state of its own, not a function: it is not noted.
    """
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
    function, *given = call

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)

    seconds = []
    for _ in range(_REPEATS + 1):
        args, kwargs = apply_to_collection(given, Tensor, leaf)  # SwAV's are lists of tensors
        start = _now()
        loss = function(*args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        seconds.append(_now() - start)
    return statistics.median(seconds[1:])
