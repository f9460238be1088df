"""Random views of images. An image's views depend only on its seed, not on workers, batches or the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emim_solo.images.folders import RunImages
from emim_solo.suite import load_suite


def seed_cpu(*entropy: int) -> int:
    """Seed Python, NumPy and torch on the CPU from whole numbers; returns the seed that they get."""
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.default_generator.manual_seed(state)  # torch.manual_seed would seed GPUs, too
    return state


class _Views(Dataset):
    def __init__(self, dataset: Any, chosen: Sequence[int], seed: int) -> None:
        self.dataset, self.chosen, self.seed = dataset, chosen, seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        index = self.chosen[position]
        with isolate_rng(include_cuda=False):
            seed_cpu(self.seed, index)
            views, label = self.dataset[index]
        return views, torch.full((len(views),), int(label))


def _joined(batch: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([views for views, _ in batch]), torch.cat([labels for _, labels in batch])


def _several(transform: Any, number: int, image: Any) -> Tensor:
    return torch.stack([transform(image) for _ in range(number)])


def view_datasets(cfg: DictConfig, view: DictConfig, number: int, images: RunImages) -> tuple[Dataset, Dataset | None]:
    """A run's training images and, if any, validation images, each as ``number`` views by ``view``, an entry of ``augmentations``."""
    suite = load_suite()
    return suite.evaluation_datasets(cfg, images, partial(_several, suite.view_transform(cfg, view), number))


def view_loader(
    cfg: DictConfig, dataset: Any, number: int, seed: int, chosen: Sequence[int] | None = None
) -> DataLoader:
    """Loads a dataset of :func:`view_datasets`, in order or as ``chosen``. The ``number`` views of an image follow each other."""
    return DataLoader(
        _Views(dataset, range(len(dataset)) if chosen is None else chosen, seed),
        batch_size=max(1, cfg.optimizer.batch_size // number),
        num_workers=cfg.data.num_workers,
        collate_fn=_joined,
        generator=torch.Generator(),  # the workers' seed comes from it, not from the generator that training uses
    )
