"""1.0.2's DALI loader, a mixin of the method with settings from argparse, as a data module."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig


class DALIData(LightningDataModule):
    """1.0.2's ``PretrainABC.train_dataloader``, called on a stand-in for the method that has it as a mixin."""

    def __init__(self, cfg: DictConfig, views: list[dict[str, Any]], listing: Any) -> None:
        super().__init__()
        self.cfg, self.views = cfg, views
        self.suite: Any = importlib.import_module("solo.methods.dali")
        pipelines: Any = importlib.import_module("solo.utils.dali_dataloader")
        pipelines.os = listing
        if not torch.cuda.is_available():
            for name in ("PretrainPipeline", "NormalPipeline", "CustomNormalPipeline"):
                setattr(self.suite, name, _for_no_gpu(getattr(pipelines, name)))

    def train_dataloader(self) -> Any:
        cfg, trainer = self.cfg, self.trainer
        assert trainer is not None
        train_path = Path(cfg.data.train_path).absolute()
        method = SimpleNamespace(
            trainer=trainer,
            local_rank=trainer.local_rank,
            global_rank=trainer.global_rank,
            device=trainer.strategy.root_device if cfg.dali.device == "gpu" else torch.device("cpu"),
            batch_size=cfg.optimizer.batch_size,
            num_large_crops=cfg.data.num_large_crops,
            num_small_crops=cfg.data.num_small_crops,
            extra_args={
                "dataset": cfg.data.dataset,
                "data_dir": train_path.parent,
                "train_dir": train_path.name,
                "no_labels": cfg.data.no_labels,
                "num_workers": max(1, cfg.data.num_workers),  # DALI's threads
                "dali_device": cfg.dali.device,
                # Otherwise DALI reads the folder in its own way, not the list of files.
                "encode_indexes_into_labels": not cfg.data.no_labels,
                "unique_augs": len(self.views),
                "transform_kwargs": self.views if len(self.views) > 1 else self.views[0],
                "num_crops_per_aug": [view.num_crops for view in cfg.augmentations],
            },
        )
        return self.suite.PretrainABC.train_dataloader(method)


def _for_no_gpu(pipeline: Any) -> Any:
    """A pipeline adds ``device_id`` to the seed and passes it to DALI's ``Pipeline``: a class in between drops it."""
    from nvidia.dali.pipeline import Pipeline

    class ForNoGPU(Pipeline):
        def __init__(self, batch_size: int, num_threads: int, device_id: int | None, seed: int, **kwargs: Any) -> None:
            super().__init__(batch_size=batch_size, num_threads=num_threads, device_id=None, seed=seed, **kwargs)

    return type(pipeline.__name__, (pipeline, ForNoGPU), {})
