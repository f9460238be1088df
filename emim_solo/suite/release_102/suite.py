"""solo-learn 1.0.2, the only release on the package registry, configured by the YAML schema of solo-learn main."""

from __future__ import annotations

import argparse
import importlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from solo.args.utils import N_CLASSES_PER_DATASET
from solo.methods import METHODS
from solo.methods.base import BaseMethod
from solo.methods.linear import LinearModel
from solo.utils import pretrain_dataloader
from solo.utils.checkpointer import Checkpointer
from solo.utils.knn import WeightedKNNClassifier
from solo.utils.lars import LARSWrapper
from torch import Tensor, nn
from torch.nn import functional

from emim_solo.emim.method import DEFAULTS as EMIM_DEFAULTS
from emim_solo.emim.method import EMIMMethod, complete_method_kwargs
from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.suite.api import IMAGENET_MEAN, IMAGENET_STD, Suite, allow_few_classes, as_dict, open_copy
from emim_solo.suite.fixes import LabelsOptional
from emim_solo.suite.preflight import check_numbers
from emim_solo.suite.release_102.compat import linear_warmup_cosine_annealing
from emim_solo.suite.release_102.dali import DALIData
from emim_solo.suite.views import ViewsTogether

_DEFAULTS: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("defaults.yaml")))


class EMIM(EMIMMethod, LabelsOptional, ViewsTogether, BaseMethod):
    """EMIM on 1.0.2's ``BaseMethod(**kwargs)``."""

    def __init__(self, **kwargs: Any) -> None:
        method_kwargs = {name: kwargs.pop(name, default) for name, default in EMIM_DEFAULTS.items()}
        super().__init__(**kwargs)
        self.add_emim(method_kwargs)

    def embeddings(self, out: Any) -> list[Tensor]:
        """1.0.2's base training step returns features only."""
        return self.on_each_view(self.projector, out["feats"])


class CosineKNNClassifier(WeightedKNNClassifier):
    """1.0.2 uses plain dot products as cosine similarity. Here the features have unit length, as in main."""

    def update(self, **features_and_targets: Any) -> None:
        """The base class's, on normalised features."""
        for name, value in features_and_targets.items():
            if name.endswith("features") and value is not None:
                features_and_targets[name] = functional.normalize(value, dim=1)
        super().update(**features_and_targets)


class CollectiveCheckpointer(Checkpointer):
    """1.0.2 saves on rank zero only. In Lightning 2 saving ends in a barrier, so every process must take part."""

    def save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            super().save(trainer)
        elif not trainer.sanity_checking:
            trainer.save_checkpoint(self.path / self.ckpt_placeholder.format(trainer.current_epoch))


def _lars(
    params: Any,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    eta: float = 1e-3,
    clip_lr: bool = False,
    exclude_bias_n_norm: bool = False,
) -> LARSWrapper:
    """main's LARS as 1.0.2 builds it: SGD in a wrapper."""
    sgd = torch.optim.SGD(params, lr, momentum, dampening, weight_decay, nesterov)
    return LARSWrapper(sgd, eta=eta, clip=clip_lr, exclude_bias_n_norm=exclude_bias_n_norm)


class Release102Suite(Suite):
    generation = "1.0.2"
    emim_class = EMIM
    evaluation_module = "solo.utils.classification_dataloader"
    evaluation_folders = ("train_dir", "val_dir")  # joined to a folder of its own, which absolute ones replace
    optimizers: ClassVar = {"sgd": torch.optim.SGD, "lars": _lars, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    any_number_of_views = ("wmse",)
    linear_optimizers = ("sgd", "lars", "adam")
    schedulers = ("warmup_cosine", "cosine", "step", "none")

    def uses_small_crops(self, method: str) -> bool:
        # other methods of 1.0.2 unpack the features of exactly two crops
        return method in ("byol", "simclr") or getattr(self.methods()[method], "takes_many_views", False)

    def _complete(self, cfg: DictConfig) -> DictConfig:
        cfg = self._complete_common(cfg, _DEFAULTS["pretrain"])
        _refuse("data.format", cfg.data.format == "h5", "use the whole image folder")
        _refuse("data.fraction", cfg.data.fraction > 0, "use the whole image folder")
        _refuse("auto_umap.enabled", cfg.auto_umap.enabled, "use 'emim-solo umap' on its checkpoints")
        _refuse("optimizer.exclude_bias_n_norm_wd", cfg.optimizer.exclude_bias_n_norm_wd)
        if cfg.backbone.name not in (known := BaseMethod._SUPPORTED_ENCODERS):
            text = f"backbone.name '{cfg.backbone.name}' is not in 1.0.2: expected one of {', '.join(known)}"
            raise UsageError("backbone.name", f"{text}; solo-learn main has more")
        size = cfg.augmentations[0].crop_size
        cfg.data.num_large_crops = sum(view.num_crops for view in cfg.augmentations if view.crop_size == size)
        cfg.data.num_small_crops = sum(view.num_crops for view in cfg.augmentations) - cfg.data.num_large_crops
        if cfg.data.val_path is not None:
            cfg.optimizer.classifier_lr *= self._batch_scale(cfg)
        kwargs = as_dict(cfg.method_kwargs)
        if cfg.method == "emim":
            cfg.method_kwargs = complete_method_kwargs(kwargs, self._names_of_other_methods())
        else:
            defaults = self._method_defaults(cfg.method)
            cfg.method_kwargs = defaults | {name: value for name, value in kwargs.items() if name in defaults}
            if self.method(cfg.method).__module__.startswith("solo."):
                check_numbers(as_dict(cfg.method_kwargs))
        return cfg

    def _complete_common(self, cfg: DictConfig, defaults: dict[str, Any]) -> DictConfig:
        cfg = OmegaConf.merge(_DEFAULTS["common"], defaults, open_copy(cfg))  # type: ignore[assignment]
        cfg.optimizer.lr *= self._batch_scale(cfg)
        kwargs = _DEFAULTS["optimizer_kwargs"].get(cfg.optimizer.name, {})
        cfg.optimizer.kwargs = OmegaConf.merge(kwargs, cfg.optimizer.kwargs)
        return cfg

    @staticmethod
    def _batch_scale(cfg: DictConfig) -> float:
        """main scales both learning rates by the global batch size; 1.0.2 leaves that to its caller."""
        return cfg.optimizer.batch_size * compare.processes(cfg) / 256

    @staticmethod
    def _method_defaults(method: str) -> dict[str, Any]:
        """Arguments, with defaults, that a method declares beyond those of the base methods."""
        shared = {"base_tau_momentum", "final_tau_momentum", "momentum_classifier", *_arguments(METHODS["base"])}
        return {name: default for name, default in _arguments(METHODS[method]).items() if name not in shared}

    def _names_of_other_methods(self) -> set[str]:
        return {name for method in self.methods() if method != "emim" for name in self._method_defaults(method)}

    def _finish(self, model: Any, cfg: DictConfig) -> None:
        model.scheduler_interval = cfg.scheduler.interval
        if cfg.knn_eval.enabled:  # 1.0.2 itself has only Euclidean distance
            distance = cfg.knn_eval.distance_func
            kind = CosineKNNClassifier if distance == "cosine" else WeightedKNNClassifier
            model.knn = kind(k=cfg.knn_eval.k, distance_fx=distance)
        # main's default. Here only on request: it changes rounding, and committed rows were made without it
        if not OmegaConf.select(cfg, "performance.disable_channel_last", default=True):
            model.to(memory_format=torch.channels_last)

    def constructor_kwargs(self, cfg: DictConfig) -> dict[str, Any]:
        values = as_dict(cfg)
        small_stem = values["backbone"].get("small_image_stem", False)
        backbone_args = {**values["backbone"]["kwargs"]}
        if cfg.backbone.name.startswith("resnet"):
            backbone_args["cifar"] = small_stem or cfg.data.dataset in ("cifar10", "cifar100")
        elif small_stem:
            key = "backbone.small_image_stem"
            raise UsageError(key, f"{key} is for ResNets, got {cfg.backbone.name}: leave it out")
        else:
            backbone_args.setdefault("img_size", cfg.augmentations[0].crop_size)
        return {
            "encoder": cfg.backbone.name,
            "backbone_args": backbone_args,
            "num_classes": cfg.data.num_classes,
            "max_epochs": cfg.max_epochs,
            "accumulate_grad_batches": cfg.accumulate_grad_batches,
            "num_large_crops": cfg.data.num_large_crops,
            "num_small_crops": cfg.data.num_small_crops,
            "classifier_lr": cfg.optimizer.classifier_lr,
            "min_lr": cfg.scheduler.min_lr,
            "warmup_start_lr": cfg.scheduler.warmup_start_lr if cfg.scheduler.warmup_epochs > 0 else cfg.optimizer.lr,
            "warmup_epochs": cfg.scheduler.warmup_epochs,
            "knn_eval": cfg.knn_eval.enabled,
            "knn_k": cfg.knn_eval.k,
            "base_tau_momentum": cfg.momentum.base_tau,
            "final_tau_momentum": cfg.momentum.final_tau,
            "momentum_classifier": cfg.momentum.classifier,
            **self._optimizer_kwargs(values),
            **values["method_kwargs"],
        }

    @staticmethod
    def _optimizer_kwargs(values: dict[str, Any]) -> dict[str, Any]:
        """main has LARS as its own optimizer; 1.0.2 wraps SGD in it."""
        optimizer, schedule, extra = values["optimizer"], values["scheduler"], dict(values["optimizer"]["kwargs"])
        lars = optimizer["name"] == "lars"
        of_lars = {"eta_lars": extra.pop("eta"), "grad_clip_lars": extra.pop("clip_lr")} if lars else {}
        return {
            "optimizer": "sgd" if lars else optimizer["name"],
            "lars": lars,
            **{name: optimizer[name] for name in ("lr", "weight_decay", "batch_size")},
            "scheduler": schedule["name"],
            "lr_decay_steps": schedule["lr_decay_steps"],
            "exclude_bias_n_norm": extra.pop("exclude_bias_n_norm", False),
            **of_lars,
            "extra_optimizer_args": extra,
        }

    def _training_data(self, cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
        views = [self.view_transform(cfg, view) for view in cfg.augmentations]
        crops = [view.num_crops for view in cfg.augmentations]
        transform = pretrain_dataloader.prepare_n_crop_transform(views, num_crops_per_aug=crops)
        train_path = Path(cfg.data.train_path).absolute()
        folder = {"data_dir": train_path.parent, "train_dir": train_path.name}
        return pretrain_dataloader, {"transform": transform, **folder}

    def _dali_datamodule(self, cfg: DictConfig, listing: Any) -> LightningDataModule:
        return DALIData(cfg, [view_kwargs(cfg, view) for view in cfg.augmentations], listing)

    def view_transform(self, cfg: DictConfig, view: DictConfig) -> Callable[[Any], Tensor]:
        return pretrain_dataloader.prepare_transform(cfg.data.dataset, **view_kwargs(cfg, view))

    def checkpointer(self, cfg: DictConfig) -> Callback:
        return CollectiveCheckpointer(
            Namespace(**as_dict(cfg)),
            logdir=Path(cfg.checkpoint.dir) / cfg.method,
            frequency=cfg.checkpoint.frequency,
            keep_previous_checkpoints=cfg.checkpoint.keep_prev,
        )

    def classes_of_datasets(self) -> Mapping[str, int]:
        return N_CLASSES_PER_DATASET  # type: ignore[no-any-return]

    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        cfg = self._complete_common(cfg, {})
        for name in ("eta", "clip_lr") if cfg.optimizer.name == "lars" else ():
            key, built_in = f"optimizer.kwargs.{name}", _DEFAULTS["optimizer_kwargs"]["lars"][name]
            if cfg.optimizer.kwargs[name] != built_in:
                raise UsageError(key, f"{key}: 1.0.2's LinearModel has {built_in} built in; leave it out")
        return cfg

    def linear_model(self, backbone: nn.Module, cfg: DictConfig) -> LightningModule:
        module = importlib.import_module("solo.methods.linear")
        allow_few_classes(module)
        kwargs = self._optimizer_kwargs(as_dict(cfg))
        schedule = cfg.scheduler
        model = LinearModel(backbone, num_classes=cfg.data.num_classes, max_epochs=cfg.max_epochs, **kwargs)
        model.scheduler_interval = schedule.interval
        # 1.0.2's LinearModel always warms up for 10 epochs; `annealing` replaces its schedule.
        model.warmup_epochs = schedule.warmup_epochs

        def annealing(optimizer: Any, _: int, max_epochs: float) -> Any:
            rates = schedule.warmup_start_lr, schedule.min_lr
            return linear_warmup_cosine_annealing(optimizer, model.warmup_epochs, max_epochs, *rates)

        module.LinearWarmupCosineAnnealingLR = annealing  # type: ignore[attr-defined]
        return model


def _refuse(key: str, wanted: Any, instead: str = "leave it out", what: str = "") -> None:
    """Refuse a setting that 1.0.2 does not have, if it is used."""
    if wanted:
        raise UsageError(key, f"{key}{what}: solo-learn main has it, 1.0.2 (installed) does not; {instead}")


def view_kwargs(cfg: DictConfig, view: DictConfig) -> dict[str, Any]:
    """One entry of ``augmentations`` as arguments of 1.0.2's transforms."""
    equalized = OmegaConf.select(view, "equalization.prob", default=0.0)
    _refuse("augmentations", equalized, "set it to 0", ": equalization.prob > 0")
    _refuse("augmentations", not view.rrc.enabled, "set crop_min_scale and crop_max_scale", ": rrc.enabled=False")
    jitter = view.color_jitter
    kwargs = {
        # 1.0.2 builds the jitter even if it is never applied
        **{name: jitter.get(name, 0.0) for name in ("brightness", "contrast", "saturation", "hue")},
        "color_jitter_prob": jitter.prob,
        "gray_scale_prob": view.grayscale.prob,
        "horizontal_flip_prob": view.horizontal_flip.prob,
        "gaussian_prob": view.gaussian_blur.prob,
        "solarization_prob": view.solarization.prob,
        "crop_size": view.crop_size,
        "min_scale": view.rrc.crop_min_scale,
        "max_scale": view.rrc.crop_max_scale,
    }
    if cfg.data.dataset == "custom":
        kwargs |= {"mean": list(view.get("mean", IMAGENET_MEAN)), "std": list(view.get("std", IMAGENET_STD))}
    return kwargs


def _arguments(method: Any) -> dict[str, Any]:
    """Arguments of a method of 1.0.2, with their defaults."""
    parser = method.add_model_specific_args(argparse.ArgumentParser(add_help=False))
    return {action.dest: action.default for action in parser._actions}
