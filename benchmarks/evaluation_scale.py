"""Memory and time of the evaluation at a fraction of ImageNet's size: 1.28 million x 2048 features of 1,000 classes.

    python benchmarks/evaluation_scale.py [--fractions 32 16] [--checkpoint FOLDER] [--output evaluation_scale.json]

Synthetic features: class centres and noise. 256 MiB count as large here, half the package's limit, so that a 32nd of
the images is large; the other half may come on top. For each fraction, in a fork of its own: the features are extracted
to disk as a checkpoint's are, then evaluated by k-NN (four ks and both distances, one image of each class), one epoch of
the suite's LinearModel and the first passes of the logistic regression, whose time is told for one.

"anonymous" is the peak of memory that the process has for itself, libraries included; "resident" counts the file as
well, pages of which the system takes back when it needs room. A line through the fractions tells of all images. Time is
the processor's, which a busy machine changes less than the clock.

With --checkpoint, a run on images that fit in memory is evaluated twice, whole in float32 as ever and as if it did not
fit, on disk in float16 and in pieces: the differences are in points of accuracy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from torch import Tensor

from emim_solo.checkpoints.opening import open_checkpoint
from emim_solo.evaluation import features as stored
from emim_solo.evaluation import linear as classifiers
from emim_solo.evaluation.features import Features, Split, extract, extract_features
from emim_solo.evaluation.knn import knn

IMAGES, WIDTH, CLASSES = 1_281_167, 2048, 1000
VAL_IMAGES = 1000  # one per class; for the 50,000 of ImageNet, k-NN takes fifty times as long
LARGE = 2**28  # bytes
STAGES = ("extraction", "knn", "linear_epoch", "logistic_pass")
HEAD = f"{'stage':<16}{'CPU s':>10}{'per million':>13}{'anonymous MiB':>15}{'resident MiB':>14}"


class Known(LightningModule):
    """Returns images as features, so that an extraction has only the cost of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"feats": images}


def batches(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels; the classes take turns."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for labels in (torch.arange(count) % CLASSES).split(512):
        noise = torch.randn(len(labels), WIDTH, generator=generator)
        yield (0.15 * centres[labels] + noise).relu(), labels


def status(key: str) -> float:
    """A memory entry of this process in MiB, from /proc/self/status (Linux)."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


@contextmanager
def measured(into: dict[str, Any], stage: str) -> Iterator[None]:
    """Record CPU seconds, clock seconds and peak memory of a stage."""
    peaks, stop = {"anonymous_mib": 0.0, "resident_mib": 0.0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peaks["anonymous_mib"] = max(peaks["anonymous_mib"], status("RssAnon"))
            peaks["resident_mib"] = max(peaks["resident_mib"], status("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, clock = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        into[stage] = {"cpu_seconds": time.process_time() - begin, "clock_seconds": time.perf_counter() - clock}
        stop.set()
        watcher.join()
        into[stage] |= peaks


def one_fraction(parts: int, folder: str) -> dict[str, Any]:
    stored.IN_MEMORY = LARGE
    count = IMAGES // parts
    found: dict[str, Any] = {"images": count, "before_mib": status("RssAnon")}
    with measured(found, "extraction"):
        train = extract(Known(), batches(count, seed=1), None, folder=Path(folder))
        val = extract(Known(), batches(VAL_IMAGES, seed=2), None, folder=Path(folder))
    assert train.backbone.dtype == torch.float16
    found["disk_bytes"] = train.backbone.nbytes
    features = Features(train, val, [str(label) for label in range(CLASSES)])
    with measured(found, "knn"):
        found["accuracies"] = knn(features)
    with measured(found, "linear_epoch"):
        data = {"dataset": "imagenet", "train_path": folder, "val_path": folder, "num_workers": 0}
        cfg = {"name": "synthetic", "method": "emim", "backbone": {"name": "resnet50"}, "data": data}
        for label in range(CLASSES):  # solo-learn counts the class folders
            (Path(folder) / str(label)).mkdir(exist_ok=True)
        quiet = OmegaConf.create({**cfg, "accelerator": "cpu", "enable_progress_bar": False})
        found["accuracies"] |= classifiers.linear(features, quiet, {"max_epochs": 1})
    classifiers.LOGISTIC_ITERATIONS = 1
    passes: list[int] = []
    labelled = classifiers._labelled

    def counted(split: Split, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        passes.append(len(split.labels))
        return labelled(split, device)

    classifiers._labelled = counted
    with measured(found, "logistic_pass"):
        found["accuracies"] |= classifiers.logistic(features)
    for key in ("cpu_seconds", "clock_seconds"):
        found["logistic_pass"][key] /= passes.count(count)
    return found


def of_all_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Extrapolate a line through first and last fraction to 1.28 million images; k-NN also to 50,000 queries."""
    first, last = rows[0], rows[-1]  # rows are sorted by their number of images

    def line(value: Callable[[dict[str, Any]], float]) -> float:
        slope = (value(last) - value(first)) / (last["images"] - first["images"])
        return value(last) + slope * (IMAGES - last["images"])

    told: dict[str, Any] = {}
    for stage in STAGES:
        told[stage] = {key: line(lambda row: row[stage][key]) for key in first[stage]}  # noqa: B023 - used at once
    told["disk_bytes"] = line(lambda row: row["disk_bytes"])
    told["knn"]["cpu_seconds_of_50000_images"] = told["knn"]["cpu_seconds"] * 50_000 / VAL_IMAGES
    return told


def differences(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracies of a run, evaluated whole and in pieces."""
    checkpoint = open_checkpoint(folder)
    cfg = checkpoint.cfg
    cfg.enable_progress_bar = False

    def evaluate() -> dict[str, float]:
        found = extract_features(checkpoint)
        return knn(found) | classifiers.linear(found, cfg) | classifiers.logistic(found)

    whole = evaluate()
    stored.IN_MEMORY, stored._PIECE = 0, 2**19  # 256 rows of ResNet-18's features
    in_pieces = evaluate()
    return {name: {"whole": whole[name], "in_pieces": in_pieces[name]} for name in whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=int, nargs="*", default=[32, 16], help="one n-th of the images each")
    parser.add_argument("--folder", type=Path, help="on the disk for the features (5.2 GB for all); a temporary one")
    parser.add_argument("--checkpoint", type=Path, help="folder of a run whose images fit in memory")
    parser.add_argument("--output", type=Path, help="JSON; what is there of other parts is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    found |= {"torch": torch.__version__, "processor": f"{platform.processor() or platform.machine()}, 1 thread"}

    for parts in args.fractions:
        print(f"1/{parts} of the images: {IMAGES // parts:,} x {WIDTH}\n{HEAD}")
        alone = multiprocessing.get_context("fork").Pool(1)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, alone as pool:
            row = pool.apply(one_fraction, (parts, folder))
        others = [old for old in found.get("fractions", []) if old["images"] != row["images"]]
        for stage in STAGES:
            show(stage, row[stage], row["images"])
        found["fractions"] = sorted([*others, row], key=lambda row: row["images"])
        write(found, args.output)
    if len(found.get("fractions", [])) > 1:
        found["all_images"] = told = of_all_images(found["fractions"])
        print(f"all {IMAGES:,} images by the line through these, {told['disk_bytes'] / 1e9:.2f} GB on disk\n{HEAD}")
        for stage in STAGES:
            show(stage, told[stage], IMAGES)
        write(found, args.output)
    if args.checkpoint:
        found["differences"] = differences(args.checkpoint)
        print(f"{'accuracy (%)':<28} {'whole':>8} {'pieces':>8} {'points':>8}")
        for name, pair in found["differences"].items():
            whole, pieces = pair["whole"], pair["in_pieces"]
            print(f"{name:<28} {whole:>8.2f} {pieces:>8.2f} {pieces - whole:>+8.2f}")
        write(found, args.output)


def show(stage: str, row: dict[str, float], images: int) -> None:
    cpu, each = row["cpu_seconds"], row["cpu_seconds"] * 1e6 / images
    print(f"{stage:<16}{cpu:>10.1f}{each:>13.1f}{row['anonymous_mib']:>15.0f}{row['resident_mib']:>14.0f}", flush=True)


def write(found: dict[str, Any], output: Path | None) -> None:
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
