"""Every diagnostic against a closed form or SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from emim_solo.emim import diagnostics


def gaussian(samples: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(eigenvalues: np.ndarray, samples: int = 400) -> torch.Tensor:
    """Centred features whose covariance has exactly these eigenvalues."""
    d = len(eigenvalues)
    noise = gaussian(samples, d)
    left, _ = torch.linalg.qr(noise - noise.mean(dim=0))
    right, _ = torch.linalg.qr(gaussian(d, d, seed=1))
    return left * torch.as_tensor(np.sqrt(eigenvalues * samples)) @ right.T


@pytest.mark.parametrize("d", [1, 7, 64])
def test_effective_rank_of_orthogonal_matrix_is_its_dimension(d):
    orthogonal, _ = torch.linalg.qr(gaussian(100, d))
    assert diagnostics.effective_rank(orthogonal) == pytest.approx(d)


def test_effective_rank_of_isotropic_gaussian_nears_its_dimension():
    assert diagnostics.effective_rank(gaussian(50_000, 16)) == pytest.approx(16, rel=1e-3)


def test_effective_rank_is_the_exponential_of_scipys_entropy():
    features = gaussian(60, 20) * torch.linspace(0.1, 3, 20)
    expected = math.exp(stats.entropy(np.linalg.svd(features.numpy(), compute_uv=False)))
    assert diagnostics.effective_rank(features) == pytest.approx(expected)


def test_effective_rank_ignores_scale_and_rotation():
    features = gaussian(60, 20) * torch.linspace(0.1, 3, 20)
    rotation, _ = torch.linalg.qr(gaussian(20, 20, seed=3))
    assert diagnostics.effective_rank(17 * features @ rotation) == pytest.approx(diagnostics.effective_rank(features))


def test_effective_rank_of_one_direction_and_of_nothing():
    assert diagnostics.effective_rank(torch.ones(10, 4)) == pytest.approx(1)
    assert diagnostics.effective_rank(torch.ones(10, 4), centred=True) == 0
    assert diagnostics.effective_rank(torch.zeros(10, 4)) == 0


def test_alignment_of_views_at_a_fixed_angle():
    angle = 0.7
    first = torch.stack([torch.cos(torch.arange(8.0)), torch.sin(torch.arange(8.0))], dim=1)
    second = torch.stack([torch.cos(torch.arange(8.0) + angle), torch.sin(torch.arange(8.0) + angle)], dim=1)
    chord = 2 * math.sin(angle / 2)
    assert diagnostics.alignment(3 * first, 5 * second) == pytest.approx(chord**2, rel=1e-6)
    assert diagnostics.alignment(first, second, power=1) == pytest.approx(chord, rel=1e-6)


def test_alignment_of_the_same_and_of_opposite_views():
    features = gaussian(50, 8)
    assert diagnostics.alignment(features, 2 * features) == pytest.approx(0, abs=1e-12)
    assert diagnostics.alignment(features, -features) == pytest.approx(4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_uniformity_of_equally_spaced_points_on_a_circle(temperature):
    # The mean over all ordered pairs, an image with itself among them, is e^-2t I_0(2t) up to terms of order I_n.
    n = 200
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    circle = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    with_itself = special.ive(0, 2 * temperature)
    expected = math.log((n * with_itself - 1) / (n - 1))
    assert diagnostics.uniformity(circle, temperature=temperature) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d", [3, 16])
def test_uniformity_of_the_uniform_sphere(d):
    # E exp(2t cos) = Gamma(d/2) (2 / 2t)^(d/2-1) I_{d/2-1}(2t), the constant of von Mises and Fisher.
    t, order = 2.0, d / 2 - 1
    expected = math.log(special.gamma(d / 2) * t**-order * special.ive(order, 2 * t))
    assert diagnostics.uniformity(gaussian(4000, d), temperature=t) == pytest.approx(expected, rel=5e-3)


def test_uniformity_of_a_single_point_is_zero():
    assert diagnostics.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)


def test_spectrum_equals_eigenvalues_of_numpys_covariance():
    features = gaussian(300, 12) * torch.linspace(0.5, 4, 12) + 100
    expected = np.sort(np.linalg.eigvalsh(np.cov(features.numpy(), rowvar=False, bias=True)))[::-1]
    np.testing.assert_allclose(diagnostics.spectrum(features).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 2.5])
def test_spectrum_decay_of_an_exact_power_law(alpha):
    features = with_spectrum(np.arange(1, 121, dtype=float) ** -alpha)
    assert diagnostics.spectrum_decay(features) == pytest.approx(alpha, rel=1e-9)
    assert diagnostics.spectrum_decay(1e-3 * features) == pytest.approx(alpha, rel=1e-9)


def test_spectrum_decay_does_not_see_ranks_outside_its_range():
    eigenvalues = np.arange(1, 121, dtype=float) ** -1.5
    eigenvalues[:4] = 50, 40, 30, 20
    eigenvalues[50:] /= 100
    assert diagnostics.spectrum_decay(with_spectrum(eigenvalues)) == pytest.approx(1.5, rel=1e-9)


def test_spectrum_decay_needs_three_ranks():
    assert math.isnan(diagnostics.spectrum_decay(gaussian(100, 6)))
    assert math.isfinite(diagnostics.spectrum_decay(gaussian(100, 7)))


def test_spread_of_collapsed_and_of_uniform_directions():
    assert diagnostics.spread(torch.ones(10, 4)) == pytest.approx(0, abs=1e-9)
    assert diagnostics.spread(torch.cat([gaussian(100, 4), -gaussian(100, 4)])) == pytest.approx(1)


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_information_of_correlated_gaussians(rho):
    # The noise of the estimator (0.1 on unit variances, both views) takes the correlation to rho / 1.1.
    samples, d = 100_000, 4
    first = gaussian(samples, d)
    second = rho * first + math.sqrt(1 - rho**2) * gaussian(samples, d, seed=1)
    mi, null = diagnostics.information(first, second)
    assert mi == pytest.approx(-d / 2 * math.log(1 - (rho / 1.1) ** 2), rel=0.03)
    assert null == pytest.approx(d**2 / (2 * samples), abs=5e-4)


def test_sound_features_are_not_collapsed():
    assert not diagnostics.collapsed(gaussian(256, 64))
    assert not diagnostics.collapsed(gaussian(256, 2))
    assert not diagnostics.collapsed(gaussian(256, 64) + 3)


@pytest.mark.parametrize(
    "features",
    [
        torch.ones(256, 64) + 1e-3 * gaussian(256, 64),
        gaussian(256, 1) @ gaussian(1, 64),
        gaussian(256, 2) @ gaussian(2, 64) + 1e-3 * gaussian(256, 64),
        torch.zeros(256, 64),
    ],
    ids=["a point", "a line", "a plane with noise", "zero"],
)
def test_collapsed_features_are_found(features):
    assert diagnostics.collapsed(features)


def test_diagnose_of_nan_features_is_nan_throughout():
    features = gaussian(64, 16)
    broken = features.clone()
    broken[3, 2] = math.nan
    sound = diagnostics.diagnose(features, features)
    assert all(math.isfinite(value) for value in sound.values())
    flagged = diagnostics.diagnose(features, broken)
    assert flagged.keys() == sound.keys() and all(math.isnan(value) for value in flagged.values())


@pytest.mark.parametrize("function", [diagnostics.effective_rank, diagnostics.uniformity, diagnostics.spectrum])
def test_bad_features_are_refused_with_their_shape(function):
    with pytest.raises(ValueError, match=r"\(3,\)"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match="at least 2 samples"):
        function(torch.ones(1, 3))
    with pytest.raises(FloatingPointError, match="NaN"):
        function(torch.full((4, 3), math.nan))


def test_non_gaussianity_of_one_column_is_the_integral_of_its_definition():
    x = np.random.default_rng(0).exponential(size=200)
    scaled = (x - x.mean()) / x.std()

    def integrand(t: float) -> float:
        distance = abs(np.exp(1j * t * scaled).mean() - math.exp(-(t**2) / 2)) ** 2
        return distance * stats.norm.pdf(t)

    expected = integrate.quad(integrand, -12, 12, limit=500)[0]
    found, _ = diagnostics.non_gaussianity(torch.tensor(x)[:, None], directions=1)
    assert found == pytest.approx(expected, rel=1e-8)
    # Epps and Pulley's own sum over pairs
    pairs = np.exp(-((scaled[:, None] - scaled) ** 2) / 2).mean()
    assert found == pytest.approx(pairs - 2**0.5 * np.exp(-(scaled**2) / 4).mean() + 3**-0.5, rel=1e-8)


def test_non_gaussianity_is_at_its_null_for_gaussians_of_any_covariance_alone():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    gaussian = torch.randn(2000, 16, generator=generator, dtype=torch.float64) @ mixing
    found, null = diagnostics.non_gaussianity(gaussian)
    assert found == pytest.approx(null, rel=0.5)
    assert null == pytest.approx(diagnostics.non_gaussianity(gaussian[:500])[1] / 4, rel=0.3), "it falls as 1/N"
    signs = torch.randint(0, 2, (2000, 2), generator=generator).double()
    assert diagnostics.non_gaussianity(signs)[0] > 5 * null
    heavy = gaussian * torch.rand(2000, 1, generator=generator, dtype=torch.float64)  # spherical, no more Gaussian
    assert diagnostics.non_gaussianity(heavy)[0] > 5 * null


def test_non_gaussianity_is_seeded_and_nothing_of_nothing():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert diagnostics.non_gaussianity(features * 3 + 1) == pytest.approx(
        diagnostics.non_gaussianity(features), rel=1e-5
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert diagnostics.non_gaussianity(features, seed=1) != diagnostics.non_gaussianity(features)
    assert math.isnan(diagnostics.non_gaussianity(torch.ones(50, 8))[0])
