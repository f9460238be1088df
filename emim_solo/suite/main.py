"""solo-learn main (1.0.6), the generation that users have.

EMIM is registered in the middle of ``import solo``, just after ``solo.methods`` is loaded. Imports at the top are those
that already work at that moment.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from solo.methods import METHODS
from solo.methods.base import BaseMethod, BaseMomentumMethod
from torch import Tensor, nn

from emim_solo.emim.method import EMIMMethod, complete_method_kwargs
from emim_solo.ground.errors import UsageError
from emim_solo.suite import dali
from emim_solo.suite.api import Suite, allow_few_classes, as_dict, give_small_image_stem, open_copy
from emim_solo.suite.fixes import LabelsOptional
from emim_solo.suite.loaders import replaced
from emim_solo.suite.preflight import check_numbers
from emim_solo.suite.views import ViewsTogether

# Where solo-learn counts the folders in data.train_path, it finds none: they are listed already.
_NO_FOLDERS = SimpleNamespace(scandir=lambda _: [])


class EMIM(EMIMMethod, LabelsOptional, ViewsTogether, BaseMethod):
    """EMIM on main's ``BaseMethod(cfg)``."""

    cfg: DictConfig

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.add_emim(cfg.method_kwargs)  # the base class has completed them in place
        if OmegaConf.select(cfg, "data.no_labels", default=False):
            self.without_labels()  # main_pretrain.py builds this class without Suite.build

    def multicrop_forward(self, X: Tensor) -> dict[str, Any]:
        """Features and embeddings of a small crop."""
        out: dict[str, Any] = super().multicrop_forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def run_settings(self) -> dict[str, Any]:
        """The whole config."""
        return as_dict(self.cfg)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Defaults and checks of the base method and of EMIM's ``method_kwargs``."""
        cfg = BaseMethod.add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs = complete_method_kwargs(as_dict(cfg.method_kwargs), _names_of_other_methods())
        return cfg


def _names_of_other_methods() -> set[str]:
    return set().union(*(_names_read_by(method) for name, method in METHODS.items() if name != "emim"))


def _names_read_by(method: type) -> set[str]:
    """Names of ``method_kwargs`` in a method's source: main has no list of them."""
    try:
        source = inspect.getsource(sys.modules[method.__module__])
    except (OSError, TypeError):  # a class from a notebook, or a compiled one
        return set()
    return set(re.findall(r"method_kwargs\.(\w+)", source))


class MainSuite(Suite):
    generation = "main"
    emim_class = EMIM
    evaluation_module = "solo.data.classification_dataloader"
    evaluation_folders = ("train_data_path", "val_data_path")
    optimizers = BaseMethod._OPTIMIZERS
    any_number_of_views = ("mae", "simclr", "supcon", "wmse")

    def uses_small_crops(self, method: str) -> bool:
        # The base class computes features of a small crop, no embedding. Other methods never use them.
        return self.methods()[method].multicrop_forward is not BaseMethod.multicrop_forward

    def _complete(self, cfg: DictConfig) -> DictConfig:
        from solo.args import pretrain

        with replaced(pretrain, os=_NO_FOLDERS):
            cfg = pretrain.parse_cfg(cfg)
        method = self.method(cfg.method)
        if issubclass(method, BaseMomentumMethod) and OmegaConf.select(cfg, "momentum") is None:
            cfg.momentum = {}  # its keys have defaults, the section itself has none
        cfg = method.add_and_assert_specific_cfg(cfg)
        if cfg.backbone.name.startswith("vit"):  # timm assumes 224 pixels, whatever the crop size
            cfg.backbone.kwargs = {"img_size": cfg.augmentations[0].crop_size} | as_dict(cfg.backbone.kwargs)
        if method is not EMIM and (missing := sorted(_names_read_by(method) - set(cfg.method_kwargs))):
            names = ", ".join(f"method_kwargs.{name}" for name in missing)
            raise UsageError(
                "method_kwargs",
                f"{cfg.method} needs {names}: solo-learn main has no default for them; copy them from the method's "
                f"config in its scripts/pretrain/cifar",
            )
        if method.__module__.startswith("solo."):
            read = _names_read_by(method)
            check_numbers({name: value for name, value in as_dict(cfg.method_kwargs).items() if name in read})
        return cfg

    def constructor_kwargs(self, cfg: DictConfig) -> dict[str, Any]:
        return {"cfg": open_copy(cfg)}

    def _finish(self, model: Any, cfg: DictConfig) -> None:
        from solo.utils.misc import make_contiguous

        if OmegaConf.select(cfg, "backbone.small_image_stem", default=False):
            give_small_image_stem(model.backbone)
            if (momentum := getattr(model, "momentum_backbone", None)) is not None:
                give_small_image_stem(momentum)
                momentum.conv1.load_state_dict(model.backbone.conv1.state_dict())
                momentum.conv1.requires_grad_(False)
        make_contiguous(model)
        if not cfg.performance.disable_channel_last:
            model.to(memory_format=torch.channels_last)

    def _training_data(self, cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
        from solo.data import pretrain_dataloader as module

        views = [module.NCropAugmentation(self.view_transform(cfg, view), view.num_crops) for view in cfg.augmentations]
        return module, {
            "transform": module.FullTransformPipeline(views),
            "train_data_path": cfg.data.train_path,
            "data_format": cfg.data.format,
            "data_fraction": cfg.data.fraction,
        }

    def _dali_datamodule(self, cfg: DictConfig, listing: Any) -> LightningDataModule:
        from solo.data import dali_dataloader
        from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation

        dali_dataloader.os = listing
        dali.free_cpu_pipelines_from_cuda()
        build = dali_dataloader.build_transform_pipeline_dali
        views = [
            NCropAugmentation(build(cfg.data.dataset, view, dali_device=cfg.dali.device), view.num_crops)
            for view in cfg.augmentations
        ]
        return dali_dataloader.PretrainDALIDataModule(
            dataset=cfg.data.dataset,
            train_data_path=cfg.data.train_path,
            transforms=FullTransformPipeline(views),
            num_large_crops=cfg.data.num_large_crops,
            num_small_crops=cfg.data.num_small_crops,
            num_workers=max(1, cfg.data.num_workers),  # DALI's threads
            batch_size=cfg.optimizer.batch_size,
            no_labels=cfg.data.no_labels,
            data_fraction=cfg.data.fraction,
            dali_device=cfg.dali.device,
            encode_indexes_into_labels=cfg.dali.encode_indexes_into_labels,
        )

    def view_transform(self, cfg: DictConfig, view: DictConfig) -> Callable[[Any], Tensor]:
        from solo.data.pretrain_dataloader import build_transform_pipeline

        return build_transform_pipeline(cfg.data.dataset, view)

    def checkpointer(self, cfg: DictConfig) -> Callback:
        from solo.utils.checkpointer import Checkpointer

        return Checkpointer(
            cfg,
            logdir=Path(cfg.checkpoint.dir) / cfg.method,
            frequency=cfg.checkpoint.frequency,
            keep_prev=cfg.checkpoint.keep_prev,
        )

    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        from solo.args import linear

        classes = cfg.data.get("num_classes", 1)
        with replaced(linear, os=_NO_FOLDERS):
            cfg = linear.parse_cfg(open_copy(cfg))  # LinearModel itself adds the defaults of its own settings
        cfg.data.num_classes = classes
        return cfg

    def classes_of_datasets(self) -> Mapping[str, int]:
        from solo.args import pretrain

        return pretrain._N_CLASSES_PER_DATASET  # type: ignore[no-any-return]

    def linear_model(self, backbone: nn.Module, cfg: DictConfig) -> LightningModule:
        from solo.methods import linear

        allow_few_classes(linear)
        return linear.LinearModel(backbone, cfg=cfg, loss_func=nn.CrossEntropyLoss(), mixup_func=None)
