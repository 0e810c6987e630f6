"""The order `avx2` of IQ4_XS on vectors, row by row: the bits of avx2_jit.

64 bytes are 4 sub-blocks of 32. Their low nibbles are one vector, 16 weights of each sub-block, the high ones
another; sort() lays activations out so. A level's magnitude is multiplied with an activation that has its sign.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import fma, multiply_bytes, multiply_words, table
from refimpl.arith.simd_lanes import convert, high_half, join, low_half, permutation, reinterpret
from refimpl.arith.simd_memory import get, load, prefetch, put
from refimpl.dots.levels_simd import IQ4_XS_BYTES, IQ4_XS_QS, unpack_scales
from refimpl.dots.super_simd import fold8
from refimpl.dots.unpack_simd import read_half
from refimpl.quants.levels import IQ4_VALUES

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO = np.float32(0)
read_sizes = table([abs(int(v)) for v in IQ4_VALUES])
NEGATIVE = np.uint8(8)  # codes below it are
FIRST, SECOND = (permutation([4 * h + k // 8 for k in range(32)]) for h in (0, 1))


def sort(acts: Codes) -> Codes:
    """Of each 128 activations the first 16 of each 32, then the others. [t, n] int8"""
    return np.ascontiguousarray(acts.reshape(len(acts), -1, 4, 2, 16).swapaxes(2, 3)).reshape(acts.shape)


@inlined
def total_half(codes: Lanes, acts: Codes, i: int, scales: Lanes) -> Lanes:
    """The integers of 16 weights of 4 sub-blocks, in 4 lanes each: int32 [16]."""
    x = load(acts, i, 64)
    signed = select(codes < NEGATIVE, fill(np.int8(0), 64) - x, x)
    return multiply_words(multiply_bytes(reinterpret(read_sizes(codes), np.uint8), signed), scales)


@jit
def avx2_iq4_xs(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """Rows of IQ4_XS with tokens; acts sorted."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes = fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * IQ4_XS_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                prefetch(raw, at + AHEAD + 64)
                scales, q = unpack_scales(raw, at), load(raw, at + IQ4_XS_QS, 64)
                low = total_half(q & np.uint8(15), acts, 256 * i, FIRST(scales))
                high = total_half(q >> np.uint8(4), acts, 256 * i + 64, FIRST(scales))
                q = load(raw, at + IQ4_XS_QS + 64, 64)
                low = low + total_half(q & np.uint8(15), acts, 256 * i + 128, SECOND(scales))
                high = high + total_half(q >> np.uint8(4), acts, 256 * i + 192, SECOND(scales))
                low, high = low_half(low) + high_half(low), low_half(high) + high_half(high)
                total = join(low_half(low), low_half(high)) + join(high_half(low), high_half(high))
                step = get(act_d, i) * read_half(raw, at)
                lanes = fma(fill(step, 8), convert(total, np.float32), lanes)
            put(out, t * m + r, fold8(lanes))
