"""What a representation looks like beyond its accuracy: pure functions on feature arrays.

Every function takes features as an ``(N, d)`` tensor, works in float64 on the CPU and returns a Python
float (information in nats). None of them looks at labels, so none can be tuned to the evaluation.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emim_solo.emim.objective import epps_pulley, mutual_information, null_mutual_information, random_directions

DECAY_RANKS = (5, 50)
"""Ranks of the covariance spectrum that the power law is fitted to, as far as they exist. The first few
follow the classes and the last the noise, so neither tells how fast the bulk decays."""

COLLAPSED_RANK = 3.0
"""Centred effective rank of the embeddings under which a run counts as collapsed. Runs that collapsed in
the laboratory had 1.4 and 2.5 of 256 dimensions, the lowest sound one 31."""

COLLAPSED_SPREAD = 0.05
"""Spread (see :func:`spread`) under which a run counts as collapsed; 1 is a uniform sphere."""


def _as_matrix(features: Tensor) -> Tensor:
    """Float64 copy on the CPU of a finite ``(N, d)`` array with at least two rows."""
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected (samples, dimensions)")
    if features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected at least 2 samples and 1 dimension")
    matrix = features.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(matrix).all():
        raise FloatingPointError("features hold NaN or infinite values")
    return matrix


def effective_rank(features: Tensor, *, centred: bool = False) -> float:
    """RankMe: the exponential of the entropy of the normalised singular values.

    Args:
        features: ``(N, d)``.
        centred: subtract the mean first. RankMe is published without it, and then a large common mean
            counts as one strong direction.

    Returns:
        A number from 1 to ``min(N, d)``; 0 for features that are all zero, which have no direction at all.

    Source: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", ICML 2023, equation 1.
    """
    matrix = _as_matrix(features)
    if centred:
        matrix = matrix - matrix.mean(dim=0)
    singular_values = torch.linalg.svdvals(matrix)
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return math.exp(torch.special.entr(singular_values / total).sum().item())


def alignment(features1: Tensor, features2: Tensor, *, power: float = 2.0) -> float:
    """Mean distance, to a power, between the two views of an image on the unit sphere: 0 is perfect.

    Args:
        features1: ``(N, d)``, one view of each image.
        features2: ``(N, d)``, the other view of the same images in the same order.
        power: exponent of the distance.

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020.
    """
    first, second = _as_matrix(features1), _as_matrix(features2)
    if first.shape != second.shape:
        raise ValueError(f"the views have shapes {tuple(first.shape)} and {tuple(second.shape)}, expected the same")
    distance = (F.normalize(first) - F.normalize(second)).norm(dim=1)
    return distance.pow(power).mean().item()


def uniformity(features: Tensor, *, temperature: float = 2.0) -> float:
    """Log of the mean Gaussian potential between pairs on the unit sphere: lower is more uniform.

    Args:
        features: ``(N, d)``; the cost is N^2 distances.
        temperature: t of the potential ``exp(-t |x - y|^2)``.

    Returns:
        From ``-4 t`` (two opposite points) to 0 (all points in one place).

    Source: Wang & Isola (see :func:`alignment`).
    """
    squared_distances = torch.pdist(F.normalize(_as_matrix(features))).square()
    return (torch.logsumexp(-temperature * squared_distances, dim=0) - math.log(len(squared_distances))).item()


def spectrum(features: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the features (N in the denominator), largest first.

    Args:
        features: ``(N, d)``.

    Returns:
        ``min(N, d)`` eigenvalues in float64; the others are zero.
    """
    matrix = _as_matrix(features)
    singular_values = torch.linalg.svdvals(matrix - matrix.mean(dim=0))
    return singular_values.square() / len(matrix)


def spectrum_decay(features: Tensor, *, ranks: tuple[int, int] = DECAY_RANKS) -> float:
    """alpha-ReQ: the exponent of the power law ``k^-alpha`` that the covariance spectrum follows.

    A least-squares line through ``(log k, log eigenvalue)``, each rank weighted by ``1 / k`` so that a
    decade of ranks counts the same wherever it lies.

    Args:
        features: ``(N, d)``.
        ranks: first and last rank of the fit, counted from 1. Ranks that do not exist, or whose eigenvalue
            is zero to rounding, are left out.

    Returns:
        alpha, or NaN where fewer than three ranks are left to fit.

    Source: Agrawal et al., "alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by
    measuring eigenspectrum decay", NeurIPS 2022.
    """
    eigenvalues = spectrum(features).numpy()
    floor = eigenvalues[0] * np.finfo(np.float64).eps * max(features.shape)
    last = min(ranks[1], int((eigenvalues > floor).sum()))
    k = np.arange(ranks[0], last + 1)
    if len(k) < 3:
        return math.nan
    # polyfit weights the residuals, not their squares.
    slope, _ = np.polyfit(np.log(k), np.log(eigenvalues[k - 1]), deg=1, w=np.sqrt(1 / k))
    return float(-slope)


def spread(features: Tensor) -> float:
    """Root mean squared distance of the features from their mean direction, on the unit sphere.

    Returns:
        From 0 (all images in one direction: complete collapse) to 1 (the directions cancel, as on a uniform
        sphere).

    Source: the test for collapse of Chen & He, "Exploring Simple Siamese Representation Learning", CVPR
    2021, section 4.1, with the sum over dimensions in place of their mean so that 1 does not depend on d.
    """
    directions = F.normalize(_as_matrix(features))
    return directions.var(dim=0, correction=0).sum().sqrt().item()


def collapsed(embeddings: Tensor) -> bool:
    """Whether embeddings have collapsed, to a point or to very few directions.

    The rule: the :func:`spread` is under :data:`COLLAPSED_SPREAD`, or the centred :func:`effective_rank` is
    under :data:`COLLAPSED_RANK` (under half the dimensions where there are fewer than six).

    Args:
        embeddings: ``(N, d)``, the output of the projector.
    """
    limit = min(COLLAPSED_RANK, min(embeddings.shape) / 2)
    return spread(embeddings) < COLLAPSED_SPREAD or effective_rank(embeddings, centred=True) < limit


def information(features1: Tensor, features2: Tensor) -> tuple[float, float]:
    """Mutual information of two views and its null, in nats.

    The estimator has a bias of about ``d^2 / 2N`` on independent features; the null, the same estimator with
    the pairs of one view rolled by one, shows it. Read the difference.

    Args:
        features1: ``(N, d)``, one view of each image.
        features2: ``(N, d)``, the other view of the same images in the same order.

    Returns:
        ``(mutual information, null)``.
    """
    first, second = _as_matrix(features1), _as_matrix(features2)
    null = null_mutual_information(first, second, gather=False)
    return mutual_information(first, second, gather=False).item(), null.item()


def non_gaussianity(features: Tensor, *, directions: int = 64, seed: int = 0) -> tuple[float, float]:
    """How far the features' one-dimensional projections are from Gaussian, and the same of Gaussian samples: sliced Epps-Pulley.

    The :func:`emim_solo.emim.objective.epps_pulley` statistic of the projections onto random directions, in the mean over these.
    The covariance is not tested: second moments hold it anyway. Where this is at its null the marginals may be taken for
    Gaussian, and the mutual information from second moments for a lower bound of the true one (see :mod:`emim_solo.emim.theory`).

    Args:
        features: ``(N, d)``, standardised here, as the objective does.
        directions: number of them, uniform on the sphere.
        seed: of the directions, and of the Gaussian samples.

    Returns:
        ``(statistic, null)``, from 0 on: signs +-1 have 0.05, a uniform distribution 0.005; the null falls as 1/N. Directions
        without variance are left out; NaN where none has any.

    Source: Epps & Pulley (see :func:`emim_solo.emim.objective.epps_pulley`); slicing as in Balestriero & LeCun, arXiv 2511.08544.
    """
    matrix = _as_matrix(features)
    slices = random_directions(matrix.shape[1], directions, seed=seed).double()
    spread, mean = matrix.std(dim=0, correction=0), matrix.mean(0)
    # The mean of a constant feature is rounded, so what centring leaves is no signal (as in objective.py).
    varying = spread > 2e-15 + 16 * torch.finfo(features.dtype).eps * mean.abs()
    projected = (matrix - mean)[:, varying] / spread[varying] @ slices[varying]
    found = epps_pulley(projected).mean().item() if varying.any() else math.nan
    return found, _gaussian_null(len(matrix), directions, seed)


@cache
def _gaussian_null(samples: int, directions: int, seed: int) -> float:
    """The statistic of as many Gaussian samples: asked for again at every logging interval of a training."""
    generator = torch.Generator().manual_seed(seed)
    return epps_pulley(torch.randn(samples, directions, generator=generator, dtype=torch.float64)).mean().item()


def diagnose(features1: Tensor, features2: Tensor) -> dict[str, float]:
    """All of the above for the two views of the same images, by name.

    Args:
        features1: ``(N, d)``, one view of each image.
        features2: ``(N, d)``, the other view of the same images in the same order.

    Returns:
        ``mi``, ``mi_null`` (nats), ``effective_rank``, ``alignment``, ``uniformity``, ``spectrum_decay``,
        ``spread``, ``collapsed`` (1 or 0), ``non_gaussianity`` and ``non_gaussianity_null``. Features with NaN or
        infinite values give NaN throughout, so that the row can be kept and its cells flagged.
    """
    names = (
        *("mi", "mi_null", "effective_rank", "alignment", "uniformity", "spectrum_decay", "spread", "collapsed"),
        *("non_gaussianity", "non_gaussianity_null"),
    )
    if not (torch.isfinite(features1).all() and torch.isfinite(features2).all()):
        return dict.fromkeys(names, math.nan)
    mi, mi_null = information(features1, features2)
    values = (
        mi,
        mi_null,
        effective_rank(features1),
        alignment(features1, features2),
        uniformity(features1),
        spectrum_decay(features1),
        spread(features1),
        float(collapsed(features1)),
        *non_gaussianity(features1),
    )
    return dict(zip(names, values, strict=True))
