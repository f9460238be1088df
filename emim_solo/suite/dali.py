"""NVIDIA DALI, on a GPU and without one. The pipelines are the suite's own.

Both generations build the CPU pipelines of ``dali.device: cpu`` for GPU number ``local_rank``, and DALI then wants CUDA.
Built for no GPU (``device_id=None``) they run anywhere: :func:`free_cpu_pipelines_from_cuda` does that for main. What the
pipelines list in a folder is what :mod:`emim_solo.suite.loaders` lists in it.

DALI seeds its pipelines with a constant and the local rank: another ``seed`` does not change the order of images, and a
resumed run starts the order again.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Images, load_rgb

_DATASETS = ("imagenet100", "imagenet", "custom")
_DEFAULTS = {"device": "gpu", "encode_indexes_into_labels": False}
_BITS_PER_SAMPLE = 258  # TIFF tag


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
            "data.format",
            "data.format=dali, but NVIDIA DALI is not installed: pip install 'emim-solo[dali]', "
            "or data.format=image_folder",
        )
    if cfg.data.dataset not in _DATASETS:
        raise UsageError(
            "data.format",
            f"data.format=dali does not know data.dataset={cfg.data.dataset}: expected one of {', '.join(_DATASETS)}; "
            "leave data.format out",
        )
    cfg.dali = OmegaConf.merge(_DEFAULTS, OmegaConf.select(cfg, "dali", default={}))
    if cfg.dali.device not in ("cpu", "gpu"):
        raise UsageError("dali.device", f"dali.device={cfg.dali.device}: expected cpu or gpu")
    if cfg.dali.device == "gpu" and not torch.cuda.is_available():
        raise UsageError("dali.device", "dali.device=gpu, but no GPU is there: add dali.device=cpu")
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
                    "data.train_path",
                    f"data.train_path: DALI does not read image '{path}', a TIFF of mode {mode}: "
                    "convert it to 8-bit RGB, or data.format=image_folder",
                )


def check_augmentations(cfg: DictConfig) -> None:
    """Check that DALI has every augmentation of a complete pretraining config.

    Raises:
        UsageError: it has not.
    """
    if any(OmegaConf.select(view, "equalization.prob", default=0.0) for view in cfg.augmentations):
        raise UsageError(
            "augmentations",
            "augmentations: equalization.prob > 0: DALI has none; set it to 0, or data.format=image_folder",
        )


def free_cpu_pipelines_from_cuda() -> None:
    """Let main's CPU pipelines run where there is no GPU. Safe to call again; imports nothing of the suite.

    With a GPU nothing changes: there a CPU pipeline is built for it and hands over pinned memory. main's builders take
    ``device_id`` when the pipeline is made, after they have added it to the seed.
    """
    module = sys.modules.get("solo.data.dali_dataloader")
    if module is None or torch.cuda.is_available():
        return
    for builder in (module.PretrainPipelineBuilder, module.NormalPipelineBuilder):
        if not hasattr(builder.pipeline, "for_no_gpu"):
            builder.pipeline = _for_no_gpu(builder.pipeline)


def _for_no_gpu(pipeline: Any) -> Any:
    @functools.wraps(pipeline)
    def for_no_gpu(self: Any, **kwargs: Any) -> Any:
        return pipeline(self, **kwargs | ({"device_id": None} if self.device == "cpu" else {}))

    for_no_gpu.for_no_gpu = True  # type: ignore[attr-defined]
    return for_no_gpu
