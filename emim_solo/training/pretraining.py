"""Runs one pretraining of any method of solo-learn: trains it, saves checkpoints and appends one row of results."""

from __future__ import annotations

import gc
import inspect
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from emim_solo.checkpoints import opening
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.stopping import Stopped
from emim_solo.images.folders import check_images
from emim_solo.results import rows
from emim_solo.suite import as_dict, load_suite
from emim_solo.suite.api import device_of, in_one_line
from emim_solo.suite.views import check_memory
from emim_solo.training.callbacks import (
    RESULTS,
    ContinueCheckpoints,
    KeepResults,
    OpenedCheckpoint,
    SaveWithinEpochs,
    StopOnNaN,
)
from emim_solo.training.live_score import KeepBest, LiveScore, score_callbacks
from emim_solo.training.order import ResumedEpochs, Seeds, SuiteData
from emim_solo.training.resume import decide
from emim_solo.training.run import Run, on_gpu, prepare

__all__ = ["prepare", "pretrain"]
_LIGHTNING_REFUSES = "Lightning's Trainer, which takes the config's other keys, refuses one"


def pretrain(run: Run, version: str | None = None, more_callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train one method and append one row to ``<checkpoint.dir>/rows.jsonl``; of a finished run, only return its row.

    Args:
        run: from :func:`prepare`.
        version: name of the run's folder below ``<checkpoint.dir>/<method>/``. An existing folder is continued from its last
            checkpoint. None: ``resume_from_checkpoint`` decides, else ``auto_resume``, else the run starts in a new folder.
        more_callbacks: Lightning callbacks, called after those of this package.

    Returns:
        The row. Its metrics are the trainer's last values.

    Raises:
        UsageError: images, labels, batch size, checkpoint or options of the Trainer do not fit.
        FloatingPointError: the loss became NaN or infinite.
    """
    files.writable_folder(run.base, "checkpoint.dir")
    run = decide(run, version)
    if run.start.finished:
        return _finished(run)
    assert run.folder is not None
    try:
        return _trained(run, more_callbacks)
    finally:
        _remove_if_empty(run.folder)


def _trained(run: Run, more_callbacks: Sequence[Callback]) -> dict[str, Any]:
    suite, cfg, start = load_suite(), run.config, run.start
    assert run.folder is not None
    _reset_peak_memory()
    seed_everything(cfg.seed, workers=True)
    model = suite.build(cfg)
    if start.checkpoint is not None:
        opening.check_fits(start.checkpoint, start.contents, cfg, model)
    check_memory(suite.backbone(model), cfg, device_of(cfg))
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    files.writable_folder(run.base, "checkpoint.dir", size if cfg.checkpoint.enabled else 0)
    scoring = score_callbacks(run, model)
    timer = Timer(as_dict(cfg).get("max_time"))
    score = next((callback for callback in scoring if isinstance(callback, LiveScore)), None)
    keep, finite = KeepResults(timer, run, score), StopOnNaN()
    callbacks: list[Callback] = [Seeds(run), finite, timer, keep, *scoring]
    if cfg.checkpoint.enabled:
        checkpointer = suite.checkpointer(cfg)
        callbacks += [checkpointer, ContinueCheckpoints(checkpointer, run)]
    if run.saved_every is not None:
        callbacks.append(SaveWithinEpochs(run.saved_every, run, finite))
    if OmegaConf.select(cfg, "auto_umap.enabled", default=False):
        callbacks.append(suite.auto_umap(cfg))
    try:
        trainer = _trainer(run, [*callbacks, *more_callbacks])
        data = _data(run)
        if start.checkpoint is not None:
            within = f", {start.batches} batches into epoch {start.epochs}" if start.batches else ""
            print(f"Resuming from '{start.checkpoint}'{within}")
        _keep_earlier_curves(run.folder)
        trainer.fit(model, datamodule=data, ckpt_path=None if start.checkpoint is None else str(start.checkpoint))
    except Stopped as stopped:
        stopped.continues = _what_continues(run)
        raise
    except (MisconfigurationException, ValueError) as error:  # Lightning checks some options only against the data
        if isinstance(error, ValueError) and "`val_check_interval`" not in str(error):
            raise
        raise UsageError("trainer", f"{_LIGHTNING_REFUSES} ({' '.join(str(error).split())})") from error
    finally:
        if (wandb := sys.modules.get("wandb")) is not None:
            wandb.finish()  # otherwise wandb would log the next run of this process into this one
    row = _row(run, epochs=trainer.current_epoch, **keep.results(trainer))
    if trainer.is_global_zero:
        rows.append(run.rows_file, row)
    return row


def _row(run: Run, **fields: Any) -> dict[str, Any]:
    config = as_dict(run.config)
    checkpoint = str(run.folder) if run.config.checkpoint.enabled else None
    suite = load_suite().identity
    row = rows.new_row(
        "pretrain", config=config, suite=suite, checkpoint=checkpoint, images=run.images.record, **fields
    )
    return {**row, "config": config}


def _finished(run: Run) -> dict[str, Any]:
    """The row of a finished run. It is written here if the run was killed before it wrote its row."""
    start, folder = run.start, run.folder
    assert folder is not None
    row = _row(run, epochs=start.epochs, **(start.contents.get(RESULTS) or {"metrics": {}}))
    stored = rows.read(run.rows_file) if run.rows_file.is_file() else []
    for written in rows.of_checkpoint(stored, folder, row["config_hash"]):
        if written["stage"] == "pretrain":
            print(f"emim-solo: already finished, '{start.checkpoint}' has its {start.epochs} epochs: this is its row")
            return written
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        rows.append(run.rows_file, row)
    return row


def _what_continues(run: Run) -> str:
    """Says how to continue a run that was stopped."""
    assert run.folder is not None
    path = opening.last_checkpoint(run.folder) if run.config.checkpoint.enabled else None
    if path is None:
        return "nothing was saved yet, the same command starts again"
    flag = "" if run.config.auto_resume.enabled else " and auto_resume.enabled=True"
    return f"the same command{flag} goes on from '{path}'"


def _data(run: Run) -> LightningDataModule:
    """Check all images and make the loaders. Validation images are loaded by torchvision, also with DALI."""
    suite, cfg, images = load_suite(), run.config, run.images
    named = {"data.val_path": images.val, "data.train_path": images.train, "held-out images": images.held_out}
    for name, part in named.items():
        if part is not None:
            check_images(part.paths, name)
    val_loader: DataLoader | None = None
    if cfg.data.val_path is not None and not cfg.data.no_labels:
        val_loader = suite.evaluation_loaders(cfg, images)[1]
    if cfg.data.format != "dali":
        train_loader = suite.train_loader(cfg, images)
        _check_batches(run, len(train_loader.dataset))  # type: ignore[arg-type]
        return SuiteData(run, train_loader, val_loader)
    assert images.train is not None
    _check_batches(run, len(images.train))
    module = suite.dali_datamodule(cfg, images.train)
    module.val_dataloader = lambda: val_loader or []  # type: ignore[method-assign]
    return module


def _check_batches(run: Run, images: int) -> None:
    """Refuse fewer images than one batch needs: Lightning would train on no batch and give no error."""
    size = run.config.optimizer.batch_size
    if images < size * run.processes:
        whole = f"a batch of {size} on {run.processes} process(es)"
        raise UsageError("optimizer.batch_size", f"{images} training images are fewer than {whole}: lower the batch")


def _trainer(run: Run, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer with those of its options that the config has, as in solo-learn's main_pretrain.py."""
    cfg = run.config
    names = inspect.signature(Trainer.__init__).parameters.keys() - {"max_time"}  # the Timer callback has it
    options = {name: value for name, value in as_dict(cfg).items() if name in names}
    options["strategy"] = options.get("strategy") or "auto"
    if not on_gpu(cfg):
        options["devices"] = len(cfg.devices)  # Lightning wants a number of CPU processes, solo-learn a list
        options["sync_batchnorm"] = False  # torch has it on GPUs only; one process has nothing to synchronise
    # KeepBest is a ModelCheckpoint of Lightning and needs this option. solo-learn's Checkpointer does not.
    options["enable_checkpointing"] = any(isinstance(callback, KeepBest) for callback in callbacks)
    options.setdefault("enable_model_summary", logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO))
    if run.start.checkpoint is not None:
        options["plugins"] = [OpenedCheckpoint(run.start)]
    assert run.folder is not None
    with in_one_line("trainer", _LIGHTNING_REFUSES):
        trainer = Trainer(**options, logger=_loggers(cfg, run.folder), callbacks=callbacks)
    trainer.fit_loop.__class__ = ResumedEpochs
    return trainer


def _loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """CSV in the run's folder, always; wandb and TensorBoard if the config enables them."""
    place: dict[str, Any] = {"name": folder.parent.name, "version": folder.name}
    loggers: list[Logger] = [CSVLogger(str(folder.parent.parent), **place)]
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        keys = {key: cfg.wandb.get(key) for key in ("project", "entity", "offline", "group")}
        wandb = WandbLogger(name=cfg.name, save_dir=str(folder), **keys)
        with in_one_line("wandb.enabled", "wandb does not start", "wandb login, or wandb.offline=True"):
            _ = wandb.experiment  # starts wandb here; Lightning would start it only after training has begun
        loggers.append(wandb)
    if OmegaConf.select(cfg, "tensorboard.enabled", default=False):
        loggers.append(TensorBoardLogger(str(folder.parent.parent), **place))
    return loggers


@rank_zero_only
def _remove_if_empty(folder: Path) -> None:
    """Free the number of a run that was refused or stopped before it wrote anything."""
    with suppress(OSError):
        folder.rmdir()


@rank_zero_only
def _keep_earlier_curves(folder: Path) -> None:
    """Rename the metrics.csv of a run that is resumed, because Lightning's CSVLogger would delete it."""
    curve = folder / "metrics.csv"
    if curve.is_file():
        curve.rename(folder / f"metrics.{len(list(folder.glob('metrics.*.csv')))}.csv")


def _reset_peak_memory() -> None:
    """Reset the peak memory of this process. Otherwise a run's peak would include the runs before it in the same process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux has this file; elsewhere the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
