"""Networks as torchvision and timm name them: built by their library, without a classifier, from weights in its names."""

from __future__ import annotations

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
from emim_solo.suite.api import IMAGENET_MEAN, IMAGENET_STD, give_small_image_stem

LIBRARIES = ("torchvision", "timm")
ONNX = "onnx"
_TIMM_SUFFIXES = {"vit": "_patch16_224", "swin": "_patch4_window7_224"}  # of the suite's names without them
_OF_TRAINING = ("zero_init_residual", "weights", "pretrained", "progress")  # say how a network starts, not what it is


def first_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """What differs between the weights of a network and those of a file in names and shapes, None if nothing does."""
    here, there = (
        # A counter that torchvision's older files are without.
        {name: tuple(value.shape) for name, value in weights.items() if not name.endswith("num_batches_tracked")}
        for weights in (ours, theirs)
    )
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not odd:
        return None
    return (
        f"{len(odd)} weights differ, first '{odd[0]}' ({there.get(odd[0], 'absent')} in it, "
        f"{here.get(odd[0], 'absent')} here)"
    )


@dataclass(frozen=True)
class Architecture:
    """A network that a library builds by name.

    Attributes:
        library: ``torchvision`` or ``timm``.
        name: what the library calls it.
        kwargs: what its constructor takes beside the name.
        small_image_stem: the suite's for CIFAR in place of a ResNet's own.

    Raises:
        UsageError: the library has no such network.
    """

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    small_image_stem: bool = False

    def __post_init__(self) -> None:
        if self.library == "timm":
            exists = timm.is_model(self._bare_name) and hasattr(timm.models, self._bare_name)
        else:
            exists = self.name in torchvision.models.list_models(module=torchvision.models)
        if not exists:
            raise UsageError(f"{self.library} has no network '{self.name}': see {self.library}'s list_models()")

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def filled(self, weights: Mapping[str, Tensor], place: Path | str) -> nn.Module:
        """The network with given weights, in evaluation mode: images ``(N, 3, H, W)`` to features ``(N, d)``.

        Args:
            weights: in the library's names; those of its classifier are left out.
            place: where they are from, for an error.

        Raises:
            UsageError: the library cannot build it, or the weights are of another one.
        """
        network, of_classifier = self._build()
        own = {name: value for name, value in weights.items() if name not in of_classifier}
        if odd := first_difference(network.state_dict(), own):
            kwargs = f" with {dict(self.kwargs)}" if self.kwargs else ""
            raise UsageError(
                f"'{place}' is not of {self}{kwargs}: {odd}; name the network that it is of, with its backbone.kwargs "
                "and, where it has one, backbone.small_image_stem=True"
            )
        network.load_state_dict(own, strict=False)  # names and shapes are those
        return network.eval()

    def _build(self) -> tuple[nn.Module, set[str]]:
        """The network, freshly initialised, and the names of the weights that only its classifier has."""
        # Not timm.create_model: solo-learn puts networks of its own under some of timm's names.
        library = timm.models if self.library == "timm" else torchvision.models
        try:
            network: Any = getattr(library, self._bare_name)(**self.kwargs)
            names = set(network.state_dict())
            if self.library == "timm":
                network.reset_classifier(0)
            else:
                last = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
                parent, _, own = last.rpartition(".")
                setattr(network.get_submodule(parent), own, nn.Identity())
            if self.small_image_stem:
                give_small_image_stem(network)
        except (AssertionError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self} with {dict(self.kwargs)} gives no features ({error}): take another") from error
        return network, names - set(network.state_dict())

    @property
    def _bare_name(self) -> str:
        """timm puts the name of weights after a dot."""
        return self.name.partition(".")[0]

    def images(self) -> dict[str, Any]:
        """Size, mean and std of the images that the library's own weights of this network take."""
        found: dict[str, Any] = {"crop_size": 224, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
        if self.library == "timm" and (own := timm.get_pretrained_cfg(self.name)):
            found = {"crop_size": own.input_size[-1], "mean": list(own.mean), "std": list(own.std)}
        if self.library == "torchvision" and (weights := torchvision.models.get_model_weights(self.name)):
            shown: Any = next(iter(weights)).transforms()
            found = {"crop_size": shown.crop_size[0], "mean": list(shown.mean), "std": list(shown.std)}
        return found | ({"crop_size": self.kwargs["img_size"]} if "img_size" in self.kwargs else {})

    def loading(self, file: str) -> list[str]:
        """Python that loads weights of a file with the library alone: imports, and three lines, four with another stem."""
        kwargs = "".join(f", {key}={value!r}" for key, value in self.kwargs.items())
        parts = {} if self.library == "timm" else {"fc": "nn.Identity()"}
        if self.small_image_stem:
            parts |= {"conv1": "nn.Conv2d(3, 64, 3, 1, 2, bias=False)", "maxpool": "nn.Identity()"}
        make = (
            f"timm.create_model({self.name!r}, num_classes=0{kwargs})"
            if self.library == "timm"
            else f"torchvision.models.{self.name}({kwargs[2:]})"
        )
        replace = ", ".join(f"network.{part}" for part in parts) + " = " + ", ".join(parts.values())
        safe = file.endswith(".safetensors")
        return [
            f"import torch, {self.library}",
            *(["from torch import nn"] if parts else []),
            *(["from safetensors.torch import load_file"] if safe else []),
            "",
            f"network = {make}",
            *([replace] if parts else []),
            f"network.load_state_dict({f'load_file({file!r})' if safe else f'torch.load({file!r}, weights_only=True)'})",
            "features = network.eval()(images)",
        ]


class Backbone(LightningModule):
    """A network whose output is the features, called as the suite's methods are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``(N, 3, H, W)`` to ``feats`` ``(N, d)``."""
        return {"feats": self.network(images)}


class OnnxNetwork(nn.Module):
    """A network in ONNX, which runs on the CPU.

    Raises:
        UsageError: there is no onnxruntime, or it cannot read the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnxruntime

            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its own types, one for each way in which a file can be damaged
            line = str(error).splitlines()[0]
            raise UsageError(
                f"cannot open '{path}' ({line}): pip install 'emim-solo[export]', or export again"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to features ``(N, d)``."""
        (taken,) = self.session.get_inputs()
        if list(images.shape[1:]) != taken.shape[1:]:
            raise ValueError(f"it takes {taken.shape[1:]}")
        return torch.from_numpy(self.session.run(None, {taken.name: images.float().cpu().numpy()})[0])


def named(suites_name: str, backbone: nn.Module, kwargs: Mapping[str, Any], library: str) -> Architecture:
    """What a library calls a backbone of the suite; whether it computes the same is not looked at.

    Args:
        suites_name: ``backbone.name`` of a config.
        backbone: the suite's module.
        kwargs: ``backbone.kwargs`` of the config.
        library: ``torchvision`` or ``timm``.

    Raises:
        UsageError: the library has none of this name.
    """
    family = suites_name.partition("_")[0]
    own = {key: value for key, value in kwargs.items() if key not in _OF_TRAINING}
    if suites_name.startswith("resnet"):
        return Architecture(library, suites_name, own, isinstance(backbone.maxpool, nn.Identity))
    size = getattr(
        getattr(backbone, "patch_embed", None), "img_size", None
    )  # not in every config: it follows the crops
    own |= {} if size is None else {"img_size": size[0]}
    if family == "vit":  # those of MoCo v3 and MAE have heads of their own
        own["num_heads"] = backbone.blocks[0].attn.num_heads  # type: ignore[index, union-attr]
    return Architecture(library, suites_name + _TIMM_SUFFIXES.get(family, ""), own)
