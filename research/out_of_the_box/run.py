"""Every method in every setting, as it comes: rows by the setting, all methods of one before the next begins.

    python research/out_of_the_box/run.py --data DATASETS --rows docs/results/out-of-the-box/rows.jsonl

DATASETS holds cifar10/{train,test}, fashion-mnist/{train,val} and digits/{train,val}; `emim-solo images NAME DIR` writes the
last two. One process of one thread. A row that is there is not made again: the same command goes on where it was.
`--methods` and `--half` narrow it down; a loss of research/candidates.py is tried by `--candidate NAME='{key: value}'`.
With `--each` every view has a forward of its own, in which BatchNorm sees it alone, for settings of three or more views.

A run: the laboratory's network, AdamW, warm-up over a tenth of the steps, then a cosine, both by step. CIFAR-10 is seen in
crops of 24 pixels of at least 0.2 of the image, the other two in crops of 16 pixels of at least 0.4; digits are not mirrored.
It trains on 4,000 training images (digits: 900) and is judged on 4,000 other training images (digits: the other 897): 20-NN
and a ridge classifier on the features. No test image of CIFAR-10 or Fashion-MNIST is seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(1, str(Path(__file__).parents[1]))

import draw
import lab
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from methods import METHODS
from torch import Tensor, nn

DATA: dict[str, dict[str, Any]] = {
    "cifar10": {"folders": ["train"], "images": 4000, "judged": 4000, "size": 24, "crop_min": 0.2, "flip": 0.5},
    "fashion-mnist": {"folders": ["train"], "images": 4000, "judged": 4000, "size": 16, "crop_min": 0.4, "flip": 0.5},
    "digits": {"folders": ["train", "val"], "images": 900, "judged": 897, "size": 16, "crop_min": 0.4, "flip": 0.0},
}
VIEWS_JUDGED, IMAGES_JUDGED = 4, 500  # views per image and images, for the view information


def images_of(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Training images, then evaluation images, in a fixed random order, and their labels."""
    data = DATA[name]
    parts = [lab.images_of(folder / name / part) for part in data["folders"]]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    chosen = torch.tensor(np.random.RandomState(0).permutation(len(y)))[: data["images"] + data["judged"]]
    return x[chosen], y[chosen]


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == lab.PRECISION)


def train(setting: dict[str, Any], loss_of: Callable[..., Any], images: Tensor, seed: int, *, each: bool) -> lab.Model:
    """One training; a forward of all views together, or of ``each``.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    torch.manual_seed(seed)
    data = DATA[setting["data"]]
    net, width = lab.encoder(16)
    model = lab.Model(net, lab.mlp([width, *[setting["hidden"]] * (setting["layers"] - 1), setting["dim"]]))
    parameters = list(model.parameters())
    rate = setting["lr"] * setting["batch"] / 256
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=setting["weight_decay"])
    steps = setting["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min((t + 1) / (0.1 * steps), 1) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < setting["batch"]:
            order = torch.randperm(len(images))
        index, order = order.split([setting["batch"], len(order) - setting["batch"]])
        x = images[index].float() / 255
        scale = (data["crop_min"], 1.0)
        views = [lab.augment(x, data["size"], scale, flip=data["flip"]) for _ in range(setting["views"])]
        z = [model(view) for view in views] if each else model(torch.cat(views)).chunk(setting["views"])
        loss = loss_of(*z)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, setting["clip"] or math.inf)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm.item()} at step {step}")
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def features(model: lab.Model, images: Tensor, size: int) -> Tensor:
    found = []
    for batch in images.split(500):
        x = F.interpolate(batch.float() / 255, size=size, mode="bilinear", antialias=True)
        x = ((x - lab.MEAN) / lab.STD).contiguous(memory_format=torch.channels_last)
        with autocast():
            found.append(model.net(x).float())
    return torch.cat(found)


@torch.no_grad()
def judge(model: lab.Model, x: Tensor, y: Tensor, setting: dict[str, Any]) -> dict[str, Any]:
    from sklearn.linear_model import RidgeClassifier

    from emim_solo.diagnostics import collapsed, effective_rank
    from emim_solo.evaluation.knn import knn_accuracies
    from emim_solo.scores import scores

    data = DATA[setting["data"]]
    model.eval()
    h = features(model, x, data["size"])
    if not torch.isfinite(h).all():
        raise FloatingPointError("features are not finite")
    known, h, y_known, y = h[: data["images"]], h[data["images"] :], y[: data["images"]], y[data["images"] :]
    mean, spread = known.mean(0), known.std(0) + 1e-6
    ridge = RidgeClassifier(alpha=10.0).fit(((known - mean) / spread).numpy(), y_known.numpy())
    found: dict[str, Any] = {
        "knn": round(knn_accuracies(known, y_known, h, y, ks=[20])[20], 2),
        "linear": round(100 * ridge.score(((h - mean) / spread).numpy(), y.numpy()), 2),
    }
    torch.manual_seed(0)
    held_out = x[data["images"] :][:IMAGES_JUDGED].float() / 255
    backbone, projector = [], []
    for _ in range(VIEWS_JUDGED):
        view = lab.augment(held_out, data["size"], (data["crop_min"], 1.0), flip=data["flip"])
        projector.append(model(view))
        backbone.append(model.h)
    z = torch.stack(projector)
    standardised = (z - z.mean((0, 1))) / (z.std((0, 1)) + 1e-8)
    found |= {
        "rank": round(effective_rank(projector[0], centred=True), 2),
        "backbone_rank": round(effective_rank(backbone[0], centred=True), 2),
        "collapsed": collapsed(projector[0]),
        "noise_share": round(standardised.var(0).mean().item(), 4),  # variance between views of an image; total 1
        "view_information": round(
            scores(torch.stack(backbone, 1), noise_variance=0.1, delta=1e-4, seed=0)["view_information"], 3
        ),
    }
    return found


def candidate(text: str) -> tuple[str, Callable[..., Any]]:
    """Parse ``NAME={key: value}`` into the name in rows and a loss with these options."""
    import candidates

    name, _, options = text.partition("=")
    kwargs = yaml.safe_load(options or "{}")
    loss = candidates.LOSSES[name]
    made = loss(**kwargs) if isinstance(loss, type) else partial(loss, **kwargs)
    return f"{name} {json.dumps(kwargs)}" if kwargs else name, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all otherwise")
    parser.add_argument("--candidate", nargs="+", default=[], help="in place of the methods")
    parser.add_argument("--half", choices=("choose", "show"), help="both otherwise")
    parser.add_argument("--settings", type=int, nargs="+", help="numbers; all otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings-only-with", type=Path, help="rows: leave out settings that have none there")
    parser.add_argument("--each", action="store_true", help="a forward for each view; rows say so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.candidate:
        if arguments.half != "choose":
            parser.error("candidates are judged on --half choose; what is shown afterwards is a method")
        losses = dict(map(candidate, arguments.candidate))
    else:
        losses = {name: METHODS[name].loss for name in arguments.methods or METHODS}
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    done = {(row["setting"], row["method"], row["seed"]) for row in map(json.loads, lines)}
    if arguments.settings_only_with:
        there = {json.loads(line)["setting"] for line in arguments.settings_only_with.read_text().splitlines()}
    cache: dict[str, tuple[Tensor, Tensor]] = {}
    for setting in draw.read():
        number = setting["setting"]
        if arguments.half not in (None, setting["half"]) or number not in (arguments.settings or [number]):
            continue
        if arguments.settings_only_with and number not in there:
            continue
        if arguments.each and setting["views"] < 3:
            continue
        for name, loss in losses.items():
            if (number, name, arguments.seed) in done:
                continue
            if setting["data"] not in cache:
                cache[setting["data"]] = images_of(setting["data"], arguments.data)
            x, y = cache[setting["data"]]
            loss = deepcopy(loss)  # some remember the steps of a run
            wall, cpu = time.time(), time.process_time()
            try:
                model = train(setting, loss, x[: DATA[setting["data"]]["images"]], arguments.seed, each=arguments.each)
                found = judge(model, x, y, setting)
            except (FloatingPointError, torch.linalg.LinAlgError, ValueError) as error:
                found = {"failed": str(error)}
            row = {"setting": number, "half": setting["half"], "method": name, "seed": arguments.seed} | found
            row |= {"forward": "each"} if arguments.each else {}
            row |= {
                "settings": {key: value for key, value in setting.items() if key not in ("setting", "half")},
                "seconds": round(time.time() - wall, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "precision": str(lab.PRECISION).removeprefix("torch."),
                "processor": sorted(lab.CAPABILITIES & lab.FEATURES),
                "load": [round(value, 1) for value in os.getloadavg()],
                "torch": torch.__version__,
            }
            with arguments.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key != "settings"}, flush=True)


if __name__ == "__main__":
    main()
