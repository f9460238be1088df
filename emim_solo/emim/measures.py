"""How good is a representation, measured without labels? Pure functions of features, in float64 on the CPU.

Information is in nats (natural logarithm). :func:`scores` and :func:`diagnose` compute all measures by name, for the rows
of ``emim-solo score`` and of a benchmark's diagnostics. Those that take ``(N, d)`` features raise ValueError for another shape or
N < 2, and FloatingPointError for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emim_solo.emim.objective import (
    epps_pulley,
    log_det,
    mutual_information,
    null_mutual_information,
    random_directions,
)

OF_A_PAIR = ("pair_information", "pair_information_null", "rankme", "alpha_req", "alignment", "uniformity")
"""Measures of both :func:`scores` and :func:`diagnose`, computed on the first view of each image or on the first two."""
NAMES = ("view_information", "view_information_null", "lidar", *OF_A_PAIR)
"""Measures of :func:`scores`."""
CONFIDENCE = 0.95
SPECTRUM_IMAGES = 25_600
"""Maximal number of images for measures of one or two views: as many as RankMe's authors use."""
UNIFORMITY_IMAGES = 4_096
"""Maximal number of images for uniformity, which keeps the distance of every pair in memory."""
DECAY_RANKS = (5, 50)
"""First and last rank, counted from 1, of the power-law fit: the ranks before follow the classes, those after the noise."""
COLLAPSED_RANK = 3.0
"""Embeddings with a smaller centred :func:`rankme` are collapsed. Of 256 dimensions collapsed runs had 1.4 and 2.5, sound ones 31."""
COLLAPSED_SPREAD = 0.05
"""Embeddings with a smaller :func:`spread` are collapsed; a uniform sphere has 1."""
_PIECE = 2**24  # float64 numbers: 128 MB

# -- measures of one view, or two -------------------------------------------------------------------------------------------


def _as_matrix(features: Tensor) -> Tensor:
    """Float64 copy on the CPU of a finite ``(N, d)`` array of at least two rows."""
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, d) of at least 2 samples")
    matrix = features.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(matrix).all():
        raise FloatingPointError(
            "features hold NaN or infinite values: expected those of a network that has not diverged"
        )
    return matrix


def rankme(features: Tensor, *, centred: bool = False) -> float:
    """RankMe of ``(N, d)`` features: the exponential of the entropy of the normalised singular values.

    From 1 to ``min(N, d)``; 0 if all features are zero. The published measure does not subtract the mean, so a large common
    mean counts as one strong direction; ``centred`` subtracts it.

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
    """Mean power of the distance on the unit sphere between two views ``(N, d)`` of the same images: 0 is perfect.

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020.
    """
    first, second = _as_matrix(features1), _as_matrix(features2)
    if first.shape != second.shape:
        raise ValueError(f"the views have shapes {tuple(first.shape)} and {tuple(second.shape)}, expected the same")
    distance = (F.normalize(first) - F.normalize(second)).norm(dim=1)
    return distance.pow(power).mean().item()


def uniformity(features: Tensor, *, temperature: float = 2.0) -> float:
    """Log of the mean potential ``exp(-t |x - y|^2)`` over all pairs of ``(N, d)`` features on the unit sphere.

    From ``-4 t`` (two opposite points) to 0 (all points in one place); lower is more uniform.

    Source: Wang & Isola (see :func:`alignment`).
    """
    squared_distances = torch.pdist(F.normalize(_as_matrix(features))).square()
    return (torch.logsumexp(-temperature * squared_distances, dim=0) - math.log(len(squared_distances))).item()


def spectrum(features: Tensor) -> Tensor:
    """``min(N, d)`` eigenvalues of the covariance of ``(N, d)`` features (N in the denominator), largest first."""
    matrix = _as_matrix(features)
    singular_values = torch.linalg.svdvals(matrix - matrix.mean(dim=0))
    return singular_values.square() / len(matrix)


def alpha_req(features: Tensor) -> float:
    """alpha-ReQ: the exponent of the power law ``k^-alpha`` of the covariance spectrum of ``(N, d)`` features.

    A least-squares line through ``(log k, log eigenvalue)`` for the ranks of :data:`DECAY_RANKS`. The weights ``1 / k`` give
    every decade of ranks the same influence. NaN if fewer than three eigenvalues are above rounding.

    Source: Agrawal et al., "alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by
    measuring eigenspectrum decay", NeurIPS 2022.
    """
    eigenvalues = spectrum(features)
    floor = eigenvalues[0] * torch.finfo(torch.float64).eps * max(features.shape)
    first, last = DECAY_RANKS
    k = torch.arange(first, max(first, min(last, int((eigenvalues > floor).sum())) + 1))
    if len(k) < 3:
        return math.nan
    weights = 1 / k.double()
    weights /= weights.sum()
    x, y = k.double().log(), eigenvalues[k - 1].log()
    x, y = x - weights @ x, y - weights @ y
    return -(weights @ (x * y) / (weights @ x.square())).item()


def spread(features: Tensor) -> float:
    """Root mean squared distance of ``(N, d)`` features from their mean direction, on the unit sphere.

    From 0 (all in one direction: complete collapse) to 1 (the directions cancel, as on a uniform sphere).

    Source: the test for collapse of Chen & He, "Exploring Simple Siamese Representation Learning", CVPR
    2021, section 4.1. The sum over dimensions replaces their mean, so that the value 1 does not depend on d.
    """
    directions = F.normalize(_as_matrix(features))
    return directions.var(dim=0, correction=0).sum().sqrt().item()


def collapsed(embeddings: Tensor) -> bool:
    """Whether embeddings ``(N, d)`` of the projector have collapsed, to a point or to very few directions.

    The rule: the :func:`spread` is below :data:`COLLAPSED_SPREAD`, or the centred :func:`rankme` is
    below :data:`COLLAPSED_RANK` (below half of ``min(N, d)`` if that is less than 3).
    """
    limit = min(COLLAPSED_RANK, min(embeddings.shape) / 2)
    return spread(embeddings) < COLLAPSED_SPREAD or rankme(embeddings, centred=True) < limit


def pair_information(features1: Tensor, features2: Tensor, *, noise_variance: float = 0.1) -> tuple[float, float]:
    """Mutual information of two views ``(N, d)`` of the same images, and its null, in nats: read the difference.

    The null is the same estimator with one view rolled by one image. It shows the estimator's bias, which is about
    ``d^2 / 2N`` for independent features.
    """
    first, second = _as_matrix(features1), _as_matrix(features2)
    null = null_mutual_information(first, second, noise_variance=noise_variance, gather=False)
    return mutual_information(first, second, noise_variance=noise_variance, gather=False).item(), null.item()


def non_gaussianity(features: Tensor, *, directions: int = 64, seed: int = 0) -> tuple[float, float]:
    """How far projections of ``(N, d)`` features onto random directions are from Gaussian, and the same of Gaussian samples.

    The mean :func:`emim_solo.emim.objective.epps_pulley` statistic of the standardised features. It does not test the
    covariance, which the second moments describe. If the statistic is at its null, treat the marginals as Gaussian. The mutual
    information from second moments is then a lower bound of the true one (see :mod:`emim_solo.emim.theory`).

    Returns:
        ``(statistic, null)``, both >= 0: for d = 1 signs +-1 have 0.044, a uniform distribution 0.006; the null falls as 1/N. Features
        without variance are left out; NaN if none has variance.

    Source: Epps & Pulley (see :func:`emim_solo.emim.objective.epps_pulley`); slicing as in Balestriero & LeCun, arXiv 2511.08544.
    """
    matrix = _as_matrix(features)
    slices = random_directions(matrix.shape[1], directions, seed=seed).double()
    spread, mean = matrix.std(dim=0, correction=0), matrix.mean(0)
    # The mean of a constant feature is rounded, so what centring leaves is no signal (as in objective.py).
    varying = spread > 2e-15 + 16 * torch.finfo(features.dtype).eps * mean.abs()
    projected = (matrix - mean)[:, varying] / spread[varying] @ slices[varying]
    statistic = epps_pulley(projected).mean().item() if varying.any() else math.nan
    return statistic, _gaussian_null(len(matrix), directions, seed)


@cache
def _gaussian_null(samples: int, directions: int, seed: int) -> float:
    """The statistic of the same number of Gaussian samples; cached, since a training needs it at every logging interval."""
    generator = torch.Generator().manual_seed(seed)
    return epps_pulley(torch.randn(samples, directions, generator=generator, dtype=torch.float64)).mean().item()


# -- measures of several views -------------------------------------------------------------------------------------------------


def image_information(features: Tensor, *, noise_variance: float = 0.1, seed: int = 0) -> tuple[float, float]:
    """Information of a view about its image, and its null, in nats: read the difference, which is the view information.

    Features are standardised over all images and views. A feature that is constant to rounding adds nothing. With noise
    of variance e added to every view,

        I(Z; image) = 1/2 [log det(S_w + S_b + e I) - log det(S_w + e I)],

    where S_w is the covariance within images (N (q - 1) degrees of freedom) and S_b is the covariance of the images'
    means minus S_w / q. The formula is exact if the means, and the views around them, are Gaussian. It is an upper bound of
    the information of two views about each other (data processing).

    The null is the same number after every view was assigned to a random image (at e = 0 it is d^2 / (4 N q (q - 1)) to
    first order, by Wishart log determinants). For views independent of their images the difference has mean 0, for every
    N, q, d and e. For other views it is too low, by up to about d^2 / 4N nats if S_b is much larger than S_w and e is
    small. Compare only scores with equal N, q and e.

    Args:
        features: ``(N, q, d)``: N images, q views of each; all at least 2.
        noise_variance: e > 0.
        seed: of the null.

    Returns:
        ``(information, null)``; NaN for features that are not finite.

    Raises:
        ValueError: another shape, or a bad noise variance.
    """
    _check(features, noise_variance=noise_variance)
    if not _finite(features):
        return math.nan, math.nan
    images, views, _ = features.shape
    mean, total, between = _moments(features)
    scale = total.diagonal().rsqrt()
    # The mean of a constant feature is rounded, so what centring leaves is no signal (as in objective.py).
    eps = torch.finfo(features.dtype).eps
    scale[total.diagonal().sqrt() <= 2e-15 + 16 * eps * mean.abs()] = 0
    noise = noise_variance * torch.eye(len(scale), dtype=torch.float64)

    def information(between: Tensor) -> float:
        within = (total - between) * (views / (views - 1))
        both = torch.stack((total + between / (images - 1), within))
        whole, residual = log_det(both * scale * scale[:, None] + noise).tolist()
        return (whole - residual) / 2

    generator = torch.Generator().manual_seed(seed)
    broken = torch.stack([torch.randperm(images, generator=generator) for _ in range(views)], dim=1)
    return information(between), information(_moments(features, broken)[2])


def lidar(features: Tensor, *, delta: float = 1e-4) -> float:
    """LiDAR: effective rank of the between-image covariance, whitened by the within-image covariance.

    Eigenvalues are those of ``(S_w + delta I)^-1 S_b`` for features ``(N, q, d)``, all at least 2, not standardised. S_b is
    the covariance of the images' means, S_w that of the views around their means (N and N q in the denominators). As in
    :func:`rankme`, the authors' 1e-7 beside each eigenvalue's share is left out. The authors use q = 50.

    Returns:
        From 1 to ``min(N - 1, d)``; 0 if all images have the same mean. NaN for features that are not finite, or so large
        (a run that diverged) that rounding swallows delta.

    Source: Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures", ICLR 2024.
    """
    _check(features, delta=delta)
    if not _finite(features):
        return math.nan
    _, total, between = _moments(features)
    factor, failed = torch.linalg.cholesky_ex(total - between + delta * torch.eye(len(total), dtype=torch.float64))
    if failed:
        return math.nan
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    return rankme(torch.linalg.solve_triangular(factor, half.mT, upper=False))


# -- all of them by name -------------------------------------------------------------------------------------------


def _of_pair(first: Tensor, second: Tensor, noise_variance: float, seed: int) -> dict[str, float]:
    """The measures :data:`OF_A_PAIR` of finite features."""
    # Neighbours in a folder are of one class. Without a shuffle the null of a pair would contain that information.
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:SPECTRUM_IMAGES]
    first, second = (view[order].to("cpu", torch.float64) for view in (first, second))
    information, null = pair_information(first, second, noise_variance=noise_variance)
    return {
        "pair_information": information - null,
        "pair_information_null": null,
        "rankme": rankme(first),
        "alpha_req": alpha_req(first),
        "alignment": alignment(first, second),
        "uniformity": uniformity(first[:UNIFORMITY_IMAGES]),
    }


def scores(features: Tensor, *, noise_variance: float = 0.1, delta: float = 1e-4, seed: int = 0) -> dict[str, float]:
    """The measures :data:`NAMES` of features ``(N, q, d)``, all at least 2. Images are shuffled where their order matters.

    ``seed`` is that of the nulls, and of the choice of images if there are more than :data:`SPECTRUM_IMAGES`.

    Returns:
        ``view_information`` and, for the first two views, ``pair_information``, each minus its null, which is
        ``<name>_null``; ``lidar``; ``rankme``, ``alpha_req`` and ``uniformity`` of the first view; ``alignment`` of the first
        two. If features are not finite, all values are NaN.

    Raises:
        ValueError: another shape, or a setting that is not above 0.
    """
    _check(features)
    if not _finite(features):
        return dict.fromkeys(NAMES, math.nan)
    view, null = image_information(features, noise_variance=noise_variance, seed=seed)
    of_views = {"view_information": view - null, "view_information_null": null, "lidar": lidar(features, delta=delta)}
    return of_views | _of_pair(features[:, 0], features[:, 1], noise_variance, seed)


def diagnose(features1: Tensor, features2: Tensor, *, noise_variance: float = 0.1, seed: int = 0) -> dict[str, float]:
    """Whether a run is healthy, judged by two views ``(N, d)`` of the same images.

    Returns:
        The measures :data:`OF_A_PAIR` as in :func:`scores`, and ``spread``, ``collapsed`` (1 or 0), ``non_gaussianity``
        and ``non_gaussianity_null`` of the first view. If features hold NaN or infinite values, all values are NaN.
    """
    of_first = ("spread", "collapsed", "non_gaussianity", "non_gaussianity_null")
    if not (torch.isfinite(features1).all() and torch.isfinite(features2).all()):
        return dict.fromkeys((*OF_A_PAIR, *of_first), math.nan)
    values = spread(features1), float(collapsed(features1)), *non_gaussianity(features1)
    return _of_pair(features1, features2, noise_variance, seed) | dict(zip(of_first, values, strict=True))


def half_widths(features: Tensor, *, splits: int = 10, seed: int = 0, **settings: float) -> dict[str, float]:
    """Half the width of a 95 % interval around each of the :func:`scores` of features ``(N, q, d)``, N at least 4.

    The interval is over the choice of images. The images are split into two random halves. A quarter of the squared
    difference of the halves' scores estimates the variance of the score of all images; the estimate is the mean over
    ``splits`` splits. Each split costs as much as the scores. A bootstrap would be wrong: an image drawn twice is no second
    image (docs/label-free.md). Compared with the spread over new images, the intervals are half as wide again for independent
    views, right for Gaussian ones, and up to 40 % too narrow for heavy tails. NaN if a score is NaN. ``seed`` is that of the
    splits and the scores, ``settings`` are those of the scores.
    """
    widths = _half_widths(features, lambda half: list(scores(half, seed=seed, **settings).values()), splits, seed)
    return dict(zip(NAMES, widths, strict=True))


def _half_widths(features: Tensor, values: Callable[[Tensor], list[float]], splits: int, seed: int) -> list[float]:
    _check(features)
    images = len(features)
    if images < 4 or splits < 1:
        raise ValueError(f"{images} images and {splits} splits: expected at least 4 images and 1 split")
    generator = torch.Generator().manual_seed(seed)
    square: Any = 0
    for _ in range(splits):
        halves = torch.randperm(images, generator=generator)[: images // 2 * 2].view(2, -1)
        one, other = (torch.tensor(values(features[half]), dtype=torch.float64) for half in halves)
        square = square + (one - other).square() / splits
    return (t_quantile(splits) * (square / 4).sqrt()).tolist()


@cache
def t_quantile(degrees: int) -> float:
    """The value that ``|t|`` is below with probability 95 %, for Student's t with so many degrees of freedom.

    SciPy's ``t.ppf`` is the same, but the score needs only torch.
    """
    x = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi * degrees) / 2
    density = torch.exp(log_scale - (degrees + 1) / 2 * torch.log1p(x.square() / degrees))
    probability = 2 * torch.cumulative_trapezoid(density, x)  # up to x[1], x[2], ...
    above = int((probability < CONFIDENCE).sum())
    left = (probability[above] - CONFIDENCE) / (probability[above] - probability[above - 1])
    return (x[above + 1] - left * (x[1] - x[0])).item()


class ViewInformation(NamedTuple):
    """What a view tells about its image, in nats.

    Attributes:
        score: the estimate minus its null: the number that ranks encoders.
        null: the same estimate after every view was assigned to a random image.
        half_width: of a 95 % interval around the score, over the choice of images.
    """

    score: float
    null: float
    half_width: float


def view_information(features: Any, *, noise_variance: float = 0.1, splits: int = 10, seed: int = 0) -> ViewInformation:
    """The view information of any features, with its null and its interval: see :func:`image_information`.

    Args:
        features: ``(N, q, d)``, q augmented views of each of N >= 4 images: a tensor or a NumPy array.
        noise_variance: e > 0.
        splits: number of splits of the images into halves, for the interval; each costs about as much as the score.
        seed: of the null and the splits.

    Returns:
        Score, null and half width; NaN for features that are not finite.

    Raises:
        ValueError: another shape, or a bad setting.
    """
    features = torch.as_tensor(features)

    def score(part: Tensor) -> float:
        information, null = image_information(part, noise_variance=noise_variance, seed=seed)
        return information - null

    (half_width,) = _half_widths(features, lambda half: [score(half)], splits, seed)
    information, null = image_information(features, noise_variance=noise_variance, seed=seed)
    return ViewInformation(information - null, null, half_width)


def _check(features: Tensor, **above_0: float) -> None:
    if features.ndim != 3 or min(features.shape) < 2 or not features.is_floating_point():
        raise ValueError(
            f"features have shape {tuple(features.shape)} and dtype {features.dtype}, expected floating (images, views, "
            "dimensions), at least 2 of each"
        )
    for name, value in above_0.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def _finite(features: Tensor) -> bool:
    return all(bool(bound.isfinite()) for bound in torch.aminmax(features))  # without an array of their size


def _pieces(features: Tensor, order: Tensor | None = None) -> Iterator[Tensor]:
    """A few images at a time in float64. With an order ``(N, q)``, view j of row i is view j of image ``order[i, j]``."""
    size = max(1, _PIECE // (features.shape[1] * features.shape[2]))
    columns = torch.arange(features.shape[1])
    for piece in features.split(size) if order is None else order.split(size):
        yield (piece if order is None else features[piece, columns]).detach().to("cpu", torch.float64)


def _moments(features: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance of all views and covariance of the images' means, with N q and N in the denominators."""
    images, views, dimensions = features.shape
    mean = torch.zeros(dimensions, dtype=torch.float64)
    for piece in _pieces(features):
        mean += piece.sum((0, 1)) / (images * views)
    total, between = torch.zeros(2, dimensions, dimensions, dtype=torch.float64)
    for piece in _pieces(features, order):
        centred = piece - mean
        if order is None:  # an order does not change it
            total += centred.flatten(0, 1).mT @ centred.flatten(0, 1) / (images * views)
        means = centred.mean(1)
        between += means.mT @ means / images
    return mean, total, between


effective_rank, spectrum_decay, information = rankme, alpha_req, pair_information
"""Names of version 0.2."""
