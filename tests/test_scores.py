"""Every score against a closed form, SciPy, or a simulation with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats

from emim_solo.emim import scores as module
from emim_solo.emim.scores import half_widths, lidar, scores, view_information
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


# -- information of a view about its image -----------------------------------------------------------------------


@pytest.mark.parametrize(("images", "views", "d"), [(60, 4, 8), (12, 2, 30), (40, 3, 60)])
def test_independent_views_have_no_information(images, views, d):
    """With more dimensions than images, too, and with features of very different sizes."""
    found = [view_information(noise(images, views, d, seed=s) * torch.arange(1, d + 1), seed=s) for s in range(150)]
    differences = np.subtract(*np.transpose(found))
    assert abs(differences.mean()) < 3.5 * stats.sem(differences)
    assert np.mean(found, axis=0)[1] > 3 * abs(differences.mean()), "the plug-in alone counts as some"


def test_null_is_the_expectation_of_wishart_log_determinants():
    images, views, d = 200, 3, 10
    nulls = [view_information(noise(images, views, d, seed=s), noise_variance=1e-9, seed=s)[1] for s in range(100)]
    assert np.mean(nulls) == pytest.approx(d**2 / (4 * images * views * (views - 1)), rel=0.1)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("e", [0.001, 0.1])
def test_gaussian_views_have_the_information_of_their_covariances(scale, e):
    between, within = covariances(5, scale)
    value, null = view_information(gaussian_views(20_000, 3, between, within), noise_variance=e)
    assert value - null == pytest.approx(closed_form(between, within, e), rel=0.02)


def test_information_does_not_see_order_of_images_and_views_nor_scale():
    features = gaussian_views(50, 4, *covariances(6, 1.0))
    value, _ = view_information(features)
    other = features[torch.randperm(50)][:, [2, 0, 3, 1]] * torch.linspace(0.1, 9, 6) + 5
    assert view_information(other)[0] == pytest.approx(value, rel=1e-9)


def test_pieces_make_the_whole(monkeypatch):
    features = gaussian_views(50, 4, *covariances(6, 1.0))
    whole = view_information(features), lidar(features)
    monkeypatch.setattr(module, "_PIECE", 7 * 4 * 6)
    assert view_information(features) == pytest.approx(whole[0], rel=1e-12)
    assert lidar(features) == pytest.approx(whole[1], rel=1e-12)


def test_constant_features_add_nothing():
    features = gaussian_views(50, 4, *covariances(6, 1.0)).float()
    with_constants = torch.cat((features, torch.full((50, 4, 3), 0.1), torch.zeros(50, 4, 2)), dim=2)
    assert view_information(with_constants) == pytest.approx(view_information(features), rel=1e-9)
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
    assert math.isnan(lidar(features)) and all(map(math.isnan, view_information(features)))


@pytest.mark.parametrize("shape", [(20, 4), (1, 3, 4), (20, 1, 4), (20, 3, 1)])
def test_shapes_that_hold_no_views_are_refused(shape):
    for function in (view_information, lidar, scores, half_widths):
        with pytest.raises(ValueError, match=r"\(images, views, dimensions\)"):
            function(noise(*shape))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="noise_variance"):
        view_information(noise(20, 3, 4), noise_variance=0)
    with pytest.raises(ValueError, match="delta"):
        lidar(noise(20, 3, 4), delta=0)
    with pytest.raises(ValueError, match="3 images"):
        half_widths(noise(3, 3, 4))
