"""Products of float matrices on vectors: the bits of floats_jit for every shape.

A sum's 16 lanes are one vector; 4 rows and 4 tokens (or 8 rows and one token) are multiplied at a time, so that
every load serves several products and the additions of 16 sums hide each other's latency. Which sums are taken
together never changes a sum.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_lanes import as_float32, first, high_half, join, low_half, permutation
from refimpl.arith.simd_memory import load, prefetch, put, stack, store
from refimpl.arith.sums import DOT_LANES

Floats = NDArray[np.float32]
Weights = NDArray[Any]  # float32, or uint16: bf16 bits

LANES = DOT_LANES
ZERO = np.float32(0)
AHEAD = 512  # elements that are asked for before they are read

FOUR_TIMES = permutation([*range(16)] * 4)
EIGHT_TIMES = permutation([*range(16)] * 8)


def _halves(lanes: int, groups: int, high: int) -> list[int]:
    """The lower or upper half of each of so many groups of lanes."""
    return [g * lanes + high * lanes // 2 + k for g in range(groups) for k in range(lanes // 2)]


LOW_8, HIGH_8 = permutation(_halves(16, 4, 0)), permutation(_halves(16, 4, 1))
LOW_4, HIGH_4 = permutation(_halves(8, 4, 0)), permutation(_halves(8, 4, 1))
LOW_2, HIGH_2 = permutation(_halves(4, 4, 0)), permutation(_halves(4, 4, 1))
LOW_1, HIGH_1 = permutation(_halves(2, 4, 0)), permutation(_halves(2, 4, 1))


@inlined
def fold(sums: Lanes) -> Lanes:
    """Four sums of 16 lanes each, folded by halves: float32 [64] -> [4]."""
    sums = LOW_8(sums) + HIGH_8(sums)
    sums = LOW_4(sums) + HIGH_4(sums)
    sums = LOW_2(sums) + HIGH_2(sums)
    return LOW_1(sums) + HIGH_1(sums)


@inlined
def load_four(x: Weights, i: int, stride: int) -> Lanes:
    """16 elements of each of 4 rows, float32 [64]."""
    a, b = load(x, i, 16), load(x, i + stride, 16)
    c, d = load(x, i + 2 * stride, 16), load(x, i + 3 * stride, 16)
    return as_float32(join(join(a, b), join(c, d)))


@jit
def multiply(w: Weights, x: Floats, out: Floats) -> None:
    """Multiply rows of weights with tokens, in the order of arith.sums.dot_lanes.

    w   : [m, n] float32, or uint16: bf16 bits; n a multiple of 16
    x   : [t, n] float32
    out : [t, m] float32, written
    """
    tokens = x.shape[0] // 4 * 4
    for t in range(0, tokens, 4):
        multiply_four(w, x, t, out)
    for t in range(tokens, x.shape[0]):
        multiply_one(w, x, t, out)


@jit
def multiply_four(w: Weights, x: Floats, t: int, out: Floats) -> None:
    """Tokens t to t + 3 with every row, 4 rows at a time; the last 4 reach back where they are not whole."""
    m, n = w.shape
    sums = stack(np.float32, 16)
    if m < 4:
        for k in range(4):
            multiply_one(w, x, t + k, out)
        return
    for start in range(0, m, 4):
        r = min(start, m - 4)
        a, b, c, d = fill(ZERO, 64), fill(ZERO, 64), fill(ZERO, 64), fill(ZERO, 64)
        for i in range(0, n, 16):
            v = load_four(x, t * n + i, n)
            at = r * n + i
            a = a + FOUR_TIMES(as_float32(load(w, at, 16))) * v
            b = b + FOUR_TIMES(as_float32(load(w, at + n, 16))) * v
            c = c + FOUR_TIMES(as_float32(load(w, at + 2 * n, 16))) * v
            d = d + FOUR_TIMES(as_float32(load(w, at + 3 * n, 16))) * v
        store(sums, 0, fold(a))
        store(sums, 4, fold(b))
        store(sums, 8, fold(c))
        store(sums, 12, fold(d))
        for k in range(16):
            out[t + k % 4, r + k // 4] = sums[k]


@jit
def multiply_one(w: Weights, x: Floats, t: int, out: Floats) -> None:
    """Token t with every row, 8 rows at a time; the rows left over one by one."""
    m, n = w.shape
    rows = m // 8 * 8
    for r in range(0, rows, 8):
        sums = fill(ZERO, 128)
        for i in range(0, n, 16):
            at = r * n + i
            for k in range(8):
                prefetch(w, at + k * n + AHEAD)
            v = load(x, t * n + i, 16)
            eight = join(load_four(w, at, n), load_four(w, at + 4 * n, n))
            sums = sums + eight * EIGHT_TIMES(v)
        store(out, t * m + r, fold(low_half(sums)))
        store(out, t * m + r + 4, fold(high_half(sums)))
    for r in range(rows, m):
        one = fill(ZERO, 16)
        for i in range(0, n, 16):
            one = one + as_float32(load(w, r * n + i, 16)) * load(x, t * n + i, 16)
        half = low_half(one) + high_half(one)
        quarter = low_half(half) + high_half(half)
        pair = low_half(quarter) + high_half(quarter)
        put(out, t * m + r, first(pair) + first(high_half(pair)))
