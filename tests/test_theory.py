"""The closed forms against integration, densities and samples from SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import gammaln

from emim_solo.emim import theory


def random_covariance(m: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(m, 2 * m))
    return factor @ factor.T / (2 * m)


@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.3, 0.99])
@pytest.mark.parametrize("d", [1, 5])
def test_correlated_gaussians_agree_with_the_determinants(rho, d):
    covariance = np.block([[np.eye(d), rho * np.eye(d)], [rho * np.eye(d), np.eye(d)]])
    expected = theory.gaussian_mutual_information(covariance, d)
    assert theory.correlated_gaussian_mutual_information(rho, d) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_gaussian_mi_is_the_sum_of_the_entropies_of_its_densities():
    covariance, n = random_covariance(7, 0), 3
    entropy = lambda c: stats.multivariate_normal(cov=c).entropy()  # noqa: E731
    expected = entropy(covariance[:n, :n]) + entropy(covariance[n:, n:]) - entropy(covariance)
    assert expected > 0.1
    assert theory.gaussian_mutual_information(covariance, n) == pytest.approx(expected, rel=1e-10)


def test_gaussian_mi_is_invariant_under_invertible_maps_of_each_view():
    covariance, n = random_covariance(6, 1), 3
    rng = np.random.default_rng(2)
    map_ = np.zeros((6, 6))
    map_[:n, :n], map_[n:, n:] = rng.normal(size=(n, n)), rng.normal(size=(n, n))
    mapped = map_ @ covariance @ map_.T
    expected = theory.gaussian_mutual_information(covariance, n)
    assert theory.gaussian_mutual_information(mapped, n) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [0.5, 0.8, 1.0, 2.0, 5.0])
def test_mggd_entropy_in_one_dimension_is_that_of_scipys_generalised_normal(beta):
    # exp(-1/2 (x^2/s)^beta) is gennorm's exp(-|x/scale|^(2 beta)) at scale = sqrt(s) 2^(1/(2 beta)).
    variance = 1.7
    oracle = stats.gennorm(2 * beta, scale=math.sqrt(variance) * 2 ** (1 / (2 * beta)))
    assert theory.mggd_entropy([[variance]], beta) == pytest.approx(float(oracle.entropy()), rel=1e-10)
    assert theory.mggd_covariance_factor(1, beta) * variance == pytest.approx(float(oracle.var()), rel=1e-10)


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_mggd_entropy_and_covariance_agree_with_integration_over_the_radius(m, beta):
    # For S = I the density depends on the radius r only; the sphere's area is 2 pi^(m/2) / Gamma(m/2).
    area = 2 * math.pi ** (m / 2) / math.exp(gammaln(m / 2))

    def moment(f):
        weighted = lambda r: f(r) * area * r ** (m - 1) * math.exp(-(r ** (2 * beta)) / 2)  # noqa: E731
        return integrate.quad(weighted, 0, np.inf, epsabs=1e-13, epsrel=1e-12, limit=200)[0]

    mass = moment(lambda r: 1)
    entropy = math.log(mass) + moment(lambda r: r ** (2 * beta) / 2) / mass
    assert theory.mggd_entropy(np.eye(m), beta) == pytest.approx(entropy, rel=1e-8)
    assert theory.mggd_covariance_factor(m, beta) == pytest.approx(moment(lambda r: r * r) / mass / m, rel=1e-8)


def test_mggd_of_shape_1_is_the_gaussian():
    covariance = random_covariance(4, 3)
    assert theory.mggd_covariance_factor(4, 1.0) == pytest.approx(1, rel=1e-14)
    expected = stats.multivariate_normal(cov=covariance).entropy()
    assert theory.mggd_entropy(covariance, 1.0) == pytest.approx(expected, rel=1e-12)
    assert theory.mggd_constant(9, 1.0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "beta", "expected"), [(1, 0.5, -0.046118), (8, 0.5, -0.126249), (1, 2, -0.014968), (8, 2, -0.070088)]
)
def test_mggd_constant_is_negative_so_it_is_no_mutual_information(n, beta, expected):
    assert theory.mggd_constant(n, beta) == pytest.approx(expected, abs=1e-6)


def test_true_mi_of_an_uncorrelated_mggd_is_positive_though_the_constant_is_negative():
    # The two coordinates of a 2-d MGGD, whose marginals are integrated and not taken for MGGDs.
    beta = 0.5
    log_density_at = -theory.mggd_entropy(np.eye(2), beta) + 2 / (2 * beta)  # log of the normaliser
    density = lambda x, y: math.exp(log_density_at - (x * x + y * y) ** beta / 2)  # noqa: E731
    marginal = lambda x: 2 * integrate.quad(lambda y: density(x, y), 0, np.inf)[0]  # noqa: E731
    assert 2 * integrate.quad(marginal, 0, 200, limit=200)[0] == pytest.approx(1, abs=1e-6)
    entropy = -2 * integrate.quad(lambda x: marginal(x) * math.log(marginal(x)), 0, 200, limit=200)[0]
    assert 2 * entropy - theory.mggd_entropy(np.eye(2), beta) > 0.01
    assert theory.mggd_constant(1, beta) < -0.01


def test_student_t_mi_agrees_with_monte_carlo_over_scipys_densities():
    n, nu = 4, 5
    dispersion = np.block([[np.eye(n), 0.6 * np.eye(n)], [0.6 * np.eye(n), np.eye(n)]])
    expected = theory.student_t_mutual_information(dispersion, n, nu)
    constant = theory.student_t_mutual_information(np.eye(2 * n), n, nu)
    assert constant == pytest.approx(0.127795, abs=1e-6)
    assert expected == pytest.approx(1.0204, abs=1e-4)
    joint = stats.multivariate_t(shape=dispersion, df=nu)
    half = stats.multivariate_t(shape=np.eye(n), df=nu)
    samples = joint.rvs(size=100_000, random_state=0)
    log_ratio = joint.logpdf(samples) - half.logpdf(samples[:, :n]) - half.logpdf(samples[:, n:])
    error = log_ratio.std() / math.sqrt(len(samples))
    assert error < 0.01
    assert log_ratio.mean() == pytest.approx(expected, abs=4 * error)


def test_student_t_mi_tends_to_the_gaussians():
    covariance = random_covariance(6, 5)
    gaussian = theory.gaussian_mutual_information(covariance, 2)
    assert theory.student_t_mutual_information(covariance, 2, 1e7) == pytest.approx(gaussian, abs=1e-5)
    assert theory.student_t_mutual_information(covariance, 2, 3) > gaussian + 0.05


@pytest.mark.parametrize("beta_or_nu", [0, -1.0, math.nan])
def test_shapes_that_are_not_positive_are_refused(beta_or_nu):
    for call in (
        lambda: theory.mggd_entropy(np.eye(2), beta_or_nu),
        lambda: theory.mggd_constant(2, beta_or_nu),
        lambda: theory.mggd_covariance_factor(2, beta_or_nu),
        lambda: theory.student_t_mutual_information(np.eye(2), 1, beta_or_nu),
    ):
        with pytest.raises(ValueError, match="must be above 0"):
            call()


@pytest.mark.parametrize(
    ("covariance", "n", "message"),
    [
        (np.ones((2, 3)), 1, r"square matrix, got shape \(2, 3\)"),
        ([[1.0, 0.5], [0.2, 1.0]], 1, "symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], 1, "positive definite"),
        (np.eye(3), 3, "split the 3 coordinates"),
        (np.eye(3), 0, "split the 3 coordinates"),
    ],
)
def test_what_is_no_covariance_of_two_blocks_is_refused(covariance, n, message):
    with pytest.raises(ValueError, match=message):
        theory.gaussian_mutual_information(covariance, n)


def test_perfect_correlation_and_empty_dimension_are_refused():
    with pytest.raises(ValueError, match="rho must lie"):
        theory.correlated_gaussian_mutual_information(1.0, 2)
    with pytest.raises(ValueError, match="dimension must be at least 1"):
        theory.mggd_constant(0, 1.0)


@pytest.mark.parametrize(("rho", "agreeing"), [(0.8, 0.9), (0.3, 0.7), (0.6, 1.0)])
def test_gaussian_marginals_make_the_log_det_ratio_a_lower_bound(rho, agreeing):
    true, by_theorem = theory.pairs_of_gaussians(rho, agreeing)
    plus, minus = (stats.multivariate_normal(cov=[[1, r], [r, 1]]) for r in (rho, -rho))
    samples = plus.rvs(200_000, random_state=0)
    samples[round(200_000 * agreeing) :, 1] *= -1
    joint = agreeing * plus.pdf(samples) + (1 - agreeing) * minus.pdf(samples)
    log_ratio = np.log(joint) - stats.norm.logpdf(samples).sum(1)
    assert true == pytest.approx(log_ratio.mean(), abs=4 * log_ratio.std() / len(samples) ** 0.5)
    correlation = (2 * agreeing - 1) * rho
    assert by_theorem == pytest.approx(-math.log(1 - correlation**2) / 2)
    if agreeing == 1:
        assert true == pytest.approx(by_theorem, rel=1e-9), "jointly Gaussian: equality"
    else:
        assert true > by_theorem * 1.1, "strict"


def test_without_gaussian_marginals_the_log_det_ratio_is_no_bound():
    table = np.array([[0.475, 0.025], [0.025, 0.475]])  # two signs of correlation 0.9
    true, by_theorem = theory.pairs_of_signs(0.9)
    assert true == pytest.approx(stats.entropy(table.ravel(), np.full(4, 0.25)))
    assert by_theorem > 1.5 * true


@pytest.mark.parametrize("arguments", [(1.0, 0.5), (0.5, 1.5), (0.5, -0.1)])
def test_pairs_that_are_none_are_refused(arguments):
    with pytest.raises(ValueError, match="0 <= agreeing <= 1"):
        theory.pairs_of_gaussians(*arguments)
