"""A pretraining run. Its config, its images, the protocol of its score and its start are decided once, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from emim_solo.evaluation.protocol import FEWEST_IMAGES, Protocol
from emim_solo.ground import compare, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import check, read
from emim_solo.images.embedded import write_images
from emim_solo.images.folders import HeldOut, Listings, RunImages, expand_home
from emim_solo.suite import load_suite, schema
from emim_solo.suite.api import device_of, in_one_line, open_copy

_ONE_CROP = ("wmse", "mae")  # one crop is enough for these, as in solo-learn's main_pretrain.py
_SIDES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "digits": 32, "fashion-mnist": 28, "fashion-mnist-few": 28}
_HELD_OUT = 10  # at most one in ten training images is held out for the score


@dataclass(frozen=True)
class Start:
    """How a run starts: afresh, from a checkpoint, or not at all because it is finished."""

    checkpoint: Path | None = None  # the run goes on from it, or has finished with it
    contents: dict[str, Any] = field(default_factory=dict, repr=False)  # of that file, until Lightning restores them
    epochs: int = 0  # whole epochs in the checkpoint
    batches: int = 0  # batches of the next epoch in the checkpoint, for each process
    finished: bool = False


@dataclass(frozen=True)
class Run:
    """One pretraining run. Code that gets a Run relies on its values and does not check them again."""

    config: DictConfig  # complete and read-only, in solo-learn main's schema; learning rates are for the global batch
    images: RunImages  # listed once
    protocol: Protocol | None = None  # of the score during training; None: no score
    folder: Path | None = None  # <checkpoint.dir>/<method>/<version>, set by emim_solo.training.resume.decide
    start: Start = Start()

    @property
    def base(self) -> Path:
        """The folder ``<checkpoint.dir>/<method>``, which holds the folders of the method's runs."""
        return Path(self.config.checkpoint.dir) / self.config.method

    @property
    def rows_file(self) -> Path:
        """The file to which the run's row is appended."""
        return Path(self.config.checkpoint.dir) / "rows.jsonl"

    @property
    def saved_every(self) -> int | None:
        """Number of steps between checkpoints within an epoch; None: checkpoints only at the ends of epochs."""
        return OmegaConf.select(self.config, "checkpoint.every_n_steps")  # type: ignore[no-any-return]

    @property
    def processes(self) -> int:
        """Number of processes that train the run together."""
        return compare.processes(self.config)


def composed(folder: Path, name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A config as Hydra composes it, else a UsageError. Only one Hydra can be active, so an outer one is set aside meanwhile."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.2"):
            return open_copy(compose(name, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError("config", " ".join(str(error).split())) from error
    finally:
        GlobalHydra.instance().hydra = outer  # another instance: initialize_config_dir has replaced it


def prepare(cfg: DictConfig, listings: Listings | None = None) -> Run:
    """Check a pretraining config, fill in every default and list its images, before any work that could be lost.

    Args:
        cfg: solo-learn main's YAML schema, as composed by Hydra. Not changed.
        listings: image folders that are listed already, shared by several runs on the same images.

    Raises:
        UsageError: the config or its images are wrong. The message says what was expected and what to do.
    """
    suite, cfg = load_suite(), open_copy(cfg)
    schema.leave_out_empty_sections(cfg)
    _check_values(cfg)
    expand_home(cfg)
    files.check_name("name", cfg.name)
    suite.check_values(cfg)
    suite.method(cfg.method)
    _check_saved_within_epochs(cfg)
    cfg.devices = _device_list(cfg)
    if cfg.get("sync_batchnorm") and compare.processes(cfg) > 1 and not on_gpu(cfg):
        raise UsageError("sync_batchnorm", "sync_batchnorm=True on a CPU: torch has it on GPUs only: set it to False")
    if cfg.get("precision") == "auto":
        cfg.precision = native_precision(cfg)
    cfg.augmentations = [_complete_view(view) for view in cfg.augmentations]
    train = Path(cfg.data.train_path).absolute()
    if cfg.data.get("embedded") and train.name == "train" and not train.is_dir():  # a user's folder is left alone
        write_images(cfg.data.embedded, train.parent)
    score = cfg.pop("score", None)
    images = RunImages.of(cfg, listings)
    images.check_classes()
    protocol = None if score is None else _complete_score(cfg, score, images)
    if (held_out := HeldOut.recorded(cfg)) is not None and images.listed is not None:
        images = replace(images, held_positions=tuple(held_out.positions(len(images.listed))))
    cfg = suite.complete(cfg, images)
    _check_crops(cfg)
    for number, view in enumerate(cfg.augmentations):
        key = f"augmentations.{number}"
        with isolate_rng(), in_one_line(key, f"{key} in solo-learn {suite.version}"):  # torchvision checks its settings
            suite.view_transform(cfg, view)(Image.new("RGB", (8, 8)))
    OmegaConf.set_readonly(cfg, True)
    return Run(cfg, images, protocol)


def _check_values(cfg: DictConfig) -> None:
    """Check that every value fits :class:`emim_solo.suite.schema.Config` and that no required value is missing."""
    with in_one_line("config", "config"):
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    for key in schema.REFUSED.keys() & values.keys():
        raise UsageError(key, f"{key}={values[key]}: a config cannot set it: {schema.REFUSED[key]}")
    if missing := schema.missing(values):
        raise UsageError(missing[0], f"config lacks {', '.join(missing)}: see 'emim-solo configs' for complete ones")
    check(schema.Config, values)
    if not values["augmentations"]:
        raise UsageError("augmentations", "augmentations=[]: expected views, each with crop_size and num_crops")
    if values.get("max_steps") == 0:
        raise UsageError("max_steps", "max_steps=0: expected at least 1, or -1 for all of max_epochs")
    most = values.get("max_time")
    with in_one_line("max_time", f"max_time={most}: expected DD:HH:MM:SS in quotes, or settings as in {{hours: 2}}"):
        remaining = Timer(most).time_remaining()
        if remaining is not None and remaining <= 0:
            raise ValueError("no time")


def _complete_view(view: DictConfig) -> DictConfig:
    """An entry of ``augmentations`` with all keys that solo-learn asks for."""
    whole: dict[Any, Any] = asdict(schema.View(crop_size=view.crop_size, num_crops=view.num_crops))
    parts = ({key: value for key, value in part.items() if value is not None} for part in (whole, view))
    return OmegaConf.merge(*parts)  # type: ignore[return-value]


def _check_crops(cfg: DictConfig) -> None:
    suite, large, small = load_suite(), cfg.data.num_large_crops, cfg.data.num_small_crops
    many = suite.takes_many_views(cfg.method)
    if (large < 2 and cfg.method not in _ONE_CROP) or (large > 2 and not many):
        able = ", ".join(name for name in sorted(suite.methods()) if suite.takes_many_views(name))
        raise UsageError(
            "augmentations",
            f"{cfg.method} takes 2 large crops{' or more' if many else ''}, augmentations give {large}: set num_crops of "
            f"the entries with the first crop_size to 2{' or more' if many else ''} in total"
            f"{'' if many else f', or take one of {able}'}",
        )
    if small and not suite.uses_small_crops(cfg.method):
        able = ", ".join(name for name in sorted(suite.methods()) if suite.uses_small_crops(name))
        raise UsageError(
            "augmentations",
            f"{cfg.method} has no use for small crops in solo-learn {suite.version}, augmentations give {small}: leave out "
            f"those of the second crop_size, or take one of {able}",
        )
    side = cfg.data.get("image_size") or _SIDES.get(cfg.data.get("embedded") or cfg.data.dataset)
    for number, view in enumerate(cfg.augmentations):
        if view.num_crops > 2 and side and view.crop_size > side:
            key = f"augmentations.{number}.crop_size"
            raise UsageError(
                key,
                f"{key}={view.crop_size}: {view.num_crops} patches larger than the images, of {side} pixels, show no more "
                f"of them and take {(view.crop_size / side) ** 2:.1f} times as long: set it to {side} or less",
            )


def _check_saved_within_epochs(cfg: DictConfig) -> None:
    """Refuse ``checkpoint.every_n_steps`` if nothing is saved, or if loader or method cannot resume within an epoch."""
    key = "checkpoint.every_n_steps"
    every = OmegaConf.select(cfg, key)
    if every is None:
        return
    reason = None
    if not cfg.checkpoint.get("enabled"):
        reason = "nothing is saved: add checkpoint.enabled=True"
    elif cfg.data.get("format") == "dali":
        reason = "DALI's loader cannot begin within an epoch: leave it out, or set data.format=image_folder"
    elif load_suite().prepares_epochs(cfg.method):
        reason = f"{cfg.method} prepares each epoch at its start, so it goes on from an epoch's end alone: leave it out"
    if reason is not None:
        raise UsageError(key, f"{key}={every}: {reason}")


def _complete_score(cfg: DictConfig, section: Any, images: RunImages) -> Protocol | None:
    """Check the section ``score``, and put it into ``cfg`` if it is enabled.

    In ``cfg`` the section also has ``protocol_hash``. Without ``data.val_path`` it has ``held_out``, too: it says which training
    images are held out of training.
    """
    score = read(schema.Score, section, "score")
    for key in ("patience", "keep_best"):
        if getattr(score, key) and not score.enabled:
            raise UsageError(f"score.{key}", f"score.{key} without a score: add score.enabled=True")
    if not score.enabled:
        return None
    if score.keep_best and not OmegaConf.select(cfg, "checkpoint.enabled", default=False):
        raise UsageError("score.keep_best", "score.keep_best=True keeps a checkpoint: add checkpoint.enabled=True")
    protocol = Protocol.read(score.protocol)
    cfg.score = asdict(score) | {"protocol_hash": protocol.hash}
    validated = cfg.data.get("val_path") is not None
    scored = images.val if validated else images.listed
    if scored is None:
        if validated:
            return protocol
        raise UsageError(
            "score.enabled",
            f"the score holds images out of folders, not of {cfg.data.dataset}: set data.val_path (no label is used)",
        )
    count = min(protocol.images, len(scored) if validated else len(scored) // _HELD_OUT)
    if count < FEWEST_IMAGES:
        which = "validation images" if validated else "training images to hold out"
        few = f"{'' if validated else 'a tenth of '}{len(scored)} {which}"
        raise UsageError("score.enabled", f"score.enabled=True with {few}: add some, it needs at least {FEWEST_IMAGES}")
    if not validated:
        cfg.score.held_out = {"images": count, "of": len(scored), "seed": protocol.seed}
    return protocol


def _device_list(cfg: DictConfig) -> list[int]:
    """The devices as a list, because solo-learn uses its length. Lightning's other forms are translated."""
    devices = cfg.get("devices", 1)
    available = torch.cuda.device_count() if on_gpu(cfg) else 1
    try:
        if isinstance(devices, str) and devices.strip() != "auto":
            devices = [index for index in devices.split(",") if index.strip()] if "," in devices else int(devices)
        if devices == -1 or isinstance(devices, str):
            devices = available
        if isinstance(devices, int) and not isinstance(devices, bool):
            devices = range(min(devices, schema.MOST_PROCESSES + 1))
        indices = [int(index) for index in devices]
    except (TypeError, ValueError, OverflowError):
        indices = []
    if not indices or min(indices) < 0 or not len(set(indices)) == len(indices) <= schema.MOST_PROCESSES:
        shown = cfg.get("devices")
        raise UsageError("devices", f"devices={shown}: expected a number from 1 on, 'auto' or a list of device indices")
    return indices


def on_gpu(cfg: DictConfig) -> bool:
    """Whether a run trains on a GPU; UsageError if the config asks for a GPU and there is none."""
    accelerator = cfg.get("accelerator", "auto")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            "accelerator", f"accelerator={accelerator}, but there is no GPU: add accelerator=cpu devices=1 precision=32"
        )
    return device_of(cfg).type == "cuda"


def native_precision(cfg: DictConfig) -> str:
    """The value of ``precision: auto`` on this machine: ``bf16-mixed`` if the run's CPU or GPU has bfloat16, else ``32``.

    Without such hardware bfloat16 is emulated. On a CPU that is ten times slower than ``32``.
    """
    if on_gpu(cfg):
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:  # also 32 if torch is too old to tell
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if native else "32"
