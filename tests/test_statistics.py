"""Intervals against SciPy's own and against coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from emim_solo.results.statistics import Estimate, estimate, paired


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_equals_scipys_one_sample_t_test(n):
    values = np.random.default_rng(n).normal(90, 2, n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    result = estimate(values)
    assert result.n == n and result.mean == pytest.approx(values.mean())
    assert result.interval == pytest.approx((expected.low, expected.high))


def test_paired_interval_equals_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(90, 2, 5), rng.normal(89, 2, 5)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    result = estimate(paired(dict(enumerate(a)), dict(reversed(list(enumerate(b))))).values())
    assert result.interval == pytest.approx((expected.low, expected.high))


def test_interval_covers_the_truth_in_95_percent_of_experiments():
    values = np.random.default_rng(1).normal(0, 3, (4000, 4))
    covered = [low <= 0 <= high for low, high in (estimate(row).interval for row in values)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval():
    assert estimate([91.0]) == Estimate(91.0, None, 1)
    assert estimate([91.0]).interval is None
    assert estimate(paired({0: 91.0}, {0: 90.0}).values()) == Estimate(1.0, None, 1)


def test_seeds_that_only_one_method_has_are_left_out_of_the_difference():
    assert paired({0: 3.0, 1: 5.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: -100.0}) == {0: 2.0, 1: 3.0}


def test_values_that_are_not_finite_are_counted_and_left_out():
    result = estimate([90.0, math.nan, 92.0])
    assert (result.mean, result.n, result.not_finite) == (91.0, 2, 1)
    assert result.interval == pytest.approx(estimate([90.0, 92.0]).interval)


def test_nothing_gives_nan_and_no_interval():
    assert math.isnan(estimate([]).mean) and estimate([]).interval is None
    assert estimate([math.nan]).n == 0 and estimate([math.nan]).not_finite == 1
    assert paired({0: 1.0}, {1: 1.0}) == {}
