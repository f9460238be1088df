"""Many views of one size go through the network as one batch, for every method, if memory holds them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from emim_solo.ground.errors import UsageError
from emim_solo.suite.loaders import replaced

FEWEST = 3  # two views go one by one, as in solo-learn, so that earlier runs keep their exact weights


class ViewsTogether(LightningModule):
    """Between a method and its generation's base method: three or more views of one size become one batch.

    One forward of all costs less than one forward of each, and BatchNorm computes its moments over all of them. The method
    gets the outputs of each view, as from the base method.
    """

    num_large_crops: int

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The base method's outputs, whose lists have one entry per view.

        Args:
            batch: indices; the views, each ``(N, 3, size, size)``, large ones first; and labels.
            batch_idx: number of the batch.
        """
        indices, views, labels = batch
        large = self.num_large_crops
        views = [views] if isinstance(views, Tensor) else views
        of_large, of_small = at_once(views[:large]), at_once(views[large:])
        if len(of_large) > 1:  # the base method uses the same labels for each large batch
            of_large = [1] * large
        self.views_at_once = [*of_large, *of_small]
        if len(self.views_at_once) == len(views):
            return super().training_step(batch, batch_idx)
        joined = [torch.cat(together) for together in _split(views, self.views_at_once)]
        batches = {"num_large_crops": len(of_large), "num_small_crops": len(of_small), "num_crops": len(joined)}
        with replaced(self, **batches):
            out: Any = super().training_step([indices, joined, labels.repeat(of_large[0])], batch_idx)
        return {name: self._of_each(value) if isinstance(value, list) else value for name, value in out.items()}

    def on_each_view(self, module: Callable[[Tensor], Tensor], features: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of a module for the features of each view, in the same batches as the views."""
        return self._of_each([module(torch.cat(together)) for together in _split(features, self.views_at_once)])

    def _of_each(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """The batches' outputs split into the views' outputs."""
        return [view for each, views in zip(joined, self.views_at_once, strict=False) for view in each.chunk(views)]


def at_once(views: Sequence[Tensor]) -> list[int]:
    """Numbers of views, in order, that form one batch: neighbours of one shape, if at least FEWEST."""
    groups = [len(list(group)) for _, group in groupby(views, key=lambda view: view.shape)]
    return [size for group in groups for size in ([group] if group >= FEWEST else [1] * group)]


def _split(values: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    left = iter(values)
    return [list(islice(left, size)) for size in sizes]


def check_memory(backbone: nn.Module, cfg: DictConfig, device: torch.device) -> None:
    """Refuse a complete config of three or more views whose step keeps more activations than the device has memory.

    Raises:
        UsageError: it does. The message has both sizes.
    """
    views = sum(view.num_crops for view in cfg.augmentations)
    if views < FEWEST:
        return
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(cfg.devices)
    if (needed := activation_bytes(backbone, cfg)) > memory:
        step = f"a step of {cfg.optimizer.batch_size} images in {views} views keeps {needed / 2**30:.1f} GiB of activations"
        has = f"a process has {memory / 2**30:.1f} GiB"
        raise UsageError("augmentations", f"{step}, {has}: set a smaller num_crops or optimizer.batch_size")


def activation_bytes(backbone: nn.Module, cfg: DictConfig) -> float:
    """What the backbone keeps of a step for its backward: measured on two and on four views of each size, and scaled."""
    network = copy.deepcopy(backbone).train()  # BatchNorm changes its moments
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def kept(views: int, size: int) -> int:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        half = torch.autocast("cpu", torch.bfloat16, enabled="16" in str(cfg.get("precision")))
        with torch.random.fork_rng(devices=[]), half, saved_tensors_hooks(note, lambda tensor: tensor):
            output = network(torch.zeros(views, 3, size, size))  # its graph holds the storages until they are summed
        return sum(size for place, size in storages.items() if place not in weights) if output.requires_grad else 0

    needed = 0.0
    for view in cfg.augmentations:
        of_two, of_four = kept(2, view.crop_size), kept(4, view.crop_size)
        needed += of_two + (of_four - of_two) / 2 * (view.num_crops * cfg.optimizer.batch_size - 2)
    return needed
