"""Explicit mutual information between the embeddings of two views, and losses made of it.

Theorem 1 of L. Chang, P. Liu, Q. Guo, F. Wen, "Explicit Mutual Information Maximization for
Self-Supervised Learning" (arXiv 2409.04747) gives the mutual information (MI) of two jointly Gaussian
vectors from their second moments alone. Adding isotropic noise of variance e to both makes it finite
and smooth:

    MI = 1/2 [log det(I + C11/e) + log det(I + C22/e) - log det(I + C/e)],   C the joint covariance.

Estimators and losses are derived from the paper's two theorems; they are not the authors' code. All values are in nats
(natural logarithm) and of the GLOBAL batch. Under torch.distributed the embeddings are gathered with their gradients, and
every process computes the same value. The gradients that DistributedDataParallel averages equal those of one joined batch.

For N samples of INDEPENDENT d-dimensional embeddings the estimated MI is about d^2/(2N) nats, not 0. Compare
`mutual_information` with `null_mutual_information`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from numbers import Real
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import mse_loss, normalize

FORMS = ("auto", "primal", "dual", "pooled")
OBJECTIVES = ("exact", "bound", "mean")
MARGINALS = ("exact", "series")
RESIDUALS = ("exact", "diagonal", "isotropic")


def mutual_information(
    z1: Tensor,
    z2: Tensor,
    *,
    noise_variance: float = 0.1,
    form: Literal["auto", "primal", "dual", "pooled"] = "auto",
    standardise: bool = True,
    gather: bool = True,
) -> Tensor:
    """Gaussian mutual information of two batches of paired embeddings (Theorem 1), differentiable.

    Args:
        z1: N x d embeddings of the first view, of this process.
        z2: N x d embeddings of the second view, paired by row.
        noise_variance: e > 0, variance of the isotropic noise added to both views. In float32 a value below about 1e-5 is
            lost in rounding when the views agree. Pass float64 embeddings then.
        form: "primal" (2d x 2d matrices) and "dual" (N x N, for any d) give the same number; "auto" takes
            the cheaper one. "pooled" assumes exchangeable views (one encoder, one distribution of
            augmentations), pools their moments, and has half the small-sample bias.
        standardise: scale every feature of each view to unit variance over the global batch. Features
            are always centred. A constant feature becomes 0: it adds nothing and gets no gradient.
        gather: True joins the samples of all training processes into one batch. False uses those of this process alone.

    Returns:
        The MI in nats, a 0-dim tensor: float64 if an input is, else float32, whatever autocast says.

    Raises:
        ValueError: shapes differ, over the processes too; not N x d; N < 2; a bad option.
        TypeError: an input is not of floating dtype.
        FloatingPointError: an input holds NaN or Inf, or a covariance cannot be factorised even in float64. On a GPU and
            in torch.compile a check would cost time: the result and its gradient are NaN instead, and float64 is not tried.
        RuntimeError: a second derivative (create_graph=True) or a transform of torch.func is requested.
    """
    return _of_pairs(z1, z2, 0, noise_variance, form, standardise, gather)


def null_mutual_information(
    z1: Tensor,
    z2: Tensor,
    *,
    noise_variance: float = 0.1,
    form: Literal["auto", "primal", "dual", "pooled"] = "auto",
    standardise: bool = True,
    gather: bool = True,
) -> Tensor:
    """The MI that the estimator reports for unrelated pairs: its small-sample bias on this batch.

    It is `mutual_information` with `z2` rolled by one sample over the global batch. Arguments and errors are the same.
    """
    return _of_pairs(z1, z2, 1, noise_variance, form, standardise, gather)


def _of_pairs(
    z1: Tensor, z2: Tensor, roll: int, noise_variance: float, form: str, standardise: bool, gather: bool
) -> Tensor:
    _check_choice("form", form, FORMS)
    _check_number("noise_variance", noise_variance, above_0=True)
    with _full_precision(z1):
        views = _views((z1, z2), "features" if standardise else None, gather)
        if roll:
            views = torch.stack((views[0], views[1].roll(roll, 0)))
        return _with_retry(lambda x: _mutual_information(x, form, noise_variance), views)


def emim_loss_func(
    z1: Tensor,
    z2: Tensor,
    *more: Tensor,
    objective: Literal["bound", "exact", "mean"] = "bound",
    marginal: Literal["exact", "series"] = "series",
    series_order: int = 2,
    residual: Literal["exact", "diagonal", "isotropic"] = "isotropic",
    weight: float = 4.0,
    noise_variance: float = 0.1,
    gaussian_weight: float = 0.0,
    directions: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """EMIM's loss: the negative mutual information of two views, or a cheap bound, per dimension.

    `objective="exact"` is -mutual_information / d, averaged over all pairs of views. It does not use `marginal`,
    `series_order`, `residual` and `weight`.

    `objective="mean"` uses no setting but `gaussian_weight`. The embeddings are put on the sphere of radius sqrt(d), not
    standardised, and centred over the batch. Let c be the mean of an image's views, and n Gaussian noise of variance e. The
    MI of c and c + n is 1/2 log det(I + Cov(c)/e), or less if c is not Gaussian. Averaged over all noise, with the weight
    1/(pi sqrt(e)), that is the trace of the square root of Cov(c). The loss is minus that trace / d: -1 at best. Except for
    the centring it is the loss of MMCR (Yerxa et al. 2023, arXiv 2303.03307), up to a factor. It computes the singular values
    of an N x d matrix.

    `objective="bound"` is (-H(Z) + weight * H(Z|Z')) / d for exchangeable views, with the pooled moments C = Cov(Z),
    S = Cov(Z, Z') and C- = Cov((Z - Z')/sqrt 2) = C - S. For more than two views C is the mean over the views and S the mean
    over their pairs: the MI is still that of two views. Both entropies omit the constant d/2 (1 + log(2 pi)). With marginal
    and residual "exact" and weight 1 the loss is the negative pooled MI per dimension. With marginal "exact" and weight 1

        MI with "isotropic"  <=  MI with "diagonal"  <=  pooled MI

    for every batch: H(Z|Z') <= H(Z - Z'), then Hadamard, then Jensen. A truncated series may lie on either side.

    The residual "exact" suits weights near 1. Above log(1 + 1/e) / log((2 + e) / (1 + e)) (3.7 for e = 0.1; less with
    the series) full collapse has a lower loss than agreement. The bounds have no such limit. But with the marginal
    "exact" and a weight above 1, collapse has a lower loss than independent views, from which training starts. Weight
    4 did end in collapse (docs/research.md): use the series for a weight above 1.

    If the marginals are Gaussian, the MI of either objective is a lower bound of the true MI, whatever the joint
    distribution (docs/theory.md). `gaussian_weight` makes the marginals more Gaussian: it multiplies a term that is
    added to the loss, the `epps_pulley` statistic of the pooled views, averaged over `directions`.

    Args:
        z1: N x d embeddings of the first view, of this process; standardised here over the global batch, but for "mean".
        z2: N x d embeddings of the second view, paired by row.
        more: embeddings of further views (multi-crop), paired by row.
        objective: "bound", "exact" or "mean".
        marginal: H(Z) = 1/2 log det(C + eI): "exact", or the first two terms of its "series" about (1 + e) I, which
            need no factorisation and are concave everywhere.
        series_order: 2, the number of terms. More terms converge only near I and cost more than "exact".
        residual: H(Z|Z'): "exact" 1/2 [log det(C+S+eI) + log det(C-S+eI) - log det(C+eI)],
            "diagonal" 1/2 sum_i log 2(v_i + e), "isotropic" d/2 log 2(v + e), with v_i the diagonal of C-
            and v its mean.
        weight: of H(Z|Z'), >= 0; 1 gives the MI, more gives the multi-view information bottleneck.
        noise_variance: e > 0, variance of the isotropic noise added to both views.
        gaussian_weight: of the distance between the marginals and Gaussian ones, >= 0.
        directions: d x m, unit length; the distance is measured along them. `random_directions` draws them: new ones in
            every step, the same ones in every process.
        gather: True joins the samples of all processes into one batch. False: each process computes its own loss.

    Returns:
        The loss in nats per dimension ("mean": times a standard deviation), a 0-dim tensor: float64 if an input is, else float32.

    Raises:
        ValueError, TypeError, FloatingPointError, RuntimeError: as `mutual_information`; ValueError also for a
            gaussian_weight above 0 without directions.
    """
    check_loss_settings(objective, marginal, series_order, residual, weight, noise_variance, gaussian_weight)
    if gaussian_weight and directions is None:
        raise ValueError("a gaussian_weight above 0 needs directions, d x m: random_directions(d, m, seed=step)")

    def loss(views: Tensor) -> Tensor:
        if objective == "exact":
            pairs = combinations(range(len(views)), 2)
            informations = [_mutual_information(views[list(pair)], "auto", noise_variance) for pair in pairs]
            negative = -torch.stack(informations).mean()
        elif objective == "mean":
            negative = -_mean_information(views)
        else:
            entropy, residual_entropy = _entropies(views, marginal, residual, noise_variance)
            negative = weight * residual_entropy - entropy
        return negative / views.shape[-1]

    with _full_precision(z1):
        views = _views((z1, z2, *more), "samples" if objective == "mean" else "features", gather)
        value = _with_retry(loss, views)
        if gaussian_weight and directions is not None:
            value = value + gaussian_weight * epps_pulley(views.flatten(0, 1) @ directions.to(views.dtype)).mean()
        return value


def check_loss_settings(
    objective: str = "bound",
    marginal: str = "series",
    series_order: int = 2,
    residual: str = "isotropic",
    weight: float = 4.0,
    noise_variance: float = 0.1,
    gaussian_weight: float = 0.0,
) -> None:
    """Raises ValueError for a setting that `emim_loss_func` cannot take."""
    _check_choice("objective", objective, OBJECTIVES)
    _check_choice("marginal", marginal, MARGINALS)
    _check_choice("residual", residual, RESIDUALS)
    _check_number("noise_variance", noise_variance, above_0=True)
    if type(series_order) is not int or series_order != 2:
        raise ValueError(
            f"series_order must be 2, got {series_order!r}; marginal='exact' is the whole series and costs less"
        )
    _check_number("weight", weight)
    _check_number("gaussian_weight", gaussian_weight)


def entropies(
    z1: Tensor,
    z2: Tensor,
    *more: Tensor,
    marginal: Literal["exact", "series"] = "series",
    residual: Literal["exact", "diagonal", "isotropic"] = "isotropic",
    noise_variance: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """H(Z) and H(Z|Z') of `emim_loss_func` with `objective="bound"`, which is (weight * H(Z|Z') - H(Z)) / d.

    In nats, 0-dim, both without the constant d/2 (1 + log(2 pi)). Arguments and errors are those of `emim_loss_func`.
    """
    check_loss_settings(marginal=marginal, residual=residual, noise_variance=noise_variance)
    with _full_precision(z1):
        views = _views((z1, z2, *more), "features")
        terms = _with_retry(lambda x: torch.stack(_entropies(x, marginal, residual, noise_variance)), views)
        return terms[0], terms[1]


def epps_pulley(samples: Tensor) -> Tensor:
    """How far each of the m columns of N x m samples is from Gaussian: Epps-Pulley's statistic over N, differentiable.

    With x a column scaled to mean 0 and variance 1, and phi its empirical characteristic function,

        integral |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2) / sqrt(2 pi) dt,

    by the trapezoidal rule. For so smooth an integrand its error falls faster than any power of the step.

    Returns:
        m statistics, each >= 0. Many Gaussian samples have (1 - sqrt(3)/2)/N on average, signs +-1 have 0.044. A column
        without variance has the value of a single point, 0.163, and no gradient.

    Source: T. W. Epps, L. B. Pulley, "A test for normality based on the empirical characteristic function", Biometrika
    70, 1983; the weight is theirs.
    """
    centred = samples - samples.mean(0)
    variance = centred.square().mean(0)
    # Rounding may leave a constant column a tiny variance, whose rsqrt and its gradient would be huge.
    tiny = (16 * torch.finfo(samples.dtype).eps) ** 2
    x = centred * (variance + tiny).rsqrt()
    step, nodes = 0.3, 22  # up to t = 6.3, where the weight is 2e-9 of what it is at 0
    t = step * torch.arange(1, nodes, dtype=samples.dtype, device=samples.device)[:, None, None]
    gaussian = torch.exp(-t.square() / 2)[:, 0]
    angles = t * x
    distance = (angles.cos().mean(1) - gaussian).square() + angles.sin().mean(1).square()
    return (2 * step / math.sqrt(2 * math.pi) * gaussian * distance).sum(0)  # even, and 0 at t = 0


def random_directions(dimension: int, count: int, *, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Directions, d x m, unit length, uniform on the sphere. One seed gives the same ones on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return normalize(torch.randn(dimension, count, generator=generator, device=device), dim=0)


# --- the terms; `views` are K x N x d, centred ------------------------------------------------------


def _mutual_information(views: Tensor, form: str, noise_variance: float) -> Tensor:
    """MI in nats of two centred views."""
    _, samples, dimension = views.shape
    if form == "pooled":
        marginal = _log_det(views.flatten(0, 1), noise_variance)
        return marginal - _joint_log_det(views, noise_variance) / 2
    if form == "auto":
        form = "dual" if samples < 2 * dimension else "primal"
    scale = 1 / (samples * noise_variance)
    if form == "dual":
        # det(I + AB) = det(I + BA), and the joint embedding's Gram matrix is the sum of the two.
        grams = _Gram.apply(views) * scale
        first, second, joint = log_det(_plus_identity(torch.cat((grams, grams.sum(0, keepdim=True)))))
    else:
        moments = _plus_identity(_Gram.apply(torch.cat(views.unbind(), dim=1).mT) * scale)
        first = log_det(moments[:dimension, :dimension])
        second = log_det(moments[dimension:, dimension:])
        joint = log_det(moments)
    return (first + second - joint) / 2


def _mean_information(views: Tensor) -> Tensor:
    """The information of the views' mean c through Gaussian noise, averaged over all noise: tr sqrt(Cov(c)) on the sphere of radius sqrt(d)."""
    _, samples, dimension = views.shape
    mean = views.mean(0)
    trace = torch.linalg.matrix_norm(mean.nan_to_num(), ord="nuc")  # on NaN the SVD would raise
    trace = trace + 0 * mean.sum()  # NaN, if there is one
    return trace * math.sqrt(dimension / samples)


def _entropies(views: Tensor, marginal: str, residual: str, noise_variance: float) -> tuple[Tensor, Tensor]:
    """H(Z) and H(Z|Z') of exchangeable, pooled views, or bounds of them, both without the constant d/2 (1 + log(2 pi))."""
    count, samples, dimension = views.shape
    deviation, scatter = _Deviation.apply(views)
    products, scale = len(deviation), 1 + noise_variance
    zeros = dimension - products  # eigenvalues 0 of C that the smaller X X^T lacks
    if "exact" in (marginal, residual):  # log det(C + eI)
        whole = log_det(_plus_identity(deviation / scale))
        whole = whole + products * math.log(scale) + zeros * math.log(noise_variance)
    if marginal == "exact":
        entropy = whole / 2
    else:  # d log s + log det(I + X), with s = 1 + e, X = (C - I) / s and log det(I + X) ~ tr X - tr X^2 / 2
        first = deviation.detach().trace() - zeros  # constant after standardisation
        second = torch.linalg.vector_norm(deviation).square() + zeros
        entropy = (dimension * math.log(scale) + first / scale - second / (2 * scale**2)) / 2

    variances = scatter / (samples * (count - 1))  # their expectation is the diagonal of C - S
    if residual == "isotropic":
        residual_entropy = dimension / 2 * torch.log(2 * (variances.mean() + noise_variance))
    elif residual == "diagonal":
        residual_entropy = torch.log(2 * (variances + noise_variance)).sum() / 2
    else:
        joint = 2 * dimension * math.log(noise_variance) + _joint_log_det(views, noise_variance)
        residual_entropy = (joint - whole) / 2
    return entropy, residual_entropy


def _log_det(embeddings: Tensor, noise_variance: float) -> Tensor:
    """log det(I + C/e), C = X^T X / n of n x d centred embeddings, through the smaller of C and X X^T."""
    smaller = embeddings if _wide(embeddings) else embeddings.mT
    return log_det(_plus_identity(_Gram.apply(smaller) / (len(embeddings) * noise_variance)))


def _wide(embeddings: Tensor) -> bool:
    return embeddings.shape[0] < embeddings.shape[1]


def _joint_log_det(views: Tensor, noise_variance: float) -> Tensor:
    """log det(I + joint covariance / e) of two of K exchangeable views, whose sum and difference are uncorrelated.

    sqrt(K) times the mean has the covariance C + (K - 1) S. Helmert's K - 1 contrasts, of view j + 1 and the mean of the views
    before, have C - S. The sum's C + S is a mix of both.
    """
    count = len(views)
    sums = views.cumsum(0)
    j = torch.arange(1, count, dtype=views.dtype, device=views.device)[:, None, None]
    contrasts = ((sums[:-1] - j * views[1:]) / (j * (j + 1)).sqrt()).flatten(0, 1)
    total = sums[-1] / math.sqrt(count) * math.sqrt(2 / count)
    if count > 2:  # the weights of the rows make their mean C + S
        of_contrasts = math.sqrt((count - 2) / (count * (count - 1)))
        total = torch.cat((total, contrasts * of_contrasts)) * math.sqrt(count)
    return _log_det(total, noise_variance) + _log_det(contrasts, noise_variance)


def _with_retry(compute: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Computes again in float64 if float32 cannot factorise: views that nearly agree, with little noise."""
    try:
        return compute(views)
    except _NotPositiveDefinite:
        if views.dtype == torch.float64:
            raise
        return compute(views.double()).to(views.dtype)


def _plus_identity(matrices: Tensor) -> Tensor:
    return matrices + torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


# --- closed-form gradients --------------------------------------------------------------------------


def _first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses create_graph=True: with these backward passes a second derivative would be incomplete."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not _is_compiling():
            raise RuntimeError("EMIM's objective has no second derivative: call backward without create_graph=True")
        return backward(ctx, *grads)

    return checked


_STRIP = 256  # rows of a product computed together: the fastest value between 128 and 683


def _product(x: Tensor) -> Tensor:
    """X X^T of (a stack of) matrices. A CPU, where operations cost the time, computes half of it and mirrors that."""
    size = x.shape[-2]
    if x.device.type != "cpu" or size <= _STRIP:
        return x @ x.mT
    result = x.new_empty(*x.shape[:-1], size)
    for start in range(0, size, _STRIP):
        end = start + _STRIP
        torch.matmul(x[..., start:end, :], x[..., start:, :].mT, out=result[..., start:end, start:])
        result[..., end:, start:end] = result[..., start:end, end:].mT
    return result


class _Gram(Function):
    """X X^T with one matrix product in the backward pass, where autograd does two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _product(x)

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with _full_precision(x):
            return (grad + grad.mT) @ x


class _Deviation(Function):
    """C - I of K x N x d views, and each feature's scatter within samples. C = X^T X / n of all, or X X^T / n if smaller."""

    @staticmethod
    def forward(ctx: Any, views: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(views)
        if len(views) == 2:  # the same result; the mean is not needed
            scatter = mse_loss(views[0], views[1], reduction="none").sum(0) / 2
        else:
            centre = views.mean(0)
            scatter = torch.stack([mse_loss(view, centre, reduction="none").sum(0) for view in views]).sum(0)
        pooled = views.flatten(0, 1)
        deviation = _product(pooled if _wide(pooled) else pooled.mT).div_(len(pooled))
        deviation.diagonal().sub_(1)
        return deviation, scatter

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad_deviation: Tensor, grad_scatter: Tensor) -> Tensor:
        (views,) = ctx.saved_tensors
        pooled, slope = views.flatten(0, 1), 2 * grad_scatter
        factors = (grad_deviation, pooled) if _wide(pooled) else (pooled, grad_deviation)
        with _full_precision(views):
            grad = torch.addmm(pooled, *factors, beta=0, alpha=2 / len(pooled)).view_as(views)
        # Subtract first, then multiply: products of the views themselves would lose small differences to rounding.
        if len(views) == 2:
            difference = views[0] - views[1]
            grad[0].addcmul_(difference, slope, value=0.5)
            grad[1].addcmul_(difference, slope, value=-0.5)
            return grad
        centre = views.mean(0)
        for each, view in zip(grad, views, strict=True):
            each.addcmul_(view - centre, slope)
        return grad


_SMALLEST_STD = 1e-15


class _Standardise(Function):
    """Batch normalisation of each view, written into one tensor: torch's own with a stack takes twice the memory."""

    @staticmethod
    def forward(*ctx_and_views: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx, *views = ctx_and_views  # torch.compile counts a ctx named in the signature as a view
        # torch silently leaves `out` unwritten if a view has another layout.
        views = [view.contiguous() for view in views]
        scaled = views[0].new_empty(len(views), *views[0].shape)
        means, inverse_stds = scaled.new_empty(2, len(views), scaled.shape[-1])
        for view, *out in zip(views, scaled, means, inverse_stds, strict=True):
            torch.native_batch_norm(view, None, None, None, None, True, 0.0, _SMALLEST_STD**2, out=out)
        ctx.save_for_backward(means, inverse_stds, *views)
        ctx.mark_non_differentiable(means, inverse_stds)
        return scaled, means, inverse_stds

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grads: Tensor, *of_statistics: Tensor) -> tuple[Tensor | None, ...]:
        means, inverse_stds, *views = ctx.saved_tensors
        return tuple(
            torch.ops.aten.native_batch_norm_backward(
                grad, view, None, None, None, mean, inverse_std, True, _SMALLEST_STD**2, [True, False, False]
            )[0]
            for grad, view, mean, inverse_std in zip(grads, views, means, inverse_stds, strict=True)
        )


class _LogDet(Function):
    """log det; its gradient is the inverse, which comes from the same Cholesky factor."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(matrices)
        if not _can_look(info):
            factor.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0)[..., None], math.nan)
        elif info.any():
            raise _NotPositiveDefinite
        ctx.save_for_backward(factor)
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        return grad[..., None, None] * torch.cholesky_inverse(factor)


def log_det(matrices: Tensor) -> Tensor:
    """log det of (a stack of) symmetric positive definite matrices, differentiable.

    Raises:
        FloatingPointError: a matrix is not positive definite in its precision. On a GPU and in torch.compile: NaN instead.
    """
    return _LogDet.apply(matrices)


class _NotPositiveDefinite(FloatingPointError):
    def __init__(self) -> None:
        super().__init__(
            "a covariance of the embeddings is not positive definite in floating point; "
            "raise noise_variance (0.1 is the default)"
        )


# --- from two tensors to the views over all processes -----------------------------------------------


def _views(embeddings: Sequence[Tensor], scale: Literal["features", "samples"] | None, gather: bool = True) -> Tensor:
    """The views, checked, gathered, centred: K x N_global x d, at least float32.

    ``scale``: features get variance 1, or samples length 1 before they are centred, or neither.
    """
    names = [f"z{number}" for number in range(1, len(embeddings) + 1)]
    for name, z in zip(names, embeddings, strict=True):
        if not z.is_floating_point():
            raise TypeError(f"{name} must be of floating dtype, got {z.dtype}")
    shapes = [tuple(z.shape) for z in embeddings]
    if len(set(shapes)) > 1:
        raise ValueError(f"{' and '.join(names)} must have one shape, got {' and '.join(map(str, shapes))}")
    if len(shapes[0]) != 2 or shapes[0][1] == 0:
        raise ValueError(f"embeddings must be N x d with d >= 1, got shape {shapes[0]}")
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in embeddings) else torch.float32
    views = [z.to(dtype) for z in embeddings]
    gathered = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if gathered:
        views = list(_gather(torch.stack(views)))
    samples = len(views[0])
    if samples < 2:
        raise ValueError(f"mutual information needs at least 2 samples, got {samples}")
    if scale != "features":
        kept = torch.stack(views)
        if scale == "samples":
            lengths = torch.linalg.vector_norm(kept, dim=2, keepdim=True)
            # An infinite length would make an embedding 0, not NaN.
            kept = kept / lengths.clamp_min(torch.finfo(dtype).tiny).masked_fill(lengths.isinf(), math.nan)
        means = kept.mean(1, keepdim=True)
        if _can_look(means):
            _check_finite(means, views, gathered)
        return kept - means
    # Batch normalisation's kernel is the fastest one, has a gradient, and returns the statistics.
    scaled, means, inverse_stds = _Standardise.apply(*views)
    stds = inverse_stds.reciprocal()
    # Rounding of the mean leaves a constant feature a tiny standard deviation, which standardisation would blow up.
    constant = stds <= 2 * _SMALLEST_STD + 16 * torch.finfo(dtype).eps * means.abs()
    if _can_look(stds):
        _check_finite(stds, views, gathered)
        if not constant.any():  # saves a pass over the embeddings
            return scaled
    # Batch normalisation returns zeros, not NaN, for a feature whose variance overflows.
    factor = (~constant).to(dtype).masked_fill(stds.isinf(), math.nan)
    return scaled * factor[:, None]


def _check_finite(statistics: Tensor, views: Sequence[Tensor], gathered: bool) -> None:
    # Every NaN, Inf or overflow shows in its feature's statistics, so a pass over the embeddings is not needed.
    if statistics.isfinite().all():
        return
    if gathered:
        _check_changed_together(torch.stack(list(views)))
    counts = [int((~view.isfinite()).sum()) for view in views]
    found = [f"z{number} holds {count}" for number, count in enumerate(counts, 1) if count]
    if not found:
        raise FloatingPointError(
            f"the embeddings are too large for {views[0].dtype}: their variance overflows; lower the learning rate"
        )
    raise FloatingPointError(f"NaN or Inf among {views[0].numel()} values: {' and '.join(found)}")


class _Gather(Function):
    """Joins the samples of all processes along dimension 1 and sums the gradient; torch's own function is deprecated."""

    @staticmethod
    def forward(ctx: Any, views: Tensor) -> Tensor:
        parts = [torch.empty_like(views) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


_agreed_shapes: WeakKeyDictionary[dist.ProcessGroup, dict[int, torch.Size]] = WeakKeyDictionary()  # by number of views


def _gather(views: Tensor) -> Tensor:
    """The samples of all processes. Shapes are compared when they change: unequal shapes would hang the collective.

    A process whose shape has changed does not know whether the others' changed too. It first gathers infinities in the
    old shape: a process that still has that shape finds them among its samples.
    """
    agreed_shapes = _agreed_shapes.setdefault(dist.group.WORLD, {})  # type: ignore[arg-type]
    agreed = agreed_shapes.get(len(views))
    if views.shape != agreed:
        if agreed is not None:
            _check_changed_together(_Gather.apply(views.new_full(agreed, -math.inf)))
        shape = torch.tensor(views.shape[1:], device=views.device)
        shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
        dist.all_gather(shapes, shape)
        listed = [tuple(s.tolist()) for s in shapes]
        if len(set(listed)) > 1:
            raise ValueError(
                f"every process must hold a batch of the same shape, got {listed}; drop the last, smaller batch"
            )
        agreed_shapes[len(views)] = views.shape
    return _Gather.apply(views)


def _check_changed_together(gathered: Tensor) -> None:
    changed = [bool(part.isneginf().all()) for part in gathered.chunk(dist.get_world_size(), dim=1)]
    if any(changed) and not all(changed):
        ranks = [rank for rank, has in enumerate(changed) if has]
        raise ValueError(
            f"every process must hold a batch of the same shape: on rank {ranks} alone it is no longer that of the "
            "batch before; drop the last, smaller batch"
        )


_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)  # missing in the oldest supported torch


def _can_look(values: Tensor) -> bool:
    """Whether code may branch on values: on a GPU it would have to wait for them, in torch.compile there are none."""
    return values.device.type == "cpu" and not _is_compiling()


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Turns autocast off: second moments and factorisations are useless in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


# --- options ----------------------------------------------------------------------------------------


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; there are {', '.join(known)}")


def _check_number(name: str, value: float, *, above_0: bool = False) -> None:
    if not (isinstance(value, Real) and math.isfinite(value) and (value > 0 or (value == 0 and not above_0))):
        least = "above 0" if above_0 else "of at least 0"
        raise ValueError(f"{name} must be a finite number {least}, got {value!r}")
