"""The one place that opens checkpoints on disk.

A run's folder is ``<checkpoint.dir>/<method>/<version>``. It holds solo-learn's ``args.json`` and ``*-ep=<epoch>.ckpt``, written
by ``emim-solo pretrain`` or by solo-learn main's own script. ``*-ep=<epoch>-step=<step>.ckpt`` was saved within an epoch.
Files of weights are opened, too: of a network of torchvision or timm, and those that ``emim-solo export`` writes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import nn

from emim_solo.checkpoints.architectures import LIBRARIES, Architecture, Backbone, OnnxNetwork, first_difference
from emim_solo.checkpoints.contents import DamagedCheckpoint, load, load_weights
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import check
from emim_solo.images.folders import HeldOut, Images, Listings, RunImages, check_held_out, expand_home
from emim_solo.suite import as_dict, load_suite, schema
from emim_solo.suite.api import in_one_line

ARGUMENTS = "args.json"
IMAGES = "emim_solo_images"  # key in a checkpoint: the record of the images that it was trained on
CARD = "emim_solo"  # key in a model card's front matter: what is needed to open the file again
EXPECTED = (
    f"expected the folder of a run, <checkpoint.dir>/<method>/<version>, as the pretraining prints it, a .ckpt file in one, a "
    f"file of 'emim-solo export', or weights of a network of a library, {'|'.join(LIBRARIES)}:NETWORK@FILE"
)
_OF_LIBRARY = re.compile(rf"({'|'.join(LIBRARIES)}):([^@]+)@(.+)")
_OF_DATA = ("dataset", "train_path", "val_path", "format", "no_labels", "num_workers", "image_size")
_OF_VIEW = ("crop_size", "mean", "std")
_CHANGEABLE = (*(f"data.{name}" for name in _OF_DATA), *(f"augmentations.0.{name}" for name in _OF_VIEW))
# An evaluation may change the former; of LIBRARY:NETWORK@FILE it may change the latter, too.
_OF_NETWORK = ("backbone.kwargs.KEY", "backbone.small_image_stem")


@dataclass(frozen=True)
class Checkpoint:
    """A run that can be evaluated."""

    folder: Path  # <checkpoint.dir>/<method>/<version>, with args.json
    path: Path  # its .ckpt file: the named one, else the latest whole one
    cfg: DictConfig  # the completed config of its training, but with the images that it is evaluated on
    trained: DictConfig  # the config in args.json; the same object as cfg if no image setting was changed
    recorded: Mapping[str, Any] = field(default_factory=dict)  # its own record of the images it was trained on
    listings: Listings = field(default_factory=Listings)  # of folders, shared with checkpoints opened together

    @cached_property
    def images(self) -> RunImages:
        """The images that it is evaluated on; UsageError if they cannot be listed, or if others are held out than in training."""
        images = RunImages.of(self.cfg, self.listings)
        if self.cfg is self.trained:
            check_held_out(self.recorded, images, self.path)
        return images

    @property
    def epochs(self) -> int:
        """Number of whole epochs it was trained for."""
        return (_age(self.path) or (0, 0))[0]

    @property
    def rows_file(self) -> Path:
        """The file of its rows. It also has the row of the pretraining."""
        folder = self.folder
        if (folder.parent / ARGUMENTS).is_file():  # this is best/ inside the run's folder
            folder = folder.parent
        return folder.parent.parent / "rows.jsonl"

    def model(self) -> LightningModule:
        """The trained method in evaluation mode, on the CPU."""
        stored = load(self.path, weights_alone=True)["state_dict"]
        model = load_suite().build(self.trained)
        fresh = model.state_dict().keys()
        # solo-learn main's script also saves buffers that only training makes (queues, memory banks). Their names have no dot.
        weights = {name: value for name, value in stored.items() if name in fresh or "." in name}
        check_fits(self.path, {"state_dict": weights}, self.trained, model)
        model.load_state_dict(weights)
        if self.cfg is not self.trained:
            _check_features(model.eval(), self.cfg)
        return model.eval()


@dataclass(frozen=True)
class WeightsFile(Checkpoint):
    """A file of a network's weights, or of a network in ONNX (``architecture`` is None). ``folder`` and ``path`` are the file."""

    architecture: Architecture | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs it was trained for; 0 if not known."""
        return int(self.cfg.max_epochs)

    @property
    def rows_file(self) -> Path:
        """``rows.jsonl`` beside the file."""
        return self.path.with_name("rows.jsonl")

    def model(self) -> LightningModule:
        """The network in evaluation mode, on the CPU, as a method that has no projector."""
        if self.architecture is None:
            network: nn.Module = OnnxNetwork(self.path.read_bytes(), self.path)
        else:
            network = self.architecture.filled(load_weights(self.path), self.path)
        model = Backbone(network).eval()
        _check_features(model, self.cfg)
        return model


@torch.no_grad()
def _check_features(model: LightningModule, cfg: DictConfig) -> None:
    """Check that a model gives one row of features for an image of the size and channels that evaluations show."""
    channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)
    if channels != 3:
        reason = f"{cfg.name} takes images of {channels} channels"
        raise UsageError("backbone.kwargs.in_chans", f"{reason}: expected weights for 3, images are shown in RGB")
    images = load_suite().evaluation_transform(cfg)(Image.new("RGB", (32, 32))).unsqueeze(0)  # CIFAR's are not resized
    key, what = "augmentations.0.crop_size", f"{cfg.name} does not take images of {images.shape[-1]} pixels"
    to_do = f"of folders, set {key} to the size that it was trained at"
    with in_one_line(key, what, to_do):  # a ViT takes only one size
        features = model(images)["feats"]
    shape = getattr(features, "shape", ())
    if len(shape) != 2:
        reason = f"{cfg.name} gives {tuple(shape) or type(features).__name__} for an image: expected (1, d)"
        raise UsageError("backbone.kwargs", f"{reason}; leave out kwargs such as features_only and global_pool")


def open_checkpoint(place: Path | str, changes: Sequence[str] = (), listings: Listings | None = None) -> Checkpoint:
    """Find what can be evaluated at a place of :data:`EXPECTED`: the latest whole checkpoint of a run, or a file of weights.

    ``changes`` are ``key=value`` each, for the images to evaluate on, in the schema of pretraining (``data.train_path``,
    ``augmentations.0.crop_size``); for a library's network also keys of ``backbone``. UsageError if there is no such place, no
    whole checkpoint, no such images, or if the installed solo-learn lacks the method or generation.
    """
    listings = listings or Listings()
    if match := _OF_LIBRARY.fullmatch(str(place)):
        library, name, file = match.groups()
        backbone = OmegaConf.create({"backbone": {"kwargs": {}}})
        of_network = [change for change in changes if change.startswith("backbone.")]
        network = _with_changes(backbone, of_network, _OF_NETWORK).backbone
        architecture = Architecture(library, name, as_dict(network.kwargs), bool(network.get("small_image_stem")))
        return _of_weights(Path(os.path.expanduser(file)), architecture, {}, changes, listings)
    path = Path(os.path.abspath(os.path.expanduser(place)))  # "." has neither method nor version in it
    if is_weights(path):
        return _exported(path, changes, listings)
    folder = path.parent if path.is_file() else path
    arguments = folder / ARGUMENTS
    if not arguments.is_file():
        raise UsageError("checkpoint.folder", f"no {ARGUMENTS} in '{path}': {EXPECTED}")
    cfg = OmegaConf.create(files.read_json(arguments))
    if missing := [key for key in ("name", "method", "seed", "data", "backbone") if cfg.get(key) is None]:
        reason = f"'{arguments}' lacks {', '.join(missing)}"
        raise UsageError("checkpoint.arguments", f"{reason}: expected what solo-learn's Checkpointer writes")
    suite = load_suite()
    if cfg.method not in suite.methods():
        reason = f"'{folder}' is of method '{cfg.method}'"
        raise UsageError("checkpoint.method", f"{reason}, which solo-learn {suite.version} does not have")
    latest = last_whole(folder, weights_alone=True) if folder == path else (path, load(path, weights_alone=True))
    if latest is None:
        raise UsageError("checkpoint.missing", f"no checkpoint in '{folder}': train with checkpoint.enabled=True")
    path, contents = latest
    check_generation(path, contents)
    recorded = contents.get(IMAGES, {})
    shown = _on_images(cfg, changes, listings, recorded) if changes else cfg
    return Checkpoint(folder, path, shown, cfg, recorded, listings)


def is_weights(place: Path | str) -> bool:
    """Whether a place is LIBRARY:NETWORK@FILE, or a file that is no checkpoint in a run's folder."""
    path = Path(os.path.expanduser(place))
    of_run = path.suffix.lower() == ".ckpt" and path.with_name(ARGUMENTS).is_file()
    return bool(_OF_LIBRARY.fullmatch(str(place))) or (path.is_file() and not of_run)


def open_checkpoints(places: Sequence[Path | str], changes: Sequence[str] = ()) -> list[Checkpoint]:
    """:func:`open_checkpoint` for each place. All are opened before any work begins."""
    of_network = [change for change in changes if change.startswith("backbone.")]
    if of_network and not any(_OF_LIBRARY.fullmatch(str(place)) for place in places):
        reason = "of LIBRARY:NETWORK@FILE alone, anything else knows its own network; leave it out"
        raise UsageError(of_network[0].partition("=")[0], f"{of_network[0]}: {reason}")
    listings = Listings()
    return [open_checkpoint(place, changes, listings) for place in places]


def _of_weights(
    path: Path, architecture: Architecture | None, known: Mapping[str, Any], changes: Sequence[str], listings: Listings
) -> WeightsFile:
    """Open a file of weights, or a network in ONNX. ``known`` is the part of its run's config that is known."""
    if not path.is_file():
        raise UsageError("checkpoint.missing", f"no weights '{path}': {EXPECTED}")
    about = {"name": path.stem, "method": str(architecture), "seed": 0, "max_epochs": 0}
    about |= {"backbone": {"name": str(architecture), "kwargs": {}}, "optimizer": {"batch_size": 64}}
    about |= {"augmentations": [architecture.image_settings() if architecture else {}]}
    data = {"dataset": "custom", "val_path": None, "format": "image_folder", "no_labels": False, "num_workers": 2}
    cfg = OmegaConf.merge(OmegaConf.create(about | {"data": data}), known)
    cfg = _on_images(cfg, changes, listings, {})  # type: ignore[arg-type]
    return WeightsFile(path, path, cfg, cfg, listings=listings, architecture=architecture)


def _exported(path: Path, changes: Sequence[str], listings: Listings) -> WeightsFile:
    """Open a file that ``emim-solo export`` has written, by the model card beside it."""
    from huggingface_hub import ModelCard

    card = path.with_name(f"{path.name}.md")
    if not card.is_file():
        reason = f"'{path}' has neither {ARGUMENTS} nor a model card '{card.name}' beside it"
        raise UsageError("checkpoint.card", f"{reason}: {EXPECTED}")
    with in_one_line("checkpoint.card", f"'{card}' is no card of 'emim-solo export'", f"export again; {EXPECTED}"):
        front = ModelCard(files.read_text(card)).data.to_dict()[CARD]
        architecture, known = front["network"] and Architecture(**front["network"]), front["config"]
    return _of_weights(path, architecture, known, changes, listings)


def _on_images(cfg: DictConfig, changes: Sequence[str], listings: Listings, recorded: Mapping[str, Any]) -> DictConfig:
    """A config with other images; UsageError for keys of anything else, or for images that do not exist."""
    cfg = _with_changes(cfg, [change for change in changes if not change.startswith("backbone.")], _CHANGEABLE)
    fixed = cfg.data.dataset != "custom" and cfg.method in load_suite().methods()
    if of_view := [change for change in changes if fixed and change.startswith("augmentations.")]:
        key, dataset = of_view[0].partition("=")[0], cfg.data.dataset
        reason = f"solo-learn shows the images of data.dataset={dataset} in its own size, mean and std"
        raise UsageError(key, f"{of_view[0]}: {reason}: leave it out, or name a folder with data.dataset=custom")
    if cfg.data.get("train_path") is None:
        to_do = "Add data.train_path=DIR and, for accuracies, data.val_path=DIR, or data.no_labels=True"
        raise UsageError("data.train_path", f"which images is {cfg.name} to be evaluated on? {to_do}")
    whole = as_dict(cfg)
    data, view = whole["data"], whole["augmentations"][0]
    check(schema.Data, {name: data[name] for name in _OF_DATA if name in data}, "data")
    check(schema.View, {name: view[name] for name in _OF_VIEW if name in view}, "augmentations.0")
    expand_home(cfg)
    held_out = HeldOut.recorded(cfg) if any(change.startswith("data.train_path=") for change in changes) else None
    if held_out is not None:
        cfg.score.held_out = None
    listed = RunImages.of(cfg, listings).listed
    if held_out is not None and _are_of(held_out, recorded, listed):
        cfg.score.held_out = asdict(held_out)
    return load_suite().count_classes(cfg, listed)


def _are_of(held_out: HeldOut, recorded: Mapping[str, Any], listed: Images | None) -> bool:
    """Whether these are the images of the training, elsewhere now. Of other images, none was held out."""
    if listed is None or len(listed) != held_out.of or "held_out" not in recorded:
        return False
    return listed.at(held_out.positions(len(listed))).digest == recorded["held_out"]["digest"]


def _with_changes(cfg: DictConfig, changes: Sequence[str], keys: Sequence[str]) -> DictConfig:
    """A config with changes, ``key=value`` each, to the allowed ``keys``. ``KEY`` at the end of one stands for any name."""
    cfg = cfg.copy()
    for change in changes:
        key, _, value = change.partition("=")
        if not any(key == each or (each.endswith("KEY") and key.startswith(each[:-3])) for each in keys):
            raise UsageError(key, f"{change}: expected one of {', '.join((*_CHANGEABLE, *_OF_NETWORK))}")
        try:  # a folder may be called 2024
            parsed = value if key.endswith("_path") and value != "null" else yaml.safe_load(value)
            OmegaConf.update(cfg, key, parsed, force_add=True)
            OmegaConf.to_container(cfg, resolve=True)
        except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
            raise UsageError(key, f"{change}: {str(error).splitlines()[0]}") from error
    return cfg


def by_epoch(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of whole epochs in a run's folder, in order, each with its epoch (from 0). No file is opened."""
    return [(epochs - 1, path) for epochs, step, path in _by_age(folder) if step == 0]


def within_epoch(name: str, epoch: int, step: int) -> str:
    """File name of a checkpoint that is saved within an epoch, after ``step`` steps of the run."""
    return f"{name}-ep={epoch}-step={step}.ckpt"


def within_epochs(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder that were saved within an epoch."""
    return [path for _, step, path in _by_age(folder) if step > 0]


def progress(contents: Mapping[str, Any]) -> tuple[int, int]:
    """Number of whole epochs, and of batches of the next epoch, in a checkpoint.

    An epoch that has ended counts as whole, even if the run's last step cut it short.
    """
    epoch: int = contents["epoch"]
    loop: Mapping[str, Any] | None = (contents.get("loops") or {}).get("fit_loop")
    if loop is None or loop["epoch_progress"]["current"]["processed"] > epoch:
        return epoch + 1, 0
    return epoch, loop["epoch_loop.batch_progress"]["current"]["processed"]


def _by_age(folder: Path) -> list[tuple[int, int, Path]]:
    """Whole epochs, step within the next one (0: its beginning) and path of each checkpoint in a folder, in order."""
    names = os.listdir(folder) if folder.is_dir() else []  # glob raises no error for a folder that cannot be listed
    return sorted((*age, path) for path in map(folder.joinpath, names) if (age := _age(path)) is not None)


def _age(path: Path) -> tuple[int, int] | None:
    match = re.search(r"-ep=(\d+)(?:-step=(\d+))?\.ckpt$", path.name)
    if match is None:
        return None
    epoch, step = int(match[1]), match[2]
    return (epoch + 1, 0) if step is None else (epoch, int(step))


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a run's folder, None if there is none. A warning names newer ones that are damaged.

    DamagedCheckpoint if there are checkpoints, but none is whole.
    """
    latest = last_whole(folder, weights_alone=True)
    return None if latest is None else latest[0]


def last_whole(folder: Path, *, weights_alone: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """:func:`last_checkpoint` and its contents. They have to be read to know that the file is whole."""
    damaged: list[DamagedCheckpoint] = []
    for *_, path in _by_age(folder)[::-1]:
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


def check_generation(path: Path, contents: Mapping[str, Any]) -> None:
    """UsageError if a checkpoint has no backbone, or one of the other generation of solo-learn, judged by its name."""
    suite = load_suite()
    parts = {name.partition(".")[0] for name in contents["state_dict"]}
    if suite.backbone_name in parts:
        return
    reason = f"has no '{suite.backbone_name}': expected one of a method of solo-learn {suite.version}"
    for generation, name in suite.backbone_names.items():
        if name in parts:
            reason = f"was trained with solo-learn {generation}, installed is {suite.generation}: install the former"
    raise UsageError("checkpoint.generation", f"checkpoint '{path}' {reason}")


def check_fits(path: Path, contents: Mapping[str, Any], cfg: DictConfig, model: LightningModule) -> None:
    """Check that a checkpoint is of this method, backbone and projector; UsageError with what differs."""
    method = stored_arguments(path).get("method", cfg.method)
    if method != cfg.method:
        raise UsageError("checkpoint.method", f"'{path}' is of method '{method}': expected one of '{cfg.method}'")
    if differing := first_difference(model.state_dict(), contents["state_dict"]):
        reason = f"checkpoint '{path}' is of another model: {differing}"
        raise UsageError("checkpoint.weights", f"{reason}; use the config that it was trained with")


def stored_arguments(path: Path) -> dict[str, Any]:
    """The config beside a checkpoint. Empty if there is no file, or, with a warning, if the file is damaged."""
    arguments = path.with_name(ARGUMENTS)
    if not arguments.is_file():
        return {}
    try:
        return files.read_json(arguments)
    except UsageError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
