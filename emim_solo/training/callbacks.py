"""What happens to a run while Lightning trains it: seeds, NaN, what a checkpoint says, which file is replaced."""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from emim_solo.checkpoints.opening import IMAGES
from emim_solo.training.live_score import LiveScore, is_last_epoch
from emim_solo.training.run import Start

RESULTS = "results_so_far"  # key in a checkpoint


class SuiteData(LightningDataModule):
    """The suite's loaders, the training one drawing the same numbers in epoch e whether or not the run was resumed."""

    def __init__(
        self, seed: int, train_loader: DataLoader, val_loader: DataLoader | None, first_epoch: int = 0
    ) -> None:
        super().__init__()
        self.seed, self.train_loader, self.val_loader, self.first_epoch = seed, train_loader, val_loader, first_epoch

    def train_dataloader(self) -> DataLoader:
        # Lightning makes the first epoch's iterator right after this call, before it has restored a checkpoint's
        # epoch; a later one's after on_train_epoch_start.
        assert self.trainer is not None
        seed_epoch(self.seed, self.first_epoch, self.trainer.global_rank)
        return self.train_loader

    def val_dataloader(self) -> Any:
        return self.val_loader if self.val_loader is not None else []


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, NumPy and torch for one epoch of one process, so that a resumed run is the same run."""
    state = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


class SeedEachEpoch(Callback):
    """Calls :func:`seed_epoch` at the start of each epoch but this process's first, which :class:`SuiteData` seeds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.first = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.first:
            seed_epoch(self.seed, trainer.current_epoch, trainer.global_rank)
        self.first = False


class StopOnNaN(Callback):
    """Ends a run whose loss is no longer finite, at the logging interval: reading it at every step would make a GPU wait."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.finite &= torch.isfinite(loss.detach()).all()
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if not self.finite:
            raise FloatingPointError(
                f"the training loss is NaN or infinite in epoch {trainer.current_epoch}, by step {trainer.global_step}: "
                "lower optimizer.lr, or use precision=32 or bf16-mixed, and resume from the last checkpoint"
            )


class KeepResults(Callback):
    """Writes into each checkpoint what the run's row would say if it ended there: a kill may come before the row."""

    def __init__(self, timer: Timer, images: dict[str, Any], score: LiveScore | None = None) -> None:
        self.timer, self.images, self.score = timer, images, score

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RESULTS] = self.results(trainer)
        checkpoint[IMAGES] = self.images

    def results(self, trainer: Trainer) -> dict[str, Any]:
        """The fields of a row that only the trainer knows."""
        device, peak = "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes, but bytes on macOS
        peak *= 1 if sys.platform == "darwin" else 2**10
        if trainer.strategy.root_device.type == "cuda":
            device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
        return {
            "device": device if trainer.world_size == 1 else f"{trainer.world_size} x {device}",
            "seconds": round(self.timer.time_elapsed("train"), 1),
            "peak_memory_mb": peak // 2**20,
            "metrics": {name: round(float(value), 6) for name, value in sorted(trainer.callback_metrics.items())},
            **({} if self.score is None else {"score": self.score.summary}),
        }


class ContinueCheckpoints(Callback):
    """Has the suite's Checkpointer replace the file that a run continues, and save the last epoch at any frequency."""

    def __init__(self, checkpointer: Any, resumed: Path | None) -> None:
        self.checkpointer, self.resumed = checkpointer, resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resumed is not None:
            self.checkpointer.last_ckpt = self.resumed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_last_epoch(trainer) and trainer.current_epoch % self.checkpointer.frequency != 0:
            self.checkpointer.save(trainer)


class OpenedCheckpoint(TorchCheckpointIO):
    """Gives Lightning the checkpoint that was read when the run was decided, so that it is not read again."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start = start

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path) != self.start.checkpoint or not self.start.contents:
            return super().load_checkpoint(path, *args, **kwargs)
        contents = dict(self.start.contents)
        self.start.contents.clear()  # their memory is free once they are restored
        return contents
