"""Runs the benchmark of a YAML file: ``python benchmark_driver.py CONFIG [STAGE]``.

With a stage, the process dies by SIGKILL in the middle of writing that stage's row, half of it on disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from omegaconf import OmegaConf

from emim_solo.benchmark.runner import run_benchmark
from emim_solo.results import rows

if len(sys.argv) > 2:
    whole = rows.append

    def half(path, row):
        if row["stage"] != sys.argv[2]:
            return whole(path, row)
        line = json.dumps(row, default=str)
        with open(path, "a") as file:
            file.write(line[: len(line) // 2])
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)

    rows.append = half

run_benchmark(OmegaConf.load(sys.argv[1]))
