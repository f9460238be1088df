"""NVIDIA DALI, with and without a GPU. The pipelines are solo-learn's own.

Both generations build the CPU pipelines of ``dali.device: cpu`` for GPU number ``local_rank``, so DALI requires CUDA.
With ``device_id=None`` the pipelines run anywhere: :func:`free_cpu_pipelines_from_cuda` sets that for main. The pipelines
read the images that :mod:`emim_solo.suite.loaders` lists.

DALI seeds its pipelines with a constant and the local rank. Another ``seed`` does not change the order of images, and a
resumed run starts the order again.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.imports import package_available
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import BITS_PER_SAMPLE, FOLDER_DATASETS, Images, load_rgb
from emim_solo.suite import schema

is_installed = functools.partial(package_available, "nvidia.dali")


def complete_dali(cfg: DictConfig) -> DictConfig:
    """Fill in main's defaults of ``dali`` and check that this machine supports the settings. Changes ``cfg``.

    Args:
        cfg: a config with ``data.format: dali``; its values have the schema's types.

    Raises:
        UsageError: DALI is not installed or lacks an augmentation, the dataset is not of image folders, or there is no GPU.
    """
    if not is_installed():
        raise UsageError(
            "data.format",
            "data.format=dali, but NVIDIA DALI is not installed: pip install 'emim-solo[dali]', "
            "or data.format=image_folder",
        )
    if cfg.data.dataset not in FOLDER_DATASETS:
        raise UsageError(
            "data.format",
            f"data.format=dali does not know data.dataset={cfg.data.dataset}: expected one of {', '.join(FOLDER_DATASETS)}; "
            "leave data.format out",
        )
    cfg.dali = OmegaConf.merge(asdict(schema.Dali()), OmegaConf.select(cfg, "dali", default={}))
    if cfg.dali.device == "gpu" and not torch.cuda.is_available():
        raise UsageError("dali.device", "dali.device=gpu, but there is no GPU: add +dali.device=cpu")
    if any(OmegaConf.select(view, "equalization.prob", default=0.0) for view in cfg.augmentations):
        text = "equalization.prob > 0: DALI has none; set it to 0, or data.format=image_folder"
        raise UsageError("augmentations", f"augmentations: {text}")
    return cfg


def check_training_images(images: Images) -> None:
    """Check that DALI, too, can read the training images.

    DALI decodes a file to the same pixels as :func:`emim_solo.images.folders.load_rgb`, or fails. But it assumes that floating
    values of a TIFF lie between 0 and 1.

    Raises:
        UsageError: an image cannot be read, or DALI cannot read it.
    """
    for path in images.paths:
        if path.lower().endswith((".tif", ".tiff")):
            load_rgb(path, "data.train_path: ")
            with Image.open(path) as image:
                bits = np.min(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 1))
                mode = image.mode
            if bits < 8 or mode == "LAB":
                raise UsageError(
                    "data.train_path",
                    f"data.train_path: DALI does not read image '{path}', a TIFF of mode {mode}: "
                    "convert it to 8-bit RGB, or data.format=image_folder",
                )


def free_cpu_pipelines_from_cuda() -> None:
    """Let main's CPU pipelines run without a GPU. Safe to call again; imports nothing of solo-learn.

    With a GPU nothing changes: a CPU pipeline is then built for that GPU and returns pinned memory. main's builders have
    already added ``device_id`` to the seed when they pass it to the pipeline.
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
