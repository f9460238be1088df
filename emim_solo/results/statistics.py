"""Statistics over the seeds of a benchmark: mean, 95 % interval, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over the finite values, NaN if there are none.
        half_width: of Student's 95 % t-interval around the mean; None for fewer than two finite values.
        n: number of finite values.
        not_finite: number of values left out because they were NaN or infinite.
    """

    mean: float
    half_width: float | None
    n: int
    not_finite: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end of the interval; None if ``half_width`` is None."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


@cache
def _quantile(degrees: int) -> float:
    """Of Student's t. SciPy takes a millisecond for each, and a report has thousands of intervals, of few numbers of seeds."""
    return float(stats.t.ppf(0.975, df=degrees))


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and t-interval of independent values, such as one metric over seeds."""
    array = np.asarray(list(values), dtype=np.float64)
    finite = array[np.isfinite(array)]
    n, left_out = len(finite), len(array) - len(finite)
    half_width = None
    if n > 1:
        half_width = _quantile(n - 1) * float(finite.std(ddof=1)) / math.sqrt(n)
    return Estimate(float(finite.mean()) if n else math.nan, half_width, n, left_out)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """``values - baseline`` for each seed that both have."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}
