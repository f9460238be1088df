"""What is in a checkpoint or a file of weights. Tensors and plain values are read, code never runs."""

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

# What main's own Checkpointer saves with SimSiam's schedule, which holds a function and, with it, the optimizer; and the
# arguments and best accuracy that others' scripts put beside their weights.
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
    """What is in a checkpoint: ``state_dict``, ``epoch`` and, unless ``weights_alone``, objects beside them.

    Raises:
        DamagedCheckpoint: it is cut short, altered or no checkpoint.
        UsageError: there is no such file, it cannot be read, or it holds what could run code.
    """
    contents = _read(path, weights_alone=weights_alone)
    if not isinstance(contents.get("state_dict"), Mapping) or not isinstance(contents.get("epoch"), int):
        raise DamagedCheckpoint(path, "no state_dict or epoch")
    return contents


def load_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a network by name: of the file as it is, or of the backbone in a checkpoint of a method of the suite.

    Of several sets of weights one is taken, which is said. UsageError as :func:`load`, or if there are none by name.
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
    weights = timm.models.clean_state_dict(dict(weights))  # of DataParallel and torch.compile
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
    """The mapping in a file that torch or safetensors has written, whatever the file is called."""
    try:
        with open(path, "rb") as file:
            contents = _parse(file, path, weights_alone=weights_alone)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError("checkpoint.missing", f"no checkpoint '{path}': expected a .ckpt file") from error
    except OSError as error:  # of the disk, which says nothing of what is on it
        reason = error.strerror or error
        raise _unreadable(f"cannot read '{path}' ({reason}): expected a file that you may read") from error
    if not isinstance(contents, Mapping):
        raise _unreadable(f"'{path}' holds a {type(contents).__name__}: expected weights by name, or a 'state_dict'")
    return dict(contents)


def _unreadable(message: str) -> UsageError:
    return UsageError("checkpoint.unreadable", message)


def _parse(file: BinaryIO, path: Path, *, weights_alone: bool) -> Any:
    whole = False
    try:
        if file.read(9)[8:] == b"{":  # safetensors: the length of a header, and the header in JSON
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
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of the disk; torch seeks before the start
            raise
        reason = " ".join(str(error).split())
        what = re.search(r"(?:GLOBAL|global:?) (\S+)", reason)
        if isinstance(error, pickle.UnpicklingError) and (whole or what):
            reason = f"'{path}' holds {what[1] if what else 'more than tensors and plain values'}, which could run code"
            raise UsageError("checkpoint.code", f"{reason}: save its tensors alone, without such objects") from error
        if whole:  # by its checksums: short of memory, or of a kind that torch does not load so
            reason = f"torch cannot load '{path}', which is whole ({type(error).__name__}: {reason[:200]})"
            raise _unreadable(f"{reason}: expected what torch.save or safetensors writes") from error
        raise DamagedCheckpoint(path, type(error).__name__) from error


class _Inert:
    """Stands for an object beside the weights: nothing is called, nothing is kept."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _no_items(*_: Any) -> dict[str, Any]:
    return OrderedDict()


def _without_objects(file: BinaryIO) -> AbstractContextManager[Any]:
    """Within it torch's safe loading passes over the objects that are known beside weights; others stay refused."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch before 2.6 has no stand-ins
        return nullcontext()
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    if not all(_BESIDE_WEIGHTS.fullmatch(name) for name in names):
        return nullcontext()
    stand_ins = [(_no_items if name.endswith("defaultdict") else _Inert, name) for name in names]
    return torch.serialization.safe_globals(stand_ins)  # type: ignore[arg-type]
