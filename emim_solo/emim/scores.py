"""Scores of a representation without labels, from several views of every image: pure functions on feature arrays.

Features are ``(N, q, d)`` tensors: q views of each of N images, all from one distribution of augmentations. Work is done
in float64 on the CPU, in pieces, so that only the features themselves have to fit into memory; information is in nats.
What needs one or two views is in :mod:`emim_solo.emim.diagnostics` and is called from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from scipy import stats
from torch import Tensor

from emim_solo.emim.diagnostics import alignment, effective_rank, spectrum_decay, uniformity
from emim_solo.emim.objective import log_det, mutual_information, null_mutual_information

NAMES = (
    "view_information",
    "pair_information",
    "rankme",
    "lidar",
    "alpha_req",
    "alignment",
    "uniformity",
    "view_information_null",
    "pair_information_null",
)
CONFIDENCE = 0.95
SPECTRUM_IMAGES = 25_600
"""Images at most that scores of one or two views see: as many as RankMe's authors take."""
UNIFORMITY_IMAGES = 4_096
"""Uniformity holds the distance of every pair."""
_PIECE = 2**24  # numbers in float64: 128 MB


def view_information(features: Tensor, *, noise_variance: float = 0.1, seed: int = 0) -> tuple[float, float]:
    """Information of a view about its image, and its null, in nats: read the difference.

    Features x are standardised over all images and views; one that is constant to rounding becomes 0 and adds nothing.
    With noise of variance e added to every view,

        I(Z; image) = 1/2 [log det(S_w + S_b + e I) - log det(S_w + e I)],

    S_w the covariance within images (N (q - 1) degrees of freedom), S_b that of the images' means less S_w / q. It is
    exact where views are Gaussian about their image's mean and the means are Gaussian, and bounds the information of
    two views about each other from above (data processing).

    The null is the same number after every view was given to a random image. Views that are independent of their images
    do not change in distribution by that, whatever it is: of such views the difference has the mean 0 for every N, q, d
    and e. (At e = 0 log determinants of Wishart matrices give d^2 / (4 N q (q - 1)) to first order.) With more dimensions
    than images the same holds, the null is a few nats, and e alone keeps the determinants above 0.

    The difference of views that do tell their image is too low, by up to about d^2 / 4N nats where S_b outweighs S_w and
    e is small: compare scores of one N, q, e and, across widths, with care.

    Args:
        features: ``(N, q, d)``, N and q at least 2.
        noise_variance: e > 0.
        seed: of the null.

    Returns:
        ``(information, null)``; NaN for features that are not finite.

    Raises:
        ValueError: another shape, or a bad noise variance.
    """
    images, views, _ = _check(features)
    if not noise_variance > 0:
        raise ValueError(f"noise_variance must be above 0, got {noise_variance}")
    if not _finite(features):
        return math.nan, math.nan
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
    square distance of views from them (N and N q in the denominators). As in :func:`effective_rank`, the authors' 1e-7
    beside each eigenvalue's share is left out.

    Args:
        features: ``(N, q, d)``, all at least 2; the authors take 1,000 images and 50 views.
        delta: > 0, on the features as they are.

    Returns:
        A number from 1 to ``min(N - 1, d)``; 0 where all images have one mean. NaN for features that are not finite, or so
        large, of a run that diverged, that delta is lost in their rounding.

    Source: Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures", ICLR 2024.
    """
    _check(features)
    if not delta > 0:
        raise ValueError(f"delta must be above 0, got {delta}")
    if not _finite(features):
        return math.nan
    _, total, between = _moments(features)
    factor, failed = torch.linalg.cholesky_ex(total - between + delta * torch.eye(len(total), dtype=torch.float64))
    if failed:
        return math.nan
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    return effective_rank(torch.linalg.solve_triangular(factor, half.mT, upper=False))


def scores(features: Tensor, *, noise_variance: float = 0.1, delta: float = 1e-4, seed: int = 0) -> dict[str, float]:
    """Every score of one set of features, by name.

    Args:
        features: ``(N, q, d)``, all at least 2. In any order: they are shuffled where it counts.
        noise_variance: e of the informations.
        delta: of LiDAR.
        seed: of the nulls, and of the images taken where there are more than :data:`SPECTRUM_IMAGES` (for uniformity
            :data:`UNIFORMITY_IMAGES`).

    Returns:
        ``view_information`` less its null, and ``view_information_null``; ``pair_information``, the mutual information
        of the first two views less its null, and ``pair_information_null``; ``rankme``, ``alpha_req`` and ``uniformity``
        of the first view; ``alignment`` of the first two; ``lidar``. Features that are not finite give NaN throughout.

    Raises:
        ValueError: another shape, or a setting that is not above 0.
    """
    images, _, _ = _check(features)
    if not _finite(features):
        return dict.fromkeys(NAMES, math.nan)
    view, view_null = view_information(features, noise_variance=noise_variance, seed=seed)
    # Neighbours in a folder are of one class: in their order the null of a pair would hold that information.
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:SPECTRUM_IMAGES]
    first, second = (features[order, view].to("cpu", torch.float64) for view in (0, 1))
    pair_null = null_mutual_information(first, second, noise_variance=noise_variance, gather=False).item()
    values = (
        view - view_null,
        mutual_information(first, second, noise_variance=noise_variance, gather=False).item() - pair_null,
        effective_rank(first),
        lidar(features, delta=delta),
        spectrum_decay(first),
        alignment(first, second),
        uniformity(first[:UNIFORMITY_IMAGES]),
        view_null,
        pair_null,
    )
    return dict(zip(NAMES, values, strict=True))


def half_widths(features: Tensor, *, splits: int = 10, seed: int = 0, **settings: float) -> dict[str, float]:
    """Half the width of a 95 % interval around each of the :func:`scores`, over the choice of images.

    The images are split into two halves at random; the halves are independent, so a quarter of the squared difference of
    their scores estimates the variance of the whole's, and its mean over the splits is taken. The plain bootstrap does not
    serve here: an image drawn twice is no second image, and with d = 256 and N = 180 to 500 it moved the information
    by 3 to 9 nats where its standard error was 0.2 to 1.9. Against the spread over new
    images these are half as wide again for independent views, right for Gaussian ones, and up to 40 % too narrow for heavy
    tails.

    Args:
        features: ``(N, q, d)``, N at least 4.
        splits: into two halves; each costs what :func:`scores` costs.
        seed: of the splits, and of the scores.
        **settings: of :func:`scores`.

    Returns:
        By name of the score; NaN where that is NaN.
    """
    images, _, _ = _check(features)
    if images < 4 or splits < 1:
        raise ValueError(f"{images} images and {splits} splits: expected at least 4 images and 1 split")
    generator = torch.Generator().manual_seed(seed)
    squares: dict[str, float] = {}
    for _ in range(splits):
        halves = torch.randperm(images, generator=generator)[: images // 2 * 2].view(2, -1)
        one, other = (scores(features[half], seed=seed, **settings) for half in halves)
        for name in one:
            squares[name] = squares.get(name, 0.0) + (one[name] - other[name]) ** 2
    factor = float(stats.t.ppf((1 + CONFIDENCE) / 2, df=splits))
    return {name: factor * math.sqrt(square / splits / 4) for name, square in squares.items()}


def _check(features: Tensor) -> tuple[int, int, int]:
    if features.ndim != 3 or min(features.shape) < 2 or not features.is_floating_point():
        raise ValueError(
            f"features have shape {tuple(features.shape)} and dtype {features.dtype}, expected floating (images, views, "
            "dimensions), at least 2 of each"
        )
    images, views, dimensions = features.shape
    return images, views, dimensions


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
