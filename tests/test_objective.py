"""The estimators and losses against explicit covariances, closed forms and plain autograd, in float64."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emim_solo.emim import theory
from emim_solo.emim.objective import (
    _Gram,
    emim_loss_func,
    entropies,
    epps_pulley,
    log_det,
    mutual_information,
    null_mutual_information,
    random_directions,
)

FAMILY = [
    {"objective": "exact"},
    {"objective": "mean"},
    *(
        {"marginal": marginal, "residual": residual, "weight": weight}
        for marginal, residual, weight in itertools.product(
            ("exact", "series"), ("exact", "diagonal", "isotropic"), (1.0, 4.0)
        )
    ),
]
STANDARDISED = [kwargs for kwargs in FAMILY if kwargs.get("objective") != "mean"]
FORMS = ["primal", "dual", "pooled"]
SIZES = [(40, 6), (24, 16), (12, 17), (8, 40)]  # N >= 2d, d < N < 2d, N < d <= 2N, 2N < d: each its own route


def name_of(kwargs: dict) -> str:
    return "-".join(str(value) for value in kwargs.values())


def pair(n: int, d: int, *, seed: int = 0, noise: float = 0.5, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Two noisy linear views of one source, with means and scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    views = [
        (source + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)) @ mix * scale + shift
        for scale, shift in ((1.0, 3.0), (2.0, -1.0))
    ]
    return views[0].to(dtype), views[1].to(dtype)


def several(count: int, n: int, d: int) -> list[Tensor]:
    """Noisy linear views of one source, the third and later ones noisier."""
    views = [z for seed in range((count + 1) // 2) for z in pair(n, d, noise=0.4 + 0.3 * seed)]
    generator = torch.Generator().manual_seed(7)
    return [z + 0.2 * torch.randn(n, d, generator=generator, dtype=z.dtype) for z in views[:count]]


def poisoned(value: float, count: int) -> Tensor:
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    z.view(-1)[:count] = value
    return z


FINE = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))


def explicit_standardised(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / z.std(0, unbiased=False)


def explicit_mutual_information(z1: Tensor, z2: Tensor, e: float, *, pooled: bool = False) -> Tensor:
    """The definition: covariances written out, torch.logdet, plain autograd."""
    x1, x2 = explicit_standardised(z1), explicit_standardised(z2)
    n, d = x1.shape
    eye = torch.eye(d, dtype=z1.dtype)
    c11, c22, c12 = x1.T @ x1 / n + e * eye, x2.T @ x2 / n + e * eye, x1.T @ x2 / n
    if pooled:
        c11 = c22 = (c11 + c22) / 2
        c12 = (c12 + c12.T) / 2
    joint = torch.cat((torch.cat((c11, c12), 1), torch.cat((c12.T, c22), 1)))
    return (torch.logdet(c11) + torch.logdet(c22) - torch.logdet(joint)) / 2


def explicit_loss(*views: Tensor, e: float, weight: float, marginal: str, residual: str) -> Tensor:
    """The loss from eigenvalues of moments written out: means over views and over pairs of views."""
    x = [explicit_standardised(z) for z in views]
    n, d = x[0].shape
    eye = torch.eye(d, dtype=x[0].dtype)
    c = sum(a.T @ a for a in x) / (n * len(x))
    pairs = list(itertools.permutations(x, 2))
    s = sum(a.T @ b for a, b in pairs) / (n * len(pairs))
    if marginal == "exact":
        entropy = torch.logdet(c + e * eye) / 2
    else:  # two terms about (1 + e) I
        x = torch.linalg.eigvalsh((c - eye) / (1 + e))
        entropy = (d * math.log(1 + e) + x.sum() - x.square().sum() / 2) / 2
    if residual == "exact":
        rest = torch.logdet(c + s + e * eye) + torch.logdet(c - s + e * eye) - torch.logdet(c + e * eye)
    elif residual == "diagonal":
        rest = torch.log(2 * (torch.diagonal(c - s) + e)).sum()
    else:
        rest = d * torch.log(2 * (torch.diagonal(c - s).mean() + e))
    return (weight * rest / 2 - entropy) / d


def of_pairs(x: Tensor) -> Tensor:
    """Epps and Pulley's own sum over pairs of samples, over N, of each column."""
    x = (x - x.mean(0)) / x.std(0, correction=0)
    pairs = torch.exp(-(x[:, None] - x[None]).square() / 2).mean((0, 1))
    return pairs - 2**0.5 * torch.exp(-x.square() / 4).mean(0) + 3**-0.5


SAMPLES = {
    "gaussian": lambda n: torch.randn(n, 5, dtype=torch.float64),
    "uniform": lambda n: torch.rand(n, 5, dtype=torch.float64),
    "signs": lambda n: torch.randn(n, 5, dtype=torch.float64).sign(),
    "heavy": lambda n: torch.randn(n, 5, dtype=torch.float64) ** 3,
    "an outlier": lambda n: torch.cat((torch.randn(n, 5, dtype=torch.float64), torch.full((1, 5), 40.0))),
}


@pytest.mark.parametrize("draw", SAMPLES.values(), ids=SAMPLES)
def test_epps_pulley_is_its_authors_sum_over_pairs(draw):
    torch.manual_seed(0)
    x = 3 * draw(300) - 7
    torch.testing.assert_close(epps_pulley(x), of_pairs(x), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(epps_pulley(x.float()).double(), of_pairs(x), rtol=2e-3, atol=1e-6)
    assert torch.autograd.gradcheck(epps_pulley, x[:20].clone().requires_grad_())


def test_epps_pulley_of_gaussian_samples_and_of_a_point():
    """In the mean (1 - sqrt(3)/2)/N, mean and variance being fitted; a point has the integral of (1 - exp(-t^2/2))^2."""
    torch.manual_seed(0)
    found = 2000 * epps_pulley(torch.randn(2000, 3000)).mean()
    assert found == pytest.approx(1 - 3**0.5 / 2, rel=0.05)
    constant = torch.full((50, 3), 1 / 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(epps_pulley(constant).sum(), constant)
    torch.testing.assert_close(epps_pulley(constant), torch.full((3,), 1 - 2**0.5 + 3**-0.5), rtol=1e-2, atol=0)
    assert (gradient.abs() < 1e-3).all()


def test_directions_are_uniform_and_of_the_seed():
    directions = random_directions(6, 4000, seed=3)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(4000))
    torch.testing.assert_close(directions @ directions.T / 4000, torch.eye(6) / 6, atol=0.01, rtol=0)
    state = torch.get_rng_state()
    assert torch.equal(directions, random_directions(6, 4000, seed=3))
    assert not torch.equal(directions, random_directions(6, 4000, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kwargs", [{}, {"objective": "exact"}], ids=["bound", "exact"])
def test_the_gaussian_weight_adds_the_statistic_of_the_pooled_views(kwargs):
    z1, z2 = pair(60, 5)
    directions = random_directions(5, 7, seed=0)
    pooled = torch.cat([(z - z.mean(0)) / z.std(0, correction=0) for z in (z1, z2)])
    added = emim_loss_func(z1, z2, gaussian_weight=3.0, directions=directions, **kwargs) - emim_loss_func(
        z1, z2, **kwargs
    )
    torch.testing.assert_close(added, 3 * of_pairs(pooled @ directions.double()).mean(), rtol=1e-5, atol=1e-8)


def test_the_gaussian_weight_makes_embeddings_gaussian():
    """Signs in, steps down the gradient: the statistic of directions never stepped along falls to that of Gaussian samples."""
    torch.manual_seed(0)
    z = (torch.randn(200, 4).sign() + 0.1 * torch.randn(200, 4)).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.05)
    unseen = random_directions(4, 200, seed=10**6)
    before = epps_pulley(z.detach() @ unseen).mean()
    for step in range(120):
        optimiser.zero_grad()
        directions = random_directions(4, 16, seed=step)
        emim_loss_func(z, z + 0.3 * torch.randn(200, 4), gaussian_weight=100.0, directions=directions).backward()
        optimiser.step()
    after = epps_pulley(z.detach() @ unseen).mean()
    assert before > 5e-3
    assert after < 1e-3


def test_a_gaussian_weight_without_directions_is_refused():
    z = torch.randn(8, 3)
    with pytest.raises(ValueError, match="needs directions"):
        emim_loss_func(z, z, gaussian_weight=1.0)
    with pytest.raises(ValueError, match="gaussian_weight must be a finite number of at least 0, got -1"):
        emim_loss_func(z, z, gaussian_weight=-1)


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("e", [0.1, 1e-3])
def test_value_and_gradient_are_those_of_explicit_covariances(form, size, e):
    z1, z2 = pair(*size)
    ours = value_and_gradients(lambda a, b: mutual_information(a, b, form=form, noise_variance=e), z1, z2)
    oracle = value_and_gradients(lambda a, b: explicit_mutual_information(a, b, e, pooled=form == "pooled"), z1, z2)
    for mine, its in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_dual_equals_primal_and_auto(size):
    z1, z2 = pair(*size)
    primal, dual, auto = (mutual_information(z1, z2, form=form) for form in ("primal", "dual", "auto"))
    torch.testing.assert_close(dual, primal, rtol=1e-6, atol=0)
    torch.testing.assert_close(auto, primal, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_pooled_equals_primal_for_exchangeable_views(size):
    # Every pair in both orders: the two views have the same moments and a symmetric cross-covariance.
    z1, z2 = pair(*size)
    both, swapped = torch.cat((z1, z2)), torch.cat((z2, z1))
    expected = mutual_information(both, swapped, form="primal")
    torch.testing.assert_close(mutual_information(both, swapped, form="pooled"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["primal", "pooled"])
def test_mi_of_correlated_gaussians_is_the_closed_form(form):
    n, d, rho = 200_000, 3, 0.8
    generator = torch.Generator().manual_seed(0)
    z1, other = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    z2 = rho * z1 + math.sqrt(1 - rho**2) * other
    expected = theory.correlated_gaussian_mutual_information(rho, d)
    assert mutual_information(z1, z2, form=form, noise_variance=1e-9).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_noise_adds_to_both_views(form):
    # With the noise in the covariance, the closed form of theory is the estimator's value.
    z1, z2 = pair(60, 4)
    joint = torch.cat((explicit_standardised(z1), explicit_standardised(z2)), 1)
    for e in (0.01, 0.1, 1.0):
        covariance = joint.T @ joint / len(joint) + e * torch.eye(8, dtype=joint.dtype)
        expected = theory.gaussian_mutual_information(covariance.numpy(), 4)
        assert mutual_information(z1, z2, form=form, noise_variance=e).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_mi_is_invariant_under_invertible_maps_as_the_noise_vanishes(form):
    z1, z2 = pair(100, 5)
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    gaps = []
    for e in (0.1, 1e-4, 1e-10):
        before = mutual_information(z1, z2, form=form, noise_variance=e)
        after = mutual_information(z1 @ maps[0], z2 @ maps[1], form=form, noise_variance=e)
        gaps.append(abs((after - before) / before).item())
    assert gaps[0] > 10 * gaps[1]
    assert gaps[2] < 1e-6


def test_without_standardisation_features_are_centred_but_keep_their_scale():
    z1, z2 = pair(50, 4)
    x1, x2 = z1 - z1.mean(0), z2 - z2.mean(0)
    for form in FORMS:
        given = mutual_information(z1, z2, standardise=False, form=form)
        torch.testing.assert_close(mutual_information(x1, x2, standardise=False, form=form), given)
        assert given > mutual_information(z1 / 10, z2 / 10, standardise=False, form=form) + 0.1
        x = [explicit_standardised(z) for z in (z1, z2)]
        torch.testing.assert_close(
            mutual_information(*x, standardise=False, form=form), mutual_information(z1, z2, form=form)
        )


def test_views_are_interchangeable_and_samples_unordered():
    z1, z2 = pair(30, 8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for form in FORMS:
        value = mutual_information(z1, z2, form=form)
        torch.testing.assert_close(mutual_information(z2, z1, form=form), value)
        torch.testing.assert_close(mutual_information(z1[order], z2[order], form=form), value)


# --- the small-sample bias ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "e", "expected"),
    [(256, 64, 0.1, 7.9), (256, 128, 0.01, 66.6), (256, 128, 0.1, 35.3), (1024, 64, 0.01, 2.06), (256, 2048, 0.1, 461)],
)
def test_independent_views_have_the_measured_small_sample_bias(n, d, e, expected):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, n, d, generator=generator)
    assert mutual_information(z1, z2, noise_variance=e).item() == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(("form", "samples_per_bias"), [("auto", 1), ("pooled", 2)])
def test_independent_views_have_null_mi_and_pooling_halves_it(form, samples_per_bias):
    n, d = 4096, 64
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    kwargs = {"form": form, "noise_variance": 1e-6}
    expected = d**2 / (2 * n) / samples_per_bias
    value, null = mutual_information(z1, z2, **kwargs).item(), null_mutual_information(z1, z2, **kwargs).item()
    assert value == pytest.approx(expected, rel=0.1)
    assert null == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_null_is_the_mi_of_rolled_pairs_and_lies_under_that_of_true_pairs(form):
    z1, z2 = pair(64, 8)
    null = null_mutual_information(z1, z2, form=form)
    torch.testing.assert_close(null, mutual_information(z1, z2.roll(1, 0), form=form))
    assert null < mutual_information(z1, z2, form=form) - 1


# --- the family of losses -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residual", ["exact", "diagonal", "isotropic"])
@pytest.mark.parametrize("marginal", ["exact", "series"])
def test_bound_and_its_gradient_are_those_of_explicit_covariances(count, size, marginal, residual):
    views = several(count, *size)
    kwargs = {"marginal": marginal, "residual": residual, "weight": 3.0}
    ours = value_and_gradients(partial(emim_loss_func, noise_variance=0.2, **kwargs), *views)
    oracle = value_and_gradients(partial(explicit_loss, e=0.2, **kwargs), *views)
    for mine, its in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)


# Views, samples, dimensions: pooled samples over and under the dimensions, N over and under d, matrices of one strip, of
# several and of strips that do not fill the last.
MANY_VIEWS = [(20, 25, 64), (20, 6, 200), (8, 10, 120), (2, 300, 270), (2, 170, 530), (5, 70, 300), (3, 400, 280)]


def crops(count: int, n: int, d: int) -> list[Tensor]:
    """Two large views of one source; the small ones that follow show it less and in a scale of their own."""
    generator = torch.Generator().manual_seed(count)
    source = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, n, d, generator=generator, dtype=torch.float64)
    return [source + 0.3 * e if k < 2 else 0.2 * (source + 1.5 * e) - 1 for k, e in enumerate(noise)]


def loss_by_numpy(views: list[Tensor], e: float, weight: float) -> float:
    """The default loss from its definition: C the mean over views, S over pairs of views, written out one by one."""
    x = [(z - z.mean(0)) / z.std(0) for z in (view.numpy() for view in views)]
    n, d = x[0].shape
    c = np.mean([a.T @ a / n for a in x], axis=0)
    s = np.mean([(a.T @ b + b.T @ a) / (2 * n) for a, b in itertools.combinations(x, 2)], axis=0)
    deviation = (c - np.eye(d)) / (1 + e)
    entropy = (d * np.log(1 + e) + np.trace(deviation) - np.trace(deviation @ deviation) / 2) / 2
    return (weight * d / 2 * np.log(2 * (np.trace(c - s) / d + e)) - entropy) / d


@pytest.mark.parametrize("size", MANY_VIEWS, ids=str)
def test_the_loss_of_many_views_and_its_slopes_are_those_of_the_definition(size):
    views = crops(*size)
    value, *gradients = value_and_gradients(partial(emim_loss_func, noise_variance=0.2, weight=3.0), *views)
    assert value.item() == pytest.approx(loss_by_numpy(views, 0.2, 3.0), rel=1e-10)
    for k in {0, 1, size[0] - 1}:  # large and small views; along the gradient, so that the slope is its norm squared
        step = 1e-4 * gradients[k] / gradients[k].norm()
        ends = [loss_by_numpy([*views[:k], views[k] + sign * step, *views[k + 1 :]], 0.2, 3.0) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(gradients[k].norm().item(), rel=1e-4)


@pytest.mark.parametrize("size", MANY_VIEWS, ids=str)
@pytest.mark.parametrize("marginal", ["series", "exact"])
@pytest.mark.parametrize("residual", ["isotropic", "diagonal"])
def test_the_float32_gradient_of_many_views_is_that_of_float64_autograd(size, marginal, residual):
    views = [z.float() for z in crops(*size)]  # rounded before either sees them
    kwargs = {"marginal": marginal, "residual": residual, "weight": 3.0}
    _, *found = value_and_gradients(partial(emim_loss_func, noise_variance=0.2, **kwargs), *views)
    oracle = partial(explicit_loss, e=0.2, **kwargs)
    _, *expected = value_and_gradients(oracle, *(z.double() for z in views))
    found, expected = torch.stack(found).double(), torch.stack(expected)
    assert (found - expected).norm() < 1.5e-6 * expected.norm()


def test_exact_objective_is_the_negative_mi_per_dimension():
    z1, z2 = pair(40, 6)
    expected = -mutual_information(z1, z2, noise_variance=0.3) / 6
    torch.testing.assert_close(emim_loss_func(z1, z2, objective="exact", noise_variance=0.3), expected)


@pytest.mark.parametrize("size", SIZES)
def test_exact_members_at_weight_1_are_the_negative_pooled_mi_per_dimension(size):
    z1, z2 = pair(*size)
    loss = emim_loss_func(z1, z2, marginal="exact", residual="exact", weight=1.0)
    torch.testing.assert_close(loss * size[1], -mutual_information(z1, z2, form="pooled"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("e", [0.01, 1.0])
def test_residual_bounds_are_ordered_under_the_pooled_mi(size, noise, e):
    z1, z2 = pair(*size, noise=noise)
    kwargs = {"marginal": "exact", "weight": 1.0, "noise_variance": e}
    isotropic, diagonal = (-emim_loss_func(z1, z2, residual=r, **kwargs) * size[1] for r in ("isotropic", "diagonal"))
    exact = mutual_information(z1, z2, form="pooled", noise_variance=e)
    assert isotropic <= diagonal + 1e-9
    assert diagonal <= exact + 1e-9
    # Strict where the difference of the views is correlated and its features differ.
    assert isotropic < exact - 1e-6


def test_series_climbs_out_of_a_near_collapse():
    # Features that are almost copies of one another: the largest eigenvalue of C is near d, far outside the
    # radius of convergence about the identity.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 1, generator=generator, dtype=torch.float64).expand(64, 12)
    z = (z + 0.05 * torch.randn(64, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    entropies, losses = [], []
    optimiser = torch.optim.SGD([z], lr=2.0)
    for step in range(201):
        loss = emim_loss_func(z, z, weight=0.0)
        if step % 50 == 0:
            losses.append(loss.item())
            entropies.append(-emim_loss_func(z, z, marginal="exact", weight=0.0).item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert entropies == sorted(entropies)
    assert losses == sorted(losses, reverse=True)
    assert entropies[-1] > entropies[0] + 0.05


@pytest.mark.parametrize("kwargs", FAMILY, ids=name_of)
def test_agreement_beats_shuffled_pairs(kwargs):
    agreeing, _ = agreeing_and_collapsed()
    shuffled = emim_loss_func(agreeing[0], agreeing[1].roll(1, 0), **kwargs)
    assert emim_loss_func(*agreeing, **kwargs) < shuffled - 0.1


@pytest.mark.parametrize("kwargs", [k for k in FAMILY if k.get("residual") != "exact" or k["weight"] == 1], ids=name_of)
def test_agreement_beats_collapse(kwargs):
    agreeing, collapsed = agreeing_and_collapsed()
    assert emim_loss_func(*agreeing, **kwargs) < emim_loss_func(*collapsed, **kwargs) - 0.01
    constant = torch.ones_like(agreeing[0])
    same = emim_loss_func(agreeing[0], agreeing[0], **kwargs)
    assert same < emim_loss_func(constant, constant, **kwargs) - 0.1


def agreeing_and_collapsed() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Spread features, and copies of one of them, under the same noise."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(256, 8, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(2, 256, 8, generator=generator, dtype=torch.float64)
    line = z[:, :1].expand(256, 8)
    return (z + noise[0], z + noise[1]), (line + noise[0], line + noise[1])


@pytest.mark.parametrize("e", [0.01, 0.1, 1.0])
def test_exact_residual_prefers_collapse_only_above_the_documented_weight(e):
    z, _ = pair(200, 5)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)).T)
    constant = torch.ones_like(z)
    limit = math.log(1 + 1 / e) / math.log((2 + e) / (1 + e))
    for weight, sign in ((limit - 0.01, -1), (limit + 0.01, 1)):
        kwargs = {"marginal": "exact", "residual": "exact", "weight": weight, "noise_variance": e}
        assert sign * (emim_loss_func(z, z, **kwargs) - emim_loss_func(constant, constant, **kwargs)) > 0


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("size", [(24, 16), (8, 40)])
def test_the_mean_tells_of_itself_through_all_noise(count, size):
    """Quadrature of the Gaussian channel's information over its noise e, weight e^(-1/2) / pi; gradient by differences."""
    views = several(count, *size)
    on_the_sphere = np.stack([z / np.linalg.norm(z, axis=1, keepdims=True) for z in views]) * size[1] ** 0.5
    c = on_the_sphere.mean(0) - on_the_sphere.mean((0, 1))
    eigenvalues = np.linalg.eigvalsh(c.T @ c / len(c)).clip(0)

    def integrand(t):  # e = exp(t)
        return 0.5 * np.log1p(eigenvalues / np.exp(t)).sum() * np.exp(t / 2) / np.pi

    expected = -quad(integrand, -70, 70, limit=1000)[0] / size[1]
    assert emim_loss_func(*views, objective="mean").item() == pytest.approx(expected, rel=1e-5)
    z = views[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: emim_loss_func(x, *views[1:], objective="mean"), z, rtol=1e-3)


def test_the_information_of_the_mean_knows_no_length_and_zeros_have_none():
    views = several(3, 20, 6)
    value, *gradients = value_and_gradients(partial(emim_loss_func, objective="mean"), *views)
    longer = [z * torch.linspace(0.1, 50, 20, dtype=z.dtype)[:, None] for z in views]
    torch.testing.assert_close(emim_loss_func(*longer, objective="mean"), value)
    for z, gradient in zip(views, gradients, strict=True):
        assert (z * gradient).sum(1).abs().max() < 1e-12 < gradient.abs().max(), "along the sphere"
    zeros = [torch.cat((z, torch.zeros(4, 6))) for z in views]
    for found in value_and_gradients(partial(emim_loss_func, objective="mean"), *zeros):
        assert found.isfinite().all()
    same = torch.ones(8, 6, dtype=torch.float64)
    assert emim_loss_func(same, same, objective="mean").abs() < 1e-12


def test_the_information_of_the_mean_is_lightlys_mmcr_of_views_and_their_opposites():
    """Opposites centre the batch and leave the singular values as they are, but for sqrt 2."""
    mmcr = pytest.importorskip("lightly.loss").MMCRLoss(0.0)
    first, second = (torch.nn.functional.normalize(z) for z in several(2, 20, 6))
    theirs = mmcr(first[:, None], second[:, None]).item()
    ours = emim_loss_func(*(torch.cat((3 * z, -z)) for z in (first, second)), objective="mean").item()
    assert ours == pytest.approx(theirs / (20 * 6) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("kwargs", FAMILY, ids=name_of)
def test_descent_on_the_loss_raises_mutual_information(kwargs):
    z1, z2 = (z.requires_grad_() for z in pair(64, 6, noise=1.5))
    before = mutual_information(z1, z2).item()
    optimiser = torch.optim.Adam([z1, z2], lr=0.05)
    for _ in range(30):
        optimiser.zero_grad()
        emim_loss_func(z1, z2, **kwargs).backward()
        optimiser.step()
    assert mutual_information(z1, z2).item() > before + 0.5


@pytest.mark.parametrize("kwargs", FAMILY, ids=name_of)
def test_the_layout_of_embeddings_in_memory_plays_no_part(kwargs):
    views = pair(40, 6)
    expected = value_and_gradients(partial(emim_loss_func, **kwargs), *views)
    columns = [z.T.contiguous().T for z in views]
    slices = torch.stack(views, dim=1).unbind(1)
    for others in (columns, slices, [views[0], columns[1]]):
        leaves = [z.detach().requires_grad_() for z in others]
        value = emim_loss_func(*leaves, **kwargs)
        for mine, its in zip((value, *torch.autograd.grad(value, leaves)), expected, strict=True):
            torch.testing.assert_close(mine, its)


# --- more than two views --------------------------------------------------------------------------


def test_exact_objective_of_several_views_is_the_mean_over_their_pairs():
    views = several(4, 40, 6)
    expected = [explicit_mutual_information(a, b, 0.1) for a, b in itertools.combinations(views, 2)]
    assert emim_loss_func(*views, objective="exact").item() == pytest.approx(-sum(expected).item() / 6 / 6, rel=1e-6)


@pytest.mark.parametrize("kwargs", FAMILY, ids=name_of)
def test_several_views_are_unordered_and_agreement_beats_shuffled_pairs(kwargs):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(256, 8, generator=generator, dtype=torch.float64)
    views = list(z + 0.3 * torch.randn(4, 256, 8, generator=generator, dtype=torch.float64))
    agreeing = emim_loss_func(*views, **kwargs)
    torch.testing.assert_close(emim_loss_func(*reversed(views), **kwargs), agreeing)
    shuffled = [view.roll(shift, 0) for shift, view in enumerate(views)]
    assert agreeing < emim_loss_func(*shuffled, **kwargs) - 0.1


def test_a_bad_view_among_several_is_named():
    with pytest.raises(ValueError, match=r"z1 and z2 and z3 must have one shape, got .* and \(10, 3\)"):
        emim_loss_func(FINE, FINE, FINE[:, :3])
    with pytest.raises(FloatingPointError, match=r"NaN or Inf among 40 values: z3 holds 2$"):
        emim_loss_func(FINE, FINE, poisoned(math.nan, 2))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", FAMILY, ids=name_of)
@pytest.mark.parametrize("size", [(12, 3), (5, 7)])
def test_gradcheck_of_the_losses(kwargs, size):
    z1, z2 = (z.requires_grad_() for z in pair(*size))
    assert torch.autograd.gradcheck(lambda a, b: emim_loss_func(a, b, **kwargs), (z1, z2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("function", [mutual_information, null_mutual_information])
def test_gradcheck_of_mutual_information(function, form, standardise):
    z1, z2 = (z.requires_grad_() for z in pair(6, 4))
    assert torch.autograd.gradcheck(partial(function, form=form, standardise=standardise), (z1, z2))


@pytest.mark.parametrize("stack", [(), (3,)])
def test_closed_form_gradients_are_autograds(stack):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*stack, 300, 350, generator=generator, dtype=torch.float64)  # two strips of a product
    weights = torch.randn(*stack, 300, 300, generator=generator, dtype=torch.float64)
    definite = x @ x.mT + torch.eye(300, dtype=torch.float64)
    for ours, oracle, at in (
        (lambda a: (_Gram.apply(a) * weights).sum(), lambda a: (a @ a.mT * weights).sum(), x),
        (
            lambda m: (log_det(m) * weights[..., 0, 0]).sum(),
            lambda m: (torch.logdet(m) * weights[..., 0, 0]).sum(),
            definite,
        ),
    ):
        for mine, its in zip(value_and_gradients(ours, at), value_and_gradients(oracle, at), strict=True):
            torch.testing.assert_close(mine, its)


# --- on a GPU, in torch.compile; what is refused ----------------------------------------------------

EVERY_PATH = {
    **{name_of(kwargs): partial(emim_loss_func, **kwargs) for kwargs in FAMILY if kwargs.get("weight", 4.0) == 4.0},
    **{form: partial(mutual_information, form=form) for form in FORMS},
    "centred": partial(mutual_information, standardise=False),
    "null": null_mutual_information,
    "gaussian": lambda z1, z2: emim_loss_func(
        z1, z2, gaussian_weight=2.0, directions=torch.eye(7, 3, device=z1.device)
    ),
}
every_path = pytest.mark.parametrize("function", EVERY_PATH.values(), ids=EVERY_PATH)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)  # any graph break is an error


@every_path
def test_compiles_without_a_graph_break(function):
    views = pair(12, 7)
    found, expected = value_and_gradients(compiled(function), *views), value_and_gradients(function, *views)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)


def gradients_without_the_engine(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Autograd's own nodes, called one by one: the engine that does it asks for a real GPU where a tensor says "cuda"."""
    nodes, gradients = [], {value.grad_fn: {value.output_nr: torch.ones_like(value)}}

    def collect(node):
        if node is not None and node not in nodes:
            for earlier, _ in node.next_functions:
                collect(earlier)
            nodes.append(node)

    collect(value.grad_fn)
    found = {}
    for node in reversed(nodes):
        zeros = [torch.zeros(of.shape, dtype=of.dtype, device=of.device) for of in node._input_metadata]
        given = [gradients[node].get(i, zero) for i, zero in enumerate(zeros)]  # as the engine does
        if hasattr(node, "variable"):
            found[id(node.variable)] = given[0]
            continue
        with torch.no_grad():  # as the engine does where no second derivative is asked for
            results = getattr(node, "apply", node)(*given)
        # Our own functions give a None, too, for each option that comes after their tensor.
        for (earlier, i), result in zip(node.next_functions, results if isinstance(results, tuple) else [results]):  # noqa: B905
            if earlier is not None and result is not None:
                result = result.sum_to_size(earlier._input_metadata[i].shape)
                sums = gradients.setdefault(earlier, {})
                sums[i] = sums[i] + result if i in sums else result
    return [found[id(leaf)] for leaf in leaves]


@every_path
def test_no_value_is_read_and_no_device_mixed_on_a_gpu(function):
    leaves = [z.requires_grad_() for z in pair(12, 7)]
    for mine, its in zip(
        gradients_without_the_engine(function(*leaves), leaves),
        torch.autograd.grad(function(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)
    with FakeTensorMode():  # shapes and devices only: a value that is read is an error
        leaves = [torch.randn(12, 7, device="cuda", requires_grad=True) for _ in range(2)]
        value = function(*leaves)
        assert (value.device.type, value.shape) == ("cuda", ())
        for gradient in gradients_without_the_engine(value, leaves):
            assert (gradient.device.type, gradient.shape) == ("cuda", (12, 7))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(value > 0)


@pytest.mark.parametrize("function", [function for name, function in EVERY_PATH.items() if name != "mean"])
def test_second_derivatives_and_torch_func_are_refused(function):
    views = [z.requires_grad_() for z in pair(12, 7)]
    with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph=True"):
        torch.autograd.grad(function(*views), views, create_graph=True)
    with pytest.raises(RuntimeError, match=r"vmap, grad, jvp, jacrev"):
        torch.func.grad(function)(*pair(12, 7))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(function)(*(torch.randn(3, 12, 7) for _ in range(2)))


NO_SIGNAL = pair(300, 16)[0]


@pytest.mark.parametrize(
    ("views", "kwargs"),
    [
        ((poisoned(math.nan, 1), FINE), {}),
        ((FINE, poisoned(-math.inf, 1)), {}),
        ((FINE * 1e30, FINE), {}),
        ((FINE * 1e30, FINE), {"weight": 0.0, "marginal": "exact"}),
        ((poisoned(math.nan, 1), FINE), {"objective": "mean"}),
        ((FINE * 1e30, FINE), {"objective": "mean"}),
        ((NO_SIGNAL.float(), NO_SIGNAL.float()), {"objective": "exact", "noise_variance": 1e-10}),
    ],
    ids=[
        "NaN",
        "Inf",
        "overflow",
        "overflow without a residual",
        "NaN, mean",
        "overflow, mean",
        "not positive definite",
    ],
)
def test_what_no_check_can_refuse_is_nan_with_its_gradient(views, kwargs):
    function = partial(emim_loss_func, **kwargs)
    value, *gradients = value_and_gradients(compiled(function), *views)
    assert value.isnan()
    assert any(gradient.isnan().any() for gradient in gradients)


def test_constant_features_need_no_look_at_them():
    views = [torch.nn.functional.pad(z, (0, 2), value=7.0) for z in pair(100, 5)]
    for mine, its in zip(
        value_and_gradients(compiled(emim_loss_func), *views), value_and_gradients(emim_loss_func, *views), strict=True
    ):
        torch.testing.assert_close(mine, its)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kwargs", FAMILY, ids=name_of)
def test_half_precision_under_autocast_gives_the_float32_value_and_gradient(dtype, kwargs):
    z1, z2 = pair(48, 20, dtype=dtype)
    expected = value_and_gradients(lambda a, b: emim_loss_func(a, b, **kwargs), z1.float(), z2.float())
    with torch.autocast("cpu", dtype=dtype):
        found = value_and_gradients(lambda a, b: emim_loss_func(a, b, **kwargs), z1, z2)  # backward inside as well
        assert mutual_information(z1, z2).dtype == torch.float32
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0)
    for mine, its in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - its).norm() < 1e-2 * its.norm()  # the gradient is rounded to the input's dtype


@pytest.mark.parametrize("form", FORMS)
def test_float32_under_autocast_is_computed_in_float32(form):
    z1, z2 = pair(48, 20, dtype=torch.float32)
    expected = value_and_gradients(lambda a, b: mutual_information(a, b, form=form), z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(lambda a, b: mutual_information(a, b, form=form), z1, z2)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_close_to_float64(form, size):
    z1, z2 = pair(*size)
    expected = mutual_information(z1, z2, form=form)
    found = mutual_information(z1.float(), z2.float(), form=form)
    assert (expected.dtype, found.dtype, found.shape) == (torch.float64, torch.float32, ())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["primal", "pooled"])
def test_what_float32_cannot_factorise_is_computed_in_float64(form):
    # Perfect agreement under noise far below float32's resolution: the joint covariance is singular there.
    z, _ = pair(2000, 16, dtype=torch.float32)
    found = mutual_information(z, z, form=form, noise_variance=1e-10)
    expected = mutual_information(z.double(), z.double(), form=form, noise_variance=1e-10)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)


def test_what_cannot_be_factorised_is_refused_by_name_of_noise_variance():
    with pytest.raises(FloatingPointError, match="raise noise_variance"):
        log_det(torch.diag(torch.tensor([1.0, 2.0, -1e-9])))
    z, _ = pair(300, 16)
    with pytest.raises(FloatingPointError, match="raise noise_variance"):  # C/e overflows
        mutual_information(z * 1e150, z * 1e150, standardise=False, noise_variance=1e-300)


# --- edges and bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", STANDARDISED, ids=name_of)
@pytest.mark.parametrize("constant", [0.0, 1.0, 100.123, -3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_feature_is_as_a_zero_and_gets_no_gradient(kwargs, constant, dtype):
    z1, z2 = pair(100, 5, dtype=dtype)
    z1, z2 = (torch.cat((z, torch.full((100, 1), constant, dtype=dtype)), 1) for z in (z1, z2))
    value, *gradients = value_and_gradients(lambda a, b: emim_loss_func(a, b, **kwargs), z1, z2)
    z1[:, -1] = z2[:, -1] = 0
    assert value.isfinite()
    assert value.item() == emim_loss_func(z1, z2, **kwargs).item()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient[:, -1].eq(0).all()
        assert gradient[:, 0].ne(0).any()


def test_constant_feature_adds_no_mutual_information():
    z1, z2 = pair(100, 5)
    padded = [torch.nn.functional.pad(z, (0, 3), value=7.0) for z in (z1, z2)]
    for form in FORMS:
        torch.testing.assert_close(mutual_information(*padded, form=form), mutual_information(z1, z2, form=form))


def test_small_features_on_a_large_mean_are_signal_in_float64():
    z1, z2 = pair(100, 5)
    torch.testing.assert_close(mutual_information(z1 * 1e-6, z2 * 1e-9), mutual_information(z1, z2), rtol=1e-4, atol=0)


def calls(z1: Tensor, z2: Tensor):
    return (
        lambda: mutual_information(z1, z2),
        lambda: null_mutual_information(z1, z2),
        lambda: emim_loss_func(z1, z2),
        lambda: emim_loss_func(z1, z2, objective="exact"),
        lambda: emim_loss_func(z1, z2, objective="mean"),
        lambda: mutual_information(z1, z2, standardise=False),
    )


@pytest.mark.parametrize(
    ("z1", "z2", "error", "message"),
    [
        (FINE, FINE[:, :3], ValueError, r"one shape, got \(10, 4\) and \(10, 3\)"),
        (FINE, FINE[:9], ValueError, r"one shape, got \(10, 4\) and \(9, 4\)"),
        (FINE[0], FINE[0], ValueError, r"N x d with d >= 1, got shape \(4,\)"),
        (FINE[None], FINE[None], ValueError, r"N x d with d >= 1, got shape \(1, 10, 4\)"),
        (FINE[:, :0], FINE[:, :0], ValueError, r"N x d with d >= 1, got shape \(10, 0\)"),
        (FINE[:1], FINE[:1], ValueError, "at least 2 samples, got 1"),
        (FINE[:0], FINE[:0], ValueError, "at least 2 samples, got 0"),
        (FINE.long(), FINE, TypeError, "z1 must be of floating dtype, got torch.int64"),
        (FINE, FINE.bool(), TypeError, "z2 must be of floating dtype, got torch.bool"),
        (poisoned(math.nan, 3), FINE, FloatingPointError, "NaN or Inf among 40 values: z1 holds 3$"),
        (FINE, poisoned(-math.inf, 1), FloatingPointError, "NaN or Inf among 40 values: z2 holds 1$"),
        (poisoned(math.nan, 5), poisoned(math.inf, 2), FloatingPointError, "z1 holds 5 and z2 holds 2$"),
    ],
)
def test_bad_embeddings_are_refused_with_what_they_are(z1, z2, error, message):
    for call in calls(z1, z2):
        with pytest.raises(error, match=message):
            call()


def test_overflowing_embeddings_are_refused():
    for call in calls(FINE * 1e30, FINE)[:5]:
        with pytest.raises(FloatingPointError, match=r"too large for torch.float32"):
            call()


@pytest.mark.parametrize("noise_variance", [0, -0.1, math.nan, math.inf])
def test_noise_variance_must_be_positive(noise_variance):
    for function in (mutual_information, null_mutual_information, emim_loss_func):
        with pytest.raises(ValueError, match=f"noise_variance must be .* above 0, got {noise_variance}"):
            function(FINE, FINE, noise_variance=noise_variance)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "bond"}, "unknown objective 'bond'; there are exact, bound"),
        ({"marginal": "taylor"}, "unknown marginal 'taylor'; there are exact, series"),
        ({"residual": "trace"}, "unknown residual 'trace'; there are exact, diagonal, isotropic"),
        ({"series_order": 1}, "series_order must be 2, got 1; marginal='exact' is the whole series"),
        ({"series_order": 3}, "series_order must be 2, got 3"),
        ({"series_order": 2.0}, "series_order must be 2, got 2.0"),
        ({"weight": -1}, "weight must be .* at least 0, got -1"),
        ({"weight": math.nan}, "weight must be .* at least 0, got nan"),
    ],
)
def test_bad_options_of_the_loss_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        emim_loss_func(FINE, FINE, **kwargs)


def test_unknown_form_is_refused():
    for function in (mutual_information, null_mutual_information):
        with pytest.raises(ValueError, match="unknown form 'gram'; there are auto, primal, dual, pooled"):
            function(FINE, FINE, form="gram")


@pytest.mark.parametrize("marginal", ["series", "exact"])
@pytest.mark.parametrize("residual", ["isotropic", "diagonal", "exact"])
def test_the_loss_is_made_of_the_two_entropies(marginal, residual):
    z = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = (z[0], z[0] + 0.5 * z[1], z[0] + 0.5 * z[2])
    settings = {"marginal": marginal, "residual": residual, "noise_variance": 0.2}
    entropy, residual_entropy = entropies(*views, **settings)
    loss = emim_loss_func(*views, weight=2.5, **settings)
    assert loss.item() == pytest.approx((2.5 * residual_entropy - entropy).item() / 6)
    if (marginal, residual) == ("exact", "exact"):
        first, second, _ = views
        mi = mutual_information(first, second, noise_variance=0.2, form="pooled")
        assert torch.sub(*entropies(first, second, **settings)).item() == pytest.approx(mi.item())
