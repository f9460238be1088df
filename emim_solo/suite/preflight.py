"""What does one method require of a config that others do not? solo-learn fails later, by an assertion or NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError

_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 105_000}
_ALL4ONE_HEADS, _ALL4ONE_NEIGHBOURS = 8, 5  # fixed in solo-learn


class _Run(NamedTuple):
    """Input of a check: ``kwargs`` are the method's, complete; ``global_batch`` is the number of images in one step."""

    cfg: DictConfig
    kwargs: dict[str, Any]
    batch: int
    processes: int
    images: int

    @property
    def global_batch(self) -> int:
        return self.batch * self.processes


def check_method(cfg: DictConfig, images: int | None) -> None:
    """Refuse a complete config with which its method cannot train on so many images; None if they are not listed."""
    kwargs: Any = OmegaConf.to_container(cfg.method_kwargs, resolve=True)
    if images is None:
        images = _IMAGES.get(cfg.data.dataset, 0)  # 0: not known, such as for an HDF5 file
    images = int(images * cfg.data.fraction) if cfg.data.fraction > 0 else images
    run = _Run(cfg, kwargs, cfg.optimizer.batch_size, compare.processes(cfg), images)
    checks = [_momentum, _whole_batches_in_queue, *([_CHECKS[cfg.method]] if cfg.method in _CHECKS else [])]
    if unmet := [sentence for check in checks for sentence in check(run)]:
        raise UsageError("method", f"{cfg.method} needs {'; '.join(unmet)}")


def check_numbers(kwargs: Mapping[str, Any]) -> None:
    """Check the ``method_kwargs`` of a method of solo-learn, which declares no types: all are numbers."""
    for name, value in kwargs.items():
        values = value if name == "num_prototypes" and isinstance(value, list) else [value]
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in values):
            key = f"method_kwargs.{name}"
            raise UsageError(key, f"{key}={str(value)[:80]}: expected a finite number, or True or False for a switch")


def _momentum(run: _Run) -> Iterator[str]:
    base, final = (OmegaConf.select(run.cfg, f"momentum.{name}") for name in ("base_tau", "final_tau"))
    if base is not None and final is not None and not 0 <= base <= final <= 1:
        yield f"0 <= momentum.base_tau <= momentum.final_tau <= 1, got {base} and {final}"


def _whole_batches_in_queue(run: _Run) -> Iterator[str]:
    size = run.kwargs.get("queue_size")
    if size is not None and run.cfg.method != "swav" and (size < 1 or size % run.global_batch):
        queue = f"method_kwargs.queue_size={size} is no multiple of the {run.global_batch} images of a step"
        yield f"a queue of whole batches: {queue}; set it to {max(1, size // run.global_batch) * run.global_batch}"


def _swav(run: _Run) -> Iterator[str]:
    size = run.kwargs["queue_size"]
    if size and size // run.processes < run.batch:
        queue = f"method_kwargs.queue_size={size} is less than {run.global_batch} images"
        yield f"a queue of one batch at least: {queue}; set it to {run.global_batch} or more, or to 0 for none"


def _all4one(run: _Run) -> Iterator[str]:
    width = run.kwargs["proj_output_dim"]
    if width % _ALL4ONE_HEADS:
        yield f"method_kwargs.proj_output_dim in multiples of {_ALL4ONE_HEADS}, its attention heads, got {width}"
    if run.kwargs["queue_size"] < _ALL4ONE_NEIGHBOURS:
        yield f"method_kwargs.queue_size of {_ALL4ONE_NEIGHBOURS} or more, its neighbours, got {run.kwargs['queue_size']}"


def _dino(run: _Run) -> Iterator[str]:
    warm_up, epochs = run.kwargs["warmup_teacher_temperature_epochs"], run.cfg.max_epochs
    if warm_up > epochs:
        warm_up = f"method_kwargs.warmup_teacher_temperature_epochs={warm_up}"
        yield f"max_epochs of at least {warm_up}, got {epochs}: set the latter to {epochs} or less (main has 0)"


def _wmse(run: _Run) -> Iterator[str]:
    size, width = run.kwargs["whitening_size"], run.kwargs["proj_output_dim"]
    if size < 1 or run.batch % size:
        fitting = max(each for each in range(1, run.batch + 1) if not run.batch % each and each <= max(size, 1))
        sizes = f"method_kwargs.whitening_size={size} to divide optimizer.batch_size={run.batch}"
        yield f"{sizes}: set whitening_size to {fitting} or another divisor"
        size = fitting
    if not run.kwargs["whitening_eps"] and width >= size:
        dimensions = f"set method_kwargs.proj_output_dim={width} below whitening_size={size} (half of it, say)"
        yield f"more images to whiten than dimensions: {dimensions}, or whitening_eps above 0"


def _deepclusterv2(run: _Run) -> Iterator[str]:
    prototypes = run.kwargs["num_prototypes"]
    kept = run.images // run.global_batch * run.batch
    if not isinstance(prototypes, list) or len(set(prototypes)) != 1:  # their scores are stacked
        yield f"method_kwargs.num_prototypes as a list of one number, such as [100,100,100], got {prototypes}"
    elif run.cfg.data.format == "dali":
        yield "the index of every image, which DALI does not give: set data.format=image_folder"
    elif 0 < kept < max(prototypes):
        memory = f"its memory holds {kept} of {run.images} training images on a process"
        text = f"as many images as prototypes: method_kwargs.num_prototypes={prototypes}, but {memory}"
        yield f"{text}; set it to numbers up to {kept}"


def _mae(run: _Run) -> Iterator[str]:
    if "vit" not in run.cfg.backbone.name:
        yield f"a ViT: set backbone.name=vit_tiny, vit_small, vit_base or vit_large, got {run.cfg.backbone.name}"
    width, heads = run.kwargs["decoder_embed_dim"], run.kwargs["decoder_num_heads"]
    if width % 4 or width % heads:
        yield f"method_kwargs.decoder_embed_dim={width} in multiples of 4 and of decoder_num_heads={heads}"


def _labels(run: _Run) -> Iterator[str]:
    supervised = run.cfg.method == "supcon" or run.kwargs.get("supervised")
    if supervised and (run.cfg.data.no_labels or run.cfg.data.num_classes < 2):
        folders = "give data.train_path with class folders and leave data.no_labels out, or take simclr"
        yield f"labels of two classes or more, whose images it draws together: {folders}"


_CHECKS: dict[str, Callable[[_Run], Iterator[str]]] = {
    "all4one": _all4one,
    "deepclusterv2": _deepclusterv2,
    "dino": _dino,
    "mae": _mae,
    "simclr": _labels,
    "supcon": _labels,
    "swav": _swav,
    "wmse": _wmse,
}
