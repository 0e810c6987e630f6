"""Codes that were rounded under a scale that is not stored: the twin of rounding.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.search_jit import TENTH, ZERO, find_peak, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HALF_STEP, SMALL_STEP = np.float32(2**-11 + 2**-21), np.float32(2**-25 + 2**-35)
ONE, TIE = np.float32(1), np.float32(0.5 + 2**-18)


@jit
def spread_half(d: Any) -> Any:
    """Bound the numbers that fp16 rounds to d: the one nearer to 0, and the one farther from it."""
    slack = abs(d) * HALF_STEP + SMALL_STEP
    return (d + slack, d - slack) if d < ZERO else (d - slack, d + slack)


@jit
def measure_between(stored: Any, first: Any, second: Any) -> Any:
    """Steps from a stored code to the range that two codes span, whichever is lower."""
    return max(0, min(first, second) - stored, stored - max(first, second))


@jit
def count_apart(stored: Bytes, codes: Bytes, inverse: Any, x: Floats, top: int) -> Any:
    """Compare the codes of a block, ties aside; return : codes off, largest distance."""
    off, far = 0, 0
    for i in range(x.size):
        code = np.int64(stored[i])  # bytes alone would wrap
        if abs(inverse * x[i] - np.float32(code - top)) <= TIE:
            continue
        distance = abs(int(code - np.int64(codes[i])))
        off += distance != 0
        far = max(far, distance)
    return off, far


@jit
def check_trials(stored: Bytes, x: Floats, top: int, d: Any, codes: Bytes) -> Any:
    """Check one block against the plain rule and 19 trial scales: fewest off, then least far, counts.

    stored : [n] uint8; x : [n] float32; d, codes : what the plain encoder gives; codes is used up
    return : codes off, largest distance
    """
    off, far = count_apart(stored, codes, ONE / d if d != ZERO else ZERO, x, top)
    peak = find_peak(x)
    for k in range(-9, 10):
        if off == 0:
            break
        inverse = -(np.float32(top) + TENTH * np.float32(k)) / peak
        for i in range(x.size):
            codes[i] = round_code(inverse * x[i], -top, top - 1) + top
        new_off, new_far = count_apart(stored, codes, inverse, x, top)
        if new_off < off or (new_off == off and new_far < far):
            off, far = new_off, new_far
    return off, far
