"""May a run be resumed, and from which checkpoint? All rules are here, except those for solo-learn's own scripts.

The scripts' rules for EMIM are in :meth:`emim_solo.emim.method.EMIMMethod.on_load_checkpoint` and
:mod:`emim_solo.plugin.auto_resumer`. They compare configs by :mod:`emim_solo.ground.compare`, as this module does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from emim_solo.checkpoints import opening
from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import HeldOut, check_held_out, differing_images
from emim_solo.suite.api import as_dict
from emim_solo.training.live_score import stopped_early
from emim_solo.training.run import Run, Start


def decide(run: Run, version: str | None = None) -> Run:
    """Returns the run with its folder and its start.

    Args:
        run: from :func:`emim_solo.training.run.prepare`.
        version: name of its folder. An existing folder is continued from its last checkpoint. None:
            ``resume_from_checkpoint`` decides, else ``auto_resume``, else the run starts in a new folder.

    Raises:
        UsageError: the run may not go on from this checkpoint. The message says why.
    """
    latest = opening.last_whole(run.base / version) if version else _to_resume(run)
    if latest is None:
        return replace(run, folder=_folder(run, version, None))
    path, contents = latest
    opening.check_generation(path, contents)
    stored = opening.stored_arguments(path)
    same_run = version is not None or (path.parent.parent == run.base and not _differences(stored, run))
    epochs, batches = opening.progress(contents)
    finished = epochs >= run.config.max_epochs or (same_run and _had_ended(contents, run.config))
    if finished and not same_run:
        raise UsageError("resume.finished", f"checkpoint '{path}' has {epochs} epochs already: raise max_epochs")
    if not finished:
        _check_schedule(path, stored, run)
        _check_score(path, stored, run)
    recorded = contents.get(opening.IMAGES, {})
    _check_images(path, stored, recorded, run)
    differing = differing_images(recorded, run.images.record)
    if batches:
        _check_within(path, stored, differing, run)
    elif differing:
        message = f"checkpoint '{path}' has other images: {', '.join(differing)}"
        if version is not None:  # a run of a benchmark or a search, compared with its other runs
            raise UsageError("images.changed", f"{message}; put them back, or start a new run elsewhere")
        rank_zero_warn(f"{message}; the run goes on with those that are there now")
    return replace(run, folder=_folder(run, version, path), start=Start(path, contents, epochs, batches, finished))


def _had_ended(contents: Mapping[str, Any], cfg: DictConfig) -> bool:
    """Whether the run had already ended when the checkpoint was written: by its score, its steps or its time."""
    timer = Timer(as_dict(cfg).get("max_time"))
    if state := contents.get("callbacks", {}).get(timer.state_key):
        timer.load_state_dict(state)
    remaining = timer.time_remaining()
    steps, most = contents.get("global_step", 0), cfg.get("max_steps", -1)
    return stopped_early(contents, cfg) or 0 <= most <= steps or (remaining is not None and remaining <= 0)


def _to_resume(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that ``resume_from_checkpoint`` names, else, with ``auto_resume``, the last of a run with the same config.

    solo-learn's AutoResumer is not used: it compares only a few settings, and the seed is not one of them.
    """
    cfg = run.config
    if cfg.resume_from_checkpoint is not None:
        path = Path(cfg.resume_from_checkpoint)
        return path, opening.load(path)
    if not cfg.auto_resume.enabled:
        return None
    oldest = time.time() - 3600 * cfg.auto_resume.max_hours
    saved = sorted(((path.stat().st_mtime, path.parent) for path in run.base.glob("*/*.ckpt")), reverse=True)
    others: list[str] = []
    for folder in dict.fromkeys(folder for changed, folder in saved if changed > oldest):
        differing = _differences(opening.stored_arguments(folder / opening.ARGUMENTS), run)
        if not differing and (latest := opening.last_whole(folder)) is not None:
            differing = differing_images(latest[1].get(opening.IMAGES, {}), run.images.record)
            if not differing:
                return latest
        others.append(f"'{folder}' has other settings: {', '.join(differing)}")
    if others:
        rank_zero_warn(f"auto_resume: {others[0]}; a new run starts")
    return None


def _differences(stored: Mapping[str, Any], run: Run) -> list[str]:
    """The settings that change results and that differ between a stored config and the run's."""
    ours = as_dict(run.config)
    theirs = {key: value for key, value in stored.items() if key in ours or key == "score"}
    if not (stored.get("score") or {}).get("enabled"):  # a disabled score is not in a completed config
        theirs.pop("score", None)
    return compare.differences(dict.fromkeys(ours) | theirs, ours, but=compare.MAY_DIFFER)


def _check_schedule(path: Path, stored: Mapping[str, Any], run: Run) -> None:
    """Lightning restores the checkpoint's optimizer and schedule. Another name is refused, another value only warned of."""
    for section in ("optimizer", "scheduler"):
        for name, before in (stored.get(section) or {}).items():
            key, now = f"{section}.{name}", as_dict(run.config)[section].get(name)
            if name == "name" and before != now:
                raise UsageError(
                    key, f"checkpoint '{path}' was trained with {key}={before}, not {now}: resume with {before}"
                )
            if name != "batch_size" and before != now:
                rank_zero_warn(f"resuming goes on with the checkpoint's {key}={before}, not with {now}")


def _check_within(path: Path, stored: Mapping[str, Any], images: Sequence[str], run: Run) -> None:
    """Refuse to resume within an epoch with other settings: other batches would show images twice, or not at all."""
    differing = [*_differences(stored, run), *images]
    if (before := compare.processes(stored)) != run.processes:
        differing.append(f"processes ({before} there, {run.processes} here)")
    if differing:
        raise UsageError(
            "resume.within_epoch",
            f"checkpoint '{path}' is from within an epoch, of another run: {', '.join(differing)}; go on with the same "
            "config, images and number of processes, or from the checkpoint of an epoch's end",
        )


def _check_score(path: Path, stored: Mapping[str, Any], run: Run) -> None:
    """Refuse another scoring protocol: best score and patience would compare the scores of two protocols."""
    before, now = (stored.get("score") or {}).get("protocol_hash"), OmegaConf.select(run.config, "score.protocol_hash")
    if before is not None and now is not None and before != now:
        raise UsageError(
            "score.protocol",
            f"checkpoint '{path}' was scored by protocol {before}, not {now}: best and patience would compare unlike "
            "numbers; resume with its score.protocol, or start a new run",
        )


def _check_images(path: Path, stored: Mapping[str, Any], recorded: Mapping[str, Any], run: Run) -> None:
    """Refuse held-out images that the checkpoint was trained on. A checkpoint of version 0.2 has no record of its images."""
    ours = HeldOut.recorded(run.config)
    if ours is not None and stored and (theirs := HeldOut.recorded(OmegaConf.create(dict(stored)))) != ours:
        raise UsageError(
            "images.held_out",
            f"checkpoint '{path}' was trained with {theirs or 'no images'} held out, not {ours}: its score would be of images "
            "it was trained on; resume with the same images and score.protocol, or set data.val_path",
        )
    check_held_out(recorded, run.images, path)


def _folder(run: Run, version: str | None, resumed: Path | None) -> Path:
    """The run's folder: the named one, else the checkpoint's if it lies in ``run.base``, else one with a new number."""
    if version is not None:
        return run.base / version
    if resumed is not None and resumed.parent.parent == run.base:
        return resumed.parent
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return run.base / "0"  # only rank zero writes
    numbers = itertools.count()
    while True:
        folder = run.base / str(next(numbers))
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
