"""NVIDIA DALI with either generation, on a GPU and without one. The pipelines are the suite's own.

What stands in the way on a machine with no GPU is one argument: both generations build the CPU pipelines of
``dali.device: cpu`` for GPU number ``local_rank``, and DALI then wants CUDA. Built for no GPU (``device_id=None``) they
run anywhere; :func:`free_cpu_pipelines_from_cuda` does that and nothing else. What the pipelines list in a folder is what
:mod:`emim_solo.suite.loaders` finds in it. Beyond that,

- main has what is needed: its data module is used as main_pretrain.py uses it;
- 1.0.2 has its loader as a mixin of the method (``solo.methods.dali.PretrainABC``), with settings from argparse. Here
  that very method runs inside a data module, so that EMIM, like any other method, needs no second class.

DALI seeds its pipelines with a constant and the local rank: another ``seed`` does not change the order of images, and a
resumed run starts the order again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Images, load_rgb
from emim_solo.suite.loaders import listed_as_os

_DATASETS = ("imagenet100", "imagenet", "custom")
_DEFAULTS = {"device": "gpu", "encode_indexes_into_labels": False}
_BITS_PER_SAMPLE = 258  # TIFF tag
_MAIN = "solo.data.dali_dataloader"
_REGISTRY_PIPELINES = "solo.utils.dali_dataloader"
_REGISTRY_LOADERS = "solo.methods.dali"


def is_installed() -> bool:
    """Whether ``nvidia.dali`` can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the namespace
        return False


def complete_dali(cfg: DictConfig) -> DictConfig:
    """Fill in main's defaults of ``dali`` and check that this machine can do what is asked. Changes ``cfg``.

    Args:
        cfg: a config with ``data.format: dali``, of pretraining or linear evaluation.

    Raises:
        UsageError: DALI is not installed, the dataset is not one of image folders, or there is no such device.
    """
    if not is_installed():
        raise UsageError(
            "data.format=dali, but NVIDIA DALI is not installed: pip install 'emim-solo[dali]', "
            "or data.format=image_folder"
        )
    if cfg.data.dataset not in _DATASETS:
        raise UsageError(
            f"data.format=dali does not know data.dataset={cfg.data.dataset}: expected one of {', '.join(_DATASETS)}; "
            "leave data.format out"
        )
    cfg.dali = OmegaConf.merge(_DEFAULTS, OmegaConf.select(cfg, "dali", default={}))
    if cfg.dali.device not in ("cpu", "gpu"):
        raise UsageError(f"dali.device={cfg.dali.device}: expected cpu or gpu")
    if cfg.dali.device == "gpu" and not torch.cuda.is_available():
        raise UsageError("dali.device=gpu, but no GPU is there: add dali.device=cpu")
    return cfg


def check_training_images(images: Images) -> None:
    """Check that DALI can read the training images, which are known to be readable.

    DALI makes of a file the pixels that :func:`emim_solo.images.folders.load_rgb` makes of it, or fails; but it takes the floating
    values of a TIFF to lie between 0 and 1.

    Raises:
        UsageError: an image that cannot be read, or not by DALI.
    """
    for path in images.paths:
        if path.lower().endswith((".tif", ".tiff")):
            load_rgb(path, "data.train_path: ")
            with Image.open(path) as image:
                bits = np.min(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, 1))
                mode = image.mode
            if bits < 8 or mode == "LAB":
                raise UsageError(
                    f"data.train_path: DALI does not read image '{path}', a TIFF of mode {mode}: "
                    "convert it to 8-bit RGB, or data.format=image_folder"
                )


def pretrain_datamodule(cfg: DictConfig, images: Images) -> LightningDataModule:
    """The suite's DALI loader of a complete pretraining config, as a data module with training images only.

    Batches are those of the suite's other loaders: [indices, views, labels], the last incomplete one dropped. The
    indices are stand-ins unless ``dali.encode_indexes_into_labels``.

    Raises:
        UsageError: as :func:`complete_dali`, or an augmentation that DALI or this generation does not have.
    """
    complete_dali(cfg)
    for view in cfg.augmentations:
        if OmegaConf.select(view, "equalization.prob", default=0.0):
            raise UsageError(
                "augmentations: equalization.prob > 0: DALI has none; set it to 0, or data.format=image_folder"
            )
    module = _main_datamodule(cfg) if _is_main() else _RegistryData(cfg)
    sys.modules[_MAIN if _is_main() else _REGISTRY_PIPELINES].os = listed_as_os(images)  # type: ignore[attr-defined]
    free_cpu_pipelines_from_cuda()
    return module


def free_cpu_pipelines_from_cuda() -> None:
    """Let the suite's CPU pipelines run where there is no GPU. Safe to call again; imports nothing of the suite.

    With a GPU nothing changes: there a CPU pipeline is built for it and hands over pinned memory.
    """
    if torch.cuda.is_available():
        return
    current = sys.modules.get(_MAIN)
    if current is not None:
        for name in ("PretrainPipelineBuilder", "NormalPipelineBuilder"):
            _build_for_no_gpu(getattr(current, name))
    old, loaders = sys.modules.get(_REGISTRY_PIPELINES), sys.modules.get(_REGISTRY_LOADERS)
    if old is not None and loaders is not None:
        for name in ("PretrainPipeline", "NormalPipeline", "CustomNormalPipeline"):
            setattr(loaders, name, _pipeline_for_no_gpu(getattr(old, name)))


def _is_main() -> bool:
    return importlib.util.find_spec("solo.data") is not None


def _build_for_no_gpu(builder: Any) -> None:
    """main's builders take ``device_id`` when the pipeline is made, after they have added it to the seed."""
    pipeline = builder.pipeline
    if getattr(pipeline, "for_no_gpu", False):
        return

    @functools.wraps(pipeline)
    def for_no_gpu(self: Any, **kwargs: Any) -> Any:
        if self.device == "cpu":
            kwargs["device_id"] = None
        return pipeline(self, **kwargs)

    for_no_gpu.for_no_gpu = True  # type: ignore[attr-defined]
    builder.pipeline = for_no_gpu


def _pipeline_for_no_gpu(pipeline: Any) -> Any:
    """1.0.2's pipelines add ``device_id`` to the seed and hand it to DALI's ``Pipeline``: a class between drops it."""
    from nvidia.dali.pipeline import Pipeline

    class ForNoGPU(Pipeline):
        def __init__(self, batch_size: int, num_threads: int, device_id: int | None, seed: int, **kwargs: Any) -> None:
            super().__init__(batch_size=batch_size, num_threads=num_threads, device_id=None, seed=seed, **kwargs)

    return type(pipeline.__name__, (pipeline, ForNoGPU), {})


def _main_datamodule(cfg: DictConfig) -> LightningDataModule:
    suite = importlib.import_module(_MAIN)
    crops = importlib.import_module("solo.data.pretrain_dataloader")
    views = [
        crops.NCropAugmentation(
            suite.build_transform_pipeline_dali(cfg.data.dataset, view, dali_device=cfg.dali.device), view.num_crops
        )
        for view in cfg.augmentations
    ]
    return suite.PretrainDALIDataModule(
        dataset=cfg.data.dataset,
        train_data_path=cfg.data.train_path,
        transforms=crops.FullTransformPipeline(views),
        num_large_crops=cfg.data.num_large_crops,
        num_small_crops=cfg.data.num_small_crops,
        num_workers=max(1, cfg.data.num_workers),  # DALI's threads
        batch_size=cfg.optimizer.batch_size,
        no_labels=cfg.data.no_labels,
        data_fraction=cfg.data.fraction,
        dali_device=cfg.dali.device,
        encode_indexes_into_labels=cfg.dali.encode_indexes_into_labels,
    )


class _RegistryData(LightningDataModule):
    """1.0.2's ``PretrainABC.train_dataloader`` on a stand-in for the method that it is meant to be mixed into."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.suite: ModuleType = importlib.import_module(_REGISTRY_LOADERS)
        self.cfg = cfg

    def train_dataloader(self) -> Any:
        cfg, trainer = self.cfg, self.trainer
        assert trainer is not None
        from emim_solo.suite.release_102.suite import view_kwargs

        views = [view_kwargs(cfg, view) for view in cfg.augmentations]
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
                "data_dir": Path(cfg.data.train_path).absolute().parent,
                "train_dir": Path(cfg.data.train_path).absolute().name,
                "no_labels": cfg.data.no_labels,
                "num_workers": max(1, cfg.data.num_workers),  # DALI's threads
                "dali_device": cfg.dali.device,
                # Otherwise the pipeline gives DALI the folder to read as it likes, instead of a list of files.
                "encode_indexes_into_labels": not cfg.data.no_labels,
                "unique_augs": len(views),
                "transform_kwargs": views if len(views) > 1 else views[0],
                "num_crops_per_aug": [view.num_crops for view in cfg.augmentations],
            },
        )
        return self.suite.PretrainABC.train_dataloader(method)
