"""Checkpoints as they lie on disk: the one place that opens them. Tensors and numbers are read, code never runs.

A run's folder is ``<checkpoint.dir>/<method>/<version>``, with the suite's ``args.json`` and ``*-ep=<epoch>.ckpt``, whether
``emim-solo pretrain`` or solo-learn main's own script has written it. Beside runs, files of weights are opened: of a network
that torchvision or timm has, and what ``emim-solo export`` has written.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from emim_solo.checkpoints.architectures import LIBRARIES, Architecture, Backbone, OnnxNetwork, first_difference
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Listings, RunImages, check_held_out, expand_home
from emim_solo.suite import load_suite, plain
from emim_solo.suite.api import count_classes

ARGUMENTS = "args.json"
IMAGES = "emim_solo_images"  # key in a checkpoint, of the record of the images that it was trained on
CARD = "emim_solo"  # key in a model card's front matter, of what opens the file again
EXPECTED = (
    f"expected the folder of a run, <checkpoint.dir>/<method>/<version>, as the pretraining prints it, a .ckpt file in one, a "
    f"file of 'emim-solo export', or weights of a network of a library, {'|'.join(LIBRARIES)}:NETWORK@FILE"
)
DATASETS = ("custom", "cifar10", "cifar100", "stl10", "imagenet100", "imagenet")  # the suite's
_OF_LIBRARY = re.compile(rf"({'|'.join(LIBRARIES)}):([^@]+)@(.+)")
_CHANGEABLE = (
    *(f"data.{key}" for key in ("dataset", "train_path", "val_path", "format", "no_labels", "num_workers")),
    *(f"augmentations.0.{key}" for key in ("crop_size", "mean", "std")),
    *("backbone.kwargs.", "backbone.small_image_stem"),  # of LIBRARY:NETWORK@FILE
)
# What main's own Checkpointer saves with SimSiam's schedule, which holds a function and, with it, the optimizer; and the
# arguments and best accuracy that others' scripts put beside their weights.
_BESIDE_WEIGHTS = re.compile(
    r"(solo|torch\.optim|numpy)\.[\w.]+|functools\.partial|collections\.defaultdict|builtins\.(getattr|dict)|argparse\.Namespace"
)


class DamagedCheckpoint(UsageError):
    """A file that is cut short, altered or no checkpoint at all."""


@dataclass(frozen=True)
class Checkpoint:
    """A run that can be evaluated.

    Attributes:
        folder: ``<checkpoint.dir>/<method>/<version>``, with ``args.json``.
        path: its latest whole ``.ckpt`` file.
        cfg: the completed config it was trained with, its images those that it is evaluated on.
        own: that config with its own images; None where they are the same.
        recorded: which images it was trained on, as it says itself; empty where it does not.
        listings: of folders, shared with the other checkpoints that were opened with it.
    """

    folder: Path
    path: Path
    cfg: DictConfig
    own: DictConfig | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)
    listings: Listings = field(default_factory=Listings)

    @cached_property
    def images(self) -> RunImages:
        """The images that it is evaluated on, listed when they are first asked for.

        Raises:
            UsageError: a folder cannot be listed, or other images would count as held out than were.
        """
        images = RunImages.of(self.cfg, self.listings)
        if self.own is None:
            check_held_out(self.recorded, images, self.path)
        return images

    @property
    def trained(self) -> DictConfig:
        """The completed config it was trained with, as it is in ``args.json``."""
        return self.cfg if self.own is None else self.own

    @property
    def epochs(self) -> int:
        """How many epochs it was trained for."""
        return _epoch(self.path) + 1

    @property
    def rows_file(self) -> Path:
        """Where its rows stand, that of its pretraining among them."""
        folder = self.folder
        if (folder.parent / ARGUMENTS).is_file():  # that of the best checkpoint, inside the run's
            folder = folder.parent
        return folder.parent.parent / "rows.jsonl"

    def model(self) -> LightningModule:
        """The trained method in evaluation mode, on the CPU."""
        contents = load(self.path, weights_alone=True)
        check_generation(self.path, contents)
        model = load_suite().build(self.trained)
        fresh = model.state_dict().keys()
        # main's own script saves queues and memory banks, too, which only training makes: the method's own buffers.
        weights = {name: value for name, value in contents["state_dict"].items() if name in fresh or "." in name}
        check_fits(self.path, {"state_dict": weights}, self.trained, model)
        model.load_state_dict(weights)
        return model.eval() if self.own is None else _taking(model.eval(), self.cfg)


@dataclass(frozen=True)
class Weights(Checkpoint):
    """A file of weights of a network, or a network in ONNX: ``folder`` and ``path`` are the file.

    Attributes:
        architecture: the network; None in ONNX, which holds it.
    """

    architecture: Architecture | None = None

    @property
    def epochs(self) -> int:
        """How many epochs it was trained for; 0 where nothing says it."""
        return int(self.cfg.max_epochs)

    @property
    def rows_file(self) -> Path:
        """Beside the file."""
        return self.path.with_name("rows.jsonl")

    def model(self) -> LightningModule:
        """The network in evaluation mode, on the CPU, as a method that has no projector."""
        architecture, path = self.architecture, self.path
        network = OnnxNetwork(path) if architecture is None else architecture.filled(_weights(path), path)
        return _taking(Backbone(network).eval(), self.cfg)


def _taking(model: LightningModule, cfg: DictConfig) -> LightningModule:
    """The model, if it takes images of the size that a folder's are shown at: a ViT takes one alone."""
    size = cfg.augmentations[0].crop_size
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        if cfg.data.dataset == "custom":
            raise UsageError(
                f"{cfg.name} does not take images of {size} pixels ({str(error).splitlines()[0]}): set "
                "augmentations.0.crop_size to the size that it was trained at"
            ) from error
    return model


def open_checkpoint(place: Path | str, changes: Sequence[str] = (), listings: Listings | None = None) -> Checkpoint:
    """Find what can be evaluated: the latest whole checkpoint of a run, or a file of weights.

    Args:
        place: a run's folder, one of its ``.ckpt`` files, a file that ``emim-solo export`` has written, or
            ``torchvision:NETWORK@FILE``, ``timm:NETWORK@FILE``.
        changes: ``key=value`` each, of the images that it is evaluated on, in the schema of pretraining
            (``data.train_path``, ``augmentations.0.crop_size``); of a library's network also of ``backbone``.
        listings: of folders that were listed already.

    Raises:
        UsageError: nothing of these, without a whole checkpoint, of another method or generation than this solo-learn
            has, or images that are not there.
    """
    listings = listings or Listings()
    if match := _OF_LIBRARY.fullmatch(str(place)):
        library, name, weights = match.groups()
        own = [change for change in changes if change.startswith("backbone.")]
        network = _changed(OmegaConf.create({"backbone": {"kwargs": {}}}), own).backbone
        return _of_weights(
            Path(weights).expanduser(), {"library": library, "name": name, **plain(network)}, {}, changes, listings
        )
    path = Path(place).expanduser()
    folder = path.parent if path.suffix == ".ckpt" and path.is_file() else path
    if path.is_file() and not (folder / ARGUMENTS).is_file():
        return _exported(path, changes, listings)
    if not (folder / ARGUMENTS).is_file():
        raise UsageError(f"no {ARGUMENTS} in '{folder}': {EXPECTED}")
    cfg = OmegaConf.create(files.read_json(folder / ARGUMENTS))
    odd = [key for key in ("name", "method", "seed", "data", "backbone") if cfg.get(key) is None]
    if odd:
        raise UsageError(
            f"'{folder / ARGUMENTS}' lacks {', '.join(odd)}: expected what the suite's Checkpointer writes"
        )
    suite = load_suite()
    if cfg.method not in suite.methods():
        raise UsageError(f"'{folder}' is of method '{cfg.method}', which solo-learn {suite.version} does not have")
    found = last_whole(folder, weights_alone=True) if folder == path else (path, load(path, weights_alone=True))
    if found is None:
        raise UsageError(
            f"no checkpoint in '{folder}': expected a .ckpt file; train again with checkpoint.enabled=True"
        )
    check_generation(*found)
    shown = _on_images(cfg, changes, listings) if changes else cfg
    recorded = found[1].get(IMAGES, {})
    return Checkpoint(folder, found[0], shown, cfg if changes else None, recorded, listings)


def open_checkpoints(places: Sequence[Path | str], changes: Sequence[str] = ()) -> list[Checkpoint]:
    """:func:`open_checkpoint` of each, all of them before any work begins."""
    foreign = [change for change in changes if change.startswith("backbone.")]
    if foreign and not any(_OF_LIBRARY.fullmatch(str(place)) for place in places):
        raise UsageError(
            f"{foreign[0]}: of LIBRARY:NETWORK@FILE alone, anything else knows its own network; leave it out"
        )
    listings = Listings()
    return [open_checkpoint(place, changes, listings) for place in places]


def _of_weights(
    path: Path, network: Mapping[str, Any] | None, known: Mapping[str, Any], changes: Sequence[str], listings: Listings
) -> Weights:
    """Weights of an :class:`Architecture`, or a network in ONNX, with what is known of the run that they are of."""
    if not path.is_file():
        raise UsageError(f"no weights '{path}': {EXPECTED}")
    architecture = None if network is None else Architecture(**network)
    cfg = OmegaConf.create(
        {
            "name": path.stem,
            "method": str(architecture),
            "seed": 0,
            "max_epochs": 0,
            "backbone": {"name": str(architecture), "kwargs": {}},
            "data": {
                "dataset": "custom",
                "val_path": None,
                "format": "image_folder",
                "no_labels": False,
                "num_workers": 2,
            },
            "augmentations": [architecture.images() if architecture else {}],
            "optimizer": {"batch_size": 64},
        }
    )
    cfg = _on_images(OmegaConf.merge(cfg, known), changes, listings)  # type: ignore[arg-type]
    return Weights(path, path, cfg, listings=listings, architecture=architecture)


def _exported(path: Path, changes: Sequence[str], listings: Listings) -> Weights:
    """A file with the card that ``emim-solo export`` has put beside it."""
    from huggingface_hub import ModelCard

    card = path.with_name(f"{path.name}.md")
    if not card.is_file():
        raise UsageError(f"'{path}' has neither {ARGUMENTS} nor a model card '{card.name}' beside it: {EXPECTED}")
    try:
        front = ModelCard(files.read_text(card)).data.to_dict()[CARD]
        network, known = front["network"], front["config"]
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"'{card}' is no card of 'emim-solo export' ({error}): export again; {EXPECTED}") from error
    return _of_weights(path, network, known, changes, listings)


def _on_images(cfg: DictConfig, changes: Sequence[str], listings: Listings) -> DictConfig:
    """A config with other images.

    Raises:
        UsageError: a key of something else, or images that are not there.
    """
    cfg = _changed(cfg, [change for change in changes if not change.startswith("backbone.")])
    if cfg.data.get("train_path") is None:
        raise UsageError(
            f"which images is {cfg.name} to be evaluated on? Add data.train_path=DIR and, for accuracies, "
            "data.val_path=DIR: folders with one folder for each class, or data.no_labels=True"
        )
    view = cfg.augmentations[0]
    for key, value, right, expected in (
        ("data.dataset", cfg.data.dataset, cfg.data.dataset in DATASETS, f"one of {', '.join(DATASETS)}"),
        ("crop_size", view.crop_size, isinstance(view.crop_size, int) and view.crop_size > 0, "a whole number above 0"),
        *((key, view.get(key), _three(view.get(key, (0, 0, 0))), "three numbers") for key in ("mean", "std")),
    ):
        if not right:
            raise UsageError(f"{key}={value}: expected {expected}")
    load_suite().check_values(OmegaConf.masked_copy(cfg, ["data"]))
    expand_home(cfg)
    cfg.data.num_classes = None  # of a dataset that is known by name the names of its classes
    return count_classes(cfg, RunImages.of(cfg, listings).listed)


def _three(values: Any) -> bool:
    return isinstance(values, Sequence) and [isinstance(value, int | float) for value in values] == [True] * 3


def _changed(cfg: DictConfig, changes: Sequence[str]) -> DictConfig:
    cfg = cfg.copy()
    for change in changes:
        key, _, value = change.partition("=")
        if not key.startswith(_CHANGEABLE):
            raise UsageError(f"{change}: expected one of {', '.join(_CHANGEABLE)}, of the images to evaluate on")
        try:  # a folder may be called 2024
            parsed = value if key.endswith("_path") and value != "null" else yaml.safe_load(value)
            OmegaConf.update(cfg, key, parsed, force_add=True)
        except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
            raise UsageError(f"{change}: {str(error).splitlines()[0]}") from error
    return cfg


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
    found = last_whole(folder, weights_alone=True)
    return None if found is None else found[0]


def last_whole(folder: Path, *, weights_alone: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """:func:`last_checkpoint` and what is in it: to know that it is whole it has to be read."""
    damaged: list[DamagedCheckpoint] = []
    for _, path in by_epoch(folder)[::-1]:
        try:
            contents = load(path, weights_alone=weights_alone)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        for newer in damaged:
            warnings.warn(f"{newer}; '{path.name}' is taken", stacklevel=3)
        return path, contents
    if damaged:
        raise damaged[0]
    return None


def load(path: Path, *, weights_alone: bool = False) -> dict[str, Any]:
    """What is in a checkpoint: ``state_dict`` and ``epoch`` at least.

    Args:
        path: of the file.
        weights_alone: whether objects beside the weights, of a schedule say, may be passed over: an evaluation has no use for them.

    Raises:
        DamagedCheckpoint: it is cut short, altered or no checkpoint.
        UsageError: there is no such file, or it holds more than tensors and plain values, which could run code.
    """
    contents = _read(path, weights_alone=weights_alone)
    if not isinstance(contents.get("state_dict"), Mapping) or not isinstance(contents.get("epoch"), int):
        raise _damaged(path, "no state_dict or epoch")
    return contents


def _damaged(path: Path, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"cannot read checkpoint '{path}' ({reason}): it is cut short or no checkpoint; remove it and start again, or give "
        "another"
    )


def _read(path: Path, *, weights_alone: bool = False) -> dict[str, Any]:
    """The mapping in a file that torch or safetensors has written."""
    if not path.is_file():
        raise UsageError(f"no checkpoint '{path}': expected a .ckpt file written by the suite's Checkpointer")
    zipped = False
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and (odd := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"checksum of {odd}")
        with _only_weights(path) if weights_alone and zipped else nullcontext():
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return dict(contents)
    except Exception as error:  # torch.load raises many types on a file that is not whole
        if isinstance(error, pickle.UnpicklingError) and zipped:
            reason = str(error).replace("\n", " ")
            what = re.search(r"(?:GLOBAL|global:?) (\S+)", reason)
            raise UsageError(
                f"checkpoint '{path}' holds more than tensors and plain values"
                f"{f' ({what[1]})' if what else ''}, which could run code: it is not loaded; give one that was "
                "written by the suite's Checkpointer, or weights alone"
            ) from error
        raise _damaged(path, type(error).__name__) from error


class _Inert:
    """Stands for an object beside the weights: nothing is called, nothing is kept."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _only_weights(path: Path) -> AbstractContextManager[Any]:
    """Within it torch's safe loading passes over the objects that are known beside weights; others stay refused."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch before 2.6 has no stand-ins
        return nullcontext()
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not all(_BESIDE_WEIGHTS.fullmatch(name) for name in names):
        return nullcontext()
    stand_ins = [(_no_items if name.endswith("defaultdict") else _Inert, name) for name in names]
    return torch.serialization.safe_globals(stand_ins)  # type: ignore[arg-type]


def _no_items(*_: Any) -> dict[str, Any]:
    return OrderedDict()


def _weights(path: Path) -> dict[str, Tensor]:
    """Weights of a network by name: of the file as it is, or of the backbone in a checkpoint of a method of the suite.

    Raises:
        UsageError: they are neither.
    """
    contents = _read(path, weights_alone=True)
    held: Any = next(
        (contents[key] for key in ("state_dict", "model") if isinstance(contents.get(key), Mapping)), contents
    )
    if not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise UsageError(f"'{path}' holds no weights by name: expected a state dict, in itself or as its 'state_dict'")
    weights: dict[str, Tensor] = timm.models.clean_state_dict(held)  # of DataParallel and torch.compile
    if "pytorch-lightning_version" in contents:
        prefixes = tuple(f"{name}." for name in load_suite().backbone_names.values())
        of_backbone = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(prefixes)}
        return of_backbone or weights
    return weights


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
    if odd := first_difference(model.state_dict(), contents["state_dict"]):
        raise UsageError(f"checkpoint '{path}' is of another model: {odd}; use its own config")


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
