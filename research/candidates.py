"""Candidate losses for EMIM, all from second moments. docs/research.md has their results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emim_solo.emim.objective import emim_loss_func

DIRECTIONS = 16  # random directions per step, for the Gaussian marginals


def standardised(z: Tensor, scale: str = "features") -> Tensor:
    z = z - z.mean(0)
    variances = z.pow(2).mean(0)
    return z / ((variances.mean() if scale == "total" else variances) + 1e-8).sqrt()


def family(
    *embeddings: Tensor,
    weight: float = 4.0,
    noise: float = 0.1,
    marginal_noise: float | None = None,
    marginal: str = "series",
    residual: str = "isotropic",
    power: float = 1.0,
    sphere: bool = False,
    first_only: bool = False,
    scale: str = "features",  # scaled to variance 1: each of the "features", or their mean, "total"
) -> Tensor:
    """(-H(Z) + weight H(Z|Z')) / d for K >= 2 exchangeable views, each N x d."""
    z = torch.stack([standardised(view.float(), scale) for view in embeddings])
    if sphere:
        z = torch.nn.functional.normalize(z, dim=-1) * math.sqrt(z.shape[-1])
    views, samples, d = z.shape
    e = noise if marginal_noise is None else marginal_noise
    pooled = (z[:1] if first_only else z).flatten(0, 1)
    c = pooled.T @ pooled / len(pooled)
    eye = torch.eye(d)
    if marginal == "series":
        x = (c + e * eye) / (1 + e) - eye
        h = -x.pow(2).sum() / 4
    elif marginal == "renyi":
        h = -d / 4 * torch.log(((c + e * eye) / (1 + e)).pow(2).sum() / d)
    elif marginal == "views":  # the series with the moments of each view instead of the pooled ones
        own_moments = torch.einsum("kni,knj->kij", z, z) / samples
        h = -((own_moments - eye) / (1 + e)).pow(2).sum() / (4 * views)
    elif marginal == "unbiased":  # the series with tr C^2 from pairs of different images only, a U-statistic
        own = torch.einsum("ind,jnd->nij", z, z).pow(2).sum() / len(pooled) ** 2
        square = (c.pow(2).sum() - own) * samples / (samples - 1)
        h = -(square - 2 * c.trace() + d) / (4 * (1 + e) ** 2)
    else:
        h = torch.logdet(c + e * eye) / 2
    within = z - z.mean(0)
    if residual == "isotropic":
        v = within.pow(2).sum(0).mean() / (views - 1)
        r = d / 2 * torch.log(2 * (v + noise))
    elif residual == "diagonal":
        v = within.pow(2).sum(0).mean(0) / (views - 1)
        r = (
            torch.log(2 * (v.pow(power).mean() ** (1 / power) + noise)) * d / 2
            if power > 1
            else torch.log(2 * (v + noise)).sum() / 2
        )
    elif residual == "samples":  # power mean over the samples' own variances; power 0 is the mean of their logarithms
        v = within.pow(2).sum(0).mean(1) / (views - 1)
        r = (
            d
            / 2
            * (
                torch.log(2 * (v + noise)).mean()
                if power == 0
                else torch.log(2 * ((v + noise).pow(power).mean() ** (1 / power)))
            )
        )
    elif residual == "spectrum":  # power mean over the eigenvalues of the residual covariance, power 2
        flat = within.flatten(0, 1)
        w = flat.T @ flat / (samples * (views - 1)) + noise * eye
        r = d / 2 * torch.log(2 * (w.pow(2).sum() / d).sqrt())
    elif residual == "predicted":  # the best linear prediction of one view from the other
        s = (z.sum(0).T @ z.sum(0) / samples - views * c) / (views * (views - 1))
        w = c + noise * eye - s @ torch.linalg.solve(c + noise * eye, s)
        r = d / 2 * torch.log(w.diagonal().mean())
    else:
        raise ValueError(residual)
    return (weight * r - h) / d


def emim(*z: Tensor, l2_normalise: bool = False, **kwargs: Any) -> Tensor:
    """The package's loss. `l2_normalise`, which some recipes have, is `sphere` of :func:`family`, without centring again."""
    if l2_normalise:
        return family(*z, sphere=True, **kwargs)
    if kwargs.get("gaussian_weight"):
        directions = torch.randn(z[0].shape[1], DIRECTIONS)
        kwargs["directions"] = torch.nn.functional.normalize(directions, dim=0)
    return emim_loss_func(*z, **kwargs)


def shrunk(*embeddings: Tensor, noise_variance: float = 0.1) -> Tensor:
    """Log det at weight 1 with the isotropic residual. C is shrunk towards the identity, for d above the pooled samples.

    The share of the identity is the oracle approximating shrinkage of Y. Chen et al., "Shrinkage Algorithms for MMSE
    Covariance Estimation", IEEE Trans. Signal Processing 58, 2010. It is computed from tr C and tr C^2.
    """
    z = torch.stack([standardised(view.float()) for view in embeddings])
    d, pooled = z.shape[-1], z.flatten(0, 1)
    smaller = pooled if len(pooled) < d else pooled.T
    moments = smaller @ smaller.T / len(pooled)
    trace, square = moments.diagonal().sum().detach(), moments.square().sum().detach()
    between = (1 - 2 / d) * square + trace**2
    share = min(float(between / ((len(pooled) + 1 - 2 / d) * (square - trace**2 / d))), 1.0)
    e = noise_variance + share  # C becomes (1 - share) C + share I, for features of variance 1
    h = torch.logdet(torch.eye(len(moments)) + (1 - share) / e * moments) / 2 + d / 2 * math.log(e)
    v = (z - z.mean(1, keepdim=True)).var(0).mean()
    return (d / 2 * torch.log(2 * (v + noise_variance)) - h) / d


def centroid(*embeddings: Tensor, noise_variance: float = 1.0) -> Tensor:
    """-I(c; c + noise)/d in nats. c is Gaussian with the covariance of an image's mean view; each view is on the sphere.

    Like MMCR, it has one term. Views that agree make the mean long, and many directions raise the log det. MMCR has the
    square root of the eigenvalues instead of their logarithm.
    """
    z = torch.nn.functional.normalize(torch.stack([view.float() for view in embeddings]), dim=-1)
    c = z.mean(0) - z.mean((0, 1))
    d = c.shape[1]
    smaller = c if len(c) < d else c.T
    moments = smaller @ smaller.T * (d / len(c))  # sphere of radius sqrt d, so that a direction has variance 1
    return -torch.logdet(torch.eye(len(moments)) + moments / noise_variance) / (2 * d)


def spanned(
    *embeddings: Tensor,
    noise: float = 0.1,
    entropy: str = "views",
    form: str = "log_det",
    weight: float = 1.0,
    averaged: bool = False,
    sphere: bool = True,
    centred: bool = False,
) -> Tensor:
    """(-H + weight H(Z|Z')) / r on the sphere, or with features of mean 0 and variance 1 / d if not `sphere`. Both entropies use the r = min(N, d) directions that a batch can span.

    The package's isotropic bound takes Jensen's inequality over all d. Its residual then has d / 2 logarithms, while only
    r / 2 in the log det can change. Here both have r / 2. Moments are scaled so that a direction has variance 1 on
    average; `noise` has the same unit, so nothing is left that depends on d or N.
    `entropy` "views" takes H from each view's own moments: views that disagree cannot raise it. "mean" takes H from the mean
    of the views. For two views this gives H(Z + Z') - H(Z - Z'), of first order in the correlation; MI is of second order.
    With "mean", `averaged` and noise 1, the loss is minus the information about the image in the mean of its views, seen
    through noise with the variance of one direction: the mean has K times less residual variance than a view. Weight 0
    leaves the information of the noisy mean about the mean itself.
    `centred` takes the mean over the batch away after the sphere, so that moments are covariances.
    `form` "renyi" replaces the log det by the logarithm of tr C^2: exact in the scale, and to second order in the shape.
    `form` "root" is "log_det" averaged over all noise: the integral over e > 0 of log(1 + x / e) e^(-1/2) is 2 pi sqrt(x). So it has
    no noise to set. With entropy "mean" and weight 0 it is MMCR's nuclear norm, up to a factor.
    """
    if sphere:
        z = torch.nn.functional.normalize(torch.stack([view.float() for view in embeddings]), dim=-1)
        z = z - z.mean((0, 1)) if centred else z
    else:
        z = torch.stack([standardised(view.float()) / math.sqrt(view.shape[1]) for view in embeddings])
    views, samples, d = z.shape
    r = min(samples, d)
    within = (z - z.mean(0)).square().sum() / (samples * (views - 1))  # the total variance is 1
    within = within / views if averaged else within
    residual = r * (within + 1e-12).sqrt() if form == "root" else r / 2 * torch.log(within + noise)
    h = z.new_zeros(())
    parts = z if entropy == "views" else z.mean(0, keepdim=True)
    for part in parts:
        if form == "root":
            h = h + torch.linalg.matrix_norm(part, ord="nuc") * math.sqrt(r / samples)
            continue
        smaller = part if samples < d else part.T
        moments = smaller @ smaller.T * (r / samples)  # trace r if the part is on the sphere
        if form == "log_det":
            h = h + torch.logdet(moments + noise * torch.eye(r)) / 2
        else:
            trace = moments.diagonal().sum()
            h = h + r / 2 * torch.log(trace / r + noise) - r / 4 * torch.log(r * moments.square().sum() / trace**2)
    return (weight * residual - h / len(parts)) / r


def schatten(*embeddings: Tensor, power: float | str = 0.5, least: float = 0.0, pairs: bool = False) -> Tensor:
    """-tr M^power / r. M is the second moment of the views' mean on the sphere, scaled so that r = min(N, d) directions of variance 1
    have trace r.

    The integral over e > 0 of log(1 + x / e) e^(power - 1) is pi / (power sin(pi power)) x^power. So this is the information of the noisy
    mean about the mean, averaged over noise levels with the weight e^(power - 1). Power 1/2 is MMCR. Power 1 is the length of
    the mean alone; toward power 0 only the spread is left. `pairs` takes the mean of each two views (three at the end if their
    number is odd) in place of the mean of all. Power "noise" is the share of the variance that the views of an image do not have in
    common, of each batch anew: agreement counts as much as it lacks. 0 is the share where all images are one point: there only spread counts.
    The power is `least` or more.
    """
    z = torch.nn.functional.normalize(torch.stack([view.float() for view in embeddings]), dim=-1)
    if power == "noise":
        power = min(max(float(z.detach().var(0).sum(-1).mean()), least), 1.0)
    r = min(z.shape[1:])
    groups = z.tensor_split(len(z) // 2) if pairs else [z]
    eigenvalues = torch.stack([torch.linalg.svdvals(group.mean(0)) for group in groups]).square() * (r / z.shape[1])
    return -(eigenvalues + 1e-6).pow(power).sum(-1).mean() / r


class MovingAverage(torch.nn.Module):
    """The default family with pooled second moments averaged over steps; the history has no gradient.

    The gradient of the series is evaluated at the average, and applied to the batch's own moments at full weight.
    """

    moments: Tensor

    def __init__(self, history: float = 0.9, weight: float = 4.0, noise: float = 0.1, sphere: bool = True) -> None:
        super().__init__()
        self.history, self.weight, self.noise, self.sphere, self.steps = history, weight, noise, sphere, 0

    def forward(self, *embeddings: Tensor) -> Tensor:
        z = torch.stack([standardised(view.float()) for view in embeddings])
        d = z.shape[-1]
        if self.sphere:
            z = torch.nn.functional.normalize(z, dim=-1) * math.sqrt(d)
        pooled = z.flatten(0, 1)
        c = pooled.T @ pooled / len(pooled)
        self.steps += 1
        history = min(self.history, 1 - 1 / self.steps)
        self.moments = history * self.moments + (1 - history) * c.detach() if self.steps > 1 else c.detach()
        x = (self.moments + self.noise * torch.eye(d)) / (1 + self.noise) - torch.eye(d)
        h = -(x * c).sum() / (2 * (1 + self.noise))
        v = (z - z.mean(0)).pow(2).sum(0).mean() / (len(z) - 1)
        return (self.weight * d / 2 * torch.log(2 * (v + self.noise)) - h) / d


class Remembered(torch.nn.Module):
    """MMCR's nuclear norm of the images' mean views, with those of the steps before, without gradient, as more rows: `rows` in all.

    A batch of N images spans N directions at most. A direction that the remembered rows fill already is worth less to the batch.
    """

    def __init__(self, rows: int = 256) -> None:
        super().__init__()
        self.rows = rows
        self.before: Tensor | None = None

    def forward(self, *embeddings: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(torch.stack([view.float() for view in embeddings]), dim=-1)
        c = z.mean(0)
        samples, d = c.shape
        means = c if self.before is None else torch.cat((c, self.before))
        means = means[: max(self.rows, samples)]
        self.before = means.detach()
        r = min(len(means), d)
        scale = math.sqrt(r / len(means)) / r * len(means) / samples  # a gradient as without memory
        return -torch.linalg.matrix_norm(means, ord="nuc") * scale


class Scheduled(torch.nn.Module):
    """The package's loss. Options change from one value to another over the steps, along half a cosine."""

    def __init__(self, steps: int, **ends: tuple[float, float]) -> None:
        super().__init__()
        self.total, self.ends, self.steps = steps, ends, 0

    def forward(self, *embeddings: Tensor) -> Tensor:
        gone = (1 - math.cos(math.pi * self.steps / self.total)) / 2
        self.steps += 1
        options: dict[str, Any] = {name: a + (b - a) * gone for name, (a, b) in self.ends.items()}
        return emim_loss_func(*embeddings, **options)


LOSSES: dict[str, Any] = {
    "emim": emim,
    "shrunk": shrunk,
    "centroid": centroid,
    "family": family,
    "spanned": spanned,
    "schatten": schatten,
    "moving_average": MovingAverage,
    "remembered": Remembered,
    "scheduled": Scheduled,
}
