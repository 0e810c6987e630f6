"""Count codes that are not the encoder's under the stored scales, on vectors: the results of rounding_jit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, maximum, minimum
from refimpl.arith.simd_lanes import convert, first, high_half, join, low_half
from refimpl.arith.simd_memory import get, load, put, stack
from refimpl.quants import q4_k_simd, q6_k_simd, rounding_jit
from refimpl.quants.formats import Q4_K, Q6_K
from refimpl.quants.q6_k_simd import read_half, round_half
from refimpl.quants.search_simd import ZERO, find_largest

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]

Q4_K_BYTES, Q6_K_BYTES = q4_k_simd.BYTES, q6_k_simd.BYTES
QS, QH = q4_k_simd.QS, q6_k_simd.QH
read_q4_k_scales, round_q4_k = q4_k_simd.read_scales, q4_k_simd.round_codes
read_q6_k_scales = q6_k_simd.read_scales


def nearest(raw: Bytes, id: int, weights: int, x: Floats, off: Words, far: Bytes) -> None:
    """Check rows of blocks as rounding_jit.nearest does, to which Q8_0 and Q5_0 are left."""
    if id == Q4_K.id:
        check_q4_k(raw, x, off, far)
    elif id == Q6_K.id:
        check_q6_k(raw, x, off, far)
    else:
        rounding_jit.nearest(raw, id, weights, x, off, far)


@jit
def check_q4_k(raw: Bytes, x: Floats, off: Words, far: Bytes) -> None:
    """raw [R, bytes] uint8, x [R, n] float32 -> off [R, NB] uint16: how many; far [R, NB] uint8: how far."""
    steps, offsets = stack(np.float32, 8), stack(np.float32, 8)
    for block in range(off.size):
        at = block * Q4_K_BYTES
        read_q4_k_scales(raw, at, steps, offsets)
        count, most = fill(np.uint8(0), 32), fill(np.uint8(0), 32)
        for j in range(8):
            step = get(steps, j)
            if step != ZERO:  # a zero scale keeps any codes
                stored = (load(raw, at + QS + j // 2 * 32, 32) >> np.uint8(j % 2 * 4)) & np.uint8(15)
                code = convert(round_q4_k(x, block * 256 + j * 32, step, get(offsets, j)), np.uint8)
                count, most = note(stored, code, count, most)
        put(off, block, np.uint16(add_lanes(convert(count, np.int32))))
        put(far, block, first(find_largest(most)))


@jit
def check_q6_k(raw: Bytes, x: Floats, off: Words, far: Bytes) -> None:
    """raw [R, bytes] uint8, x [R, n] float32 -> off [R, NB] uint16: how many; far [R, NB] uint8: how far."""
    steps = stack(np.float32, 16)
    for block in range(off.size):
        at = block * Q6_K_BYTES
        read_q6_k_scales(raw, at, steps)
        count, most = fill(np.uint8(0), 16), fill(np.uint8(0), 16)
        for half in range(2):
            stored = read_half(raw, at + 64 * half, at + QH + 32 * half)
            codes = round_half(x, block * 256 + 128 * half, steps, 8 * half)
            for k in range(4):
                if get(steps, 8 * half + 2 * k) != ZERO:  # a zero scale keeps any codes
                    count, most = note(low_half(stored[k]), low_half(codes[k]), count, most)
                if get(steps, 8 * half + 2 * k + 1) != ZERO:
                    count, most = note(high_half(stored[k]), high_half(codes[k]), count, most)
        none = fill(np.uint8(0), 16)
        put(off, block, np.uint16(add_lanes(convert(join(count, none), np.int32))))
        put(far, block, first(find_largest(join(most, none))))


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
