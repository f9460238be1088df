"""Closed forms of entropy and mutual information (MI), in nats: the tests compare the objective with them.

Theorems 1 and 2 of L. Chang, P. Liu, Q. Guo, F. Wen, "Explicit Mutual Information Maximization for
Self-Supervised Learning" (arXiv 2409.04747). A joint vector consists of two views: the first n
coordinates and the rest.

What holds exactly: for ANY elliptical joint distribution with dispersion S the MI is

    1/2 log(|S_11| |S_22| / |S|) + a constant >= 0 that depends on the distribution's shape and dimensions.

Each marginal is elliptical, and its dispersion is its block of S. The constant is the MI for a block-diagonal S: 0 for
the Gaussian, a closed form for the multivariate Student t.

What does not hold: Theorem 2 assumes that the joint vector AND its two views are multivariate generalised Gaussians (MGGD)
of one shape. For a shape other than 1 no such distribution exists: a marginal of an MGGD is no MGGD. The constant of its
formula, `mggd_constant`, is then negative, which no MI is. It does not depend on S, so the log-det ratio has the same maximisers.

If both MARGINALS are Gaussian, then for every joint distribution the log-det ratio is a lower bound of the MI: docs/theory.md
has the proof (Foster & Grassberger, Phys. Rev. E 83, 2011, for two scalars). For `pairs_of_gaussians` the inequality is
strict. Without Gaussian marginals there is no such bound: `pairs_of_signs` have less MI than their log-det ratio.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cholesky
from scipy.special import digamma, entr, gammaln


def gaussian_mutual_information(covariance: ArrayLike, n: int) -> float:
    """MI in nats between the first n coordinates of a Gaussian and the others: 1/2 log(|C_11| |C_22| / |C|).

    Raises:
        ValueError: the m x m covariance is not symmetric and positive definite, or not 0 < n < m.
    """
    joint = np.asarray(covariance, dtype=float)
    whole = _log_det(joint)
    if not 0 < n < len(joint):
        raise ValueError(f"n must split the {len(joint)} coordinates into two blocks, got {n}")
    return (_log_det(joint[:n, :n]) + _log_det(joint[n:, n:]) - whole) / 2


def correlated_gaussian_mutual_information(rho: float, d: int) -> float:
    """MI in nats of d independent pairs of Gaussians with correlation rho: -d/2 log(1 - rho^2). ValueError unless -1 < rho < 1."""
    if not -1 < rho < 1:
        raise ValueError(f"rho must lie between -1 and 1, got {rho}")
    return -d / 2 * math.log1p(-(rho**2))


def mggd_covariance_factor(m: int, beta: float) -> float:
    """s in covariance = s * dispersion, for an m-dimensional MGGD of shape beta; 1 for the Gaussian, beta = 1.

    ValueError unless m >= 1 and beta > 0.
    """
    _check_dimension_and_shape(m, beta, "beta")
    log_ratio = gammaln((m + 2) / (2 * beta)) - gammaln(m / (2 * beta))
    return math.exp(math.log(2) / beta + log_ratio) / m


def mggd_entropy(dispersion: ArrayLike, beta: float) -> float:
    """Differential entropy in nats of the MGGD with density proportional to exp(-1/2 (x^T S^-1 x)^beta).

    The shape beta > 0 is 1 for the Gaussian with covariance S; 1/2 is Laplace-like, a larger beta is flatter.

    Raises:
        ValueError: the m x m dispersion S is not symmetric and positive definite, or beta <= 0.
    """
    matrix = np.asarray(dispersion, dtype=float)
    log_det = _log_det(matrix)
    _check_dimension_and_shape(len(matrix), beta, "beta")
    return _mggd_standard_entropy(len(matrix), beta) + log_det / 2


def mggd_constant(n: int, beta: float) -> float:
    """The constant of Theorem 2 in nats, 2 H_n - H_2n of MGGDs with identity covariance: 0 for beta = 1, else negative.

    ValueError unless n >= 1 and beta > 0.
    """
    _check_dimension_and_shape(n, beta, "beta")

    def entropy_at_identity_covariance(m: int) -> float:
        return _mggd_standard_entropy(m, beta) - m / 2 * math.log(mggd_covariance_factor(m, beta))

    return 2 * entropy_at_identity_covariance(n) - entropy_at_identity_covariance(2 * n)


def pairs_of_gaussians(rho: float, agreeing: float) -> tuple[float, float]:
    """The true MI in nats of two standard normals that are not jointly normal, and their MI by Theorem 1.

    Z' = +- rho Z + sqrt(1 - rho^2) noise, with sign + with probability `agreeing`. Both marginals are N(0, 1). The joint is
    a mixture of two Gaussians with correlations rho and -rho.

    Returns:
        The MI by quadrature, and the log-det ratio of the correlation (2 agreeing - 1) rho, which never exceeds it.

    Raises:
        ValueError: not -1 < rho < 1, or `agreeing` is no probability.
    """
    if not -1 < rho < 1 or not 0 <= agreeing <= 1:
        raise ValueError(f"expected -1 < rho < 1 and 0 <= agreeing <= 1, got {rho} and {agreeing}")
    spread = 1 - rho**2
    # The trapezoidal rule: here it converges faster than any power of its step, which the components' shorter axis sets.
    step = math.sqrt(1 - abs(rho)) / 8
    grid = np.arange(-10, 10 + step, step)
    x, y = np.meshgrid(grid, grid)
    # log of the joint density over the product of the marginals, for each sign
    ratios = [(2 * sign * rho * x * y - rho**2 * (x**2 + y**2)) / (2 * spread) for sign in (1, -1)]
    with np.errstate(divide="ignore"):
        shares = np.log([agreeing, 1 - agreeing])
    ratio = np.logaddexp(ratios[0] + shares[0], ratios[1] + shares[1]) - math.log(spread) / 2
    density = np.exp(ratio - (x**2 + y**2) / 2) / (2 * math.pi)
    information = float((density * ratio).sum()) * step**2
    return information, correlated_gaussian_mutual_information((2 * agreeing - 1) * rho, 1)


def pairs_of_signs(rho: float) -> tuple[float, float]:
    """MI in nats of two fair signs with correlation rho, log 2 - H_b((1 + rho) / 2), and by Theorem 1, which is no bound.

    ValueError unless -1 < rho < 1.
    """
    ratio = correlated_gaussian_mutual_information(rho, 1)
    same = (1 + rho) / 2
    return math.log(2) - float(entr(same) + entr(1 - same)), ratio


def student_t_mutual_information(dispersion: ArrayLike, n: int, nu: float) -> float:
    """MI in nats between the first n coordinates of a multivariate Student t and the others; its covariance is nu/(nu-2) S.

    It exceeds the MI of the Gaussian with the same S (0 for identity S) by a constant that vanishes only as nu grows.

    Raises:
        ValueError: the m x m dispersion S is not symmetric and positive definite, not 0 < n < m, or nu <= 0.
    """
    gaussian = gaussian_mutual_information(dispersion, n)
    m = len(np.asarray(dispersion))
    _check_dimension_and_shape(m, nu, "nu")
    blocks = _student_t_standard_entropy(n, nu) + _student_t_standard_entropy(m - n, nu)
    return gaussian + blocks - _student_t_standard_entropy(m, nu)


def _mggd_standard_entropy(m: int, beta: float) -> float:
    half = m / (2 * beta)
    log_normaliser = m / 2 * math.log(math.pi) + half * math.log(2) - math.log(beta)
    return float(log_normaliser + gammaln(half) - gammaln(m / 2) + half)


def _student_t_standard_entropy(m: int, nu: float) -> float:
    half, whole = nu / 2, (nu + m) / 2
    log_normaliser = gammaln(half) - gammaln(whole) + m / 2 * math.log(nu * math.pi)
    return float(log_normaliser + whole * (digamma(whole) - digamma(half)))


def _log_det(matrix: np.ndarray) -> float:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.allclose(matrix, matrix.T):
        raise ValueError(f"a covariance or dispersion must be a symmetric square matrix, got shape {matrix.shape}")
    try:
        factor = cholesky(matrix, lower=True)
    except np.linalg.LinAlgError as error:
        raise ValueError("a covariance must be positive definite, this one is not") from error
    return float(2 * np.log(np.diagonal(factor)).sum())


def _check_dimension_and_shape(m: int, shape: float, name: str) -> None:
    if m < 1:
        raise ValueError(f"the dimension must be at least 1, got {m}")
    if not shape > 0:
        raise ValueError(f"{name} must be above 0, got {shape}")
