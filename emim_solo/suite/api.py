"""What can the rest of the package ask of solo-learn, whichever generation is installed?"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle
from torchvision import transforms

from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Images, RunImages
from emim_solo.suite import dali
from emim_solo.suite.fixes import knn_of_all_classes, with_fixes
from emim_solo.suite.loaders import listed_as_os, reading_folders
from emim_solo.suite.plugins import add_methods, methods_of_other_packages
from emim_solo.suite.preflight import check_method

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# solo-learn's evaluation does not crop images up to STL-10's 96 pixels, and crops 224 out of 256 on ImageNet.
_LARGEST_UNCROPPED = 96


class Suite(ABC):
    """Models, data and callbacks of one generation of solo-learn, configured by the YAML schema of solo-learn main."""

    generation: ClassVar[str]
    emim_class: ClassVar[type[LightningModule]]  # EMIM on this generation's base method
    evaluation_module: ClassVar[str]  # solo-learn's module with the evaluation datasets
    evaluation_folders: ClassVar[tuple[str, str]]  # its arguments that say where training and validation images are
    backbone_names: ClassVar[dict[str, str]] = {"main": "backbone", "1.0.2": "encoder"}
    optimizers: ClassVar[Mapping[str, Callable[..., Any]]]  # take params, lr, weight_decay and optimizer.kwargs
    linear_optimizers: ClassVar[tuple[str, ...]] = ("sgd", "lars", "adam", "adamw")
    any_number_of_views: ClassVar[tuple[str, ...]]  # solo-learn's methods whose loss takes 3 or more of one size
    schedulers: ClassVar[tuple[str, ...]] = ("warmup_cosine", "step", "none")

    def __init__(self, version: str) -> None:
        self.version = version

    @property
    def identity(self) -> dict[str, str]:
        """Generation and version, for the rows of results."""
        return {"generation": self.generation, "version": self.version}

    @property
    def backbone_name(self) -> str:
        """Prefix of the backbone's weights in a checkpoint of this generation."""
        return self.backbone_names[self.generation]

    # -- methods ------------------------------------------------------------------------------------------------

    @property
    def METHODS(self) -> dict[str, Any]:
        """solo-learn's own dictionary, which may be changed in place."""
        return importlib.import_module("solo.methods").METHODS

    def methods(self) -> dict[str, Any]:
        """Name and class of every pretraining method, including EMIM and the methods of other packages."""
        add_methods(self.METHODS, self.emim_class)
        return {name: method for name, method in self.METHODS.items() if name not in ("base", "linear")}

    def method(self, name: str) -> Any:
        """The class of a pretraining method.

        Raises:
            UsageError: there is no such method, or the one of another package is not available, with the reason.
        """
        methods = self.methods()
        if name in methods:
            return methods[name]
        other = methods_of_other_packages(self.METHODS["base"]).get(name)
        if isinstance(other, UsageError):
            raise other
        raise UsageError(
            "method", f"unknown method '{name}': solo-learn {self.version} has {', '.join(sorted(methods))}"
        )

    def takes_many_views(self, method: str) -> bool:
        """Whether a method's loss takes more than two views of one size; other classes declare ``takes_many_views``."""
        return method in self.any_number_of_views or getattr(self.methods()[method], "takes_many_views", False)

    def prepares_epochs(self, method: str) -> bool:
        """Whether a method has its own work at the start of each epoch (DINO's schedule, DeepClusterV2's k-means)."""
        classes = self.methods()[method].__mro__
        theirs = [each for each in classes if not each.__module__.startswith(("lightning.", "emim_solo.suite."))]
        return any("on_train_epoch_start" in vars(each) for each in theirs)

    @abstractmethod
    def uses_small_crops(self, method: str) -> bool:
        """Whether a method's loss takes crops of a smaller ``crop_size`` (multi-crop)."""

    def check_values(self, cfg: DictConfig, *, linear: bool = False) -> None:
        """Check names and settings that only solo-learn knows: those of its optimizers and schedulers.

        Keys of ``optimizer.kwargs`` that belong to another optimizer are dropped from ``cfg``, with a warning. They are
        left over if ``optimizer.name`` was changed in an existing config.

        Args:
            cfg: in the schema of pretraining or of linear evaluation; its values have the schema's types.
            linear: whether the schema is that of linear evaluation.

        Raises:
            UsageError: solo-learn has no such optimizer or scheduler, or it does not take its settings.
        """
        optimizers = self.linear_optimizers if linear else self.optimizers
        for key, names in (("optimizer.name", optimizers), ("scheduler.name", self.schedulers)):
            if (name := OmegaConf.select(cfg, key)) is not None and name not in names:
                raise UsageError(key, f"{key}={name}: expected one of {', '.join(names)} in solo-learn {self.version}")
        if OmegaConf.select(cfg, "scheduler.name") == "step" and cfg.scheduler.get("lr_decay_steps") is None:
            key = "scheduler.lr_decay_steps"
            raise UsageError(key, f"scheduler.name=step without {key}: expected epochs, as in [60,80]")
        if kwargs := OmegaConf.select(cfg, "optimizer.kwargs"):
            cfg.optimizer.kwargs = self._kwargs_of_optimizer(cfg.optimizer.name, as_dict(kwargs))

    def _kwargs_of_optimizer(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        key = "optimizer.kwargs"
        known = {
            optimizer: inspect.signature(maker).parameters.keys() - {"params", "lr", "weight_decay"}
            for optimizer, maker in self.optimizers.items()
        }
        others = [each for each in kwargs if each not in known[name]]
        if unknown := [each for each in others if not any(each in settings for settings in known.values())]:
            expected = ", ".join(sorted(known[name]))
            raise UsageError(key, f"{key}: {', '.join(unknown)} is no setting of {name}: expected some of {expected}")
        if others:
            rank_zero_warn(f"{key} of another optimizer than {name} are left out: {', '.join(others)}")
        kwargs = {each: value for each, value in kwargs.items() if each in known[name]}
        weight = nn.Parameter(torch.ones(1, 1))
        weight.grad = torch.ones_like(weight)  # LARS skips gradients of 0
        on_any_device = {each: value for each, value in kwargs.items() if each != "capturable"}  # GPU only
        with in_one_line(key, f"{key} of {name}"):  # one step, because the optimizer itself checks its settings
            self.optimizers[name]([weight], lr=0.1, weight_decay=0.0, **on_any_device).step()
        return kwargs

    def complete(self, cfg: DictConfig, images: RunImages) -> DictConfig:
        """The config with every default filled in and checked, and learning rates scaled by batch size and devices.

        Args:
            cfg: as the user wrote it, but ``devices`` is a list. Not changed.
            images: the images that ``cfg`` names.

        Raises:
            UsageError: the method has no such setting, or cannot train with these settings.
        """
        cfg = open_copy(cfg)
        if cfg.data.get("fraction") == 1:  # solo-learn has another number for all images, and an assertion against 1
            cfg.data.fraction = -1.0
        if cfg.data.get("format") == "dali":  # before solo-learn's own assertion, which has no message
            cfg = dali.complete_dali(cfg)
        with in_one_line("method_kwargs", f"config of {cfg.method} in solo-learn {self.version}"):
            cfg = self.count_classes(self._complete(cfg), images.listed)
            check_method(cfg, None if images.train is None else len(images.train))
        return cfg

    def count_classes(self, cfg: DictConfig, listed: Images | None) -> DictConfig:
        """Set ``data.num_classes``: solo-learn's number for its datasets, the listed classes of a ``custom`` folder."""
        count = len(listed.classes) if listed is not None else 0
        cfg.data.num_classes = self.classes_of_datasets().get(cfg.data.dataset, max(1, count))
        return cfg

    @abstractmethod
    def classes_of_datasets(self) -> Mapping[str, int]:
        """solo-learn's numbers of classes of its datasets. Of a ``custom`` folder it would count every folder."""

    @abstractmethod
    def _complete(self, cfg: DictConfig) -> DictConfig:
        """:meth:`complete`, as far as generations differ; ``cfg`` may be changed."""

    @abstractmethod
    def constructor_kwargs(self, cfg: DictConfig) -> dict[str, Any]:
        """Arguments of the class of ``cfg.method`` and of its ``load_from_checkpoint``; ``cfg`` is complete."""

    def build(self, cfg: DictConfig) -> LightningModule:
        """The method ``cfg.method``, freshly initialised, with :mod:`emim_solo.suite.fixes`.

        Args:
            cfg: complete.

        Raises:
            UsageError: the method's class does not take these ``method_kwargs``, backbone or momentum, or the backbone
                does not take images of this size.
        """
        allow_few_classes(importlib.import_module("solo.methods.base"))  # of the momentum classifier
        knn_of_all_classes()
        method = with_fixes(self.method(cfg.method))
        where = "look at method_kwargs, backbone.kwargs and momentum"
        with in_one_line("method", f"{cfg.method} of solo-learn {self.version} cannot be built", where):
            model: Any = method(**self.constructor_kwargs(cfg))
        if cfg.data.no_labels:
            model.without_labels()
        if cfg.data.val_path is None:
            model.knn_eval = False  # it would keep the features of every step and never use them
        self._finish(model, cfg)
        self._check_features(model, cfg)
        return model

    def _check_features(self, model: Any, cfg: DictConfig) -> None:
        """One forward of two black images of each size: a change by ``backbone.kwargs`` may not fit backbone or classifier."""
        backbone = self.backbone(model).eval()
        bfloat16_on_cpu = device_of(cfg).type == "cpu" and "bf16" in str(cfg.get("precision"))
        hooks = refuse_broken_gradients(backbone) if bfloat16_on_cpu else []
        sizes = {view.crop_size for view in cfg.augmentations} | {whole_size(cfg)}
        if cfg.data.dataset != "custom" and cfg.data.val_path is not None and not cfg.data.no_labels:
            sizes.add(self.evaluation_transform(cfg)(Image.new("RGB", (32, 32))).shape[-1])
        for size in sorted(sizes):
            what = f"backbone {cfg.backbone.name} on images of {size} pixels (crop_size, data.image_size)"
            with in_one_line("backbone.kwargs", what), torch.no_grad(), torch.random.fork_rng(devices=[]):
                features = backbone(torch.zeros(2, 3, size, size))
                if (shape := tuple(features.shape)) != (2, model.features_dim):
                    raise ValueError(f"its features have shape {shape}, expected {(2, model.features_dim)}")
        backbone.train()
        for hook in hooks:
            hook.remove()

    @abstractmethod
    def _finish(self, model: Any, cfg: DictConfig) -> None:
        """Apply the settings of ``cfg`` that this generation's class does not take."""

    def backbone(self, model: Any) -> nn.Module:
        """The backbone inside a method, which maps images to features."""
        return getattr(model, self.backbone_name)

    # -- data ---------------------------------------------------------------------------------------------------

    def train_loader(self, cfg: DictConfig, images: RunImages) -> DataLoader:
        """Shuffled batches of indices (B,), a list of views (B, 3, s, s) and labels (B,), without the last incomplete batch."""
        module, arguments = self._training_data(cfg)
        reason = f"data.fraction={cfg.data.fraction} of {cfg.data.dataset} in solo-learn {self.version}"
        explained = in_one_line("data.fraction", reason) if cfg.data.fraction > 0 else nullcontext()
        with explained, reading_folders(module, images.train):
            dataset = module.prepare_datasets(cfg.data.dataset, no_labels=cfg.data.no_labels, **arguments)
        return module.prepare_dataloader(dataset, cfg.optimizer.batch_size, cfg.data.num_workers)

    @abstractmethod
    def _training_data(self, cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
        """solo-learn's module of training images, and arguments of its ``prepare_datasets``."""

    @abstractmethod
    def view_transform(self, cfg: DictConfig, view: DictConfig) -> Callable[[Any], torch.Tensor]:
        """Makes one random view (3, s, s) of an image by an entry of ``augmentations``; a known dataset has its own mean and std."""

    def dali_datamodule(self, cfg: DictConfig, images: Images) -> LightningDataModule:
        """A data module with only solo-learn's DALI loader of training images.

        Batches are those of :meth:`train_loader`, but indices are placeholders unless ``dali.encode_indexes_into_labels``.

        Args:
            cfg: complete.
            images: to train on.

        Raises:
            UsageError: this generation lacks an augmentation, or DALI cannot read an image.
        """
        dali.check_training_images(images)
        return self._dali_datamodule(cfg, listed_as_os(images))

    @abstractmethod
    def _dali_datamodule(self, cfg: DictConfig, listing: Any) -> LightningDataModule:
        """:meth:`dali_datamodule` of this generation; its pipelines list folders by ``listing`` instead of ``os``."""

    def evaluation_datasets(
        self, cfg: DictConfig, images: RunImages, transform: Any = None
    ) -> tuple[Dataset, Dataset | None]:
        """Train and validation images, both transformed by ``transform``, by default :meth:`evaluation_transform`.

        Training images are all listed ones, including those held out of training.

        Unlabelled images have the label -1, and ``classes`` is empty. Without ``data.val_path`` the second is None.
        """
        transform = transform or self.evaluation_transform(cfg)
        module = importlib.import_module(self.evaluation_module)
        paths = (Path(path).absolute() for path in (cfg.data.train_path, cfg.data.val_path or cfg.data.train_path))
        arguments: dict[str, Any] = dict(zip(self.evaluation_folders, paths, strict=True))
        if cfg.data.format == "h5":
            arguments["data_format"] = "h5"
        with reading_folders(module, images.listed, images.val):
            train, val = module.prepare_datasets(cfg.data.dataset, transform, transform, **arguments)
        return train, val if cfg.data.val_path is not None else None

    def evaluation_transform(self, cfg: DictConfig) -> Any:
        """solo-learn's transform of validation images, at the size that the backbone was trained on.

        Both generations validate a ``custom`` folder at 224 pixels, whatever it was trained at; users are to rewrite that
        function. Here such a folder has its :func:`whole_size` and the mean and std of training. So has any dataset that is shown
        to a network of another library.
        """
        if cfg.data.dataset != "custom" and cfg.method in self.methods():
            return importlib.import_module(self.evaluation_module).prepare_transforms(cfg.data.dataset)[1]
        view = cfg.augmentations[0]
        size = whole_size(cfg)
        return transforms.Compose(
            [
                transforms.Resize(size if size <= _LARGEST_UNCROPPED else size * 256 // 224),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(view.get("mean", IMAGENET_MEAN), view.get("std", IMAGENET_STD)),
            ]
        )

    def evaluation_loaders(self, cfg: DictConfig, images: RunImages) -> tuple[DataLoader, DataLoader | None]:
        """All train and validation images in order; solo-learn's own loaders shuffle and drop the last batch."""
        train, val = self.evaluation_datasets(cfg, images)
        load = partial(
            DataLoader,
            batch_size=cfg.optimizer.batch_size,
            num_workers=cfg.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return load(train), None if val is None else load(val)

    # -- callbacks and evaluation -------------------------------------------------------------------------------

    @abstractmethod
    def checkpointer(self, cfg: DictConfig) -> Callback:
        """solo-learn's Checkpointer; it writes ``<checkpoint.dir>/<method>/<version>/{args.json,*.ckpt}``."""

    def auto_umap(self, cfg: DictConfig) -> Callback:
        """solo-learn's AutoUMAP callback. With 1.0.2, completing a config refuses it.

        Raises:
            UsageError: umap-learn is not installed.
        """
        with in_one_line("auto_umap.enabled", "auto_umap.enabled", "pip install 'emim-solo[umap]'"):
            callback = importlib.import_module("solo.utils.auto_umap").AutoUMAP
        place = Path(cfg.auto_umap.dir) / cfg.method
        return callback(cfg.name, logdir=place, frequency=cfg.auto_umap.frequency)

    @abstractmethod
    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        """Like :meth:`complete`, for the schema of linear evaluation."""

    @abstractmethod
    def linear_model(self, backbone: nn.Module, cfg: DictConfig) -> LightningModule:
        """solo-learn's LinearModel on a frozen backbone; ``cfg`` is complete in the schema of linear evaluation."""


@contextmanager
def in_one_line(key: str, what: str, to_do: str = "") -> Iterator[None]:
    """Within it, an exception of solo-learn or a library about a user's settings becomes a UsageError.

    Args:
        key: of the error.
        what: beginning of the message: what was tried.
        to_do: end of the message: what the user can do.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # an assertion, or anything that an odd value causes inside a library
        lines = str(error).strip().splitlines() or ["no message"]
        raise UsageError(
            key, f"{what} ({type(error).__name__}: {lines[0]})" + (f": {to_do}" if to_do else "")
        ) from error


def as_dict(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    """The config as dicts and lists, with interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def open_copy(cfg: DictConfig) -> DictConfig:
    """A copy that accepts new keys, since completing a config writes defaults into it."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    return cfg


def device_of(cfg: DictConfig) -> torch.device:
    """The first GPU, if there is one and the run may use it; else the CPU."""
    on_gpu = torch.cuda.is_available() and cfg.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if on_gpu else "cpu")


def whole_size(cfg: DictConfig) -> int:
    """Side of a whole image in pixels: ``data.image_size`` if views are patches of it, else the first ``crop_size``."""
    return int(cfg.data.get("image_size") or cfg.augmentations[0].crop_size)


def allow_few_classes(module: ModuleType) -> None:
    """Let a module of solo-learn that always computes top-5 accuracy run with fewer than five classes."""
    accuracy_at_k = module.accuracy_at_k
    if getattr(accuracy_at_k, "few_classes", False):
        return

    def clamped(outputs: torch.Tensor, targets: torch.Tensor, top_k: Sequence[int] = (1, 5)) -> Sequence[torch.Tensor]:
        return accuracy_at_k(outputs, targets, top_k=[min(k, outputs.size(1)) for k in top_k])

    clamped.few_classes = True  # type: ignore[attr-defined]
    module.accuracy_at_k = clamped  # type: ignore[attr-defined]


def refuse_broken_gradients(backbone: nn.Module) -> list[RemovableHandle]:
    """Make a network's forward raise if a gradient would be wrong in bfloat16 on a CPU; call it before such a training.

    For a strided 3x3 convolution on a single pixel torch 2.14 (oneDNN) leaves the weights' gradient uninitialised there.

    Raises:
        UsageError: in the forward.
    """

    def check(name: str, images: Tensor, conv: nn.Conv2d) -> None:
        if conv.stride[0] > 1 and conv.kernel_size[0] > 1 and images.shape[-2:] == (1, 1):
            raise UsageError(
                "precision",
                f"precision: a crop is a single pixel before the backbone's {name}; in bfloat16 on a CPU torch then computes "
                "a wrong gradient: set precision=32, backbone.small_image_stem=True or a larger crop_size",
            )

    convs = ((name, part) for name, part in backbone.named_modules() if isinstance(part, nn.Conv2d))
    return [
        conv.register_forward_pre_hook(lambda conv, images, name=name: check(name, images[0], conv))
        for name, conv in convs
    ]


def give_small_image_stem(backbone: nn.Module) -> None:
    """Replace a ResNet's ImageNet stem in place by solo-learn's stem for CIFAR: 3x3, stride 1, no max-pool.

    Raises:
        UsageError: the backbone is not a torchvision ResNet.
    """
    if not (hasattr(backbone, "conv1") and hasattr(backbone, "maxpool")):
        raise UsageError(
            "backbone.small_image_stem",
            f"backbone.small_image_stem is for ResNets, got {type(backbone).__name__}: leave it out, "
            "and set a smaller patch size through backbone.kwargs if the backbone has one",
        )
    backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    backbone.maxpool = nn.Identity()
