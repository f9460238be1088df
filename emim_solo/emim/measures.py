"""Measures of a representation without labels, in float64 on the CPU, information in nats: pure functions on features.

:func:`scores` and :func:`diagnose` are all of them by name: what ``emim-solo score`` and a benchmark's diagnostics
write into their rows.
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
"""What :func:`scores` and :func:`diagnose` both have: of the first view of each image, or of the first two."""
NAMES = ("view_information", "view_information_null", "lidar", *OF_A_PAIR)
"""Of :func:`scores`."""
CONFIDENCE = 0.95
SPECTRUM_IMAGES = 25_600
"""Images at most that measures of one or two views see: as many as RankMe's authors take."""
UNIFORMITY_IMAGES = 4_096
"""Uniformity holds the distance of every pair."""
DECAY_RANKS = (5, 50)
"""Ranks that the power law is fitted to, from 1: the first few follow the classes and the last the noise."""
COLLAPSED_RANK = 3.0
"""Centred :func:`rankme` of collapsed embeddings: collapsed runs had 1.4 and 2.5 of 256 dimensions, sound ones 31."""
COLLAPSED_SPREAD = 0.05
"""Spread (see :func:`spread`) under which a run counts as collapsed; 1 is a uniform sphere."""
_PIECE = 2**24  # numbers in float64: 128 MB

# -- of one view, or two -------------------------------------------------------------------------------------------


def _as_matrix(features: Tensor) -> Tensor:
    """Float64 copy on the CPU of a finite ``(N, d)`` array with at least two rows."""
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, d) of at least 2 samples")
    matrix = features.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(matrix).all():
        raise FloatingPointError("features hold NaN or infinite values")
    return matrix


def rankme(features: Tensor, *, centred: bool = False) -> float:
    """RankMe of ``(N, d)`` features: the exponential of the entropy of the normalised singular values.

    From 1 to ``min(N, d)``, 0 for features that are all zero. Published without the mean subtracted (``centred``): a
    large common mean counts as one strong direction.

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
    """Mean distance, to a power, of two views ``(N, d)`` of the same images on the unit sphere: 0 is perfect.

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020.
    """
    first, second = _as_matrix(features1), _as_matrix(features2)
    if first.shape != second.shape:
        raise ValueError(f"the views have shapes {tuple(first.shape)} and {tuple(second.shape)}, expected the same")
    distance = (F.normalize(first) - F.normalize(second)).norm(dim=1)
    return distance.pow(power).mean().item()


def uniformity(features: Tensor, *, temperature: float = 2.0) -> float:
    """Log of the mean potential ``exp(-t |x - y|^2)`` of all N^2 pairs of ``(N, d)`` features on the unit sphere.

    From ``-4 t`` (two opposite points; lower is more uniform) to 0 (all points in one place).

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

    A least-squares line through ``(log k, log eigenvalue)``, each rank of :data:`DECAY_RANKS` weighted by ``1 / k`` so
    that a decade of ranks counts the same wherever it lies; NaN where fewer than three eigenvalues are above rounding.

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
    2021, section 4.1, with the sum over dimensions in place of their mean so that 1 does not depend on d.
    """
    directions = F.normalize(_as_matrix(features))
    return directions.var(dim=0, correction=0).sum().sqrt().item()


def collapsed(embeddings: Tensor) -> bool:
    """Whether embeddings ``(N, d)`` of the projector have collapsed, to a point or to very few directions.

    The rule: the :func:`spread` is under :data:`COLLAPSED_SPREAD`, or the centred :func:`rankme` is
    under :data:`COLLAPSED_RANK` (under half the dimensions where there are fewer than six).
    """
    limit = min(COLLAPSED_RANK, min(embeddings.shape) / 2)
    return spread(embeddings) < COLLAPSED_SPREAD or rankme(embeddings, centred=True) < limit


def pair_information(features1: Tensor, features2: Tensor, *, noise_variance: float = 0.1) -> tuple[float, float]:
    """Mutual information of two views ``(N, d)`` of the same images and its null, in nats: read the difference.

    The estimator has a bias of about ``d^2 / 2N`` on independent features; the null, the same estimator with
    the pairs of one view rolled by one, shows it.
    """
    first, second = _as_matrix(features1), _as_matrix(features2)
    null = null_mutual_information(first, second, noise_variance=noise_variance, gather=False)
    return mutual_information(first, second, noise_variance=noise_variance, gather=False).item(), null.item()


def non_gaussianity(features: Tensor, *, directions: int = 64, seed: int = 0) -> tuple[float, float]:
    """How far projections of ``(N, d)`` features onto random directions are from Gaussian, and Gaussian samples are.

    The mean :func:`emim_solo.emim.objective.epps_pulley` statistic of the standardised features. The covariance is not
    tested: second moments hold it anyway. Where this is at its null the marginals may be taken for Gaussian, and the
    mutual information from second moments for a lower bound of the true one (see :mod:`emim_solo.emim.theory`).

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
    statistic = epps_pulley(projected).mean().item() if varying.any() else math.nan
    return statistic, _gaussian_null(len(matrix), directions, seed)


@cache
def _gaussian_null(samples: int, directions: int, seed: int) -> float:
    """The statistic of as many Gaussian samples: asked for again at every logging interval of a training."""
    generator = torch.Generator().manual_seed(seed)
    return epps_pulley(torch.randn(samples, directions, generator=generator, dtype=torch.float64)).mean().item()


# -- of several views -------------------------------------------------------------------------------------------------


def image_information(features: Tensor, *, noise_variance: float = 0.1, seed: int = 0) -> tuple[float, float]:
    """Information of a view about its image, and its null, in nats: read the difference, which is the view information.

    Features are standardised over all images and views; one that is constant to rounding adds nothing. With noise of
    variance e added to every view,

        I(Z; image) = 1/2 [log det(S_w + S_b + e I) - log det(S_w + e I)],

    S_w the covariance within images (N (q - 1) degrees of freedom), S_b that of the images' means less S_w / q. It is
    exact where means, and views about them, are Gaussian, and bounds the information of two views about each other from
    above (data processing).

    The null is the same number after every view was given to a random image (at e = 0 d^2 / (4 N q (q - 1)) to first
    order, by Wishart log determinants). Of views that are independent of their images the difference has the mean 0 for
    every N, q, d and e. Of views that do tell their image it is too low, by up to about d^2 / 4N nats where S_b
    outweighs S_w and e is small: compare scores of one N, q, e.

    Args:
        features: ``(N, q, d)``, all at least 2.
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
    """LiDAR: effective rank of the between-image covariance, whitened by the within-image one.

    Eigenvalues are those of ``(S_w + delta I)^-1 S_b``, with S_b the covariance of the images' means and S_w the mean
    square distance of views from them (N and N q in the denominators), of features ``(N, q, d)``, all at least 2, as
    they are. As in :func:`rankme`, the authors' 1e-7 beside each eigenvalue's share is left out; their q is 50.

    Returns:
        From 1 to ``min(N - 1, d)``; 0 where all images have one mean. NaN for features that are not finite, or so
        large, of a run that diverged, that delta is lost in their rounding.

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
    # Neighbours in a folder are of one class: in their order the null of a pair would hold that information.
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
    """The measures :data:`NAMES` of features ``(N, q, d)``, all at least 2, shuffled where their order counts.

    ``seed`` is of the nulls, and of the images taken where there are more than :data:`SPECTRUM_IMAGES`.

    Returns:
        ``view_information`` and, of the first two views, ``pair_information``, each less its null, which is
        ``<name>_null``; ``lidar``; ``rankme``, ``alpha_req`` and ``uniformity`` of the first view; ``alignment`` of the first
        two. Features that are not finite give NaN throughout.

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
    """What two views ``(N, d)`` of the same images say of a run's health.

    Returns:
        The measures :data:`OF_A_PAIR`, as :func:`scores` has them, and ``spread``, ``collapsed`` (1 or 0), ``non_gaussianity``
        and ``non_gaussianity_null`` of the first view. Features with NaN or infinite values give NaN throughout.
    """
    of_first = ("spread", "collapsed", "non_gaussianity", "non_gaussianity_null")
    if not (torch.isfinite(features1).all() and torch.isfinite(features2).all()):
        return dict.fromkeys((*OF_A_PAIR, *of_first), math.nan)
    values = spread(features1), float(collapsed(features1)), *non_gaussianity(features1)
    return _of_pair(features1, features2, noise_variance, seed) | dict(zip(of_first, values, strict=True))


def half_widths(features: Tensor, *, splits: int = 10, seed: int = 0, **settings: float) -> dict[str, float]:
    """Half the width of a 95 % interval around each of the :func:`scores` of features ``(N, q, d)``, N at least 4.

    It is over the choice of images: of two random halves of them, a quarter of the squared difference of their scores
    estimates the variance of the whole's; the mean over the splits into halves, each of which costs what the scores
    cost, is taken. The bootstrap does not serve: an image drawn twice is no second image (docs/label-free.md). Against
    the spread over new images these are half as wide again for independent views, right for Gaussian ones, and up to 40
    % too narrow for heavy tails. NaN where a score is NaN; ``seed`` is of the splits and, with ``settings``, of the
    scores.
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
    widths: list[float] = (t_quantile(splits) * (square / 4).sqrt()).tolist()
    return widths


@cache
def t_quantile(degrees: int) -> float:
    """What Student's t of so many degrees of freedom is under in absolute value with a probability of 95 %.

    SciPy's ``t.ppf``, without SciPy: the score needs torch alone.
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
        score: the estimate less its null: the number that ranks encoders.
        null: the same estimate after every view was given to a random image.
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
        splits: of the images into halves, for the interval; each costs about what the score costs.
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
    return all(bool(piece.isfinite().all()) for piece in features.split(_images_in_a_piece(features)))


def _images_in_a_piece(features: Tensor) -> int:
    return max(1, _PIECE // (features.shape[1] * features.shape[2]))


def _pieces(features: Tensor, order: Tensor | None = None) -> Iterator[Tensor]:
    """Some images at a time in float64; with an order ``(N, q)``, view j of row i is that of image ``order[i, j]``."""
    size = _images_in_a_piece(features)
    columns = torch.arange(features.shape[1])
    for piece in features.split(size) if order is None else order.split(size):
        yield (piece if order is None else features[piece, columns]).detach().to("cpu", torch.float64)


def _moments(features: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance of all views and covariance of the images' means, N q and N in the denominators."""
    images, views, dimensions = features.shape
    mean = torch.zeros(dimensions, dtype=torch.float64)
    for piece in _pieces(features):
        mean += piece.sum((0, 1)) / (images * views)
    total, between = torch.zeros(2, dimensions, dimensions, dtype=torch.float64)
    for piece in _pieces(features, order):
        centred = piece - mean
        if order is None:  # an order changes nothing about it
            total += centred.flatten(0, 1).mT @ centred.flatten(0, 1) / (images * views)
        means = centred.mean(1)
        between += means.mT @ means / images
    return mean, total, between


effective_rank, spectrum_decay, information = rankme, alpha_req, pair_information
"""Names of version 0.2."""
