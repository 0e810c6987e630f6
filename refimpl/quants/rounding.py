"""Codes that were rounded under a scale that is not stored: what several formats' checks share.

IQ4_NL, IQ4_XS and the ternary formats round under d before d becomes fp16: a code is the encoder's where some d that
fp16 rounds to the stored one gives it (spread_half). Q5_0 and its like round, with an imatrix, under one of 19
trial scales, without one under 1/d; they multiply by it, and whether a compiler fuses that decides ties, so a code
is the encoder's where the value lies within TIE of it or of its tie (measure_trials). Formats that round under the
scales that they store check that alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import nearest_int
from refimpl.quants.search import TENTH, find_peak

Array = NDArray[Any]

HALF_STEP, SMALL_STEP = np.float32(2**-11 + 2**-21), np.float32(2**-25 + 2**-35)
TIE = np.float32(0.5 + 2**-18)  # half a code step and four times the last bit of 16


def spread_half(d: Array) -> tuple[Array, Array]:
    """Bound the numbers that fp16 rounds to d: half a step (2^-11 of it, or 2^-25), and a 1,024th more of that.

    d      : [...] float32
    return : low, high [...] float32: the ones nearer to 0 and farther from it, where d is finite and not 0

    Rounds: every operation, to float32.
    """
    slack = np.abs(d) * HALF_STEP + SMALL_STEP
    return np.where(d < 0, d + slack, d - slack), np.where(d < 0, d - slack, d + slack)


def measure_between(stored: Array, first: Array, second: Array) -> Array:
    """Steps from stored codes to the range that two codes span, whichever is lower; int32 [...]."""
    far = np.maximum(np.minimum(first, second) - stored, stored - np.maximum(first, second))
    return np.maximum(far, 0).astype(np.int32)


def measure_trials(stored: Array, x: Array, top: int, d: Array, codes: Array) -> Array:
    """Measure the distance to the best of the plain rule and the 19 trials: fewest off, then least far.

    stored : [N, n] int32 in 0..2*top-1
    x      : [N, n] float32, finite: the source
    d      : [N] float32, codes : [N, n] int32: what the plain encoder gives
    return : [N, n] int32 >= 0, in code steps
    """
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    best = _measure_apart(stored, codes, inverse[:, None] * x, top)
    peak = find_peak(x)
    for k in range(-9, 10):
        inverse = -(np.float32(top) + TENTH * np.float32(k)) / peak
        values = inverse[:, None] * x
        far = _measure_apart(stored, np.clip(nearest_int(values), -top, top - 1) + top, values, top)
        better = _rank(far) < _rank(best)
        best = np.where(better[:, None], far, best)
    return best


def _measure_apart(stored: Array, codes: Array, values: Array, top: int) -> Array:
    """Steps between stored codes and those of a rule; none where the value, in steps, is a tie between them."""
    tie = np.abs(values - (stored - top).astype(np.float32)) <= TIE
    return np.where(tie, 0, np.abs(stored - codes))


def _rank(far: Array) -> Array:
    return np.count_nonzero(far, 1) * 256 + far.max(1)
