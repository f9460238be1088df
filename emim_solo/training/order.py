"""Which images a run sees when, and the random numbers that it draws: the same whether or not it was resumed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from emim_solo.training.run import Start


def seed_all(*entropy: int) -> None:
    """Seed Python, NumPy and torch from some whole numbers, such as a run's seed, an epoch and a process."""
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


class SuiteData(LightningDataModule):
    """The suite's loaders, the training one drawing the same numbers in epoch e whether or not the run was resumed.

    Args:
        seed: of the run.
        train_loader: of the suite.
        val_loader: of the suite, or None.
        start: how the run starts.
        processes: how many share an epoch's images, where each batch is to be one that a run can go on from; None
            where the end of an epoch is enough.
    """

    def __init__(
        self,
        seed: int,
        train_loader: DataLoader,
        val_loader: DataLoader | None,
        start: Start,
        processes: int | None = None,
    ) -> None:
        super().__init__()
        self.seed, self.train_loader, self.val_loader, self.start = seed, train_loader, val_loader, start
        self.processes = processes

    def train_dataloader(self) -> DataLoader:
        # Lightning makes the first epoch's iterator right after this call, before it has restored a checkpoint's
        # epoch; a later one's after on_train_epoch_start.
        assert self.trainer is not None
        rank = self.trainer.global_rank
        seed_all(self.seed, self.start.epochs, rank)
        if self.processes is None:
            return self.train_loader
        theirs, share = self.train_loader, (self.processes, rank if self.processes > 1 else 0)
        assert theirs.batch_size is not None
        return RestOfEpoch(
            _SeededImages(theirs.dataset, self.seed),
            theirs.batch_size,
            sampler=_EpochOrder(theirs, share, self.seed, self.start),
            num_workers=theirs.num_workers,
            pin_memory=theirs.pin_memory,
            drop_last=True,
        )

    def val_dataloader(self) -> Any:
        return self.val_loader if self.val_loader is not None else []


class RestOfEpoch(DataLoader):
    """A loader that begins where a run was stopped. Lightning asks for its state; the run's :class:`Start` has it."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _EpochOrder(DistributedSampler):
    """torch's order of an epoch, by its number; in the epoch that a run goes on within, without what was done."""

    def __init__(self, loader: DataLoader, share: tuple[int, int], seed: int, start: Start) -> None:
        super().__init__(loader.dataset, *share, seed=seed, drop_last=True)
        assert loader.batch_size is not None
        self.set_epoch(start.epochs)
        self.stopped_in, self.done = start.epochs, start.batches * loader.batch_size

    def __iter__(self) -> Iterator[Any]:
        indices = list(super().__iter__())
        return ((self.epoch, index) for index in indices[self.done if self.epoch == self.stopped_in else 0 :])


class _SeededImages(Dataset):
    """Images whose random views depend on the run's seed, the epoch and the image alone, not on what was drawn before."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        seed_all(self.seed, epoch, index, 0, 0)
        return self.images[index]


class Seeds(Callback):
    """Seeds each epoch but this process's first, which :class:`SuiteData` seeds; with ``each_batch`` each batch, too."""

    def __init__(self, seed: int, start: Start, each_batch: bool) -> None:
        self.seed, self.first, self.each_batch = seed, start.epochs, each_batch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != self.first:
            seed_all(self.seed, trainer.current_epoch, trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.each_batch:
            seed_all(self.seed, trainer.current_epoch, trainer.global_rank, batch_idx)
