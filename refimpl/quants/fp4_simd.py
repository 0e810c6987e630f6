"""Parts of MXFP4 and NVFP4 on vectors: codes from weights and weights from codes."""

from typing import Any

import numpy as np

from refimpl.arith.simd import Lanes, absolute, inlined, maximum, select
from refimpl.arith.simd_lanes import convert, first, high_half, join, lookup, low_half
from refimpl.quants.levels import FP4
from refimpl.quants.search_simd import ZERO

read_levels = lookup((*FP4, *(-v for v in FP4)))


@inlined
def decode(codes: Lanes) -> Lanes:
    """The levels of codes, as float32. codes : uint8 [n]"""
    return convert(convert(read_levels(codes), np.int32), np.float32)


@inlined
def closer(size: Lanes, value: Any, code: Any, best: Lanes, codes: Lanes) -> tuple[Lanes, Lanes]:
    """Take a code whose value lies closer to size than the best so far."""
    error = absolute(value - size)
    nearer = error < best
    return select(nearer, error, best), select(nearer, code, codes)


@inlined
def round_codes(v: Lanes, codes: Lanes, step: Any) -> Lanes:
    """The code of least error of each weight, the first of equals. v : float32 [n]; codes : int32 [n] zeros."""
    size = absolute(v)
    best, codes = closer(size, step, np.int32(1), size, codes)
    best, codes = closer(size, np.float32(2) * step, np.int32(2), best, codes)
    best, codes = closer(size, np.float32(3) * step, np.int32(3), best, codes)
    best, codes = closer(size, np.float32(4) * step, np.int32(4), best, codes)
    best, codes = closer(size, np.float32(6) * step, np.int32(5), best, codes)
    best, codes = closer(size, np.float32(8) * step, np.int32(6), best, codes)
    best, codes = closer(size, np.float32(12) * step, np.int32(7), best, codes)
    return select((v < ZERO) & (codes > np.int32(0)), codes | np.int32(8), codes)


@inlined
def pack(codes: Lanes) -> Lanes:
    """The first half of the codes in the low nibbles, the second in the high ones: int32 [2n] -> uint8 [n]."""
    narrow = convert(codes, np.uint8)
    return low_half(narrow) | (high_half(narrow) << np.uint8(4))


@inlined
def unpack(qs: Lanes) -> Lanes:
    """All low nibbles, then all high ones: uint8 [n] -> uint8 [2n]."""
    return join(qs & np.uint8(15), qs >> np.uint8(4))


@inlined
def find_largest16(v: Lanes) -> Any:
    """The largest of 16 lanes without NaN."""
    h = maximum(low_half(v), high_half(v))
    h = maximum(low_half(h), high_half(h))
    h = maximum(low_half(h), high_half(h))
    return first(maximum(low_half(h), high_half(h)))
