"""Checkpoints as they lie on disk: the one place that opens them. Tensors and numbers are read, code never runs.

A run's folder is ``<checkpoint.dir>/<method>/<version>``, with the suite's ``args.json`` and ``*-ep=<epoch>.ckpt``.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf

from emim_solo import files
from emim_solo.errors import UsageError
from emim_solo.suite import load_suite

ARGUMENTS = "args.json"


class DamagedCheckpoint(UsageError):
    """A file that is cut short, altered or no checkpoint at all."""


@dataclass(frozen=True)
class Checkpoint:
    """A run that can be evaluated.

    Attributes:
        folder: ``<checkpoint.dir>/<method>/<version>``, with ``args.json``.
        path: its latest whole ``.ckpt`` file.
        cfg: the completed config it was trained with.
    """

    folder: Path
    path: Path
    cfg: DictConfig

    @property
    def epochs(self) -> int:
        """How many epochs it was trained for."""
        return _epoch(self.path) + 1

    def model(self) -> LightningModule:
        """The trained method in evaluation mode, on the CPU."""
        contents = load(self.path)
        check_generation(self.path, contents)
        model = load_suite().build(self.cfg)
        check_fits(self.path, contents, self.cfg, model)
        model.load_state_dict(contents["state_dict"])
        return model.eval()


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Find the config and the latest whole checkpoint in a run's folder.

    Raises:
        UsageError: not such a folder, without a whole checkpoint, or of another method or generation than this
            solo-learn has.
    """
    folder = Path(folder).expanduser()
    if not (folder / ARGUMENTS).is_file():
        raise UsageError(
            f"no {ARGUMENTS} in '{folder}': expected the folder of a run, <checkpoint.dir>/<method>/<version>, "
            "as the pretraining prints it"
        )
    cfg = OmegaConf.create(files.read_json(folder / ARGUMENTS))
    odd = [key for key in ("name", "method", "seed", "data", "backbone") if cfg.get(key) is None]
    if odd:
        raise UsageError(
            f"'{folder / ARGUMENTS}' lacks {', '.join(odd)}: expected what the suite's Checkpointer writes"
        )
    suite = load_suite()
    if cfg.method not in suite.methods():
        raise UsageError(f"'{folder}' is of method '{cfg.method}', which solo-learn {suite.version} does not have")
    found = _last_whole(folder)
    if found is None:
        raise UsageError(
            f"no checkpoint in '{folder}': expected a .ckpt file; train again with checkpoint.enabled=True"
        )
    check_generation(*found)
    return Checkpoint(folder, found[0], cfg)


def by_epoch(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a run's folder with their epochs, from 0, in order; nothing is read."""
    return sorted((epoch, path) for path in folder.glob("*.ckpt") if (epoch := _epoch(path)) >= 0)


def _epoch(path: Path) -> int:
    match = re.search(r"-ep=(\d+)\.ckpt$", path.name)
    return int(match[1]) if match else -1


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest epoch in a run's folder; damaged ones that are newer are named in a warning.

    Raises:
        DamagedCheckpoint: there are checkpoints and none of them is whole.
    """
    found = _last_whole(folder)
    return None if found is None else found[0]


def _last_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """That checkpoint and what is in it: to know that it is whole it has to be read."""
    damaged: list[DamagedCheckpoint] = []
    for _, path in by_epoch(folder)[::-1]:
        try:
            contents = load(path)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        for newer in damaged:
            warnings.warn(f"{newer}; '{path.name}' is taken", stacklevel=3)
        return path, contents
    if damaged:
        raise damaged[0]
    return None


def load(path: Path) -> dict[str, Any]:
    """What is in a checkpoint: ``state_dict`` and ``epoch`` at least.

    Raises:
        DamagedCheckpoint: it is cut short, altered or no checkpoint.
        UsageError: there is no such file, or it holds more than tensors and plain values, which could run code.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint '{path}': expected a .ckpt file written by the suite's Checkpointer")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and (odd := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"checksum of {odd}")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(contents["state_dict"], Mapping) or not isinstance(contents["epoch"], int):
            raise TypeError("state_dict or epoch")
    except Exception as error:  # torch.load raises many types on a file that is not whole
        if isinstance(error, pickle.UnpicklingError) and zipped:
            reason = str(error).replace("\n", " ")
            what = re.search(r"(?:GLOBAL|global:?) (\S+)", reason)
            raise UsageError(
                f"checkpoint '{path}' holds more than tensors and plain values"
                f"{f' ({what[1]})' if what else ''}, which could run code: it is not loaded; give one that was "
                "written by the suite's Checkpointer"
            ) from error
        raise DamagedCheckpoint(
            f"cannot read checkpoint '{path}' ({type(error).__name__}): it is cut short or no checkpoint; "
            "remove it and start again, or give another"
        ) from error
    return dict(contents)


def check_generation(path: Path, contents: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of the installed generation of solo-learn, by the name of its backbone.

    Raises:
        UsageError: it is of the other one, or of no method of the suite.
    """
    suite = load_suite()
    found = {name.split(".", 1)[0] for name in contents["state_dict"]}
    if suite.backbone_name in found:
        return
    for generation, name in suite.backbone_names.items():
        if name in found:
            raise UsageError(
                f"checkpoint '{path}' was trained with solo-learn {generation}, installed is {suite.generation}: "
                f"evaluate or continue it with solo-learn {generation}"
            )
    raise UsageError(
        f"checkpoint '{path}' has no '{suite.backbone_name}': expected one of a method of solo-learn {suite.version}"
    )


def check_fits(path: Path, contents: Mapping[str, Any], cfg: DictConfig, model: LightningModule) -> None:
    """Check that a checkpoint is of this method, backbone and projector.

    Raises:
        UsageError: what differs.
    """
    arguments = stored_arguments(path)
    method = arguments.get("method", cfg.method)
    if method != cfg.method:
        raise UsageError(f"checkpoint '{path}' is of method '{method}', this run is '{cfg.method}': give its own")
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in contents["state_dict"].items()}
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        raise UsageError(
            f"checkpoint '{path}' is of another model: {len(odd)} weights differ, first '{odd[0]}' "
            f"({theirs.get(odd[0], 'absent')} in it, {ours.get(odd[0], 'absent')} here); use its own config"
        )


def stored_arguments(path: Path) -> dict[str, Any]:
    """The config beside a checkpoint; empty where there is none, or a kill cut it short, which is said in a warning."""
    arguments = path.parent / ARGUMENTS
    if not arguments.is_file():
        return {}
    try:
        return files.read_json(arguments)
    except UsageError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
