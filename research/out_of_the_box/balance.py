"""What a method's weights mean: its price of a lost dimension against its price of disagreement, without any training.

    python research/out_of_the_box/balance.py [--share 0.5] [--candidate NAME='{key: value}' ...]

Embeddings are drawn: d independent Gaussian dimensions, of which a share v of the variance differs between the views of an
image. Two changes are made to them. One moves a share t of each image's variance into one common direction, which is the first
step of a collapse. The other raises v. The number in the table is the slope of the loss along the first over its slope along the
second. A method with one number in all rows weighs both alike whatever the dimension, the batch and the number of views are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))

import torch
from methods import METHODS
from torch import Tensor

SHAPES = [
    (2, 64, 64),
    (2, 64, 512),
    (2, 256, 64),
    (2, 256, 256),
    (2, 256, 2048),
    (8, 64, 64),
    (8, 64, 512),
    (8, 32, 2048),
]
STEP = 0.02


def views(count: int, samples: int, d: int, share: Tensor, lost: Tensor, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(samples, d, generator=generator)
    direction = torch.randn(d, generator=generator)
    direction = direction / direction.norm() * d**0.5
    common = (1 - lost).sqrt() * common + lost.sqrt() * torch.randn(samples, 1, generator=generator) * direction
    own = [torch.randn(samples, d, generator=generator) for _ in range(count)]
    return [(1 - share).sqrt() * common + share.sqrt() * one for one in own]


def balance(loss: Callable[..., Any], count: int, samples: int, d: int, share: float, draws: int = 3) -> float:
    """Slope of the loss along a lost dimension, divided by its slope along disagreement."""
    slopes = torch.zeros(2)
    for seed in range(draws):
        v, t = torch.tensor(share, requires_grad=True), torch.tensor(STEP, requires_grad=True)
        torch.manual_seed(seed)
        along = torch.autograd.grad(loss(*views(count, samples, d, v, t, seed)), (t, v))
        slopes += torch.stack(along)
    return float(slopes[0] / slopes[1])


def main() -> None:
    from run import candidate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.8, 0.2], help="v: 0.8 when young, 0.2 when trained"
    )
    parser.add_argument("--candidate", nargs="+", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    losses = {name: method.loss for name, method in METHODS.items() if name != "lejepa"}  # lejepa has no fixed scale
    losses |= {name: loss for name, loss, _ in map(candidate, arguments.candidate)}
    shapes = [f"K {count}, N {samples}, d {d}" for count, samples, d in SHAPES]
    for share in arguments.share:
        print(f"\nv = {share}\n\n| method | {' | '.join(shapes)} |\n|---|{'---:|' * len(SHAPES)}")
        for name, loss in losses.items():
            print(f"| {name} | {' | '.join(f'{balance(loss, *shape, share):.2f}' for shape in SHAPES)} |", flush=True)


if __name__ == "__main__":
    main()
