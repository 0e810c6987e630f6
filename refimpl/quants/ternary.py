"""What TQ1_0, TQ2_0 and Q2_0 share: weights rounded to -1, 0 or 1 times the largest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import round_half_away
from refimpl.quants.rounding import measure_between, spread_half

Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]


def round_codes(x: Floats, lost: int) -> tuple[Floats, Codes]:
    """Round each block under 1/d, before d becomes fp16.

    d = max|x|,  q[i] = round(x[i] * (1/d)) + 1, ties away from zero; 1/d is 0 for d = 0

    x      : [N, n] float32
    lost   : the code where 1/d overflowed: what C's conversion of infinity and NaN comes to on x86
    return : d [N] float32, codes [N, n] int32 in 0..2

    Rounds: every operation, to float32.
    """
    d = np.abs(x).max(1)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))[:, None]
    codes = round_half_away(np.where(np.isinf(inverse), np.float32(0), x * inverse)) + np.float32(1)
    return d, np.where(np.isinf(inverse), lost, codes).astype(np.int32)


def measure_apart(stored: Codes, x: Floats, d: Floats, top: int) -> Codes:
    """Measure how far stored codes lie from the nearest of 0..top under d, of which code 1 stands for 0.

    The encoder rounds before d becomes fp16: any d that rounds to the stored one counts. Where d is 0 or not
    finite no code counts as off.

    stored : [N, n]; x : [N, n] float32; d : [N] float32 as stored
    return : [N, n] int32 >= 0
    """

    def round_under(scale: Floats) -> Floats:
        return np.clip(round_half_away(x / scale[:, None]) + np.float32(1), 0, top)

    low, high = spread_half(d)
    far = measure_between(stored, round_under(low), round_under(high))
    return np.where((np.isfinite(d) & (d != 0))[:, None], far, 0).astype(np.int32)
