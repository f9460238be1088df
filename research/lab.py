"""A laboratory: one small ResNet, one objective, CIFAR-10 as an image folder, a few minutes on one CPU core.

    python research/lab.py TRIALS.yaml --data CIFAR10_FOLDER --rows ROWS.jsonl [--seeds 0 1 2] [--jobs 2] [--split test]

For comparing objectives with each other, not for absolute numbers. CIFAR10_FOLDER holds train/<class>/* and
test/<class>/*. Trains on the first `images` of a fixed shuffle of the training images and scores on the next 20,000
("val"), or on the test images with `--split test`. A trial is a mapping in the YAML file, over the defaults in
`SETTINGS`; every trial and seed is one line of ROWS.jsonl, and those that are there already are not run again. With
`--protocol` each is scored without labels, too, on images that are in neither part (label_free.py reads those rows).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import combinations, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn

from emim_solo.ground.compare import config_hash

SETTINGS: dict[str, Any] = {
    "loss": "emim",  # a key of losses()
    "kwargs": {},
    "dim": 256,
    "hidden": 512,
    "layers": 3,
    "images": 20000,
    "validation_images": 20000,
    "epochs": 24,
    "batch": 256,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "clip": 0.0,  # largest norm of the gradient; 0 for none
    "optimiser": "adamw",  # or "lars", as in solo-learn's configs for CIFAR
    "views": 2,  # of CROP x CROP pixels
    "small_views": 0,  # of SMALL x SMALL pixels
    "momentum": 0.0,  # of a target encoder; 0 for none
    "predictor": 0,  # hidden width, 0 for none
    "features_weight": 0.0,  # weight of the same loss on the backbone's features
    "width": 16,  # of the network
    "crop_min": 0.2,  # smallest share of an image in a view
    "colour": 1.0,  # strength of colour jitter
    "bank": None,  # number of labelled images for k-NN and classifier; None for all training images
    "validation_from": None,  # position of the first validation image in the shuffle; None for `images`
}
CROP, SMALL = 24, 16
JUDGED = 4096  # held-out images that MI and rank are measured on
CAPABILITIES = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
FEATURES = {"avx2", "avx512_f", "avx512_bf16", "amx_bf16"}
PRECISION = (
    torch.bfloat16 if CAPABILITIES & {"avx512_bf16", "amx_bf16"} else torch.float32
)  # emulated bfloat16 is ten times slower
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.247, 0.243, 0.261]).view(1, 3, 1, 1)


def images_of(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a folder as N x 3 x 32 x 32 bytes, and their labels; a file beside the folder caches them."""
    from torchvision.datasets import ImageFolder

    cache = folder.with_suffix(".npz")
    if not cache.exists():
        dataset = ImageFolder(str(folder))
        np.savez(cache, x=np.stack([np.asarray(image) for image, _ in dataset]), y=np.array(dataset.targets))
    stored = np.load(cache)
    return torch.tensor(stored["x"]).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored["y"]).long()


def augment(
    x: Tensor, size: int = CROP, scale: tuple[float, float] = (0.2, 1.0), colour: float = 1.0, flip: float = 0.5
) -> Tensor:
    """Random resized crop, flip, brightness, contrast, saturation, hue and grayscale, drawn for each image."""
    spread = 1.2 * colour
    n = x.shape[0]
    side = torch.empty(n).uniform_(*scale).sqrt()
    ratio = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp().sqrt()
    width, height = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = width * ((torch.rand(n) < 1 - flip).float() * 2 - 1)
    theta[:, 0, 2] = (torch.rand(n) * 2 - 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = (torch.rand(n) * 2 - 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")
    jittered = (torch.rand(n, 1, 1, 1) < 0.8).float()
    x = x * (1 + jittered * (torch.rand(n, 1, 1, 1) * spread - spread / 2))
    # Contrast, saturation and hue are one 3 x 3 colour matrix and an offset for each image.
    mean = x.mean((1, 2, 3), keepdim=True)
    contrast = 1 + jittered * (torch.rand(n, 1, 1, 1) * spread - spread / 2)
    saturation = (1 + jittered * (torch.rand(n, 1, 1, 1) * spread - spread / 2)).view(n, 1, 1)
    angle = jittered.view(n) * (torch.rand(n) * 2 - 1) * spread / 2
    k = 1 / 3**0.5
    cross = torch.tensor([[0, -k, k], [k, 0, -k], [-k, k, 0]])
    hue = torch.eye(3) + angle.sin().view(n, 1, 1) * cross + (1 - angle.cos()).view(n, 1, 1) * (cross @ cross)
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    mixed = hue @ (saturation * torch.eye(3) + (1 - saturation) * luma)
    gray = torch.rand(n, 1, 1) < 0.2
    mixed = torch.where(gray, luma, mixed)
    offset = (1 - contrast) * mean
    x = torch.einsum("nij,njhw->nihw", mixed, x * contrast + offset)
    return ((x.clamp(0, 1) - MEAN) / STD).contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Sequential()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def encoder(width: int = 16) -> tuple[nn.Module, int]:
    """A ResNet of 0.3 million parameters, and the number of its features."""
    w = width
    stem = [nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
    blocks = [Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 4 * w, 2), Block(4 * w, 8 * w, 1)]
    net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return net.to(memory_format=torch.channels_last), 8 * w


class Model(nn.Module):
    """The network in bfloat16 if the CPU has it; the embeddings in float32."""

    def __init__(self, net: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.net, self.projector = net, projector

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == PRECISION):
            self.h = self.net(x).float()
        embeddings: Tensor = self.projector(self.h)
        return embeddings


def mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> Tensor:
    net.eval()
    parts = []
    for batch in images.split(500):
        x = F.interpolate(batch.float() / 255, size=CROP, mode="bilinear", antialias=True)
        parts.append(net(((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)))
    net.train()
    return torch.cat(parts)


class Swav(nn.Module):
    """Solo-learn's SwAV loss with prototypes and Sinkhorn assignments, without a queue."""

    def __init__(self, dim: int, prototypes: int = 300, temperature: float = 0.1) -> None:
        from solo.utils.sinkhorn_knopp import SinkhornKnopp

        super().__init__()
        self.prototypes, self.assign, self.temperature = (
            nn.Linear(dim, prototypes, bias=False),
            SinkhornKnopp(),
            temperature,
        )

    def forward(self, *z: Tensor) -> Any:
        from solo.losses.swav import swav_loss_func

        weight = F.normalize(self.prototypes.weight, dim=1)
        scores = [F.normalize(view, dim=1) @ weight.T for view in z]
        return swav_loss_func(scores, [self.assign(view.detach()) for view in scores], self.temperature)


class Supervised(nn.Module):
    """Cross-entropy of a linear classifier on the embeddings: a control."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, 10)

    def forward(self, *z: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(torch.cat(z)), labels.repeat(len(z)))


def losses() -> dict[str, Any]:
    """All losses by name: solo-learn's baselines, rivals, EMIM and candidates for it."""
    import candidates
    import rivals

    from emim_solo.suite import load_suite

    load_suite()
    from solo.losses.barlow import barlow_loss_func
    from solo.losses.byol import byol_loss_func
    from solo.losses.simclr import simclr_loss_func
    from solo.losses.simsiam import simsiam_loss_func
    from solo.losses.vicreg import vicreg_loss_func

    def over_pairs(loss: Any) -> Any:
        """A control that solo-learn does not have: a loss of two views, averaged over all pairs of views."""
        return lambda *z, **kwargs: torch.stack([loss(a, b, **kwargs) for a, b in combinations(z, 2)]).mean()

    suites = {"barlow_twins": barlow_loss_func, "vicreg": vicreg_loss_func}
    others = {"byol": byol_loss_func, "simsiam": simsiam_loss_func, "simclr": simclr_loss_func}
    pairs = {f"{name}_pairs": over_pairs(loss) for name, loss in suites.items()}
    return suites | others | pairs | {"swav": Swav, "supervised": Supervised} | rivals.LOSSES | candidates.LOSSES


def optimiser_of(parameters: list[nn.Parameter], s: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    """The optimiser that steps, and the one whose learning rate is scheduled."""
    rate = s["lr"] * s["batch"] / 256
    if s["optimiser"] == "adamw":
        adamw = torch.optim.AdamW(parameters, lr=rate, weight_decay=s["weight_decay"])
        return adamw, adamw
    if s["optimiser"] != "lars":
        raise ValueError(f"optimiser is 'adamw' or 'lars', got {s['optimiser']!r}")
    from solo.utils.lars import LARSWrapper  # with the values of solo-learn's configs for CIFAR

    sgd = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=s["weight_decay"])
    return LARSWrapper(sgd, eta=0.02, clip=True, exclude_bias_n_norm=True), sgd


def batches(count: int, size: int) -> Iterator[Tensor]:
    order = torch.randperm(count)
    yield from order[: count - count % size].split(size)


def train(s: dict[str, Any], seed: int, images: Tensor, labels: Tensor) -> tuple[Model, dict[str, Any]]:
    """Train on the images with the settings `s`. Only the loss "supervised" uses the labels."""
    torch.manual_seed(seed)
    net, width = encoder(s["width"])
    projector = mlp([width, *[s["hidden"]] * (s["layers"] - 1), s["dim"]])
    predictor = mlp([s["dim"], s["predictor"], s["dim"]]) if s["predictor"] else nn.Identity()
    model = Model(net, projector)
    target = copy.deepcopy(model).requires_grad_(False) if s["momentum"] else None
    loss_func = losses()[s["loss"]]
    if isinstance(loss_func, type):
        loss_func = loss_func(**s["kwargs"], **({"dim": s["dim"]} if loss_func in (Swav, Supervised) else {}))
    kwargs = {} if isinstance(loss_func, nn.Module) else s["kwargs"]
    parameters = [*model.parameters(), *predictor.parameters()]
    if isinstance(loss_func, nn.Module):
        parameters += loss_func.parameters()
    optimiser, scheduled = optimiser_of(parameters, s)
    steps = len(images) // s["batch"]
    total = s["epochs"] * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        scheduled, lambda t: min((t + 1) / steps, 1) * 0.5 * (1 + math.cos(math.pi * t / total))
    )
    step, last = 0, 0.0
    for _ in range(s["epochs"]):
        last = 0.0
        for index in batches(len(images), s["batch"]):
            x = images[index].float() / 255
            if s["loss"] == "supervised":
                kwargs = {"labels": labels[index]}
            large = torch.cat([augment(x, CROP, (s["crop_min"], 1.0), s["colour"]) for _ in range(s["views"])])
            z = list(model(large).chunk(s["views"]))
            h = model.h.chunk(s["views"])
            if s["small_views"]:
                small = torch.cat([augment(x, SMALL, (0.1, 0.4)) for _ in range(s["small_views"])])
                z += model(small).chunk(s["small_views"])
            if target is None and not s["predictor"]:
                loss = loss_func(*z, **kwargs)
                if s["features_weight"]:
                    loss = loss + s["features_weight"] * loss_func(*h, **kwargs)
            else:
                if target is None:  # SimSiam: stop-gradient
                    t1, t2 = (view.detach() for view in z)
                else:
                    with torch.no_grad():
                        t1, t2 = target(large).chunk(2)
                z1, z2 = predictor(z[0]), predictor(z[1])
                loss = (loss_func(z1, t2, **kwargs) + loss_func(z2, t1, **kwargs)) / 2
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            optimiser.zero_grad()
            loss.backward()
            if s["clip"]:
                nn.utils.clip_grad_norm_(parameters, s["clip"])
            optimiser.step()
            schedule.step()
            if target is not None:
                tau = 1 - (1 - s["momentum"]) * (math.cos(math.pi * step / total) + 1) / 2
                for old, new in zip(target.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 1 - tau)
            step, last = step + 1, last + loss.item()
    return model, {"loss_last_epoch": round(last / steps, 4)}


@torch.no_grad()
def judge(model: Model, images: Tensor) -> dict[str, float]:
    """The package's label-free measures of two views of held-out images."""
    from emim_solo.emim.measures import diagnose

    model.eval()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:JUDGED]
    x = images[chosen].float() / 255
    found = diagnose(model(augment(x)), model(augment(x)))
    null = found["pair_information_null"]
    rows_have = {"mi": found["pair_information"] + null, "mi_null": null, "effective_rank": found["rankme"]}
    rounded = {name: round(value, 3) for name, value in rows_have.items()}
    rounded |= {name: round(found[name], 3) for name in ("spread", "collapsed")}
    return rounded | {name: round(found[name], 6) for name in ("non_gaussianity", "non_gaussianity_null")}


@torch.no_grad()
def score_without_labels(model: Model, images: Tensor, protocol: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The package's scores of the first images, in the protocol's views, by name of features and variant."""
    from emim_solo.emim.measures import NAMES, scores

    model.eval()
    x = images[: protocol["images"]].float() / 255
    found: dict[str, dict[str, float]] = {}

    def add(name: str, features: Sequence[Tensor], noise_variance: float, names: Sequence[str] = NAMES) -> None:
        values = scores(
            torch.stack(list(features), 1),
            noise_variance=noise_variance,
            delta=protocol["delta"],
            seed=protocol["seed"],
        )
        found[name] = {key: round(values[key], 4) for key in names}

    for variant, views in protocol["augmentations"].items():
        torch.manual_seed(protocol["seed"])
        backbone, projector = [], []
        for _ in range(protocol["views"]):
            view = augment(x, CROP, (views["crop_min"], 1.0), views["colour"])
            projector.append(model(view))
            backbone.append(model.h)
        if variant == "default":
            add("backbone", backbone, protocol["noise_variance"])
            add("projector", projector, protocol["noise_variance"])
            for noise_variance in protocol["other_noise_variances"]:
                add(f"backbone, e = {noise_variance}", backbone, noise_variance, NAMES[:2])
        else:
            add(f"backbone, {variant} views", backbone, protocol["noise_variance"], NAMES[:2])
    return found


def score(net: nn.Module, train_set: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Top-1 accuracy in percent of k-NN (k = 20, cosine) and of a ridge classifier on the features."""
    from emim_solo.evaluation.knn import knn_accuracies

    (x, y), (xt, yt) = (features(net, train_set[0]), train_set[1]), (features(net, held_out[0]), held_out[1])
    knn = knn_accuracies(x, y, xt, yt, ks=[20])[20]
    mean, std = x.mean(0), x.std(0) + 1e-6
    ridge = RidgeClassifier(alpha=10.0).fit(((x - mean) / std).numpy(), y.numpy())
    return {"knn": round(knn, 2), "linear": round(100 * ridge.score(((xt - mean) / std).numpy(), yt.numpy()), 2)}


def run(job: tuple[str, dict[str, Any], int, argparse.Namespace]) -> list[dict[str, Any]]:
    """Train once and return a row for each requested split."""
    name, settings, seed, arguments = job
    torch.set_num_threads(1)
    started = time.time()
    x, y = images_of(arguments.data / "train")
    shuffled = torch.tensor(np.random.RandomState(0).permutation(len(y)))
    chosen, first = shuffled[: settings["images"]], settings["validation_from"] or settings["images"]
    rest, unseen = shuffled[first:].tensor_split((settings["validation_images"],))
    bank = chosen[: settings["bank"]]
    held_out = {"val": (x[rest], y[rest]), "test": images_of(arguments.data / "test")}
    found: dict[str, dict[str, Any]] = {split: {} for split in arguments.split}
    try:
        model, report = train(settings, seed, x[chosen], y[chosen])
        for split, row in found.items():
            row |= score(model.net, (x[bank], y[bank]), held_out[split]) | report | judge(model, held_out[split][0])
            if protocol := arguments.protocol and yaml.safe_load(arguments.protocol.read_text()):
                row |= {"scores": score_without_labels(model, x[unseen], protocol), "protocol": config_hash(protocol)}
    except (FloatingPointError, ValueError) as error:
        found = {split: {"failed": str(error)} for split in found}
    machine = {"precision": str(PRECISION).removeprefix("torch."), "processor": sorted(CAPABILITIES & FEATURES)}
    rest_of_row = machine | {"settings": settings, "seconds": round(time.time() - started)}
    return [{"trial": name, "seed": seed, "split": split} | row | rest_of_row for split, row in found.items()]


def trials_of(path: Path) -> dict[str, dict[str, Any]]:
    """Settings by name of the trial, with defaults. An unknown setting ends the program."""
    trials = {name: trial or {} for name, trial in yaml.safe_load(path.read_text()).items()}
    for name, trial in trials.items():
        if unknown := sorted(trial.keys() - SETTINGS.keys()):
            sys.exit(f"{path}: {name} has unknown settings {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
    return {name: SETTINGS | trial for name, trial in trials.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of trials; all otherwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=("val", "test"), nargs="+", default=["val"])
    parser.add_argument("--protocol", type=Path, help="YAML: score without labels, too")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    arguments = parser.parse_args()
    trials = trials_of(arguments.trials)
    lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    done = [(SETTINGS | row["settings"], row["seed"], row["split"]) for row in map(json.loads, lines)]
    jobs = [
        (name, settings, seed, arguments)
        for seed in arguments.seeds
        for name, settings in trials.items()
        if name in (arguments.only or trials) and any((settings, seed, split) not in done for split in arguments.split)
    ]
    for part in ("train", "test"):
        images_of(arguments.data / part)
    several = get_context("spawn").Pool(arguments.jobs, maxtasksperchild=20) if arguments.jobs > 1 else nullcontext()
    with several as pool, arguments.rows.open("a") as file:
        for rows in map(run, jobs) if pool is None else pool.imap_unordered(run, jobs, chunksize=1):
            for row in rows:
                if (row["settings"], row["seed"], row["split"]) in done:
                    continue
                file.write(json.dumps(row) + "\n")
                print({key: value for key, value in row.items() if key != "settings"}, flush=True)
            file.flush()


if __name__ == "__main__":
    main()
