"""Draws the recipes of the runs in docs/label-free.md. They were fixed before any run.

    python research/label_free/draw.py > research/label_free/trials.yaml
    python research/label_free/draw.py --digits > research/label_free/digits.yaml

Trials of lab.py have three kinds of name. `METHOD_search0_3`: recipes for a choice among eight of equal length. `METHOD_any_3`:
recipes of all lengths. `METHOD_CONTROL`: controls, which are in no rank correlation, but in the table of where the score fails.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

SHORT, LONG = 5000, 20000  # numbers of training images
COMMON = {"validation_from": LONG, "bank": SHORT}  # all are evaluated on the same images, with the same labels
GOOD = {  # for the controls: a good recipe of each from an earlier search
    "emim": {"loss": "emim", "lr": 1.6e-2, "batch": 128, "hidden": 1024},
    "vicreg": {"loss": "vicreg", "kwargs": {"sim_loss_weight": 12.5}, "lr": 4e-3, "batch": 128, "hidden": 1024},
    "barlow_twins": {"loss": "barlow_twins", "kwargs": {"lamb": 0.03}, "lr": 8e-3, "batch": 128, "hidden": 1024},
}


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def emim(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 1 / 6:
        return {"kwargs": {"objective": "exact", "noise_variance": log_uniform(rng, 0.03, 1.0)}}
    return {
        "kwargs": {
            "marginal": rng.choice(["series", "exact"]),
            "residual": rng.choice(["isotropic", "isotropic", "diagonal", "exact"]),
            "weight": log_uniform(rng, 1.0, 16.0),
            "noise_variance": log_uniform(rng, 0.03, 1.0),
        }
    }


def vicreg(rng: random.Random) -> dict[str, Any]:
    weights = {"sim_loss_weight": log_uniform(rng, 2, 100), "var_loss_weight": log_uniform(rng, 10, 50)}
    return {"kwargs": {**weights, "cov_loss_weight": log_uniform(rng, 0.1, 10)}}


def barlow_twins(rng: random.Random) -> dict[str, Any]:
    return {"kwargs": {"lamb": log_uniform(rng, 1e-3, 0.3), "scale_loss": log_uniform(rng, 0.01, 0.3)}}


def simclr(rng: random.Random) -> dict[str, Any]:
    return {"kwargs": {"temperature": log_uniform(rng, 0.05, 1.0)}}


def byol(rng: random.Random) -> dict[str, Any]:
    return {"momentum": rng.choice([0.9, 0.97, 0.99, 0.996]), "predictor": rng.choice([128, 512])}


def simsiam(rng: random.Random) -> dict[str, Any]:
    return {"predictor": rng.choice([64, 128, 512])}


def swav(rng: random.Random) -> dict[str, Any]:
    return {"kwargs": {"prototypes": rng.choice([100, 300, 1000]), "temperature": log_uniform(rng, 0.05, 0.5)}}


METHODS = {
    "emim": emim,
    "vicreg": vicreg,
    "barlow_twins": barlow_twins,
    "simclr": simclr,
    "byol": byol,
    "simsiam": simsiam,
    "swav": swav,
}


def recipe(rng: random.Random, method: str) -> dict[str, Any]:
    return {
        "loss": method,
        **METHODS[method](rng),
        "lr": log_uniform(rng, 1e-3, 3e-2),
        "weight_decay": log_uniform(rng, 1e-6, 1e-2),
        "batch": rng.choice([64, 128, 256]),
        "dim": rng.choice([64, 128, 256, 512]),
        "hidden": rng.choice([256, 512, 1024]),
        "layers": rng.choice([2, 3]),
        "clip": rng.choice([0.0, 3.0]),
    }


def drawn() -> dict[str, dict[str, Any]]:
    trials: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        rng = random.Random(f"label-free {method}")
        searched = method in GOOD
        for search in range(3 if searched else 0):
            for number in range(8):
                trials[f"{method}_search{search}_{number}"] = recipe(rng, method) | {"images": SHORT, "epochs": 8}
        for number in range(4 if searched else 8):
            schedule = {"images": SHORT, "epochs": rng.choice([4, 8, 16])}
            trials[f"{method}_any_{number}"] = recipe(rng, method) | schedule
        for number in range(3):
            trials[f"{method}_any_long{number}"] = recipe(rng, method) | {"images": LONG, "epochs": 8}
    mixed = list(trials.items())
    random.Random("order").shuffle(mixed)  # whenever the runs stop, all methods have some
    trials = dict(mixed)
    short: dict[str, Any] = {"images": SHORT, "epochs": 8}
    trials["untrained"] = {"loss": "emim", "lr": 0.0, "images": SHORT, "epochs": 1}
    for number, rate in enumerate((2e-3, 8e-3)):
        trials[f"supervised_{number}"] = {"loss": "supervised", "lr": rate, "batch": 128, **short}
    for method, good in GOOD.items():
        for name, change in (
            ("crops_of_half", {"crop_min": 0.5}),
            ("no_colour", {"colour": 0.0}),
            ("whole_images_no_colour", {"crop_min": 0.8, "colour": 0.0}),
            ("tiny_crops", {"crop_min": 0.05}),
            ("width8", {"width": 8}),
            ("width32", {"width": 32}),
            ("epochs4", {"epochs": 4}),
            ("epochs16", {"epochs": 16}),
            ("epochs48", {"epochs": 48}),
        ):
            trials[f"{method}_{name}"] = good | short | change
    return {name: trial | COMMON for name, trial in trials.items()}


DIGITS_TERMS = (
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.batch_size",
    "optimizer.classifier_lr",
    "method_kwargs.proj_hidden_dim",
    "method_kwargs.proj_output_dim",
    "max_epochs",
)
OF_THE_SUITE = {
    "predictor": "pred_hidden_dim",
    "prototypes": "num_prototypes",
}  # names in lab.py and in solo-learn


def drawn_for_digits() -> dict[str, dict[str, Any]]:
    """Entries of `methods` for a benchmark on the digits."""
    entries: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        rng = random.Random(f"label-free digits {method}")
        for number in range(10 if method in GOOD else 8):
            own = METHODS[method](rng)
            kwargs = {OF_THE_SUITE.get(key, key): value for key, value in own.pop("kwargs", {}).items()}
            kwargs |= {OF_THE_SUITE[key]: value for key, value in own.items() if key in OF_THE_SUITE}
            hidden = rng.choice([128, 256, 512])
            kwargs |= {"proj_hidden_dim": hidden, "proj_output_dim": rng.choice([64, 128, 256])}
            run: dict[str, Any] = {
                "optimizer": {
                    "lr": log_uniform(rng, 5e-4, 2e-2),
                    "weight_decay": log_uniform(rng, 1e-6, 1e-2),
                    "batch_size": rng.choice([64, 128]),
                }
            }
            if "momentum" in own:
                run["momentum"] = {"base_tau": own["momentum"], "final_tau": 1.0}
            entries[f"{method}_{number}"] = {
                "config": "emim",
                "method": method,
                "method_kwargs": kwargs,
                "run": run,
                "share_of_epochs": rng.choice([0.25, 0.5, 1.0]),
            }
    mixed = list(entries.items())
    random.Random("order").shuffle(mixed)
    return dict(mixed)


def print_digits() -> None:
    entries = drawn_for_digits()
    benchmark = yaml.safe_load((Path(__file__).parents[2] / "scripts" / "benchmark" / "demo.yaml").read_text())
    benchmark |= {"dir": "runs/label-free-digits", "max_epochs": 12, "umap": {"enabled": False}, "methods": entries}
    benchmark["deviations"] = {name: list(DIGITS_TERMS) for name in entries}
    print(
        "# Made by research/label_free/draw.py --digits: recipes drawn at random from the ranges there, on `make demo`'s terms."
    )
    print("#   emim-solo benchmark --config-path research/label_free --config-name digits")
    print(yaml.safe_dump(benchmark, sort_keys=False, default_flow_style=None, width=10_000), end="")


def main() -> None:
    if sys.argv[1:] == ["--digits"]:
        print_digits()
        return
    print("# Made by research/label_free/draw.py: recipes drawn at random from the ranges there, and controls.")
    for name, trial in drawn().items():
        print(f"{name}: {json.dumps(trial)}")


if __name__ == "__main__":
    main()
