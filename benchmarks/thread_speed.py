"""Seconds of a training step for numbers of OpenMP threads and of loader processes, each pair in a process of its own.

    python benchmarks/thread_speed.py --folder TRAIN_FOLDER [--steps 12] [--threads 1 2] [--workers 0 1 2]

The shipped pretrain/custom emim_patches on a folder of small images: eight patches of 16 pixels, batch 64, ResNet-18 with the
small-image stem, at the precision that ``auto`` is here. A step is the wall time from one batch's end to the next one's, loading
included; the first three are not counted, the median is printed. ``passive`` sets OMP_WAIT_POLICY: threads that have nothing to
do sleep instead of spinning. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

WARM_UP = 3


def step_seconds(folder: str, workers: int, steps: int) -> float:
    """The median wall time of a step in this process."""
    from hydra import compose, initialize_config_dir
    from lightning.pytorch import Callback

    from emim_solo.ground import configs
    from emim_solo.training.pretraining import prepare, pretrain

    ends: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    overrides = [
        *(f"data.train_path={folder}", "data.val_path=null", f"data.num_workers={workers}", "data.image_size=32"),
        *("augmentations.0.crop_size=16", "+backbone.small_image_stem=True", "optimizer.batch_size=64", "max_epochs=1"),
        *("accelerator=cpu", "devices=1", "strategy=auto", "sync_batchnorm=False", "checkpoint.enabled=False"),
        *(f"+limit_train_batches={steps + WARM_UP}", "knn_eval.enabled=False", "++enable_progress_bar=False"),
    ]
    with tempfile.TemporaryDirectory() as place:
        with initialize_config_dir(config_dir=str(configs.find("pretrain/custom")), version_base="1.2"):
            cfg = compose("emim_patches", overrides=[*overrides, f"checkpoint.dir={place}"])
        pretrain(prepare(cfg), more_callbacks=[Clock()])
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[WARM_UP - 1 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="training images, one folder for each class")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--here", type=int, metavar="WORKERS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here is not None:
        print(step_seconds(given.folder, given.here, given.steps))
        return
    print("| OpenMP threads | loader processes | wait policy | step (s) |\n|---:|---:|---|---:|")
    for threads, workers in itertools.product(given.threads, given.workers):
        for policy in ("default", "passive") if threads > 1 else ("default",):
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            environment |= {"OMP_WAIT_POLICY": "passive"} if policy == "passive" else {}
            command = [sys.executable, "-W", "ignore", __file__, "--folder", given.folder, "--steps", str(given.steps)]
            command += ["--here", str(workers)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            print(f"| {threads} | {workers} | {policy} | {float(done.stdout.split()[-1]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
