"""Networks of torchvision and timm: built by the library without a classifier, filled with weights in the library's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from emim_solo.ground.errors import UsageError
from emim_solo.suite.api import IMAGENET_MEAN, IMAGENET_STD, give_small_image_stem, in_one_line

LIBRARIES = ("torchvision", "timm")
ONNX = "onnx"
_TIMM_SUFFIXES = {"vit": "_patch16_224", "swin": "_patch4_window7_224"}  # in timm's names, not in solo-learn's
_AUXILIARY = ("aux1", "aux2", "AuxLogits")  # torchvision's classifiers that only training uses
_OF_START = ("weights", "pretrained")  # would download other weights than the file's
_OF_TRAINING = (*_OF_START, "zero_init_residual", "progress")  # change how a network starts, not what it is


def first_difference(network: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> str | None:
    """What differs between the weights of a network and those of a file in names and shapes, None if nothing does."""
    ours, theirs = (
        # Older files of torchvision lack this counter.
        {name: tuple(value.shape) for name, value in weights.items() if not name.endswith("num_batches_tracked")}
        for weights in (network, file)
    )
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not differing:
        return None
    first = differing[0]
    shapes = f"{theirs.get(first, 'absent')} in it, {ours.get(first, 'absent')} here"
    return f"{len(differing)} weights differ, first '{first}' ({shapes})"


@dataclass(frozen=True)
class Architecture:
    """A network that a library (``torchvision``, ``timm``) builds by name; UsageError if it has no such network."""

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # of its constructor
    small_image_stem: bool = False  # solo-learn's stem for CIFAR, instead of the ResNet's own

    def __post_init__(self) -> None:
        if self.library == "timm":
            exists = timm.is_model(self._bare_name) and hasattr(timm.models, self._bare_name)
        else:
            exists = self.name in torchvision.models.list_models(module=torchvision.models)
        if not exists:
            raise UsageError("backbone.name", f"{self.library} has no network '{self.name}': see its list_models()")
        for name in self.kwargs.keys() & set(_OF_START):
            key = f"backbone.kwargs.{name}"
            raise UsageError(key, f"{key}={self.kwargs[name]}: the weights are those of the file; leave it out")

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    @property
    def _bare_name(self) -> str:
        """The name without the part after the dot, which in timm names pretrained weights."""
        return self.name.partition(".")[0]

    def filled(self, weights: Mapping[str, Tensor], place: Path | str) -> nn.Module:
        """The network in evaluation mode: images ``(N, 3, H, W)`` to features ``(N, d)``.

        The weights have the library's names; those of a classifier are left out. UsageError if the library cannot build the
        network, or if the weights are of another one; that error names their ``place``.
        """
        network, of_classifiers = self._build()
        of_backbone = {name: value for name, value in weights.items() if name not in of_classifiers}
        if differing := first_difference(network.state_dict(), of_backbone):
            to_do = "name its network, with its backbone.kwargs and backbone.small_image_stem"
            raise UsageError("backbone.weights", f"'{place}' is not of {self}: {differing}; {to_do}")
        with torch.no_grad():
            # Names and shapes are the same. load_state_dict may ask for versions of modules, which a file may lack.
            for name, value in network.state_dict().items():
                value.copy_(of_backbone.get(name, value))
        return network.eval()

    def _build(self) -> tuple[nn.Module, set[str]]:
        """The network without classifiers, freshly initialised, and the names of the classifiers' weights."""
        # Not timm.create_model: solo-learn registers networks of its own under some of timm's names.
        library = timm.models if self.library == "timm" else torchvision.models
        with in_one_line("backbone.kwargs", f"{self} with {dict(self.kwargs)} gives no features", "take another"):
            network: Any = getattr(library, self._bare_name)(**self.kwargs)
            names = set(network.state_dict())
            if self.library == "timm":
                network.reset_classifier(0)
            else:
                _leave_out_classifiers(network)
                if hasattr(network, "transform_input"):  # as torchvision sets it with its published weights
                    network.transform_input = self.kwargs.get("transform_input", True)
            if self.small_image_stem:
                give_small_image_stem(network)
        return network, names - set(network.state_dict())

    def image_settings(self) -> dict[str, Any]:
        """Size, mean and std of the images that the library's published weights of this network expect."""
        shown: tuple[Any, ...] = (224, IMAGENET_MEAN, IMAGENET_STD)
        if self.library == "torchvision":
            published: Any = next(iter(torchvision.models.get_model_weights(self.name))).transforms()
            shown = published.crop_size[0], published.mean, published.std
            if self.name.startswith("vit_"):  # built for one size, maybe not that of the first published weights
                shown = self.kwargs.get("image_size", 224), *shown[1:]
        elif pretrained := timm.get_pretrained_cfg(self.name):
            shown = pretrained.input_size[-1], pretrained.mean, pretrained.std
        size, mean, std = shown
        return {"crop_size": self.kwargs.get("img_size", size), "mean": list(mean), "std": list(std)}

    def loading(self, file: str) -> list[str]:
        """Lines of Python that load a file's weights with only the library, and compute features."""
        kwargs = "".join(f", {key}={value!r}" for key, value in self.kwargs.items())
        make, parts = f"torchvision.models.{self.name}({kwargs[2:]})", {"fc": "nn.Identity()"}
        if self.library == "timm":
            make, parts = f'timm.create_model("{self.name}", num_classes=0{kwargs})', {}
        if self.small_image_stem:
            parts |= {"conv1": "nn.Conv2d(3, 64, 3, 1, 2, bias=False)", "maxpool": "nn.Identity()"}
        replace = f"{', '.join(f'network.{part}' for part in parts)} = {', '.join(parts.values())}"
        safe = file.lower().endswith(".safetensors")
        read = f"load_file({json.dumps(file)})" if safe else f"torch.load({json.dumps(file)}, weights_only=True)"
        return [
            f"import torch, {self.library}",
            *(["from torch import nn"] if parts else []),
            *(["from safetensors.torch import load_file"] if safe else []),
            "",
            f"network = {make}",
            *([replace] if parts else []),
            f"network.load_state_dict({read})",
            "features = network.eval()(images)",
        ]


def _leave_out_classifiers(network: nn.Module) -> None:
    """Replace the last linear layer of a torchvision network by the identity, and remove classifiers that only training uses."""
    for name in _AUXILIARY:
        if hasattr(network, name):
            setattr(network, name, None)
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError("it has no linear classifier to leave out")
    parent, _, name = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())


class Backbone(LightningModule):
    """A network that outputs features, called like solo-learn's methods."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``(N, 3, H, W)`` to ``feats`` ``(N, d)``."""
        return {"feats": self.network(images)}


class OnnxNetwork(nn.Module):
    """A network in ONNX, on the CPU, from a file's content; UsageError if onnxruntime is missing or cannot open it."""

    def __init__(self, content: bytes, place: Path | str) -> None:
        super().__init__()
        to_do = "pip install 'emim-solo[export]', or export again"
        with in_one_line("checkpoint.onnx", f"cannot open '{place}'", to_do):
            import onnxruntime

            self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to features ``(N, d)``."""
        (taken,) = self.session.get_inputs()
        if list(images.shape[1:]) != taken.shape[1:]:
            raise ValueError(f"it takes {taken.shape[1:]}")
        return torch.from_numpy(self.session.run(None, {taken.name: images.float().cpu().numpy()})[0])


def named(suites_name: str, backbone: nn.Module, kwargs: Mapping[str, Any], library: str) -> Architecture:
    """The library's network by the name of solo-learn's backbone. It may compute something else. UsageError if there is none."""
    family = suites_name.partition("_")[0]
    kept = {key: value for key, value in kwargs.items() if key not in _OF_TRAINING}
    if suites_name.startswith("resnet"):
        return Architecture(library, suites_name, kept, isinstance(backbone.maxpool, nn.Identity))
    # The config may lack img_size, because it follows the crop size.
    if (size := getattr(getattr(backbone, "patch_embed", None), "img_size", None)) is not None:
        kept["img_size"] = size[0]
    if family == "vit":  # the ViTs of MoCo v3 and MAE have other numbers of heads than timm's
        kept["num_heads"] = backbone.blocks[0].attn.num_heads  # type: ignore[index, union-attr]
    return Architecture(library, suites_name + _TIMM_SUFFIXES.get(family, ""), kept)
