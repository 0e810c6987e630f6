"""Products of float matrices on vectors: the bits of floats_jit for every shape.

For a few tokens a sum's 16 lanes are one vector; 4 rows and 4 tokens (or 8 rows and one token) are multiplied at a
time, so that every load serves several products and the additions of 16 sums hide each other's latency. Many tokens
are worth laying rows out for (sixteen_simd). Which sums are taken together never changes a sum.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_lanes import as_float32, first, high_half, join, low_half, permutation
from refimpl.arith.simd_memory import get, load, prefetch, put, stack, store
from refimpl.arith.sums import DOT_LANES
from refimpl.dots.folds_simd import fold_four, fold_sixteen
from refimpl.dots.sixteen_simd import allocate_rows, lay_out, multiply_six

Floats = NDArray[np.float32]
Weights = NDArray[Any]  # float32, or uint16: bf16 bits

LANES = DOT_LANES
ZERO = np.float32(0)
AHEAD = 512  # elements that are asked for before they are read
MANY = 16  # tokens that are worth laying rows out for
TOKENS = 192  # a multiple of 6; of so many the factors stay in the caches
SUMS = 192 * 16

FOUR_TIMES = permutation([*range(16)] * 4)
EIGHT_TIMES = permutation([*range(16)] * 8)
BY_TOKENS = permutation(
    [4 * r + t for t in range(4) for r in range(4)]
)  # a tile's sums: rows outside, tokens inside


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
    if x.shape[0] >= MANY:
        multiply_many(w, x, out)
        return
    tokens = x.shape[0] // 4 * 4
    for t in range(0, tokens, 4):
        multiply_four(w, x, t, out)
    for t in range(tokens, x.shape[0]):
        multiply_one(w, x, t, out)


@jit
def multiply_many(w: Weights, x: Floats, out: Floats) -> None:
    """16 rows at a time, and 6 tokens."""
    m, n = w.shape
    tile, sums = allocate_rows(n), stack(np.float32, SUMS)
    for token in range(0, x.shape[0], TOKENS):
        tokens = min(TOKENS, x.shape[0] - token)
        for start in range(0, m, 16):
            lay_out(w, start, tile)
            following = (start + 16) * n
            for t in range(0, tokens, 6):
                for i in range(16 * n * t // tokens, 16 * n * (t + 6) // tokens, 32):
                    prefetch(w, following + i)
                multiply_six(tile, x, token + t, x.shape[0], n, sums, t * 16)
            for t in range(tokens):
                if start + 16 <= m:
                    store(out, (token + t) * m + start, load(sums, t * 16, 16))
                    continue
                for r in range(start, m):
                    put(out, (token + t) * m + r, get(sums, t * 16 + r - start))


@jit
def multiply_four(w: Weights, x: Floats, t: int, out: Floats) -> None:
    """Tokens t to t + 3 with every row, 4 rows at a time; the last 4 reach back where they are not whole."""
    m, n = w.shape
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
        sums = BY_TOKENS(fold_sixteen(join(join(a, b), join(c, d))))
        low, high = low_half(sums), high_half(sums)
        at = t * m + r
        store(out, at, low_half(low))
        store(out, at + m, high_half(low))
        store(out, at + 2 * m, low_half(high))
        store(out, at + 3 * m, high_half(high))


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
        store(out, t * m + r, fold_four(low_half(sums)))
        store(out, t * m + r + 4, fold_four(high_half(sums)))
    for r in range(rows, m):
        one = fill(ZERO, 16)
        for i in range(0, n, 16):
            one = one + as_float32(load(w, r * n + i, 16)) * load(x, t * n + i, 16)
        half = low_half(one) + high_half(one)
        quarter = low_half(half) + high_half(half)
        pair = low_half(quarter) + high_half(quarter)
        put(out, t * m + r, first(pair) + first(high_half(pair)))
