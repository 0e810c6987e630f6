"""Intervals for shares and paired counts: what a small sample does not show."""

from math import sqrt

from scipy import stats


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    return : lower and upper bound in 0..1; (0, 1) for n = 0
    Raises ValueError where hits is not in 0..n.
    """
    _check(hits, n)
    if n == 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf((1 + level) / 2))
    share, square = hits / n, z * z / n
    middle = share + square / 2
    half = z * sqrt(share * (1 - share) / n + square / (4 * n))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share: it covers the true one in at least `level` of all samples.

    return : lower and upper bound in 0..1
    """
    _check(hits, n)
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(stats.beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def two_proportions(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """The p-value of Fisher's exact test that two shares are equal, two-sided."""
    _check(hits, n)
    _check(other_hits, other_n)
    table = [[hits, n - hits], [other_hits, other_n - other_hits]]
    return float(stats.fisher_exact(table)[1])


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact p-value that two methods fail equally often on the same items, from the items where one fails."""
    n = only_first + only_second
    return 1.0 if n == 0 else float(stats.binomtest(only_first, n, 0.5).pvalue)


def _check(hits: int, n: int) -> None:
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} is no share")
