"""The known keys of a pretraining config, with the type and the bounds of each value.

The schema is solo-learn main's, with the keys of this package added. A config may have other keys: the method, optimizer or
backbone that knows them checks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, cast, get_args, get_type_hints

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig

from emim_solo.ground.settings import setting, types_of

MOST_PROCESSES = 4_096
_MOST_CROPS, _MOST_PIXELS, _MOST_WORKERS = 1_000, 4_096, 1_024  # more is a typing error and would exhaust memory

_OF_TRAINER = get_args(get_type_hints(Trainer.__init__)["precision"])
_PRECISIONS = ("auto", *(value for literal in _OF_TRAINER for value in get_args(literal)))


@dataclass(frozen=True, kw_only=True)
class Crop:
    enabled: bool = True
    crop_min_scale: float = setting(0.08, above=0, most=1)
    crop_max_scale: float = setting(1.0, above=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Chance:
    prob: float = setting(0.0, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Jitter(Chance):
    brightness: float | tuple[float, float] = setting(0.0, least=0)
    contrast: float | tuple[float, float] = setting(0.0, least=0)
    saturation: float | tuple[float, float] = setting(0.0, least=0)
    hue: float | tuple[float, float] = setting(0.0, least=-0.5, most=0.5)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to an image to make a view of it. Of the keys that are left out, only the random crop is on."""

    rrc: Crop = field(default_factory=Crop)
    color_jitter: Jitter = field(default_factory=Jitter)
    grayscale: Chance = field(default_factory=Chance)
    gaussian_blur: Chance = field(default_factory=Chance)
    solarization: Chance = field(default_factory=Chance)
    equalization: Chance = field(default_factory=Chance)
    horizontal_flip: Chance = field(default_factory=Chance)


@dataclass(frozen=True, kw_only=True)
class View(Augmentation):
    """An entry of ``augmentations``."""

    crop_size: int = setting(least=1, most=_MOST_PIXELS)
    num_crops: int = setting(least=1, most=_MOST_CROPS)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = setting(None, above=0)


@dataclass(kw_only=True)
class Data:
    dataset: str = setting(choices=("custom", "cifar10", "cifar100", "stl10", "imagenet100", "imagenet"))
    train_path: str = setting()
    val_path: str | None = None
    format: str = setting("image_folder", choices=("image_folder", "dali", "h5"))
    num_workers: int = setting(least=0, most=_MOST_WORKERS)
    no_labels: bool = False
    fraction: float = setting(-1.0, most=1)
    embedded: str | None = None
    image_size: int | None = setting(None, least=1, most=_MOST_PIXELS)


@dataclass(kw_only=True)
class Backbone:
    name: str = setting()
    kwargs: dict[str, Any] | None = None
    small_image_stem: bool = False


@dataclass(kw_only=True)
class Optimizer:
    name: str = setting()
    batch_size: int = setting(least=2)
    lr: float = setting(least=0)
    classifier_lr: float = setting(least=0)
    weight_decay: float = setting(least=0)
    exclude_bias_n_norm_wd: bool = False
    kwargs: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Scheduler:
    name: str = setting()
    lr_decay_steps: list[int] | None = setting(None, least=1)
    min_lr: float = setting(0.0, least=0)
    warmup_start_lr: float = setting(3e-5, least=0)
    warmup_epochs: float = setting(10.0, least=0)
    interval: str = setting("step", choices=("step", "epoch"))


@dataclass(kw_only=True)
class Switch:
    enabled: bool = False


@dataclass(kw_only=True)
class CheckpointKeys(Switch):
    dir: str = "trained_models"
    frequency: int = setting(1, least=1)
    keep_prev: bool = False
    every_n_steps: int | None = setting(None, least=1)  # also saves within an epoch


@dataclass(kw_only=True)
class AutoResume(Switch):
    max_hours: float = setting(36.0, least=0)


@dataclass(kw_only=True)
class Wandb(Switch):
    entity: str | None = None
    project: str | None = "solo-learn"
    group: str | None = None
    offline: bool = False


@dataclass(kw_only=True)
class KNN(Switch):
    k: int = setting(20, least=1)
    distance_func: str = setting("euclidean", choices=("cosine", "euclidean"))


@dataclass(kw_only=True)
class UMAP(Switch):
    dir: str = "auto_umap"
    frequency: int = setting(1, least=1)


@dataclass(kw_only=True)
class Momentum:
    base_tau: float = setting(0.99, least=0, most=1)
    final_tau: float = setting(1.0, least=0, most=1)
    classifier: bool = False


@dataclass(kw_only=True)
class Dali:
    device: str = setting("gpu", choices=("cpu", "gpu"))
    encode_indexes_into_labels: bool = False


@dataclass(kw_only=True)
class Performance:
    disable_channel_last: bool = False


@dataclass(kw_only=True)
class Score(Switch):
    """The label-free score during training."""

    protocol: str = "default"  # of emim-solo score: name of a shipped one, or a file
    every_n_epochs: int | None = setting(None, least=1)  # None: a scoring costs less than 5 % of the training
    patience: int | None = setting(None, least=1)  # the run ends after so many scorings without a better score
    keep_best: bool = False  # keeps the best-scored checkpoint, in best/ of the run's folder


REFUSED = {
    "barebones": "it turns off what a run is made of: leave it out",
    "callbacks": "callbacks are Python objects: give them to emim_solo.training.pretraining.pretrain as more_callbacks",
    "default_root_dir": "a run lies in checkpoint.dir: set that",
    "enable_checkpointing": "set checkpoint.enabled",
    "fast_dev_run": "it saves nothing: set max_epochs=1 +limit_train_batches=1 +limit_val_batches=1",
    "logger": "set wandb.enabled=True or tensorboard.enabled=True; metrics.csv is always written",
    "model_registry": "checkpoints go to checkpoint.dir alone: leave it out",
    "plugins": "plugins are Python objects: leave it out",
    "reload_dataloaders_every_n_epochs": "the loader is seeded for each epoch: leave it out",
}
"""Options of the Trainer that a config cannot have, and what to do instead."""


@dataclass(kw_only=True)
class Config:
    """All known keys of a pretraining config."""

    name: str = setting()
    method: str = setting()
    seed: int = setting(5, least=0, most=2**32 - 1)
    max_epochs: int = setting(least=1)
    num_nodes: int = setting(1, least=1, most=MOST_PROCESSES)
    backbone: Backbone | None = None
    method_kwargs: dict[str, Any] | None = None
    momentum: Momentum | None = None
    data: Data | None = None
    dali: Dali | None = None
    augmentations: list[View] = setting()
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    checkpoint: CheckpointKeys | None = None
    auto_resume: AutoResume | None = None
    resume_from_checkpoint: str | None = None
    knn_eval: KNN | None = None
    auto_umap: UMAP | None = None
    wandb: Wandb | None = None
    tensorboard: Switch | None = None
    performance: Performance | None = None
    score: Score | None = None
    debug_augmentations: bool = False

    # Options of Lightning's Trainer. They are passed on unchanged.
    accelerator: str = setting("auto", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu"))
    strategy: str | None = setting(None, choices=("auto", *sorted(StrategyRegistry.available_strategies())))
    precision: str | int | None = setting(None, choices=_PRECISIONS)
    sync_batchnorm: bool = False
    max_time: str | dict[str, int] | None = None
    min_epochs: int | None = setting(None, least=1)
    max_steps: int = setting(-1, least=-1)
    min_steps: int | None = setting(None, least=1)
    limit_train_batches: int | float | None = setting(None, above=0)
    limit_val_batches: int | float | None = setting(None, least=0)
    limit_test_batches: int | float | None = setting(None, least=0)
    limit_predict_batches: int | float | None = setting(None, least=0)
    overfit_batches: int | float = setting(0.0, least=0)
    val_check_interval: int | float | None = setting(None, above=0)
    check_val_every_n_epoch: int | None = setting(1, least=1)
    num_sanity_val_steps: int | None = setting(None, least=-1)
    log_every_n_steps: int | None = setting(None, least=0)
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = setting(1, least=1)
    gradient_clip_val: int | float | None = setting(None, least=0)
    gradient_clip_algorithm: str | None = setting(None, choices=("norm", "value"))
    deterministic: bool | str | None = setting(None, choices=("warn",))
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    profiler: str | None = setting(None, choices=("simple", "advanced", "pytorch"))
    detect_anomaly: bool = False
    enable_autolog_hparams: bool = True


def missing(values: Mapping[str, Any], kind: type = Config, above: str = "") -> list[str]:
    """Keys that have neither a value nor a default, those of sections included."""
    keys = []
    for entry in fields(kind):
        key, value = f"{above}{entry.name}", values.get(entry.name)
        section = _section(kind, entry.name)
        if value in (None, "???") and MISSING is entry.default is entry.default_factory:
            keys.append(key)
        elif section is not None and isinstance(value, Mapping | None):
            keys += missing(value or {}, section, f"{key}.")
    return keys


def leave_out_empty_sections(cfg: DictConfig, kind: type = Config) -> None:
    """Remove the keys of sections that are null, as in ``score: null`` or ``optimizer.kwargs: null``. Changes ``cfg``."""
    for entry in fields(kind):
        section = _section(kind, entry.name)
        if entry.name in cfg and cfg[entry.name] is None and (section or entry.name.endswith("kwargs")):
            del cfg[entry.name]
        elif section is not None and isinstance(cfg.get(entry.name), DictConfig):
            leave_out_empty_sections(cfg[entry.name], section)


def _section(kind: type, name: str) -> type | None:
    """The dataclass of a field that is a section, else None."""
    return next((cast(type, option) for option in get_args(types_of(kind)[name]) if is_dataclass(option)), None)
