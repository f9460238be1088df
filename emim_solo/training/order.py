"""The order of a run's images, and its random numbers. Both are the same in a resumed run and in one that never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from emim_solo.evaluation.views import seed_cpu
from emim_solo.training.run import Run


def seed_all(*entropy: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPUs) from whole numbers, such as a run's seed, an epoch and a process."""
    torch.manual_seed(seed_cpu(*entropy))


class ResumedEpochs(_FitLoop):
    """Lightning's loop over epochs, which with ``max_steps`` would end the epoch of the checkpoint a second time."""

    @_Loop.restarting.setter  # type: ignore[attr-defined, untyped-decorator]
    def restarting(self, restarting: bool) -> None:
        epoch: Any = self.epoch_progress.current
        unfinished = epoch.ready != epoch.processed or epoch.started != epoch.processed
        _Loop.restarting.fset(self, restarting and unfinished)  # type: ignore[attr-defined]

    def on_run_start(self) -> None:
        epoch: Any = self.epoch_progress.current
        epoch.completed = epoch.processed
        super().on_run_start()


class SuiteData(LightningDataModule):
    """solo-learn's loaders for a run. In an epoch the training loader draws the same random numbers, resumed or not."""

    def __init__(self, run: Run, train_loader: DataLoader, val_loader: DataLoader | None) -> None:
        super().__init__()
        self.run, self.train_loader, self.val_loader = run, train_loader, val_loader

    def train_dataloader(self) -> DataLoader:
        # Lightning makes the first epoch's iterator right after this call, before it restores the epoch from a checkpoint.
        # It makes the iterators of later epochs after on_train_epoch_start, where Seeds seeds them.
        assert self.trainer is not None
        rank = self.trainer.global_rank
        seed_all(self.run.config.seed, self.run.start.epochs, rank)
        return self.train_loader if self.run.saved_every is None else ResumableLoader(self.train_loader, self.run, rank)

    def val_dataloader(self) -> Any:
        return self.val_loader if self.val_loader is not None else []


class ResumableLoader(DataLoader):
    """The images of one process. In the epoch in which the run was stopped, it skips those of the batches already trained on.

    Lightning asks a resumable loader for its state. Here it is empty: :class:`emim_solo.training.run.Start` has the position.
    """

    def __init__(self, loader: DataLoader, run: Run, rank: int) -> None:
        super().__init__(
            _SeededImages(loader.dataset, run.config.seed),
            loader.batch_size,
            sampler=_EpochOrder(loader, run, rank),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            drop_last=True,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _EpochOrder(DistributedSampler):
    """torch's order of images in an epoch, by the epoch's number; without the images that were trained on before a stop."""

    def __init__(self, loader: DataLoader, run: Run, rank: int) -> None:
        shared = run.config.get("use_distributed_sampler", True)
        share = (run.processes, rank) if shared else (1, 0)
        super().__init__(loader.dataset, *share, seed=run.config.seed, drop_last=True)
        assert loader.batch_size is not None
        self.set_epoch(run.start.epochs)
        self.stopped_in, self.done = run.start.epochs, run.start.batches * loader.batch_size

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self.epoch, self.done if self.epoch == self.stopped_in else 0
        return ((epoch, index) for index in islice(super().__iter__(), done, None))


class _SeededImages(Dataset):
    """Images whose random views depend only on the run's seed, the epoch and the image."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        seed_cpu(self.seed, epoch, index, 0, 0)
        return self.images[index]


class Seeds(Callback):
    """Seeds each epoch but the first, which :class:`SuiteData` seeds; each batch, too, if the run saves within epochs."""

    def __init__(self, run: Run) -> None:
        self.seed, self.first, self.each_batch = run.config.seed, run.start.epochs, run.saved_every is not None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != self.first:
            seed_all(self.seed, trainer.current_epoch, trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.each_batch:
            seed_all(self.seed, trainer.current_epoch, trainer.global_rank, batch_idx)
