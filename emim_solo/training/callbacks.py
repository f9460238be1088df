"""Callbacks of a run: they end it on NaN, add results to checkpoints, and decide when to save and which file to replace."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from emim_solo.checkpoints import opening
from emim_solo.training.live_score import LiveScore, is_last_epoch
from emim_solo.training.run import Run, Start

RESULTS = "results_so_far"  # key in a checkpoint


class StopOnNaN(Callback):
    """Ends a run on a NaN or infinite loss. Checks at the logging interval: a check at each step would make a GPU wait."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.finite &= torch.isfinite(loss.detach()).all()
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Raise FloatingPointError if any loss since the start was NaN or infinite."""
        if not self.finite:
            raise FloatingPointError(
                f"the training loss is NaN or infinite in epoch {trainer.current_epoch}, by step {trainer.global_step}: "
                "lower optimizer.lr, or use precision=32 or bf16-mixed, and resume from the last checkpoint"
            )


class KeepResults(Callback):
    """Writes the results so far into each checkpoint. They become the row of a run that is killed before it writes its row."""

    def __init__(self, timer: Timer, run: Run, score: LiveScore | None = None) -> None:
        self.timer, self.images, self.score = timer, run.images.record, score
        self.metrics_from = run.start.batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics_from = 0  # Lightning does not call this in an epoch that is resumed in its middle

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RESULTS] = self.results(trainer)
        checkpoint[opening.IMAGES] = self.images

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
            **({"metrics_from_batch": self.metrics_from} if self.metrics_from else {}),
            **({} if self.score is None else {"score": self.score.summary}),
        }


class ContinueCheckpoints(Callback):
    """Makes solo-learn's Checkpointer replace the file of the last whole epoch before a resume, and always save the final epoch."""

    def __init__(self, checkpointer: Any, run: Run) -> None:
        self.checkpointer, resumed = checkpointer, run.start.checkpoint
        epochs = opening.by_epoch(resumed.parent) if resumed is not None and resumed.parent == run.folder else []
        self.resumed = next((path for epoch, path in reversed(epochs) if epoch < run.start.epochs), None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resumed is not None:
            self.checkpointer.last_ckpt = self.resumed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_last_epoch(trainer) and trainer.current_epoch % self.checkpointer.frequency != 0:
            self.checkpointer.save(trainer)


class SaveWithinEpochs(Callback):
    """Saves every n-th step, beside solo-learn's file of the last epoch. The next file, of a step or an epoch, replaces it."""

    def __init__(self, every: int, run: Run, finite: StopOnNaN) -> None:
        assert run.folder is not None
        self.every, self.folder, self.finite = every, run.folder, finite
        self.name = f"{run.config.name}-{run.folder.name}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        end_batch = pl_module.on_train_batch_end

        def end_batch_and_save(*args: Any) -> None:
            end_batch(*args)
            self._save(trainer)

        # A callback's own hook would run before the method's hook, which updates the momentum network.
        pl_module.on_train_batch_end = end_batch_and_save  # type: ignore[method-assign, assignment]

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        stepped, self.step = step != self.step, step  # no save between batches whose gradients are accumulated
        if stepped and step % self.every == 0 and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.finite.check(trainer)
            path = self.folder / opening.within_epoch(self.name, trainer.current_epoch, step)
            trainer.save_checkpoint(path)
            self._remove_but(path, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved = opening.by_epoch(self.folder)
        if saved and saved[-1][0] == trainer.current_epoch:
            self._remove_but(saved[-1][1], trainer)

    def _remove_but(self, path: Path, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for other in opening.within_epochs(self.folder):
                if other != path:
                    os.remove(other)


class OpenedCheckpoint(TorchCheckpointIO):
    """Gives Lightning the contents of the checkpoint that ``resume.decide`` has read, so that the file is read only once."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start = start

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path) != self.start.checkpoint or not self.start.contents:
            return super().load_checkpoint(path, *args, **kwargs)
        contents = dict(self.start.contents)
        self.start.contents.clear()  # so that their memory is freed once Lightning has restored them
        return contents
