"""Forward and backward of EMIM's losses beside the suite's own Barlow Twins and VICReg losses, on the same tensors.

    python benchmarks/objective_speed.py [--threads 1] [--repeats 5] [--sizes 256x128 256x2048] [--output speed.json]

All losses take turns within every repeat, so that a busy machine slows them alike; the figure is the median, on a GPU
between two events of its own clock. Peak memory is what a first call adds to the process (CPU, each in a fork of its
own) or to the allocator (CUDA). The default sizes take some ten minutes on one core, nearly all of it in the suite's
losses at width 8192 and in factorisations of 4096 x 4096. Where there is a GPU, a section of it follows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emim_solo.emim.objective import emim_loss_func, mutual_information
from emim_solo.suite import load_suite

Loss = Callable[[Tensor, Tensor], Tensor]
OURS: dict[str, Loss] = {
    "emim (default: bound)": emim_loss_func,
    "emim objective=exact": partial(emim_loss_func, objective="exact"),
    "mutual_information": mutual_information,
}


def losses() -> dict[str, Loss]:
    load_suite()  # makes solo-learn 1.0.2 importable on today's torch
    from solo.losses import barlow_loss_func, vicreg_loss_func

    return {"barlow (suite)": barlow_loss_func, "vicreg (suite)": vicreg_loss_func, **OURS}


def embeddings(size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """Two correlated views, leaves that ask for gradients."""
    torch.manual_seed(0)
    source, noise = torch.randn(2, *size, device=device)
    return source.requires_grad_(), (source.detach() + noise).requires_grad_()


def seconds(loss: Loss, z1: Tensor, z2: Tensor, calls: int = 1) -> float:
    """Of one forward and backward pass, the mean over `calls`."""

    def step() -> None:
        z1.grad = z2.grad = None
        loss(z1, z2).backward()

    if z1.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def median_seconds(all_losses: dict[str, Loss], size: tuple[int, int], device: str, repeats: int) -> dict[str, Any]:
    z1, z2 = embeddings(size, device)
    # The first call warms up; a short one is repeated until the clock can tell.
    calls = {name: max(1, int(0.05 / seconds(loss, z1, z2))) for name, loss in all_losses.items()}
    times: dict[str, list[float]] = {name: [] for name in all_losses}
    for _ in range(repeats):
        for name, loss in all_losses.items():
            times[name].append(seconds(loss, z1, z2, calls[name]))
    return {name: {"seconds": statistics.median(t), "all_seconds": t} for name, t in times.items()}


def peak_mib(loss: Loss, size: tuple[int, int], device: str) -> float:
    """Memory in MiB that one forward and backward pass needs beyond its inputs."""
    if device == "cuda":
        return added_mib(loss, size, device)
    # A fork's high-water mark starts at what it has, not at the peak of the imports.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(added_mib, (loss, size, device))


def added_mib(loss: Loss, size: tuple[int, int], device: str) -> float:
    seconds(loss, *embeddings((8, 4), device))  # libraries allocate their buffers on first use
    z1, z2 = embeddings(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(loss, z1, z2)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds(loss, z1, z2)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return added / (2**20 if sys.platform == "darwin" else 2**10)


def parse_size(text: str) -> tuple[int, int]:
    samples, _, dimension = text.partition("x")
    return int(samples), int(dimension)


def section(device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a device's table and returns its rows."""
    all_losses = losses()
    # Memory first: threads that a timing has started do not survive a fork.
    peaks = {size: {name: peak_mib(f, size, device) for name, f in all_losses.items()} for size in args.sizes}
    on_cpu = f"{platform.processor() or platform.machine()}, {args.threads} thread(s)"
    processor = torch.cuda.get_device_name() if device == "cuda" else on_cpu
    print(f"torch {torch.__version__}, {processor}, float32, median of {args.repeats}")
    print(f"{'N x d':>12}  {'loss':<22}{'ms':>10}{'x barlow':>10}{'x vicreg':>10}{'peak MiB':>10}  x: times faster")
    rows = []
    for size in args.sizes:
        measured = median_seconds(all_losses, size, device, args.repeats)
        barlow, vicreg = (measured[f"{name} (suite)"]["seconds"] for name in ("barlow", "vicreg"))
        for name, row in measured.items():
            taken, peak = row["seconds"], peaks[size][name]
            print(
                f"{size[0]:>5} x {size[1]:<4}  {name:<22}{taken * 1e3:>10.2f}{barlow / taken:>10.1f}"
                f"{vicreg / taken:>10.1f}{peak:>10.1f}",
                flush=True,
            )
            at = {"processor": processor, "samples": size[0], "dimension": size[1]}
            rows.append({**at, "loss": name, "peak_mib": peak, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", choices=("cpu", "cuda"), nargs="+", default=devices, help="all there are")
    default_sizes = [(256, 128), (256, 2048), (1024, 2048), (256, 8192), (4096, 2048)]
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=default_sizes, metavar="NxD")
    parser.add_argument("--output", type=Path, help="JSON of the raw figures")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    rows = [row for device in args.devices for row in section(device, args)]
    if args.output:
        args.output.write_text(
            json.dumps({"torch": torch.__version__, "repeats": args.repeats, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
