"""Seconds of a training step by OpenMP threads, loader processes and kind of loader, each in a process of its own.

    python benchmarks/thread_speed.py --folder TRAIN_FOLDER [--views 8] [--threads 1 2] [--loaders 0 1 2 dali] [--steps 12]

The shipped pretrain/custom emim_patches on a folder of small images: patches of 16 pixels (two views are of 32), batch 64, ResNet-18
with the small-image stem, at the precision that ``auto`` is here. ``--loaders``: solo-learn's loader with so many processes, or DALI on
the CPU. ``step`` is the wall time from one batch's end to the next one's, loading included; ``network`` is the part of it in which the
network has the batch. The first three are not counted, medians are printed. ``passive`` sets OMP_WAIT_POLICY: threads that have
nothing to do sleep instead of spinning. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 3


def seconds(folder: str, views: int, loader: str, steps: int) -> dict[str, float]:
    """Medians of a step and of the network's part of it, in this process."""
    from lightning.pytorch import Callback
    from loader_speed import patches

    from emim_solo.training.pretraining import pretrain

    starts: list[float] = []
    ends: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            starts.append(time.perf_counter())

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    more = [f"+limit_train_batches={steps + WARM_UP}", f"data.num_workers={2 if loader == 'dali' else loader}"]
    more += ["max_epochs=1", "devices=1", "strategy=auto", "sync_batchnorm=False"]
    more += ["++knn_eval.enabled=False", "++enable_progress_bar=False"]
    more += ["data.val_path=null", *(["data.format=dali", "+dali.device=cpu"] if loader == "dali" else [])]
    with tempfile.TemporaryDirectory() as place:
        pretrain(patches(Path(folder), views, f"checkpoint.dir={place}", *more), more_callbacks=[Clock()])
    steps_seconds = [later - earlier for earlier, later in itertools.pairwise(ends[WARM_UP - 1 :])]
    network = [end - start for start, end in zip(starts, ends, strict=True)][WARM_UP:]
    return {"step": statistics.median(steps_seconds), "network": statistics.median(network)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="training images, one folder for each class")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loaders", nargs="+", default=["0", "1", "2", "dali"])
    parser.add_argument("--here", metavar="LOADER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here is not None:
        print(json.dumps(seconds(given.folder, given.views, given.here, given.steps)))
        return
    print("| views | OpenMP threads | loader | wait policy | step (s) | network (s) |\n|---:|---:|---|---|---:|---:|")
    for threads, loader in itertools.product(given.threads, given.loaders):
        for policy in ("default", "passive") if threads > 1 else ("default",):
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            environment |= {"OMP_WAIT_POLICY": "passive"} if policy == "passive" else {}
            command = [sys.executable, "-W", "ignore", __file__, "--folder", given.folder, "--steps", str(given.steps)]
            command += ["--views", str(given.views), "--here", loader]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            name = "DALI" if loader == "dali" else f"{loader} processes"
            cells = (given.views, threads, name, policy, f"{found['step']:.2f}", f"{found['network']:.2f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
