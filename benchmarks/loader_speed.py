"""Images per second of the suite's DALI loaders beside its torchvision loader: same images and augmentations, one run.

    python benchmarks/loader_speed.py [--folder TRAIN_FOLDER] [--images 512] [--workers 2] [--rounds 3]
    python benchmarks/loader_speed.py --crops 2 8 20 [--folder TRAIN_FOLDER] [--threads 1] [--rounds 3]

Two views of 224 pixels by the shipped pretrain/custom config. The loaders take turns, one epoch each in a round, after
one epoch each that is not counted; a rate is the median over rounds, a ratio is the median of the rounds' ratios. The
epoch is timed whole: torchvision's worker processes start anew for each one, as they do in training.

With ``--crops``: crops of one process in a second of the processor's time, which a busy machine changes less than the clock. By
the shipped pretrain/custom emim_patches, with patches of 16 pixels (two are of 32) of the digits or of a folder, decoding
included: the suite's augmentation by PIL, torchvision's v2 of the same settings on tensors, kornia's on batches and DALI's on
the CPU where they are installed. Beside them the training step of a ResNet-18 with the small-image stem, at the precision that
``auto`` is here, and what PIL takes of it without a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from emim_solo.benchmark import cost
from emim_solo.ground import configs
from emim_solo.images.embedded import write_images
from emim_solo.images.folders import Images, RunImages, find_images, load_rgb
from emim_solo.suite import dali, load_suite
from emim_solo.suite import views as forwards
from emim_solo.suite.api import open_copy
from emim_solo.training.run import Run, prepare

CLASSES = 2


def write_jpegs(folder: Path, images: int) -> Path:
    """Write JPEGs of ImageNet's usual size: random crops of the two photographs in scikit-learn."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    for index in range(images):
        photograph = photographs[index % CLASSES]
        top, left = (int(generator.integers(0, size)) for size in (427 - 375, 640 - 500))
        path = folder / str(index % CLASSES) / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=90)
    return folder


def config(images: RunImages, folder: Path, workers: int, batch: int, **dali_keys: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(configs.find("pretrain/custom")), version_base="1.2"):
        cfg = compose("emim", overrides=[f"data.train_path={folder}", f"data.num_workers={workers}"])
    OmegaConf.set_struct(cfg, False)
    cfg.optimizer.batch_size = batch
    cfg.devices, cfg.num_nodes = [0], 1
    if dali_keys:
        cfg.data.format, cfg.dali = "dali", dali_keys
    return load_suite().complete(cfg, images)


def dali_loader(cfg: DictConfig, images: Images) -> Iterable[Any]:
    module = load_suite().dali_datamodule(cfg, images)
    module.trainer = Trainer(devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.setup("fit")
    return module.train_dataloader()


def epoch(loader: Iterable[Any]) -> float:
    """Images per second of one epoch. The views of an image count once."""
    images, started = 0, time.perf_counter()
    for _, views, _ in loader:
        images += len(views[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


# -- crops of small images ------------------------------------------------------------------------------------------

BATCH = 64
BATCHES = 4  # per round


def patches(folder: Path, crops: int, *more: str) -> Run:
    """The shipped pretrain/custom emim_patches on a folder of small images, with more overrides."""
    size = 32 if crops == 2 else 16
    overrides = [f"data.train_path={folder}", "data.num_workers=0", "data.image_size=32", "+num_sanity_val_steps=0"]
    overrides += [f"augmentations.0.crop_size={size}", f"augmentations.0.num_crops={crops}", "accelerator=cpu"]
    overrides += ["+backbone.small_image_stem=True", f"optimizer.batch_size={BATCH}", "checkpoint.enabled=False"]
    with initialize_config_dir(config_dir=str(configs.find("pretrain/custom")), version_base="1.2"):
        return prepare(compose("emim_patches", overrides=[*overrides, *more]))


def by_v2(view: DictConfig) -> v2.Transform:
    """Solo-learn's pipeline in torchvision's tensor transforms: same probabilities, other interpolation and blur."""
    jitter = view.color_jitter
    return v2.Compose(
        [
            v2.RandomResizedCrop(view.crop_size, (view.rrc.crop_min_scale, view.rrc.crop_max_scale), antialias=True),
            v2.RandomApply([v2.ColorJitter(*(jitter[name] for name in JITTER))], jitter.prob),
            v2.RandomGrayscale(view.grayscale.prob),
            v2.RandomApply([v2.GaussianBlur(5)], view.gaussian_blur.prob),
            v2.RandomSolarize(128, view.solarization.prob),
            v2.RandomHorizontalFlip(view.horizontal_flip.prob),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )


JITTER = ("brightness", "contrast", "saturation", "hue")


def by_kornia(view: DictConfig) -> Any:
    import kornia.augmentation as kornia  # not a dependency

    jitter, size = view.color_jitter, (view.crop_size, view.crop_size)
    return kornia.AugmentationSequential(
        kornia.RandomResizedCrop(size, (view.rrc.crop_min_scale, view.rrc.crop_max_scale)),
        kornia.ColorJitter(*(jitter[name] for name in JITTER), p=jitter.prob),
        kornia.RandomGrayscale(p=view.grayscale.prob),
        kornia.RandomGaussianBlur((5, 5), (0.1, 2.0), p=view.gaussian_blur.prob),
        kornia.RandomSolarize(p=view.solarization.prob),
        kornia.RandomHorizontalFlip(p=view.horizontal_flip.prob),
        kornia.Normalize([0.5] * 3, [0.25] * 3),
    )


def loaders_of_patches(run: Run) -> dict[str, Iterable[Any]]:
    """Functions by name that yield batches of a run's views in this process."""
    suite, (view, *_), images = load_suite(), run.config.augmentations, run.images.train
    assert images is not None
    tensors = v2.PILToTensor()

    def batches(several: Any) -> Iterable[list[torch.Tensor]]:
        for start in range(0, len(images), BATCH):
            yield several([tensors(load_rgb(path)) for path in images.paths[start : start + BATCH]])

    one = by_v2(view)
    loaders: dict[str, Any] = {
        "PIL": lambda: (crops for _, crops, _ in suite.train_loader(run.config, run.images)),
        "v2": lambda: batches(lambda x: [torch.stack([one(image) for image in x]) for _ in range(view.num_crops)]),
    }
    if importlib.util.find_spec("kornia") is not None:
        batched = by_kornia(view)
        loaders["kornia"] = lambda: batches(lambda x: [batched(torch.stack(x) / 255) for _ in range(view.num_crops)])
    if dali.is_installed():
        cfg = open_copy(run.config)
        cfg.data.format, cfg.dali = "dali", {"device": "cpu"}
        loader = dali_loader(dali.complete_dali(cfg), images)
        loaders["DALI"] = lambda: (crops for _, crops, _ in loader)
    return loaders


def crops_per_second(batches: Iterable[Any]) -> float:
    crops, started = 0, time.process_time()
    for batch in itertools.islice(batches, BATCHES):
        crops += sum(len(view) for view in batch)
    return crops / (time.process_time() - started)


def compare_crops(folder: Path, numbers: list[int], rounds: int) -> None:
    cost._now = time.process_time  # CPU time, as for the crops
    for crops in numbers:
        run = patches(folder, crops)
        loaders = loaders_of_patches(run)
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds + 1):  # the first round is a warm-up
            for name, loader in loaders.items():
                rates[name].append(crops_per_second(loader()))
        median = {name: statistics.median(values[1:]) for name, values in rates.items()}
        size, precision = run.config.augmentations[0].crop_size, run.config.precision
        print(f"{crops} crops of {size} pixels: " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in median.items()))
        shipped, steps = forwards.FEWEST, {2: [], crops + 1: []}  # from so many views on, one forward takes all
        for _ in range(rounds):
            for forwards.FEWEST, seconds in steps.items():
                seconds.append(cost.measure(run).metrics["step_seconds"])
        together, alone = (statistics.median(seconds) for seconds in steps.values())
        forwards.FEWEST = shipped
        print(
            f"  a step of {BATCH} images in {precision}: {1000 * together:.0f} ms, {1000 * alone:.0f} with a forward for each "
            f"view; PIL is {100 * BATCH * crops / median['PIL'] / together:.1f} % of it",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="class folders of images; without it, JPEGs are written")
    parser.add_argument("--images", type=int, default=512, help="how many to write without --folder")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes, DALI's threads")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crops", type=int, nargs="+", help="of small images, instead of two views of 224 pixels")
    parser.add_argument("--threads", type=int, default=1, help="of torch, with --crops")
    arguments = parser.parse_args()
    if arguments.crops:
        torch.set_num_threads(arguments.threads)
        with tempfile.TemporaryDirectory() as temporary:
            compare_crops(
                arguments.folder or write_images("digits", temporary) / "train", arguments.crops, arguments.rounds
            )
        return
    if not dali.is_installed():
        parser.exit(2, "NVIDIA DALI is not installed: pip install 'emim-solo[dali]'\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or write_jpegs(Path(temporary), arguments.images)
        sizes = {"workers": arguments.workers, "batch": arguments.batch}
        suite, listed = load_suite(), find_images(folder, labelled=True)
        images = RunImages(listed)
        cfg = config(images, folder, **sizes)
        loaders: dict[str, Iterable[Any]] = {"torchvision": suite.train_loader(cfg, images)}
        for device in ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",):
            loaders[f"DALI {device}"] = dali_loader(config(images, folder, **sizes, device=device), listed)

        for loader in loaders.values():
            epoch(loader)
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(arguments.rounds):
            for name, loader in loaders.items():
                rates[name].append(epoch(loader))

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"solo-learn {suite.version}, {os.cpu_count()} cores, {device}, {sizes}, {arguments.rounds} rounds")
    print(f"{'loader':<12} {'images/s':>9} {'range':>15} {'x torchvision':>14}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["torchvision"], strict=True))
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{name:<12} {statistics.median(values):>9.0f} {spread:>15} {ratio:>14.2f}")


if __name__ == "__main__":
    main()
