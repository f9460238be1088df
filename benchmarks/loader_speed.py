"""Images per second of the suite's DALI loaders beside its torchvision loader: same images and augmentations, one run.

    python benchmarks/loader_speed.py [--folder TRAIN_FOLDER] [--images 512] [--workers 2] [--rounds 3]

Two views of 224 pixels by the shipped pretrain/custom config. The loaders take turns, one epoch each in a round, after
one epoch each that is not counted; a rate is the median over rounds, a ratio is the median of the rounds' ratios. The
epoch is timed whole: torchvision's worker processes start anew for each one, as they do in training.
"""

from __future__ import annotations

import argparse
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

from emim_solo.ground import configs
from emim_solo.images.folders import Images, RunImages, find_images
from emim_solo.suite import dali, load_suite

CLASSES = 2


def write_jpegs(folder: Path, images: int) -> Path:
    """JPEGs of ImageNet's usual size, cut at random from the two photographs that scikit-learn carries."""
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
    """Images per second of one epoch; views are counted once."""
    images, started = 0, time.perf_counter()
    for _, views, _ in loader:
        images += len(views[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="class folders of images; without it, JPEGs are written")
    parser.add_argument("--images", type=int, default=512, help="how many to write without --folder")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes, DALI's threads")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
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
