"""``emim-solo benchmark`` on one CPU core, with what a reader needs to interpret its times.

    python research/real_size/run.py --config-path research/real_size --config-name two-views-recipes [--keep ROWS] [key=value ...]

Arguments, rows and results are those of ``emim-solo benchmark``, with four differences:

- each row has ``cpu_seconds``: CPU time of its stage and child processes, which other work on the machine hardly
  changes; ``load``, the load average at the end of the stage; ``processor``, CPU features; and ``threads``;
- one OpenMP thread;
- if the CPU has bfloat16, the frozen network is evaluated in bfloat16 autocast, as in training. Features and view
  information then take a third of the time (``evaluation_precision`` in the row). Features are stored as float32;
- no forecast before the first run, since it trains some steps of every recipe.

The same command resumes. With `--keep ROWS` each row is also written to that file. If the folder of the runs has no
rows, the rows of complete runs are restored from that file; complete runs need no checkpoints. A run without the rows
of all its stages is made again.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(1, str(Path(__file__).parents[1]))

import lab
import torch
from torch import Tensor

from emim_solo.benchmark.runner import Runner
from emim_solo.checkpoints.opening import Checkpoint
from emim_solo.cli import main
from emim_solo.report.page import ROWS
from emim_solo.results import rows
from emim_solo.results.tables import evaluation_stages

NATIVE = torch.bfloat16 == lab.PRECISION


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Clock:
    """CPU seconds at the start of the current stage."""

    start = cpu_seconds()


def timed(stage: Any) -> Any:
    @functools.wraps(stage)
    def begin(*args: Any, **kwargs: Any) -> Any:
        Clock.start = cpu_seconds()
        return stage(*args, **kwargs)

    return begin


def complete(lines: list[str], stages: set[str]) -> list[str]:
    """The lines of runs that have a row of every stage or that diverged."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        found[row["name"], row["seed"], row["config_hash"]].append(row)
    whole = [
        of_run
        for of_run in found.values()
        if stages <= {row["stage"] for row in of_run} or any(row.get("failed") for row in of_run)
    ]
    return [json.dumps(row) + "\n" for of_run in whole for row in of_run]


def restored(init: Any, keep: Path) -> Any:
    """Wrap the runner's ``__init__``: restore the kept rows if the folder has none."""

    @functools.wraps(init)
    def begin(self: Any, plan: Any) -> None:
        rows_file = plan.folder / ROWS
        if keep.is_file() and not rows_file.is_file() and plan.runs:
            plan.folder.mkdir(parents=True, exist_ok=True)
            stages = {"pretrain", *evaluation_stages(plan.runs[0].cfg, scored=bool(plan.settings["score"]))}
            rows_file.write_text("".join(complete(keep.read_text().splitlines(), stages)))
            keep.write_text(rows_file.read_text())
        init(self, plan)

    return begin


def with_costs(append: Any, keep: Path | None) -> Any:
    @functools.wraps(append)
    def add(path: Any, row: Mapping[str, Any]) -> None:
        costs = {
            "cpu_seconds": round(cpu_seconds() - Clock.start, 1),
            "load": [round(value, 1) for value in os.getloadavg()],
            "processor": sorted(lab.CAPABILITIES & lab.FEATURES),
            "threads": torch.get_num_threads(),
            "evaluation_precision": "bfloat16" if NATIVE else "float32",
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        for file in filter(None, (path, keep)):
            append(file, {**row, **costs})

    return add


def in_bfloat16(model_of: Any) -> Any:
    """Wrap a function that returns a model: forward in bfloat16 autocast, outputs in float32."""

    @functools.wraps(model_of)
    def build(*args: Any, **kwargs: Any) -> Any:
        model = model_of(*args, **kwargs)
        forward = model.forward

        def evaluate(images: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                out = forward(images.contiguous(memory_format=torch.channels_last))
            return {name: value.float() if isinstance(value, Tensor) else value for name, value in out.items()}

        model.forward = evaluate
        return model.to(memory_format=torch.channels_last)

    return build


if __name__ == "__main__":
    arguments = sys.argv[1:]
    kept = None
    if "--keep" in arguments:
        place = arguments.index("--keep")
        kept = Path(arguments[place + 1]).absolute()
        del arguments[place : place + 2]
        Runner.__init__ = restored(Runner.__init__, kept)  # type: ignore[method-assign]
    torch.set_num_threads(1)
    Runner._stage = timed(Runner._stage)  # type: ignore[method-assign]
    Runner.say_how_long = lambda self: None  # type: ignore[method-assign]
    rows.append = with_costs(rows.append, kept)
    if NATIVE:
        Checkpoint.model = in_bfloat16(Checkpoint.model)  # type: ignore[method-assign]
    main(["benchmark", *arguments])
