"""Forward and backward of EMIM's losses beside those of the suite (solo-learn) and of lightly, on the same tensors.

    python benchmarks/objective_speed.py [--threads 1] [--rounds 1] [--sizes 2x256x128 20x100x1024] [--output speed.json]

A size is K x N x d: views, samples, dimensions. All losses of a size take turns, and in a round each has each place of a
turn once, so that neither a busy machine nor the order favours one. The figure is the median over the turns: of the
processor's time, which other processes change less than the clock's, on a GPU between two events of its own clock. Peak
memory is what a first call adds to the process (CPU, each in a fork of its own) or to the allocator (CUDA). The default
sizes take some fifteen minutes on one core, most of it in Barlow Twins and VICReg at width 8192. Where there is a GPU, a
section of it follows. lightly is a development dependency.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightly.loss import BarlowTwinsLoss, EMPSSLLoss, FroSSLLoss, LeJEPALoss, MMCRLoss
from torch import Tensor
from torch.nn.functional import normalize

from emim_solo.emim.objective import emim_loss_func, mutual_information
from emim_solo.suite import load_suite

Loss = Callable[..., Tensor]
Size = tuple[int, int, int]
OURS = "emim (default: bound)"
TWO_VIEWS: dict[str, Loss] = {
    "emim objective=exact": partial(emim_loss_func, objective="exact"),
    "mutual_information": mutual_information,
}


def frossl(*views: Tensor) -> Tensor:
    return FroSSLLoss()(list(views))


def emp_ssl(*views: Tensor) -> Tensor:
    return EMPSSLLoss()(list(views))


def lejepa(*views: Tensor) -> Tensor:
    z, large = torch.stack(views), min(2, len(views) - 1)  # lightly requires a small view
    return LEJEPA(local_proj=z[large:], global_proj=z[:large])


def mmcr(*views: Tensor) -> Tensor:
    z, half = normalize(torch.stack(views, 1), dim=-1), len(views) // 2
    return MMCRLoss()(z[:, :half], z[:, half:])


def mmcr_by_values(*views: Tensor) -> Tensor:
    """MMCR from singular values only: no term of weight 0.005, and none of the singular vectors that lightly computes."""
    return -torch.linalg.matrix_norm(normalize(torch.stack(views), dim=-1).mean(0), ord="nuc")


LEJEPA = LeJEPALoss()
MANY_VIEWS: dict[str, Loss] = {
    "frossl (lightly)": frossl,
    "mmcr (lightly)": mmcr,
    "mmcr, values alone": mmcr_by_values,
    "lejepa (lightly)": lejepa,
    "emp-ssl (lightly)": emp_ssl,
}


def losses(views: int, samples: int) -> dict[str, Loss]:
    """The losses to compare: losses of K views for at most 100 samples, losses of two views for two views."""
    found: dict[str, Loss] = {OURS: emim_loss_func}
    if samples <= 100:
        found |= MANY_VIEWS
    if views == 2:
        load_suite()  # makes solo-learn 1.0.2 importable with a current torch
        from solo.losses import barlow_loss_func, vicreg_loss_func

        suite = {"barlow (suite)": barlow_loss_func, "vicreg (suite)": vicreg_loss_func}
        found |= {**suite, "barlow (lightly)": BarlowTwinsLoss(), **TWO_VIEWS}
    return found


def embeddings(size: Size, device: str) -> list[Tensor]:
    """Correlated views as leaf tensors with gradients."""
    torch.manual_seed(0)
    views, *shape = size
    source = torch.randn(shape, device=device)
    return [(source + torch.randn(shape, device=device)).requires_grad_() for _ in range(views)]


def seconds(loss: Loss, views: list[Tensor], calls: int = 1) -> float:
    """Seconds of one forward and backward pass, mean over `calls`."""

    def step() -> None:
        for view in views:
            view.grad = None
        loss(*views).backward()

    if views[0].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - begin) / calls


def median_seconds(all_losses: dict[str, Loss], size: Size, device: str, rounds: int) -> dict[str, Any]:
    views = embeddings(size, device)
    # The first call is a warm-up. Short calls are repeated to about 0.05 s for a precise time.
    calls = {name: max(1, int(0.05 / seconds(loss, views))) for name, loss in all_losses.items()}
    times: dict[str, list[float]] = {name: [] for name in all_losses}
    names = list(all_losses)
    for turn in range(rounds * len(names)):
        first = turn % len(names)  # each loss has each position once
        for name in names[first:] + names[:first]:
            times[name].append(seconds(all_losses[name], views, calls[name]))
    return {name: {"seconds": statistics.median(t), "all_seconds": t} for name, t in times.items()}


def peak_mib(loss: Loss, size: Size, device: str) -> float:
    """Memory in MiB that one forward and backward pass needs beyond its inputs."""
    if device == "cuda":
        return added_mib(loss, size, device)
    # A fork's peak starts at its current memory, not at the peak during the imports.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(added_mib, (loss, size, device))


def added_mib(loss: Loss, size: Size, device: str) -> float:
    seconds(loss, embeddings((size[0], 8, 4), device))  # libraries allocate their buffers on first use
    views = embeddings(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(loss, views)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds(loss, views)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return added / (2**20 if sys.platform == "darwin" else 2**10)


def parse_size(text: str) -> Size:
    views, samples, dimension = map(int, text.split("x"))
    return views, samples, dimension


def section(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Print the table of a device and yield its rows."""
    all_losses = {size: losses(*size[:2]) for size in args.sizes}
    # Memory first: threads that the timing starts do not survive a fork.
    peaks = {size: {name: peak_mib(f, size, device) for name, f in all_losses[size].items()} for size in args.sizes}
    on_cpu = f"{platform.processor() or platform.machine()}, {args.threads} thread(s)"
    processor = torch.cuda.get_device_name() if device == "cuda" else on_cpu
    print(f"torch {torch.__version__}, {processor}, float32, medians")
    print(f"{'K x N x d':>16}  {'loss':<22}{'ms':>10}{'x emim':>8}{'peak MiB':>10}  x: times EMIM's default")
    for size in args.sizes:
        measured = median_seconds(all_losses[size], size, device, args.rounds)
        for name, row in measured.items():
            taken, peak = row["seconds"], peaks[size][name]
            print(
                f"{' x '.join(map(str, size)):>16}  {name:<22}{taken * 1e3:>10.2f}"
                f"{taken / measured[OURS]['seconds']:>8.2f}{peak:>10.1f}",
                flush=True,
            )
            at = {"processor": processor, "views": size[0], "samples": size[1], "dimension": size[2]}
            yield {**at, "loss": name, "peak_mib": peak, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="of as many turns as there are losses")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", choices=("cpu", "cuda"), nargs="+", default=devices, help="all there are")
    of_two = [(256, 128), (256, 2048), (1024, 2048), (256, 8192), (4096, 2048)]
    default_sizes = [(views, 100, 1024) for views in (2, 8, 20)] + [(2, *size) for size in of_two]
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=default_sizes, metavar="KxNxD")
    parser.add_argument("--output", type=Path, help="JSON of the raw figures")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "load_average": os.getloadavg()[0], "rows": []}
    for row in (row for device in args.devices for row in section(device, args)):
        found["rows"].append(row)
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
