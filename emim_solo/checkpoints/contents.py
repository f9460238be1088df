"""Reads checkpoints and files of weights. Only tensors and plain values are read; no code in a file runs."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from torch import Tensor

from emim_solo.ground.errors import UsageError
from emim_solo.suite import load_suite

# Objects known beside weights. solo-learn main's Checkpointer saves SimSiam's schedule, which holds a function and the optimizer.
# Scripts of other projects save their arguments and best accuracy.
_BESIDE_WEIGHTS = re.compile(
    r"(solo|torch\.optim|numpy)\.[\w.]+|functools\.partial|collections\.defaultdict|builtins\.(getattr|dict)|argparse\.Namespace"
)


class DamagedCheckpoint(UsageError):
    """A file that is cut short, altered or no checkpoint at all."""

    def __init__(self, path: Path, reason: str) -> None:
        to_do = "put a whole copy in its place, or move it away and start again"
        message = f"cannot read checkpoint '{path}' ({reason}): it is cut short, altered or no checkpoint; {to_do}"
        super().__init__("checkpoint.damaged", message)


def load(path: Path, *, weights_alone: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint: ``state_dict``, ``epoch`` and the rest. ``weights_alone`` skips known objects in the rest.

    Raises:
        DamagedCheckpoint: it is cut short, altered or no checkpoint.
        UsageError: there is no such file, it cannot be read, or it holds what could run code.
    """
    contents = _read(path, weights_alone=weights_alone)
    if not isinstance(contents.get("state_dict"), Mapping) or not isinstance(contents.get("epoch"), int):
        raise DamagedCheckpoint(path, "no state_dict or epoch")
    return contents


def load_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a network by name: those in the file, or of the backbone if the file is a checkpoint of solo-learn.

    If a file holds several sets of weights, a warning names the one taken. UsageError as :func:`load`, or if there is none.
    """
    contents = _read(path, weights_alone=True)
    sets = {name: value for name, value in contents.items() if _are_weights(value)}
    taken = next((name for name in ("state_dict", "model") if name in sets), None)
    weights = contents if taken is None else sets.pop(taken)
    if not _are_weights(weights):
        beside = f", it has {', '.join(sets)}" if sets else ""
        raise UsageError("checkpoint.weights", f"'{path}' holds no weights by name: expected a 'state_dict'{beside}")
    if sets:
        others = ", ".join(map(repr, sets))
        warnings.warn(f"'{path}' holds several sets of weights: '{taken}' is taken, not {others}", stacklevel=2)
    weights = timm.models.clean_state_dict(dict(weights))  # without the prefixes of DataParallel and torch.compile
    if "pytorch-lightning_version" in contents:
        prefixes = tuple(f"{name}." for name in load_suite().backbone_names.values())
        of_backbone = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(prefixes)}
        return of_backbone or weights
    return weights


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in value.items())
    )


def _read(path: Path, *, weights_alone: bool) -> dict[str, Any]:
    """The mapping in a file that torch or safetensors has written, whatever its name."""
    try:
        with open(path, "rb") as file:
            contents = _parse(file, path, weights_alone=weights_alone)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError("checkpoint.missing", f"no checkpoint '{path}': expected a .ckpt file") from error
    except OSError as error:  # an error of the disk says nothing about the file
        reason = f"cannot read '{path}' ({error.strerror or error})"
        raise UsageError("checkpoint.unreadable", f"{reason}: expected a file that you may read") from error
    if not isinstance(contents, Mapping):
        reason = f"'{path}' holds a {type(contents).__name__}"
        raise UsageError("checkpoint.unreadable", f"{reason}: expected weights by name, or a 'state_dict'")
    return dict(contents)


def _parse(file: BinaryIO, path: Path, *, weights_alone: bool) -> Any:
    whole = False
    try:
        if file.read(9)[8:] == b"{":  # safetensors: 8 bytes for the length of the header, then the header in JSON
            from safetensors.torch import load as parse

            file.seek(0)
            return parse(file.read())
        if zipped := zipfile.is_zipfile(file):
            if (altered := zipfile.ZipFile(file).testzip()) is not None:  # torch does not look at checksums
                raise ValueError(f"checksum of {altered}")
            whole = True
        file.seek(0)
        with _without_objects(file) if weights_alone and zipped else nullcontext():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise many types on a file that is not whole
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of the disk; EINVAL is torch's on a cut file
            raise
        reason = " ".join(str(error).split())
        what = re.search(r"(?:GLOBAL|global:?) (\S+)", reason)
        if isinstance(error, pickle.UnpicklingError) and (whole or what):
            reason = f"'{path}' holds {what[1] if what else 'more than tensors and plain values'}, which could run code"
            raise UsageError("checkpoint.code", f"{reason}: save its tensors alone, without such objects") from error
        if whole:  # the checksums are right: too little memory, or a kind of file that torch does not load this way
            reason = f"torch cannot load '{path}', which is whole ({type(error).__name__}: {reason[:200]})"
            expected = "expected what torch.save or safetensors writes"
            raise UsageError("checkpoint.unreadable", f"{reason}: {expected}") from error
        raise DamagedCheckpoint(path, type(error).__name__) from error


class _Inert:
    """Stands in for an object beside the weights. It calls nothing and keeps nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _no_items(*_: Any) -> dict[str, Any]:
    return OrderedDict()


def _without_objects(file: BinaryIO) -> AbstractContextManager[Any]:
    """Within it torch's safe loading puts stand-ins for known objects beside weights. It still refuses all other objects."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch before 2.6 has no stand-ins
        return nullcontext()
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    if not all(_BESIDE_WEIGHTS.fullmatch(name) for name in names):
        return nullcontext()
    stand_ins = [(_no_items if name.endswith("defaultdict") else _Inert, name) for name in names]
    return torch.serialization.safe_globals(stand_ins)  # type: ignore[arg-type]
