"""What the seeds of a benchmark say: a mean, its 95 % interval, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over the finite values, NaN if there are none.
        half_width: of the 95 % t-interval around the mean; None for fewer than two values, which say nothing
            about their spread.
        n: number of finite values.
        not_finite: number of values left out because they were NaN or infinite.
    """

    mean: float
    half_width: float | None
    n: int
    not_finite: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end of the interval, or None where there is none."""
        if self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and Student's t-interval of independent values, such as one metric over seeds."""
    array = np.asarray(list(values), dtype=np.float64)
    finite = array[np.isfinite(array)]
    n, left_out = len(finite), len(array) - len(finite)
    if n == 0:
        return Estimate(math.nan, None, 0, left_out)
    if n == 1:
        return Estimate(float(finite[0]), None, 1, left_out)
    half_width = stats.t.ppf((1 + CONFIDENCE) / 2, df=n - 1) * stats.sem(finite)
    return Estimate(float(finite.mean()), float(half_width), n, left_out)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Mean of ``values - baseline`` over the seeds that both have, with its t-interval.

    Runs of one seed share their data order and initialisation of the backbone, so the difference within a
    seed varies less than the difference of two means.

    Args:
        values: metric of one method by seed.
        baseline: the same metric of the other method by seed.
    """
    return estimate(values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys()))
