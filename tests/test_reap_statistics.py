"""Intervals and tests for shares, against figures that are published or worked out by hand."""

import pytest
from scipy import stats

from refimpl.reap.statistics import clopper_pearson, mcnemar, two_proportions, wilson


def test_nothing_in_fifty_still_allows_seven_percent():
    low, high = clopper_pearson(0, 50)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 50))  # (1 - p)^50 = 0.025
    assert high == pytest.approx(0.0711, abs=1e-4)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (3, 77)])
def test_intervals_are_scipys(hits, n):
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        want = stats.binomtest(hits, n).proportion_ci(0.95, method)
        assert ours(hits, n) == pytest.approx((want.low, want.high), abs=1e-12)


def test_no_sample_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_more_hits_than_items_are_refused():
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)


def test_shares_of_two_samples_differ_or_do_not():
    assert two_proportions(72, 2000, 144, 2000) < 1e-5  # 3.6 and 7.2 percent of 2,000
    assert two_proportions(0, 50, 2, 50) > 0.2
    assert two_proportions(3, 10, 3, 10) == pytest.approx(1)


def test_paired_failures_are_compared_by_those_that_differ():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)  # both ends of a fair coin thrown five times
