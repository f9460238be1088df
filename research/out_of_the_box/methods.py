"""The methods out of the box: each loss with its published weights, for any number of views.

A loss of two views is averaged over all pairs of views. To avoid a call for each pair, or a d x d matrix from few
samples, some losses are computed from what the pairs share. tests/test_out_of_the_box.py compares the results with
solo-learn and lightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _moments(z: Tensor) -> Tensor:
    """z^T z or z z^T, the smaller one: their Frobenius norms are the same."""
    return z.T @ z if len(z) > z.shape[1] else z @ z.T


def _mean_square_difference(z: Tensor) -> Tensor:
    """Mean squared difference, averaged over all pairs of views; z is views x samples x dimensions."""
    within: Tensor = (z - z.mean(0)).square().mean() * 2 * len(z) / (len(z) - 1)
    return within


def vicreg(*views: Tensor, similarity: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    """Mean of solo-learn's vicreg_loss_func over pairs. Variance and covariance belong to each view, so twice their mean."""
    z = torch.stack(views)
    _, samples, d = z.shape
    own = z.new_zeros(())
    for view in z:
        centred = view - view.mean(0)
        spread = torch.sqrt(view.var(0) + 1e-4)
        diagonal = centred.square().sum(0) / (samples - 1)
        off_diagonal = _moments(centred).square().sum() / (samples - 1) ** 2 - diagonal.square().sum()
        own = own + variance * F.relu(1 - spread).mean() + covariance * off_diagonal / d
    return similarity * _mean_square_difference(z) + 2 * own / len(z)


def barlow_twins(*views: Tensor, lamb: float = 0.0051, scale_loss: float = 0.024) -> Tensor:
    """Mean of solo-learn's barlow_loss_func over pairs; ||A^T B||^2 is the sum of (A A^T) * (B B^T), entry by entry."""
    z = torch.stack([(view - view.mean(0)) / torch.sqrt(view.var(0, correction=0) + 1e-5) for view in views])
    samples, d = z.shape[1:]
    grams = torch.einsum("kid,kjd->kij", z, z) / samples if samples <= d else None
    total = z.new_zeros(())
    for i, j in combinations(range(len(z)), 2):
        diagonal = (z[i] * z[j]).mean(0)
        whole = (z[i].T @ z[j] / samples).square().sum() if grams is None else (grams[i] * grams[j]).sum()
        total = total + (diagonal - 1).square().sum() + lamb * (whole - diagonal.square().sum())
    return scale_loss * total / math.comb(len(z), 2)


def simclr(*views: Tensor, temperature: float = 0.5) -> Tensor:
    """Mean of solo-learn's simclr_loss_func over pairs, from one matrix of similarities."""
    z = F.normalize(torch.stack(views), dim=-1)
    count, samples, d = z.shape
    flat = z.reshape(-1, d)
    logits = flat @ flat.T / temperature - 1 / temperature  # at most 0
    others = logits.exp() * (1 - torch.eye(len(flat)))
    sums = others.view(count, samples, count, samples).sum(-1)  # over the images of a view
    logits = logits.view(count, samples, count, samples)
    total = z.new_zeros(())
    for i, j in combinations(range(count), 2):
        for a, b in ((i, j), (j, i)):
            positive = logits[a, :, b].diagonal()
            total = total - (positive - torch.log(sums[a, :, a] + sums[a, :, b])).mean() / 2
    return total / math.comb(count, 2)


def emp_ssl(*views: Tensor, inv_coef: float = 200.0, tcr_eps: float = 0.2) -> Tensor:
    """lightly's two terms. The coding rate has the paper's sign and uses the smaller moment matrix."""
    z = F.normalize(torch.stack(views), dim=-1)
    samples, d = z.shape[1:]
    eye = torch.eye(min(samples, d))
    rates = torch.stack([torch.logdet(eye + d / (samples * tcr_eps) * _moments(view)) for view in z]).mean() / 2
    invariance: Tensor = -F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()
    return inv_coef * invariance - rates


def mmcr(*views: Tensor) -> Tensor:
    import rivals

    return rivals.mmcr(*views)


def frossl(*views: Tensor) -> Tensor:
    import rivals

    return rivals.frossl(*views)


def lejepa(*views: Tensor) -> Any:
    """LeJEPA that pulls all views to the mean of all, with rivals.SLICES directions per step."""
    import rivals

    return rivals.LeJEPA(lambda_param=0.05, large=len(views))(*views)


def emim(*views: Tensor) -> Tensor:
    from emim_solo.objective import emim_loss_func

    return emim_loss_func(*views)


def emim_bound(*views: Tensor) -> Tensor:
    from emim_solo.objective import emim_loss_func

    return emim_loss_func(*views, marginal="exact", weight=1.0)


def emim_mean(*views: Tensor) -> Tensor:
    from emim_solo.objective import emim_loss_func

    return emim_loss_func(*views, objective="mean")


@dataclass(frozen=True)
class Method:
    """A loss of the views' embeddings, and where its weights were published."""

    loss: Callable[..., Any]
    source: str


METHODS = {
    "emim": Method(emim, "this package's default: series, isotropic residual, weight 4, noise variance 0.1"),
    "emim_bound": Method(
        emim_bound, "this package's bound: marginal exact, weight 1, noise variance 0.1 (docs/research.md)"
    ),
    "emim_mean": Method(emim_mean, "this package's information of the mean of the views, which has no settings"),
    "vicreg": Method(vicreg, "25, 25, 1: Bardes et al. 2022, arXiv 2105.04906"),
    "barlow_twins": Method(
        barlow_twins, "lambda 0.0051, scale 0.024: Zbontar et al. 2021, arXiv 2103.03230, and its code"
    ),
    "simclr": Method(simclr, "temperature 0.5: Chen et al. 2020, arXiv 2002.05709, its CIFAR-10 (appendix B.9)"),
    "mmcr": Method(mmcr, "lambda 0: Yerxa et al. 2023, arXiv 2303.03307"),
    "emp_ssl": Method(emp_ssl, "200, eps 0.2: Tong et al. 2023, arXiv 2304.03977, and its code"),
    "frossl": Method(frossl, "weight 1: Skean et al. 2024, arXiv 2310.02903; lightly's default"),
    "lejepa": Method(lejepa, "lambda 0.05: Balestriero and LeCun 2025, arXiv 2511.08544"),
}
