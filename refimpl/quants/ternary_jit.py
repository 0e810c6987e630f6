"""What TQ1_0, TQ2_0 and Q2_0 share, for kernels: the twin of ternary.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import round_half_away
from refimpl.arith.jit import jit
from refimpl.quants.rounding_jit import measure_between, spread_half

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ZERO, ONE = np.float32(0), np.float32(1)


@jit
def round_codes(x: Floats, lost: int, codes: Bytes) -> Any:
    """Round one block under 1/d; return d. x : [n] float32; codes : [n] uint8 in 0..2, written."""
    d = ZERO
    for i in range(x.size):
        d = max(d, abs(x[i]))
    inverse = ONE / d if d != ZERO else ZERO
    for i in range(x.size):
        codes[i] = int(round_half_away(x[i] * inverse)) + 1 if np.isfinite(inverse) else lost
    return d


@jit
def round_under(v: Any, d: Any, top: Any) -> Any:
    """Round v/d to a code 0..top."""
    return int(min(max(round_half_away(v / d) + ONE, ZERO), np.float32(top)))


@jit
def count_apart(stored: Bytes, x: Floats, d: Any, top: int) -> Any:
    """Compare stored codes with the nearest under d; return : codes off, largest distance."""
    off, far = 0, 0
    if not np.isfinite(d) or d == ZERO:
        return off, far
    low, high = spread_half(d)
    for i in range(x.size):
        code = np.int64(stored[i])
        distance = measure_between(code, round_under(x[i], low, top), round_under(x[i], high, top))
        off += distance > 0
        far = max(far, distance)
    return off, far
