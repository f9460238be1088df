"""40 settings drawn at random, the same for every method.

    python research/out_of_the_box/draw.py     # writes settings.yaml beside it

Each value is drawn independently, uniformly from its list or log-uniformly from its range. A setting is drawn again until
it has 40,000 to 160,000 crops in total, which take about a minute on one core. The data sets take turns in random order, so
they stay balanced after any number of settings. In each pair of settings, a random one is for choosing a new default
("choose") and the other for showing it ("show").
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import yaml

SEED, COUNT = 20261128, 40
FILE = Path(__file__).with_name("settings.yaml")
LISTS: dict[str, list[Any]] = {
    "dim": [64, 128, 256, 512, 1024, 2048],
    "batch": [32, 64, 128, 256, 512],
    "hidden": [256, 512, 1024, 2048],
    "layers": [2, 3, 4],
    "weight_decay": [0.0, 1e-4, 1e-2, 1e-1],
    "clip": [0.0, 1.0, 3.0],
    "views": [2, 3, 4, 5, 6, 7, 8],
}
LR, STEPS, CROPS = (3e-4, 3e-2), (30, 1000), (40_000, 160_000)  # LR at batch 256; it scales with the batch
DATA = ("cifar10", "fashion-mnist", "digits")


def _log_uniform(generator: random.Random, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def settings() -> list[dict[str, Any]]:
    generator = random.Random(SEED)
    drawn: list[dict[str, Any]] = []
    data: list[str] = []
    halves: list[str] = []
    while len(drawn) < COUNT:
        one = {name: generator.choice(values) for name, values in LISTS.items()}
        one["lr"] = float(f"{_log_uniform(generator, *LR):.2g}")
        one["steps"] = round(_log_uniform(generator, *STEPS))
        if not CROPS[0] <= one["steps"] * one["batch"] * one["views"] <= CROPS[1]:
            continue
        data = data or generator.sample(DATA, len(DATA))
        halves = halves or generator.sample(("choose", "show"), 2)
        drawn.append({"setting": len(drawn), "half": halves.pop(), "data": data.pop(), **one})
    return drawn


def read() -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return read


if __name__ == "__main__":
    lines = [yaml.safe_dump(one, default_flow_style=True, sort_keys=False, width=1000).strip() for one in settings()]
    FILE.write_text("# Written by draw.py, before any run.\n" + "".join(f"- {line}\n" for line in lines))
