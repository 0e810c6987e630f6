"""Codes that were rounded on a line that is not stored: the twin of lines.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import LINE_FACTORS, TIE_ON_A_LINE
from refimpl.quants.search_jit import round_code

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]

TIE, SLACK, CLOSE = TIE_ON_A_LINE, 1 + 2.0**-20, 2.0**-16
FACTORS_15, FACTORS_31 = np.array(LINE_FACTORS[15]), np.array(LINE_FACTORS[31])
ZERO = np.float32(0)


@jit
def follow_plain(stored: Bytes, x: Floats, d: Any, m: Any, codes: Bytes) -> bool:
    """Are all codes those of the plain encoder, ties aside?"""
    inverse = np.float64(np.float32(1) / d) if d != ZERO else 0.0
    for i in range(x.size):
        value = (np.float64(x[i]) - np.float64(m)) * inverse
        if stored[i] != codes[i] and not abs(value - np.float64(stored[i])) <= TIE:
            return False
    return True


@jit
def follow_line(stored: Bytes, x: Floats, top: int) -> bool:
    """Is there a line that explains all codes? True where weights lie too close to tell."""
    low, high = np.float64(x[0]), np.float64(x[0])
    for i in range(x.size):
        low, high = min(low, np.float64(x[i])), max(high, np.float64(x[i]))
    if high - low <= max(abs(low), abs(high)) * CLOSE:
        return True
    factors = FACTORS_15 if top == 15 else FACTORS_31
    for k in range(factors.size):
        factor = factors[k]
        least, most = 0.0, np.inf
        if high > 0.0:
            most = factor / high * SLACK
        for i in range(x.size):
            gap, code = abs(high - np.float64(x[i])), np.float64(stored[i])
            if int(stored[i]) < top:
                least = max(least, np.float64(factor - code - TIE) / gap)
            if int(stored[i]) > 0:
                most = min(most, np.float64(factor - code + TIE) / gap)
            if least > most:
                break
        if least <= most:
            return True
    return False


@jit
def check_lines(block: Bytes, stored: Bytes, x: Floats, top: int, d: Any, m: Any, codes: Bytes) -> Any:
    """Check one block.

    block         : begins with d and m, fp16
    stored, codes : [n] uint8; x : [n] float32; d, m, codes : what the plain encoder gives
    return        : codes off, largest distance; 0 and 0 where something explains the whole block
    """
    step = decode_half(int(block[0]) | int(block[1]) << 8)
    if step == ZERO or follow_plain(stored, x, d, m, codes) or follow_line(stored, x, top):
        return 0, 0
    base = decode_half(int(block[2]) | int(block[3]) << 8)
    off, far = 0, 0
    for i in range(x.size):
        distance = abs(int(stored[i]) - round_code((x[i] - base) / step, 0, top))
        off += distance != 0
        far = max(far, distance)
    return off, far
