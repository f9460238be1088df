"""The losses of research/out_of_the_box against those of the suite and of lightly."""

from __future__ import annotations

import inspect
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

RESEARCH = Path(__file__).parents[1] / "research"


@pytest.fixture(scope="module")
def methods() -> Any:
    pytest.importorskip("lightly")
    sys.path[:0] = [str(RESEARCH), str(RESEARCH / "out_of_the_box")]
    try:
        import methods

        yield methods
    finally:
        del sys.path[:2]


def _pairs(loss: Any, views: list[torch.Tensor], **kwargs: Any) -> torch.Tensor:
    return torch.stack([loss(a, b, **kwargs) for a, b in combinations(views, 2)]).mean()


@pytest.mark.parametrize(("count", "samples", "dimension"), [(2, 12, 5), (3, 6, 20), (8, 16, 16)])
@pytest.mark.parametrize("name", ["vicreg", "barlow_twins", "simclr", "emp_ssl"])
def test_losses_are_those_of_their_libraries(methods: Any, name: str, count: int, samples: int, dimension: int) -> None:
    """Value and gradient; a loss of two views is the mean over all pairs of views."""
    from emim_solo.suite import load_suite

    load_suite()
    import rivals
    from solo.losses.barlow import barlow_loss_func
    from solo.losses.simclr import simclr_loss_func
    from solo.losses.vicreg import vicreg_loss_func

    def simclr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if "indexes" not in inspect.signature(simclr_loss_func).parameters:  # 1.0.2
            return simclr_loss_func(a, b, temperature=0.5)
        return simclr_loss_func(torch.cat((a, b)), torch.arange(samples).repeat(2), temperature=0.5)

    theirs = {
        "vicreg": lambda z: _pairs(vicreg_loss_func, z),
        "barlow_twins": lambda z: _pairs(barlow_loss_func, z, lamb=0.0051, scale_loss=0.024),
        "simclr": lambda z: _pairs(simclr, z),
        "emp_ssl": lambda z: rivals.emp_ssl(*z),
    }[name]
    torch.manual_seed(0)
    common = torch.randn(samples, dimension)
    one = [(common + torch.randn(samples, dimension)).requires_grad_() for _ in range(count)]
    other = [view.detach().clone().requires_grad_() for view in one]
    ours, reference = getattr(methods, name)(*one), theirs(other)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    ours.backward()
    reference.backward()
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("count", "samples", "dimension"), [(2, 12, 5), (3, 6, 20)])
def test_mmcr_is_the_information_of_the_noisy_mean_averaged_over_all_noise(
    methods: Any, count: int, samples: int, dimension: int
) -> None:
    """By quadrature over the noise e, with the weight e^(-1/2) / pi; the candidate's residual in the same way."""
    import candidates
    from scipy.integrate import quad

    torch.manual_seed(0)
    views = [torch.randn(samples, dimension) + torch.arange(dimension) for _ in range(count)]
    z = torch.nn.functional.normalize(torch.stack(views), dim=-1).double()
    eigenvalues = torch.linalg.svdvals(z.mean(0)).square().numpy()

    def averaged(information: Any) -> float:  # e = exp(t): the integrand is then smooth
        return float(quad(lambda t: information(np.exp(t)) * np.exp(t / 2) / np.pi, -60, 60, limit=500)[0])

    of_mean = averaged(lambda e: 0.5 * np.log1p(eigenvalues / e).sum())
    assert float(methods.mmcr(*views)) == pytest.approx(-of_mean / samples, rel=1e-4)
    r = min(samples, dimension)
    v = float((z - z.mean(0)).square().sum()) / (samples * (count - 1))
    of_noise = averaged(lambda e: 0.5 * r * np.log1p(v / count / e))
    found = candidates.spanned(*views, entropy="mean", form="root", averaged=True)
    assert float(found) == pytest.approx((of_noise - of_mean * np.sqrt(r / samples)) / r, rel=1e-4)
    z = torch.stack([(view - view.mean(0)) / view.std(0, correction=0) for view in views]).double()
    eigenvalues = torch.linalg.svdvals(z.mean(0)).square().numpy() * r / (samples * dimension)
    found = candidates.spanned(*views, entropy="mean", form="root", weight=0.0, sphere=False)
    assert float(found) == pytest.approx(-averaged(lambda e: 0.5 * np.log1p(eigenvalues / e).sum()) / r, rel=1e-4)


@pytest.mark.parametrize("power", [1 / 3, 1 / 2, 2 / 3])
def test_powers_are_the_information_averaged_with_other_weights(methods: Any, power: float) -> None:
    """By quadrature over the noise e, with the weight e^(power - 1); `pairs` is the mean over the pairs of views."""
    import candidates
    from scipy.integrate import quad

    torch.manual_seed(0)
    views = [torch.randn(8, 5) for _ in range(4)]
    z = torch.nn.functional.normalize(torch.stack(views), dim=-1).double()

    def expected(group: Any) -> float:
        x = torch.linalg.svdvals(group.mean(0)).square().numpy() * 5 / 8
        weight = power * np.sin(np.pi * power) / np.pi
        return -weight * quad(lambda t: np.log1p(x / np.exp(t)).sum() * np.exp(power * t), -60, 60, limit=500)[0] / 5

    assert float(candidates.schatten(*views, power=power)) == pytest.approx(expected(z), rel=1e-4)
    of_pairs = (expected(z[:2]) + expected(z[2:])) / 2
    assert float(candidates.schatten(*views, power=power, pairs=True)) == pytest.approx(of_pairs, rel=1e-4)
    pair = [views[0] + 2, views[1] + 2]  # of two views on the sphere the noise is 1 less their cosine
    noise = 1 - float(torch.nn.functional.cosine_similarity(*pair).mean())
    by_noise = candidates.schatten(*pair, power=noise)
    assert float(candidates.schatten(*pair, power="noise")) == pytest.approx(float(by_noise), rel=1e-4)
    at_least = candidates.schatten(*pair, power=0.9)
    assert noise < 0.9 and float(candidates.schatten(*pair, power="noise", least=0.9)) == pytest.approx(float(at_least))


def test_settings_are_as_drawn() -> None:
    """The committed settings are what the committed seed draws: 40, both halves the same size, within the ranges."""
    pytest.importorskip("lightly")
    sys.path[:0] = [str(RESEARCH / "out_of_the_box")]
    try:
        import draw
    finally:
        del sys.path[:1]
    drawn = draw.settings()
    assert draw.read() == drawn
    assert [one["half"] for one in drawn].count("choose") == len(drawn) / 2 == 20
    for one in drawn:
        assert 64 <= one["dim"] <= 2048 and 32 <= one["batch"] <= 512 and 2 <= one["views"] <= 8
        assert 3e-4 <= one["lr"] <= 3e-2


@pytest.mark.parametrize(("count", "samples", "dimension"), [(2, 40, 5), (4, 6, 20)])
def test_the_noisy_mean_tells_of_its_image(methods: Any, count: int, samples: int, dimension: int) -> None:
    """The candidate of docs/results/out-of-the-box/default.md, term by term from the eigenvalues."""
    import candidates

    torch.manual_seed(0)
    common = torch.randn(samples, dimension)
    views = [(common + torch.randn(samples, dimension)).double() for _ in range(count)]
    r = min(samples, dimension)
    z = torch.nn.functional.normalize(torch.stack(views).float(), dim=-1).double()
    eigenvalues = torch.linalg.svdvals(z.mean(0)).square() * r / samples
    within = (z - z.mean(0)).square().sum() / (samples * (count - 1))
    expected = r / 2 * torch.log(1 + within / count) - torch.log(1 + eigenvalues).sum() / 2
    found = candidates.spanned(*views, entropy="mean", noise=1.0, averaged=True)
    torch.testing.assert_close(found.double(), expected / r, rtol=1e-4, atol=1e-6)


def test_remembered_rows_count_without_gradient_and_up_to_their_number(methods: Any) -> None:
    """NumPy's singular values of this batch's means over those of the batches before; the value is scaled as without memory."""
    import candidates
    import rivals

    samples, dimension, rows = 6, 10, 15
    loss = candidates.Remembered(rows)
    torch.manual_seed(0)
    batches = [[torch.randn(samples, dimension, requires_grad=True) for _ in range(3)] for _ in range(4)]
    means = [np.mean([view.detach() / view.detach().norm(dim=1, keepdim=True) for view in b], axis=0) for b in batches]
    for number, batch in enumerate(batches):
        value = loss(*batch)
        (slope,) = torch.autograd.grad(value, batch[0])
        stacked = np.concatenate(means[number::-1])[:rows]
        scale = (min(stacked.shape) / len(stacked)) ** 0.5 / min(stacked.shape) * len(stacked) / samples
        assert value.item() == pytest.approx(-scale * np.linalg.svd(stacked, compute_uv=False).sum(), rel=1e-5)
        if number == 0:  # no memory yet: MMCR up to a factor, and so its direction
            (own,) = torch.autograd.grad(rivals.mmcr(*batch), batch[0])
            assert torch.nn.functional.cosine_similarity(slope.flatten(), own.flatten(), dim=0) > 0.9999
    assert len(stacked) == rows


def test_a_direction_that_is_remembered_is_worth_less(methods: Any) -> None:
    import candidates

    old, new = torch.eye(8)[:4], torch.eye(8)[4:]
    values = []
    for second in (old, new):
        loss = candidates.Remembered(8)
        loss(old, old)
        values.append(loss(second, second).item())
    assert values[1] < values[0]
