"""Seconds of a training step: EMIM beside Barlow Twins and VICReg, `emim-solo pretrain` beside main_pretrain.py.

    python benchmarks/step_speed.py --solo CLONE [--repeats 3] [--steps 8] [--output step_speed.json]

CLONE is one of solo-learn main. Its main_pretrain.py trains all three methods on the shipped pretrain/digits configs,
`emim-solo pretrain` trains EMIM on the same YAML, in one process and on one thread. They take turns in every repeat, in
another order each time, so that a busy machine slows them alike; each repeat's ratios are of that repeat, and the median is
told. Loading is in the same process: the time is from the first batch to the last, the processor's (which a busy machine
changes less) and the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS = {"emim": "emim", "barlow_twins": "barlow", "vicreg": "vicreg"}
OURS = "emim, emim-solo pretrain"


def timed_fits() -> list[dict[str, float]]:
    """Patch Trainer: each training appends its seconds per step to the returned list."""
    from lightning.pytorch import Callback, Trainer

    notes: list[dict[str, float]] = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            now = time.process_time(), time.perf_counter()
            if index == 0:  # the first step is a warm-up
                self.begin = now
            elif index == trainer.num_training_batches - 1:
                cpu, clock = ((end - begin) / index for begin, end in zip(self.begin, now, strict=True))
                notes.append({"cpu_seconds": cpu, "clock_seconds": clock})

    original = Trainer.__init__

    def init(self: Any, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        original(self, *args, callbacks=[*(callbacks or []), Steps()], **kwargs)

    # main_pretrain.py reads the signature to select its arguments
    init.__wrapped__ = original  # type: ignore[attr-defined]
    Trainer.__init__ = init  # type: ignore[method-assign]
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solo", type=Path, required=True, help="clone of solo-learn main")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of each training")
    parser.add_argument("--output", type=Path, help="JSON of the raw figures")
    args = parser.parse_args()
    script, output = args.solo.resolve() / "main_pretrain.py", args.output and args.output.resolve()
    sys.path.insert(0, str(script.parent))

    import torch

    from emim_solo import cli
    from emim_solo.ground import configs
    from emim_solo.images.embedded import write_images

    torch.set_num_threads(1)
    notes = timed_fits()
    folder = configs.find("pretrain/digits")
    changes = ["max_epochs=1", "data.num_workers=0", "knn_eval.enabled=False", "checkpoint.enabled=False"]
    changes += [f"+limit_train_batches={args.steps}", "+limit_val_batches=1", "+num_sanity_val_steps=0"]
    changes += [f"accelerator={'gpu' if torch.cuda.is_available() else 'cpu'}", "+enable_progress_bar=False"]

    def train(name: str) -> None:
        arguments = ["--config-path", str(folder), "--config-name", CONFIGS[name.split(",")[0]], *changes]
        if name == OURS:
            cli.main(["pretrain", *arguments])
            return
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")

    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*CONFIGS, OURS)}
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        write_images("digits", Path("datasets/digits"))
        for repeat in range(args.repeats):
            names = list(found)[:: 1 if repeat % 2 else -1]
            first = repeat // 2 % len(names)  # the positions rotate
            for name in names[first:] + names[:first]:
                train(name)
                found[name].append(notes.pop())
        os.chdir(home)

    pairs = [("emim", "barlow_twins"), ("emim", "vicreg"), (OURS, "emim")]
    ratios = {
        f"{ours} / {theirs}": {
            key: [a[key] / b[key] for a, b in zip(found[ours], found[theirs], strict=True)]
            for key in ("cpu_seconds", "clock_seconds")
        }
        for ours, theirs in pairs
    }
    print(f"{args.repeats} repeats of {args.steps} steps, torch {torch.__version__}, one thread; medians")
    for name, each in found.items():
        cpu, clock = (statistics.median(row[key] for row in each) for key in ("cpu_seconds", "clock_seconds"))
        print(f"{name:<40} {cpu:8.3f} s of the processor {clock:8.3f} s by the clock")
    for name, each in ratios.items():
        cpu, clock = (statistics.median(each[key]) for key in ("cpu_seconds", "clock_seconds"))
        low, high = min(each["cpu_seconds"]), max(each["cpu_seconds"])
        print(f"{name:<40} {cpu:8.3f} ({low:.3f} to {high:.3f}) {clock:8.3f} by the clock")
    if output:
        about = {"torch": torch.__version__, "processor": f"{platform.processor() or platform.machine()}, 1 thread"}
        about["load_average"] = os.getloadavg()[0]
        output.write_text(
            json.dumps({**about, "steps": args.steps, "seconds": found, "ratios": ratios}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
