"""Parts of check_codes on vectors: count the codes that differ, and how far."""

from typing import Any

import numpy as np

from refimpl.arith.simd import Lanes, inlined, maximum, minimum
from refimpl.arith.simd_lanes import convert, first, high_half, low_half


@inlined
def note(stored: Lanes, codes: Lanes, count: Lanes, most: Lanes) -> tuple[Lanes, Lanes]:
    """Add codes that differ to count, and raise most to their distance; all uint8."""
    apart = maximum(stored, codes) - minimum(stored, codes)
    return count + convert(apart != np.uint8(0), np.uint8), maximum(apart, most)


@inlined
def add_lanes(lanes: Lanes) -> Any:
    """The sum of 32 int32 lanes."""
    v = low_half(lanes) + high_half(lanes)
    v = low_half(v) + high_half(v)
    v = low_half(v) + high_half(v)
    v = low_half(v) + high_half(v)
    return first(low_half(v) + high_half(v))
