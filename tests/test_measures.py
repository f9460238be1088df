"""Every measure against a closed form, SciPy, or a simulation with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import integrate, special, stats

from emim_solo.emim import measures
from emim_solo.emim.measures import half_widths, image_information, lidar, scores
from emim_solo.emim.theory import gaussian_mutual_information


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_views(images: int, views: int, between: np.ndarray, within: np.ndarray, seed: int = 0) -> torch.Tensor:
    """Images' means and views about them, with these covariances."""
    roots = [torch.as_tensor(np.linalg.cholesky(matrix)) for matrix in (between, within)]
    means = noise(images, 1, len(between), seed=2 * seed) @ roots[0].T
    return means + noise(images, views, len(within), seed=2 * seed + 1) @ roots[1].T


def covariances(d: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Of means and of views about them, with a total of unit variance, so that standardising changes nothing."""
    first, second = (stats.wishart(d + 2, np.eye(d)).rvs(random_state=seed) for seed in (1, 2))
    std = np.sqrt(np.diag(scale * first + second))
    return scale * first / np.outer(std, std), second / np.outer(std, std)


def closed_form(between: np.ndarray, within: np.ndarray, e: float) -> float:
    noisy = between + within + e * np.eye(len(between))
    return gaussian_mutual_information(np.block([[noisy, between], [between, between]]), len(between))


# -- one view of each image, or two ----------------------------------------------------------------------------------


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
def test_rankme_of_orthogonal_matrix_is_its_dimension(d):
    orthogonal, _ = torch.linalg.qr(gaussian(100, d))
    assert measures.rankme(orthogonal) == pytest.approx(d)


def test_rankme_of_isotropic_gaussian_nears_its_dimension():
    assert measures.rankme(gaussian(50_000, 16)) == pytest.approx(16, rel=1e-3)


def test_rankme_is_the_exponential_of_scipys_entropy():
    features = gaussian(60, 20) * torch.linspace(0.1, 3, 20)
    expected = math.exp(stats.entropy(np.linalg.svd(features.numpy(), compute_uv=False)))
    assert measures.rankme(features) == pytest.approx(expected)


def test_rankme_ignores_scale_and_rotation():
    features = gaussian(60, 20) * torch.linspace(0.1, 3, 20)
    rotation, _ = torch.linalg.qr(gaussian(20, 20, seed=3))
    assert measures.rankme(17 * features @ rotation) == pytest.approx(measures.rankme(features))


def test_rankme_of_one_direction_and_of_nothing():
    assert measures.rankme(torch.ones(10, 4)) == pytest.approx(1)
    assert measures.rankme(torch.ones(10, 4), centred=True) == 0
    assert measures.rankme(torch.zeros(10, 4)) == 0


def test_alignment_of_views_at_a_fixed_angle():
    angle = 0.7
    first = torch.stack([torch.cos(torch.arange(8.0)), torch.sin(torch.arange(8.0))], dim=1)
    second = torch.stack([torch.cos(torch.arange(8.0) + angle), torch.sin(torch.arange(8.0) + angle)], dim=1)
    chord = 2 * math.sin(angle / 2)
    assert measures.alignment(3 * first, 5 * second) == pytest.approx(chord**2, rel=1e-6)
    assert measures.alignment(first, second, power=1) == pytest.approx(chord, rel=1e-6)


def test_alignment_of_the_same_and_of_opposite_views():
    features = gaussian(50, 8)
    assert measures.alignment(features, 2 * features) == pytest.approx(0, abs=1e-12)
    assert measures.alignment(features, -features) == pytest.approx(4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_uniformity_of_equally_spaced_points_on_a_circle(temperature):
    # The mean over all ordered pairs, an image with itself among them, is e^-2t I_0(2t) up to terms of order I_n.
    n = 200
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    circle = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    with_itself = special.ive(0, 2 * temperature)
    expected = math.log((n * with_itself - 1) / (n - 1))
    assert measures.uniformity(circle, temperature=temperature) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d", [3, 16])
def test_uniformity_of_the_uniform_sphere(d):
    # E exp(2t cos) = Gamma(d/2) (2 / 2t)^(d/2-1) I_{d/2-1}(2t), the constant of von Mises and Fisher.
    t, order = 2.0, d / 2 - 1
    expected = math.log(special.gamma(d / 2) * t**-order * special.ive(order, 2 * t))
    assert measures.uniformity(gaussian(4000, d), temperature=t) == pytest.approx(expected, rel=5e-3)


def test_uniformity_of_a_single_point_is_zero():
    assert measures.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)


def test_spectrum_equals_eigenvalues_of_numpys_covariance():
    features = gaussian(300, 12) * torch.linspace(0.5, 4, 12) + 100
    expected = np.sort(np.linalg.eigvalsh(np.cov(features.numpy(), rowvar=False, bias=True)))[::-1]
    np.testing.assert_allclose(measures.spectrum(features).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 2.5])
def test_alpha_req_of_an_exact_power_law(alpha):
    features = with_spectrum(np.arange(1, 121, dtype=float) ** -alpha)
    assert measures.alpha_req(features) == pytest.approx(alpha, rel=1e-9)
    assert measures.alpha_req(1e-3 * features) == pytest.approx(alpha, rel=1e-9)


def test_alpha_req_does_not_see_ranks_outside_its_range():
    eigenvalues = np.arange(1, 121, dtype=float) ** -1.5
    eigenvalues[:4] = 50, 40, 30, 20
    eigenvalues[50:] /= 100
    assert measures.alpha_req(with_spectrum(eigenvalues)) == pytest.approx(1.5, rel=1e-9)


def test_alpha_req_needs_three_ranks():
    assert math.isnan(measures.alpha_req(gaussian(100, 6)))
    assert math.isfinite(measures.alpha_req(gaussian(100, 7)))


def test_spread_of_collapsed_and_of_uniform_directions():
    assert measures.spread(torch.ones(10, 4)) == pytest.approx(0, abs=1e-9)
    assert measures.spread(torch.cat([gaussian(100, 4), -gaussian(100, 4)])) == pytest.approx(1)


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_information_of_correlated_gaussians(rho):
    # The noise of the estimator (0.1 on unit variances, both views) takes the correlation to rho / 1.1.
    samples, d = 100_000, 4
    first = gaussian(samples, d)
    second = rho * first + math.sqrt(1 - rho**2) * gaussian(samples, d, seed=1)
    mi, null = measures.pair_information(first, second)
    assert mi == pytest.approx(-d / 2 * math.log(1 - (rho / 1.1) ** 2), rel=0.03)
    assert null == pytest.approx(d**2 / (2 * samples), abs=5e-4)


def test_sound_features_are_not_collapsed():
    assert not measures.collapsed(gaussian(256, 64))
    assert not measures.collapsed(gaussian(256, 2))
    assert not measures.collapsed(gaussian(256, 64) + 3)


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
    assert measures.collapsed(features)


def test_diagnose_of_nan_features_is_nan_throughout():
    features = gaussian(64, 16)
    broken = features.clone()
    broken[3, 2] = math.nan
    sound = measures.diagnose(features, features)
    assert all(math.isfinite(value) for value in sound.values())
    flagged = measures.diagnose(features, broken)
    assert flagged.keys() == sound.keys() and all(math.isnan(value) for value in flagged.values())


@pytest.mark.parametrize("function", [measures.rankme, measures.uniformity, measures.spectrum])
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
    found, _ = measures.non_gaussianity(torch.tensor(x)[:, None], directions=1)
    assert found == pytest.approx(expected, rel=1e-8)
    # Epps and Pulley's own sum over pairs
    pairs = np.exp(-((scaled[:, None] - scaled) ** 2) / 2).mean()
    assert found == pytest.approx(pairs - 2**0.5 * np.exp(-(scaled**2) / 4).mean() + 3**-0.5, rel=1e-8)


def test_non_gaussianity_is_at_its_null_for_gaussians_of_any_covariance_alone():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    gaussian = torch.randn(2000, 16, generator=generator, dtype=torch.float64) @ mixing
    found, null = measures.non_gaussianity(gaussian)
    assert found == pytest.approx(null, rel=0.5)
    assert null == pytest.approx(measures.non_gaussianity(gaussian[:500])[1] / 4, rel=0.3), "it falls as 1/N"
    signs = torch.randint(0, 2, (2000, 2), generator=generator).double()
    assert measures.non_gaussianity(signs)[0] > 5 * null
    heavy = gaussian * torch.rand(2000, 1, generator=generator, dtype=torch.float64)  # spherical, no more Gaussian
    assert measures.non_gaussianity(heavy)[0] > 5 * null


def test_non_gaussianity_is_seeded_and_nothing_of_nothing():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert measures.non_gaussianity(features * 3 + 1) == pytest.approx(measures.non_gaussianity(features), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert measures.non_gaussianity(features, seed=1) != measures.non_gaussianity(features)
    assert math.isnan(measures.non_gaussianity(torch.ones(50, 8))[0])


# -- information of a view about its image -----------------------------------------------------------------------


@pytest.mark.parametrize(("images", "views", "d"), [(60, 4, 8), (12, 2, 30), (40, 3, 60)])
def test_independent_views_have_no_information(images, views, d):
    """With more dimensions than images, too, and with features of very different sizes."""
    found = [image_information(noise(images, views, d, seed=s) * torch.arange(1, d + 1), seed=s) for s in range(150)]
    differences = np.subtract(*np.transpose(found))
    assert abs(differences.mean()) < 3.5 * stats.sem(differences)
    assert np.mean(found, axis=0)[1] > 3 * abs(differences.mean()), "the plug-in alone counts as some"


def test_null_is_the_expectation_of_wishart_log_determinants():
    images, views, d = 200, 3, 10
    nulls = [image_information(noise(images, views, d, seed=s), noise_variance=1e-9, seed=s)[1] for s in range(100)]
    assert np.mean(nulls) == pytest.approx(d**2 / (4 * images * views * (views - 1)), rel=0.1)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("e", [0.001, 0.1])
def test_gaussian_views_have_the_information_of_their_covariances(scale, e):
    between, within = covariances(5, scale)
    value, null = image_information(gaussian_views(20_000, 3, between, within), noise_variance=e)
    assert value - null == pytest.approx(closed_form(between, within, e), rel=0.02)


def test_information_does_not_see_order_of_images_and_views_nor_scale():
    features = gaussian_views(50, 4, *covariances(6, 1.0))
    value, _ = image_information(features)
    other = features[torch.randperm(50)][:, [2, 0, 3, 1]] * torch.linspace(0.1, 9, 6) + 5
    assert image_information(other)[0] == pytest.approx(value, rel=1e-9)


def test_pieces_make_the_whole(monkeypatch):
    features = gaussian_views(50, 4, *covariances(6, 1.0))
    whole = image_information(features), lidar(features)
    monkeypatch.setattr(measures, "_PIECE", 7 * 4 * 6)
    assert image_information(features) == pytest.approx(whole[0], rel=1e-12)
    assert lidar(features) == pytest.approx(whole[1], rel=1e-12)


def test_constant_features_add_nothing():
    features = gaussian_views(50, 4, *covariances(6, 1.0)).float()
    with_constants = torch.cat((features, torch.full((50, 4, 3), 0.1), torch.zeros(50, 4, 2)), dim=2)
    assert image_information(with_constants) == pytest.approx(image_information(features), rel=1e-9)
    collapsed = scores(torch.full((50, 4, 6), 0.1))
    assert collapsed["view_information"] == collapsed["pair_information"] == collapsed["lidar"] == 0


# -- the others --------------------------------------------------------------------------------------------------


def test_lidar_of_features_that_swallow_delta_is_nan_and_the_other_scores_are_those_of_the_small_ones():
    features = noise(20, 3, 64)
    large, small = scores(features * 1e9), scores(features)
    assert math.isnan(large["lidar"]) and not math.isnan(small["lidar"])
    assert large["view_information"] == pytest.approx(small["view_information"], abs=1e-3)


def test_lidar_is_the_effective_rank_of_scipys_generalised_eigenvalues():
    features = gaussian_views(80, 5, *covariances(7, 0.5))
    means = features.mean(1).numpy()
    between = np.cov(means, rowvar=False, bias=True)
    residuals = (features - features.mean(1, keepdim=True)).flatten(0, 1).numpy()
    within = residuals.T @ residuals / len(residuals) + 1e-2 * np.eye(7)
    eigenvalues = scipy.linalg.eigh(between, within, eigvals_only=True)
    assert lidar(features, delta=1e-2) == pytest.approx(math.exp(stats.entropy(eigenvalues)), rel=1e-9)


def test_alpha_req_is_the_authors_weighted_least_squares():
    features = noise(300, 2, 60) * torch.arange(1, 61) ** -0.7
    eigenvalues = np.linalg.eigvalsh(np.cov(features[:, 0].numpy(), rowvar=False))[::-1]
    k = np.arange(5, 51)
    x = np.stack((-np.log(k), np.ones(len(k))), axis=1)
    alpha, _ = np.linalg.solve(x.T @ (x / k[:, None]), (x / k[:, None]).T @ np.log(eigenvalues[k - 1]))
    assert scores(features)["alpha_req"] == pytest.approx(alpha, rel=1e-9)


def test_pair_information_of_a_folder_sorted_by_class_counts_the_class():
    classes = torch.arange(400) // 200
    features = 0.1 * noise(400, 2, 3) + (2.0 * classes - 1)[:, None, None]
    # Standardised, the class is all of the variance but 1 % of each of three features.
    ones, own = np.ones((3, 3)) / 1.01, 0.01 / 1.01 * np.eye(3)
    joint = np.block([[ones + own + 0.1 * np.eye(3), ones], [ones, ones + own + 0.1 * np.eye(3)]])
    assert scores(features)["pair_information"] == pytest.approx(gaussian_mutual_information(joint, 3), rel=0.1)


def test_intervals_cover_the_closed_form():
    between, within = covariances(4, 1.0)
    truth, covered = closed_form(between, within, 0.1), 0
    for seed in range(40):
        features = gaussian_views(200, 3, between, within, seed)
        covered += (
            abs(scores(features)["view_information"] - truth) < half_widths(features, splits=6)["view_information"]
        )
    assert covered >= 34  # of 40, where 38 are expected


def test_intervals_shrink_with_the_root_of_the_images():
    features = gaussian_views(1600, 2, *covariances(4, 1.0))
    ratio = [half_widths(features[:400])[name] / half_widths(features)[name] for name in ("view_information", "rankme")]
    assert all(1.2 < r < 3.4 for r in ratio)


# -- bad input ---------------------------------------------------------------------------------------------------


def test_features_that_are_not_finite_give_nan_throughout():
    features = noise(20, 3, 4)
    features[3, 1, 2] = math.inf
    assert all(math.isnan(value) for value in (*scores(features).values(), *half_widths(features).values()))
    assert math.isnan(lidar(features)) and all(map(math.isnan, image_information(features)))


@pytest.mark.parametrize("shape", [(20, 4), (1, 3, 4), (20, 1, 4), (20, 3, 1)])
def test_shapes_that_hold_no_views_are_refused(shape):
    for function in (image_information, lidar, scores, half_widths):
        with pytest.raises(ValueError, match=r"\(images, views, dimensions\)"):
            function(noise(*shape))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="noise_variance"):
        image_information(noise(20, 3, 4), noise_variance=0)
    with pytest.raises(ValueError, match="delta"):
        lidar(noise(20, 3, 4), delta=0)
    with pytest.raises(ValueError, match="3 images"):
        half_widths(noise(3, 3, 4))
