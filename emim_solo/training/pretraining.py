"""One pretraining run of any method of the suite: checks, trainer, checkpoints, resume, one row of results."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from emim_solo.checkpoints import opening as checkpoints
from emim_solo.ground import compare, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.stopping import Stopped
from emim_solo.images.embedded import write_images
from emim_solo.images.folders import check_dataset, check_folders, check_same_classes, expand_home
from emim_solo.results import rows
from emim_solo.suite import Suite, dali, load_suite, plain
from emim_solo.training.live_score import (
    KeepBest,
    LiveScore,
    check_resumed,
    complete_score,
    is_last_epoch,
    score_callbacks,
    stopped_early,
)

_REQUIRED = (
    "name",
    "method",
    "backbone.name",
    "data.dataset",
    "data.train_path",
    "data.num_workers",
    "augmentations",
    "optimizer.name",
    "optimizer.batch_size",
    "optimizer.lr",
    "optimizer.classifier_lr",
    "optimizer.weight_decay",
    "scheduler.name",
    "max_epochs",
)
_ANY_NUMBER_OF_CROPS = ("wmse", "mae")  # as in the suite's main_pretrain.py
_RESULTS = "results_so_far"  # key in a checkpoint


def prepare(cfg: DictConfig) -> DictConfig:
    """Check a pretraining config and fill in every default, before any work that could be lost.

    Args:
        cfg: solo-learn main's YAML schema, as composed by Hydra. Not changed.

    Returns:
        A complete config: learning rates scaled to the global batch, ``devices`` a list.

    Raises:
        UsageError: what is wrong, what was expected and what to do.
    """
    suite = load_suite()
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    missing = [key for key in _REQUIRED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise UsageError(f"config lacks {', '.join(missing)}: see 'emim-solo configs' for complete ones")
    expand_home(cfg)
    files.check_name("name", cfg.name)
    suite.check_values(cfg)
    if cfg.optimizer.batch_size < 2:
        raise UsageError("optimizer.batch_size=1: expected at least 2, every loss compares the images of a batch")
    if cfg.method not in suite.methods():
        raise UsageError(
            f"unknown method '{cfg.method}': solo-learn {suite.version} has {', '.join(sorted(suite.methods()))}"
        )
    cfg.devices = _device_list(cfg)
    if name := cfg.data.get("embedded"):
        _write_embedded(name, Path(cfg.data.train_path).absolute())
    check_folders(cfg)
    complete_score(cfg)
    cfg = suite.complete(cfg)
    if cfg.data.format == "dali":
        dali.complete_dali(cfg)
    large = cfg.data.num_large_crops
    if large != 2 and cfg.method not in _ANY_NUMBER_OF_CROPS and not (cfg.method == "emim" and large > 2):
        expected = "2 large crops or more" if cfg.method == "emim" else "2 large crops"
        raise UsageError(
            f"{cfg.method} takes {expected}, augmentations give {large}: set num_crops so that those of the first "
            "crop_size add up to that"
        )
    small = cfg.data.num_small_crops
    if small and not suite.uses_small_crops(cfg.method):
        able = ", ".join(name for name in sorted(suite.methods()) if suite.uses_small_crops(name))
        raise UsageError(
            f"{cfg.method} has no use for small crops in solo-learn {suite.version}, augmentations give {small}: leave out "
            f"those of the second crop_size, or take one of {able}"
        )
    return cfg


def _write_embedded(name: str, train: Path) -> None:
    """Write images where the config looks for them; a folder of the user's own is left alone."""
    if train.name == "train" and not train.is_dir():
        write_images(name, train.parent)


def _device_list(cfg: DictConfig) -> list[int]:
    """The devices as a list, which is what the suite counts; Lightning's other spellings are translated."""
    devices = cfg.get("devices", 1)
    on_gpu = _on_gpu(cfg)
    if isinstance(devices, str):
        devices = devices.strip()
        if devices in ("auto", "-1"):
            devices = torch.cuda.device_count() if on_gpu else 1
        elif "," in devices:
            devices = [index for index in devices.split(",") if index]
        elif devices.isdecimal():
            devices = int(devices)
    if isinstance(devices, int):
        if devices == -1:
            devices = torch.cuda.device_count() if on_gpu else 1
        if devices < 1:
            raise UsageError(f"devices={devices}: expected a positive number or a list of device indices")
        return list(range(devices))
    try:
        return [int(index) for index in devices]
    except (TypeError, ValueError):
        raise UsageError(f"devices={devices}: expected a number, 'auto' or a list of device indices") from None


def _on_gpu(cfg: DictConfig) -> bool:
    accelerator = cfg.get("accelerator", "auto")
    available = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not available:
        raise UsageError(f"accelerator={accelerator}, but no GPU is there: add accelerator=cpu devices=1 precision=32")
    return accelerator in ("auto", "gpu", "cuda") and available


class SuiteData(LightningDataModule):
    """The suite's loaders, the training one drawing the same numbers in epoch e whether or not the run was resumed."""

    def __init__(self, seed: int, train_loader: DataLoader, val_loader: DataLoader | None) -> None:
        super().__init__()
        self.seed, self.train_loader, self.val_loader = seed, train_loader, val_loader
        self.first_epoch = 0

    def train_dataloader(self) -> DataLoader:
        # Lightning makes the first epoch's iterator right after this call, before it has restored a checkpoint's
        # epoch; a later one's after on_train_epoch_start.
        assert self.trainer is not None
        seed_epoch(self.seed, self.first_epoch, self.trainer.global_rank)
        return self.train_loader

    def val_dataloader(self) -> Any:
        return self.val_loader if self.val_loader is not None else []


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, NumPy and torch for one epoch of one process, so that a resumed run is the same run."""
    state = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


class SeedEachEpoch(Callback):
    """Calls :func:`seed_epoch` at the start of each epoch but this process's first, which :class:`SuiteData` seeds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.first = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.first:
            seed_epoch(self.seed, trainer.current_epoch, trainer.global_rank)
        self.first = False


class StopOnNaN(Callback):
    """Ends a run whose loss is no longer finite, at the logging interval or the epoch's end at the latest.

    The flag stays on the device: reading it at every step would make a GPU wait.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.finite &= torch.isfinite(loss.detach()).all()
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if not self.finite:
            raise FloatingPointError(
                f"the training loss is NaN or infinite in epoch {trainer.current_epoch}, "
                f"by step {trainer.global_step}: lower optimizer.lr, use precision=32 or bf16-mixed, "
                "and resume from the last checkpoint"
            )


class KeepResults(Callback):
    """Writes into each checkpoint what the run's row would say if it ended there: a kill may come before the row."""

    def __init__(self, timer: Timer, score: LiveScore | None = None) -> None:
        self.timer, self.score = timer, score

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_RESULTS] = self.results(trainer)

    def results(self, trainer: Trainer) -> dict[str, Any]:
        """The fields of a row that only the trainer knows."""
        return {
            "device": _device_name(trainer),
            "seconds": round(self.timer.time_elapsed("train"), 1),
            "peak_memory_mb": _peak_memory_mb(trainer),
            "metrics": {name: round(float(value), 6) for name, value in sorted(trainer.callback_metrics.items())},
            **({} if self.score is None else {"score": self.score.summary}),
        }


class ContinueCheckpoints(Callback):
    """Tells the suite's Checkpointer which file a resumed run continues, so that it replaces it like any other.

    And has it save the last epoch, whatever ``checkpoint.frequency`` is: its weights are what is evaluated.
    """

    def __init__(self, checkpointer: Any, resumed: Path | None) -> None:
        self.checkpointer, self.resumed = checkpointer, resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resumed is not None:
            self.checkpointer.last_ckpt = self.resumed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_last_epoch(trainer) and trainer.current_epoch % self.checkpointer.frequency != 0:
            self.checkpointer.save(trainer)


def pretrain(cfg: DictConfig, version: str | None = None, more_callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train one method and append one row to ``<checkpoint.dir>/rows.jsonl``.

    Args:
        cfg: complete, from :func:`prepare`.
        version: the run's folder below ``<checkpoint.dir>/<method>/``. An existing one is continued from its last
            checkpoint. None takes ``resume_from_checkpoint``, else what ``auto_resume`` finds, else a new number.
        more_callbacks: of Lightning's kind, called after our own.

    Returns:
        The row, its metrics being the trainer's last values.

    Raises:
        UsageError: images, labels or checkpoint do not fit.
        FloatingPointError: the loss became NaN or infinite.
    """
    suite = load_suite()
    base = Path(cfg.checkpoint.dir) / cfg.method
    files.writable_folder(base, "checkpoint.dir")
    resumed = checkpoints.last_checkpoint(base / version) if version else _checkpoint_to_resume(cfg, base)
    contents: dict[str, Any] = {}
    if resumed is not None:
        contents = checkpoints.load(resumed)
        checkpoints.check_generation(resumed, contents)
        own = version is not None or _is_of_run(resumed, cfg, base)
        if contents["epoch"] + 1 >= cfg.max_epochs or (own and stopped_early(contents, cfg)):
            return _finished(cfg, resumed, contents, own=own)
        _check_schedule(resumed, cfg)
        check_resumed(resumed, cfg)

    seed_everything(cfg.seed, workers=True)
    model = suite.build(cfg)
    if resumed is not None:
        checkpoints.check_fits(resumed, contents, cfg, model)
    files.writable_folder(base, "checkpoint.dir", _bytes_of(model) if cfg.checkpoint.enabled else 0)
    data = _data(cfg, suite)
    if resumed is not None:
        if isinstance(data, SuiteData):
            data.first_epoch = contents["epoch"] + 1
        print(f"Resuming from '{resumed}'")
    folder = _run_folder(base, version, resumed)
    _keep_earlier_curves(folder)

    checkpointer = suite.checkpointer(cfg)
    timer = Timer()
    scoring = score_callbacks(cfg, model, folder)
    keep = KeepResults(timer, next((callback for callback in scoring if isinstance(callback, LiveScore)), None))
    callbacks: list[Callback] = [SeedEachEpoch(cfg.seed), StopOnNaN(), timer, keep, *scoring]
    if cfg.checkpoint.enabled:
        same_folder = resumed if resumed is not None and resumed.parent == folder else None
        callbacks += [checkpointer, ContinueCheckpoints(checkpointer, same_folder)]
    if OmegaConf.select(cfg, "auto_umap.enabled", default=False):
        callbacks.append(suite.auto_umap(cfg))
    callbacks += more_callbacks

    loggers = _loggers(cfg, folder)
    try:
        kwargs = _trainer_kwargs(cfg)
        # The suite's Checkpointer saves; Lightning's own has to be allowed where it keeps the best.
        kwargs["enable_checkpointing"] = any(isinstance(callback, KeepBest) for callback in callbacks)
        trainer = Trainer(**kwargs, logger=loggers, callbacks=callbacks)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UsageError(f"Lightning's Trainer, which takes the config's other keys: {error}") from error
    try:
        trainer.fit(model, datamodule=data, ckpt_path=str(resumed) if resumed is not None else None)
    except Stopped as stopped:
        stopped.continues = _what_continues(cfg, folder)
        raise

    row = _row(cfg, folder, epochs=trainer.current_epoch, **keep.results(trainer))
    if trainer.is_global_zero:
        rows.append(_rows_file(cfg), row)
    return row


def _rows_file(cfg: DictConfig) -> Path:
    return Path(cfg.checkpoint.dir) / "rows.jsonl"


def _row(cfg: DictConfig, folder: Path, **fields: Any) -> dict[str, Any]:
    checkpoint = str(folder) if cfg.checkpoint.enabled else None
    config = plain(cfg)
    row = rows.new_row("pretrain", config=config, suite=load_suite().identity, checkpoint=checkpoint, **fields)
    return {**row, "config": config}


def _finished(cfg: DictConfig, path: Path, contents: dict[str, Any], *, own: bool) -> dict[str, Any]:
    """The row of a run whose checkpoint has all of its epochs; written here if a kill came before it was.

    Raises:
        UsageError: the checkpoint is not this run's own, so that there is nothing to train and nothing to say.
    """
    epochs = contents["epoch"] + 1
    if not own:
        raise UsageError(
            f"checkpoint '{path}' has {epochs} epochs already, max_epochs={cfg.max_epochs} leaves nothing to train: "
            "raise max_epochs"
        )
    row = _row(cfg, path.parent, epochs=epochs, **(contents.get(_RESULTS) or {"metrics": {}}))
    file = _rows_file(cfg)
    for found in rows.read(file) if file.is_file() else []:
        place = Path(found.get("checkpoint") or "").parts[-2:]
        if (found["stage"], found["config_hash"]) == ("pretrain", row["config_hash"]) and place == path.parent.parts[
            -2:
        ]:
            which = (
                f"all {epochs}" if epochs >= cfg.max_epochs else f"the {epochs} after which its score ended it, of its"
            )
            print(f"emim-solo: already finished, '{path}' has {which} epochs: this is its row")
            return found
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        rows.append(file, row)
    return row


def _what_continues(cfg: DictConfig, folder: Path) -> str:
    """What goes on with a run that was stopped."""
    path = checkpoints.last_checkpoint(folder) if cfg.checkpoint.enabled else None
    if path is None:
        return "no epoch was saved yet, the same command starts again"
    flag = "" if cfg.auto_resume.enabled else " and auto_resume.enabled=True"
    return f"the same command{flag} goes on from '{path}'"


def _check_schedule(path: Path, cfg: DictConfig) -> None:
    """A resumed run goes on with its checkpoint's optimizer and schedule; what Lightning cannot put into it is refused.

    Raises:
        UsageError: another optimizer or scheduler.
    """
    stored = OmegaConf.create(checkpoints.stored_arguments(path))
    for key in ("optimizer.name", "scheduler.name"):
        theirs, ours = OmegaConf.select(stored, key), OmegaConf.select(cfg, key)
        if theirs is not None and theirs != ours:
            raise UsageError(
                f"checkpoint '{path}' was trained with {key}={theirs}, this run is {ours}: resume with {theirs}, or "
                "start a new run"
            )
    for section in ("optimizer", "scheduler"):
        for key, theirs in (stored.get(section) or {}).items():
            ours = cfg[section].get(key)
            if key != "batch_size" and theirs != ours:
                rank_zero_warn(f"resuming goes on with the checkpoint's {section}.{key}={theirs}, not with {ours}")


def _bytes_of(model: LightningModule) -> int:
    """What a checkpoint takes at least."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _data(cfg: DictConfig, suite: Suite) -> LightningDataModule:
    """Training and validation images, checked. With DALI, too, torchvision loads the validation images."""
    train_loader: DataLoader | None = None
    val_loader: DataLoader | None = None
    if cfg.data.val_path is not None and not cfg.data.no_labels:
        val_loader = suite.evaluation_loaders(cfg)[1]
        assert val_loader is not None
        check_dataset(val_loader.dataset, "data.val_path")
    if cfg.data.format == "dali":
        train: Any = dali.check_training_images(cfg)
    else:
        train_loader = suite.train_loader(cfg)
        train = train_loader.dataset
        check_dataset(train, "data.train_path")
    if val_loader is not None:
        check_same_classes(train, val_loader.dataset)
    images = len(train)
    batch, processes = cfg.optimizer.batch_size, len(cfg.devices) * cfg.num_nodes
    if images < batch * processes:
        raise UsageError(
            f"{images} training images are fewer than one batch of {batch} on {processes} process(es): "
            "lower optimizer.batch_size"
        )
    if train_loader is not None:
        return SuiteData(cfg.seed, train_loader, val_loader)
    module = dali.pretrain_datamodule(cfg)
    module.val_dataloader = lambda: val_loader or []  # type: ignore[method-assign]
    return module


def _trainer_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """The config's keys that Lightning's Trainer knows, as in the suite's main_pretrain.py."""
    known = inspect.signature(Trainer.__init__).parameters
    kwargs = {name: value for name, value in plain(cfg).items() if name in known}
    strategy = kwargs.get("strategy")
    kwargs["strategy"] = DDPStrategy(find_unused_parameters=False) if strategy == "ddp" else strategy or "auto"
    if not _on_gpu(cfg):
        kwargs["devices"] = len(cfg.devices)  # Lightning counts CPU processes, the suite lists devices
    return kwargs


def _loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """CSV always, in the run's folder; wandb and tensorboard with one flag each."""
    place: dict[str, Any] = {"name": folder.parent.name, "version": folder.name}
    loggers: list[Logger] = [CSVLogger(str(folder.parent.parent), **place)]
    for package in ("wandb", "tensorboard"):
        if OmegaConf.select(cfg, f"{package}.enabled", default=False) and importlib.util.find_spec(package) is None:
            raise UsageError(f"{package}.enabled=True, but it is not installed: pip install {package}")
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(
            WandbLogger(
                name=cfg.name,
                project=cfg.wandb.project,
                entity=cfg.wandb.entity,
                offline=cfg.wandb.offline,
                save_dir=str(folder),
            )
        )
    if OmegaConf.select(cfg, "tensorboard.enabled", default=False):
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(folder.parent.parent), **place))
    return loggers


def _checkpoint_to_resume(cfg: DictConfig, base: Path) -> Path | None:
    """What ``resume_from_checkpoint`` names, else, with ``auto_resume``, the latest run of this very config.

    The suite's AutoResumer looks at the newest run alone and compares a few settings, the seed not among them.
    """
    if cfg.resume_from_checkpoint is not None:
        return Path(cfg.resume_from_checkpoint)
    if not cfg.auto_resume.enabled:
        return None
    oldest = time.time() - 3600 * cfg.auto_resume.max_hours
    changed = {path: max(path.stat().st_mtime for path in path.parent.glob("*.ckpt")) for path in base.glob("*/*.ckpt")}
    for path in sorted(changed, key=lambda path: changed[path], reverse=True):
        if changed[path] > oldest and _is_of_run(path, cfg, base):
            return checkpoints.last_checkpoint(path.parent)
    return None


def _is_of_run(path: Path, cfg: DictConfig, base: Path) -> bool:
    """Whether a checkpoint lies where this run's would, written by a run of the same config."""
    if path.parent.parent != base:
        return False
    stored, ours = checkpoints.stored_arguments(path), plain(cfg)
    if not (stored.get("score") or {}).get("enabled"):  # then the section is not in ours
        stored.pop("score", None)
    stored = {key: value for key, value in stored.items() if key in ours or key == "score"}
    return compare.config_hash(dict.fromkeys(ours) | stored) == compare.config_hash(ours)


def _run_folder(base: Path, version: str | None, resumed: Path | None) -> Path:
    if version is not None:
        return base / version
    if resumed is not None and resumed.parent.parent == base:
        return resumed.parent
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return base / "0"  # only rank zero writes
    base.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        try:
            (base / str(number)).mkdir()
            return base / str(number)
        except FileExistsError:
            number += 1


@rank_zero_only
def _keep_earlier_curves(folder: Path) -> None:
    """Lightning's CSVLogger deletes the metrics.csv it finds; a resumed run's earlier curve stays beside it."""
    curve = folder / "metrics.csv"
    if curve.is_file():
        curve.rename(folder / f"metrics.{len(list(folder.glob('metrics.*.csv')))}.csv")


def _device_name(trainer: Trainer) -> str:
    count = trainer.world_size
    name = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu"
    return f"{count} x {name}" if count > 1 else name


def reset_peak_memory() -> None:
    """Peak memory is the process's: without this, a run would be charged with the runs before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux alone has it; elsewhere the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mb(trainer: Trainer) -> int:
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes, but bytes on macOS
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
