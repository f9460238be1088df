"""Two real processes over gloo give the loss and the gradient of one process on the joined batch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from emim_solo.emim.measures import diagnose, scores
from emim_solo.emim.objective import emim_loss_func, mutual_information, null_mutual_information, random_directions

WORLD = 2
SIZES = {"N over 2d": (24, 5), "N under 2d": (12, 8), "2N under d": (6, 20)}
FUNCTIONS = {
    "default": emim_loss_func,
    "exact": partial(emim_loss_func, objective="exact"),
    "mean": partial(emim_loss_func, objective="mean"),
    **{
        f"{marginal}-{residual}": partial(emim_loss_func, marginal=marginal, residual=residual)
        for marginal in ("exact", "series")
        for residual in ("exact", "diagonal", "isotropic")
    },
    "four views": lambda z1, z2: emim_loss_func(z1, z2, z1 + z2, z1 - 2 * z2),
    "four views exact": lambda z1, z2: emim_loss_func(z1, z2, z1 + z2, z1 - 2 * z2, residual="exact"),
    "gaussian": lambda z1, z2: emim_loss_func(
        z1, z2, gaussian_weight=5.0, directions=random_directions(z1.shape[1], 4, seed=1)
    ),
    **{f"mi {form}": partial(mutual_information, form=form) for form in ("primal", "dual", "pooled")},
    "mi centred": partial(mutual_information, standardise=False),
    "null": null_mutual_information,
    "null pooled": partial(null_mutual_information, form="pooled"),
}


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    n, d = size
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    # The processes' halves differ in mean and scale, so that local statistics would not do.
    z[n // 2 :] = 3 * z[n // 2 :] + 1
    return z, z + torch.randn(n, d, generator=generator, dtype=torch.float64)


def model(d: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(d, d, bias=False, dtype=torch.float64)  # a bias is centred away


def value_and_gradients(network: nn.Module, function, z1: Tensor, z2: Tensor) -> list[Tensor]:
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    network.zero_grad()
    # One forward pass over both views, as DistributedDataParallel asks for.
    value = function(*network(torch.cat((z1, z2))).chunk(2))
    value.backward()
    return [value.detach(), z1.grad, z2.grad, *(p.grad.clone() for p in network.parameters())]


def refusals(rank: int) -> dict[str, str]:
    """Bad input on one process only: every process must say so and none may hang, and all can go on."""
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    bad = z.clone()
    bad[0, 0] = torch.nan
    messages = {}
    # After the batches of one sample the first differs in shape on both processes, the third on one.
    steps = (("unequal", z[: 4 - rank]), ("nan", bad if rank else z), ("changed", z[: 4 - rank]), ("nan again", bad))
    for name, mine in steps:
        with pytest.raises((ValueError, FloatingPointError)) as error:
            emim_loss_func(mine, mine)
        messages[name] = f"{type(error.value).__name__}: {error.value}"
    return messages


def gathers_of_each_call() -> list[int]:
    """Collectives in calls of one shape, of another, and of that again."""
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    counts = []
    for batch in (z, z, z[:3], z[:3]):
        with torch.profiler.profile() as profile:
            emim_loss_func(batch, batch)
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "c10d::allgather_"))
    return counts


def of_the_suites_barlow_twins(network: nn.Module, rows_of_one: Tensor) -> list[Tensor]:
    """Its value and gradients in one process, whose rows every process has: local statistics are then the joined batch's."""
    from emim_solo.suite import load_suite

    load_suite()
    from solo.losses.barlow import barlow_loss_func

    return value_and_gradients(network, barlow_loss_func, rows_of_one, rows_of_one.roll(1, 1))


def of_one_process() -> dict[str, float]:
    """Scores and diagnostics of features that one process has."""
    views = torch.stack(inputs((24, 5)), dim=1)
    return {**scores(views), **diagnose(*views.unbind(1))}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # no deprecated collective
        for name, size in SIZES.items():
            z1, z2 = (z.chunk(WORLD)[rank] for z in inputs(size))
            network = nn.parallel.DistributedDataParallel(model(size[1]))
            for function_name, function in FUNCTIONS.items():
                results[name, function_name] = value_and_gradients(network, function, z1, z2)
        one_sample_each = torch.eye(2, 3)[[rank]]
        results["one sample each"] = mutual_information(one_sample_each, one_sample_each)
        results["refusals"] = refusals(rank)
        results["gathers"] = gathers_of_each_call()
        if rank == 0:  # the other one does not take part
            results["alone"] = of_one_process()
    network = nn.parallel.DistributedDataParallel(model(5).float())
    results["barlow twins"] = of_the_suites_barlow_twins(network, inputs(SIZES["N over 2d"])[0].float())
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    # This file as a program: pytest imports it under a name that a spawned process could not import.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in range(WORLD)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_give_the_loss_and_gradient_of_one(two_processes, size, function):
    z1, z2 = inputs(SIZES[size])
    expected = value_and_gradients(model(SIZES[size][1]), FUNCTIONS[function], z1, z2)
    for rank, results in enumerate(two_processes):
        value, grad1, grad2, *parameters = results[size, function]
        close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-12)
        close(value, expected[0])
        # DDP's average over the processes is the one-process gradient of the parameters; that of a process's own
        # samples is scaled by the number of processes, for the average to come out right.
        for mine, its in zip((grad1, grad2), expected[1:3], strict=True):
            close(mine / WORLD, its.chunk(WORLD)[rank])
        for mine, its in zip(parameters, expected[3:], strict=True):
            assert its.norm() > 1e-6
            close(mine, its)


def test_the_suites_barlow_twins_has_a_share_of_the_gradient(two_processes):
    """What docs/distributed.md and the note under a benchmark's table say of it: if this fails, the suite has mended it."""
    value, _, _, gradient = of_the_suites_barlow_twins(model(5).float(), inputs(SIZES["N over 2d"])[0].float())
    for results in two_processes:
        mine = results["barlow twins"]
        torch.testing.assert_close(mine[0], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine[3] * WORLD, gradient, rtol=1e-3, atol=1e-5)


def test_one_sample_on_each_process_is_a_batch_of_two(two_processes):
    joined = torch.eye(2, 3)
    expected = mutual_information(joined, joined)
    assert expected > 0
    for results in two_processes:
        torch.testing.assert_close(results["one sample each"], expected)


def test_bad_input_of_one_process_is_refused_by_all(two_processes):
    for results in two_processes:
        messages = results["refusals"]
        assert messages["unequal"].startswith("ValueError: every process must hold a batch of the same shape")
        assert "[(4, 3), (3, 3)]" in messages["unequal"]
        assert messages["changed"].startswith(
            "ValueError: every process must hold a batch of the same shape: on rank [1]"
        )
        assert messages["nan again"].endswith("z1 holds 2 and z2 holds 2")
        assert messages["nan"] == "FloatingPointError: NaN or Inf among 24 values: z1 holds 1 and z2 holds 1"


def test_scores_and_diagnostics_are_of_the_features_of_one_process(two_processes):
    assert two_processes[0]["alone"] == pytest.approx(of_one_process(), nan_ok=True)


def test_shapes_are_compared_only_when_they_change(two_processes):
    for results in two_processes:
        assert results["gathers"] == [1, 1, 3, 1]


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
