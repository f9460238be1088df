"""What the rest of the package may ask of solo-learn, whichever generation is installed."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Images, RunImages
from emim_solo.suite.fixes import mended
from emim_solo.suite.loaders import reading_folders

PLUGINS = "emim_solo.methods"
"""The entry-point group in which a package names methods of its own: ``name = "module:Class"``."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Numbers and the smallest that make sense, whole where the smallest is written so.
_NUMBERS: dict[str, float] = {
    "seed": 0,
    "max_epochs": 1,
    "num_nodes": 1,
    "data.num_workers": 0,
    "optimizer.batch_size": 1,
    "optimizer.lr": 0.0,
    "optimizer.classifier_lr": 0.0,
    "optimizer.weight_decay": 0.0,
    "scheduler.warmup_epochs": 0.0,
    "scheduler.warmup_start_lr": 0.0,
    "scheduler.min_lr": 0.0,
    "checkpoint.frequency": 1,
}
# The suite's own evaluation crops: none up to STL-10's 96 pixels, 224 out of 256 on ImageNet.
_LARGEST_UNCROPPED = 96


class Suite(ABC):
    """Models, data and callbacks of solo-learn, all configured by the YAML schema of solo-learn main."""

    generation: ClassVar[str]
    backbone_names: ClassVar[dict[str, str]] = {"main": "backbone", "1.0.2": "encoder"}
    optimizers: ClassVar[tuple[str, ...]] = ("sgd", "lars", "adam", "adamw")
    linear_optimizers: ClassVar[tuple[str, ...]] = optimizers
    schedulers: ClassVar[tuple[str, ...]] = ("warmup_cosine", "step", "none")

    def __init__(self, version: str) -> None:
        self.version = version

    @property
    def identity(self) -> dict[str, str]:
        """Generation and version, for the rows of results."""
        return {"generation": self.generation, "version": self.version}

    @property
    def backbone_name(self) -> str:
        """What the backbone's weights begin with in a checkpoint of this generation."""
        return self.backbone_names[self.generation]

    # -- methods ------------------------------------------------------------------------------------------------

    @abstractmethod
    def emim_class(self) -> type[LightningModule]:
        """EMIM on this generation's base method."""

    @abstractmethod
    def registry(self) -> dict[str, Any]:
        """The suite's own METHODS: a dict that may be changed in place."""

    def methods(self) -> dict[str, Any]:
        """Name to class of every pretraining method, EMIM and those of other packages among them."""
        put_into(self.registry(), self.emim_class())
        return {name: method for name, method in self.registry().items() if name not in ("base", "linear")}

    @abstractmethod
    def uses_small_crops(self, method: str) -> bool:
        """Whether the loss of a method takes the crops of a smaller ``crop_size`` (multi-crop)."""

    @abstractmethod
    def optimizer_makers(self) -> dict[str, Callable[..., Any]]:
        """What makes each optimizer from ``params``, ``lr``, ``weight_decay`` and ``optimizer.kwargs``."""

    def check_values(self, cfg: DictConfig, *, linear: bool = False) -> None:
        """Check numbers and names, those that are there, which the suite meets only after the images were read.

        Keys of ``optimizer.kwargs`` that another optimizer takes are dropped from ``cfg``, which is said: they are left
        from the config that ``optimizer.name`` was changed of.

        Args:
            cfg: in the schema of pretraining, or of linear evaluation.
            linear: which of the two.

        Raises:
            UsageError: a value is no number or too small, the suite has no such optimizer or scheduler, or they do not
                take what is given for them.
        """
        for key, smallest in _NUMBERS.items():
            value = OmegaConf.select(cfg, key)
            whole = isinstance(smallest, int)
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if value is not None and not (right and smallest <= value < math.inf):
                kind = "whole number" if whole else "number"
                raise UsageError(f"{key}={value}: expected a {kind} of at least {smallest:g}")
        optimizers = self.linear_optimizers if linear else self.optimizers
        for key, names in (("optimizer.name", optimizers), ("scheduler.name", self.schedulers)):
            if (name := OmegaConf.select(cfg, key)) is not None and name not in names:
                raise UsageError(f"{key}={name}: expected one of {', '.join(names)} in solo-learn {self.version}")
        if OmegaConf.select(cfg, "scheduler.name") == "step":
            steps = OmegaConf.select(cfg, "scheduler.lr_decay_steps")
            if not (isinstance(steps, ListConfig) and all(isinstance(step, int) and step > 0 for step in steps)):
                raise UsageError(
                    f"scheduler.name=step with scheduler.lr_decay_steps={steps}: expected epochs, as in [60,80]"
                )
        if (interval := OmegaConf.select(cfg, "scheduler.interval")) not in (None, "step", "epoch"):
            raise UsageError(f"scheduler.interval={interval}: expected step or epoch")
        self._check_optimizer(cfg)

    def _check_optimizer(self, cfg: DictConfig) -> None:
        kwargs = OmegaConf.select(cfg, "optimizer.kwargs")
        name = OmegaConf.select(cfg, "optimizer.name")
        if not kwargs or name is None:
            return
        if not isinstance(kwargs, DictConfig):
            raise UsageError(f"optimizer.kwargs={kwargs}: expected settings of {name} by name")
        makers = self.optimizer_makers()
        keys = {
            own: set(inspect.signature(maker).parameters) - {"params", "lr", "weight_decay"}
            for own, maker in makers.items()
        }
        foreign = [str(key) for key in kwargs if key not in keys[name]]
        if unknown := [key for key in foreign if not any(key in others for others in keys.values())]:
            raise UsageError(
                f"optimizer.kwargs: {', '.join(unknown)} is no setting of {name}: expected some of "
                f"{', '.join(sorted(keys[name]))}"
            )
        if foreign:
            rank_zero_warn(f"optimizer.kwargs of another optimizer than {name} are left out: {', '.join(foreign)}")
            cfg.optimizer.kwargs = {key: value for key, value in kwargs.items() if key not in foreign}
        try:  # the optimizer checks its own settings: ask it once
            makers[name]([torch.nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.0, **plain(cfg.optimizer.kwargs))
        except (TypeError, ValueError) as error:
            raise UsageError(f"optimizer.kwargs of {name}: {error}") from error

    @abstractmethod
    def complete(self, cfg: DictConfig, images: RunImages) -> DictConfig:
        """Every default filled in and checked, learning rates scaled by batch size and devices.

        Args:
            cfg: as the user wrote it, ``devices`` being a list. Not changed.
            images: that it names.
        """

    @abstractmethod
    def constructor_kwargs(self, cfg: DictConfig) -> dict[str, Any]:
        """What the class of ``cfg.method`` (and its ``load_from_checkpoint``) takes; ``cfg`` is complete."""

    def build(self, cfg: DictConfig) -> LightningModule:
        """The method ``cfg.method``, freshly initialised, with what goes wrong in the suite's mended.

        Args:
            cfg: complete.

        Raises:
            UsageError: the method's class takes no such ``method_kwargs``, backbone or momentum.
        """
        allow_few_classes(importlib.import_module("solo.methods.base"))  # of the momentum classifier
        method = mended(self.methods()[cfg.method])
        try:
            model: Any = method(**self.constructor_kwargs(cfg))
        except UsageError:
            raise
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{cfg.method} of solo-learn {self.version} cannot be built ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'its own check'}): look at method_kwargs, backbone.kwargs "
                "and momentum"
            ) from error
        if cfg.data.no_labels:
            model.without_labels()
        if cfg.data.val_path is None:
            model.knn_eval = False  # it would keep the features of every step, and never be asked
        self._finish(model, cfg)
        return model

    @abstractmethod
    def _finish(self, model: Any, cfg: DictConfig) -> None:
        """What this generation's class does not take from ``cfg``."""

    @abstractmethod
    def backbone(self, model: LightningModule) -> nn.Module:
        """The frozen or training backbone inside a method: images to features."""

    # -- data ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def train_loader(self, cfg: DictConfig, images: RunImages) -> DataLoader:
        """Batches of (indices, views, labels), shuffled, the last incomplete batch dropped."""

    @abstractmethod
    def view_transform(self, cfg: DictConfig, view: DictConfig) -> Callable[[Any], torch.Tensor]:
        """What makes one random view of an image, by an entry of ``augmentations``; mean and std of a known dataset."""

    def evaluation_datasets(
        self, cfg: DictConfig, images: RunImages, transform: Any = None
    ) -> tuple[Dataset, Dataset | None]:
        """Train and validation images, both shown by ``transform``, by default :meth:`evaluation_transform`.

        Training images are all that are listed, those held out of training among them.

        Without labels each has the label -1 and ``classes`` is empty. Without ``data.val_path`` there are no second ones.
        """
        transform = transform or self.evaluation_transform(cfg)
        with reading_folders(self.evaluation_module(), images.listed, images.val):
            train, val = self._prepare_evaluation(cfg, cfg.data.val_path or cfg.data.train_path, transform)
        return train, val if cfg.data.val_path is not None else None

    @abstractmethod
    def evaluation_module(self) -> ModuleType:
        """The suite's module with the datasets of its evaluation."""

    @abstractmethod
    def _prepare_evaluation(self, cfg: DictConfig, val_path: str, transform: Any) -> tuple[Dataset, Dataset]:
        """The suite's own ``prepare_datasets`` of its evaluation."""

    @abstractmethod
    def suite_evaluation_transform(self, dataset: str) -> Any:
        """The suite's validation transform of a dataset it knows by name."""

    def evaluation_transform(self, cfg: DictConfig) -> Any:
        """Validation images as the suite shows them, at the size that the backbone was trained on.

        Both generations validate a ``custom`` folder at 224 pixels whatever it was trained at, and leave the function
        to be rewritten by the user. Here such a folder is shown at its training ``crop_size``, mean and std.
        """
        if cfg.data.dataset != "custom":
            return self.suite_evaluation_transform(cfg.data.dataset)
        view = cfg.augmentations[0]
        size = view.crop_size
        return transforms.Compose(
            [
                transforms.Resize(size if size <= _LARGEST_UNCROPPED else size * 256 // 224),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(view.get("mean", IMAGENET_MEAN), view.get("std", IMAGENET_STD)),
            ]
        )

    def evaluation_loaders(self, cfg: DictConfig, images: RunImages) -> tuple[DataLoader, DataLoader | None]:
        """All train and validation images in order: the suite's own loaders shuffle and drop the last batch."""
        train, val = (
            None
            if dataset is None
            else DataLoader(
                dataset,
                batch_size=cfg.optimizer.batch_size,
                num_workers=cfg.data.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
            for dataset in self.evaluation_datasets(cfg, images)
        )
        assert train is not None
        return train, val

    # -- callbacks and evaluation -------------------------------------------------------------------------------

    @abstractmethod
    def checkpointer(self, cfg: DictConfig) -> Callback:
        """The suite's Checkpointer, writing ``<checkpoint.dir>/<method>/<version>/{args.json,*.ckpt}``."""

    @abstractmethod
    def auto_umap(self, cfg: DictConfig) -> Callback:
        """The suite's AutoUMAP callback."""

    @abstractmethod
    def knn_classifier(self, k: int, temperature: float, distance: str) -> Any:
        """The suite's WeightedKNNClassifier; ``distance`` is ``cosine`` or ``euclidean``."""

    @abstractmethod
    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        """Like :meth:`complete`, for the schema of linear evaluation."""

    @abstractmethod
    def linear_model(self, backbone: nn.Module, cfg: DictConfig) -> LightningModule:
        """The suite's LinearModel on a frozen backbone; ``cfg`` is complete in the schema of linear evaluation."""


def put_into(methods: dict[str, Any], emim: type) -> None:
    """Add EMIM and the methods of other packages to a generation's METHODS, which is changed in place.

    A method that cannot be had is warned of: who does not ask for it can work on.
    """
    methods["emim"] = emim
    for name, method in _methods_of_other_packages().items():
        if methods.setdefault(name, method) is not method:
            warnings.warn(
                f"method '{name}' of {method.__module__} is left out: there is one of that name already; give it another",
                stacklevel=1,
            )


@cache
def _methods_of_other_packages() -> dict[str, type]:
    """Name to class; each module is imported here, solo-learn being loaded by now."""
    found: dict[str, type] = {}
    for entry_point in metadata.entry_points(group=PLUGINS):
        try:
            found[entry_point.name] = entry_point.load()
        except Exception as error:  # whatever the module of another package may raise
            warnings.warn(
                f"method '{entry_point.name}' is not available: {entry_point.value} cannot be imported "
                f"({type(error).__name__}: {error})",
                stacklevel=1,
            )
    return found


def plain(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    """The config as dicts and lists, interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def open_copy(cfg: DictConfig) -> DictConfig:
    """A copy that takes new keys: completing a config writes defaults into it."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    return cfg


def count_classes(cfg: DictConfig, listed: Images | None) -> DictConfig:
    """Set ``data.num_classes`` of a ``custom`` folder to the classes that are listed: the suite counts every folder."""
    if cfg.data.dataset == "custom":
        cfg.data.num_classes = max(1, len(listed.classes)) if listed is not None else 1
    return cfg


def allow_few_classes(module: ModuleType) -> None:
    """Let a module of the suite that hard-wires top-5 accuracy run on fewer than five classes."""
    accuracy_at_k = module.accuracy_at_k
    if getattr(accuracy_at_k, "few_classes", False):
        return

    def clamped(outputs: torch.Tensor, targets: torch.Tensor, top_k: Sequence[int] = (1, 5)) -> Sequence[torch.Tensor]:
        return accuracy_at_k(outputs, targets, top_k=[min(k, outputs.size(1)) for k in top_k])

    clamped.few_classes = True  # type: ignore[attr-defined]
    module.accuracy_at_k = clamped  # type: ignore[attr-defined]


def give_small_image_stem(backbone: nn.Module) -> None:
    """Replace a ResNet's ImageNet stem in place by the one that the suite gives to CIFAR: 3x3, stride 1, no max-pool.

    Raises:
        UsageError: the backbone is not a torchvision ResNet.
    """
    if not (hasattr(backbone, "conv1") and hasattr(backbone, "maxpool")):
        raise UsageError(
            f"backbone.small_image_stem is for ResNets, got {type(backbone).__name__}: leave it out, "
            "and set a smaller patch size through backbone.kwargs where the backbone has one"
        )
    backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    backbone.maxpool = nn.Identity()
