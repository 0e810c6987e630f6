"""Products with chosen rows on vectors: the bits of gather.py.

multiply_rows folds the 16 lanes of 16 sums together, of 8 keys for 2 heads. In mix_rows the lanes of a sum are
vectors themselves, of 16 channels each, and nothing needs folding but by whole vectors.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_lanes import high_half, join, low_half, permutation
from refimpl.arith.simd_memory import load, store
from refimpl.dots.folds_simd import fold_sixteen

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

ZERO = np.float32(0)
EIGHT_TIMES = permutation([*range(16)] * 8)
SIXTEEN_OF_EACH = permutation([k // 16 for k in range(256)])


@inlined
def load_pair(x: Floats, i: Any, j: Any) -> Lanes:
    """16 elements from i on, and from j on: float32 [32]."""
    return join(load(x, i, 16), load(x, j, 16))


@inlined
def load_eight(x: Floats, i: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Lanes:
    """Elements i to i + 15 of each of 8 rows, given where they start: float32 [128]."""
    first = join(load_pair(x, i + a, i + b), load_pair(x, i + c, i + d))
    return join(first, join(load_pair(x, i + e, i + f), load_pair(x, i + g, i + h)))


@jit
def multiply_rows(q: Floats, keys: Floats, rows: Numbers, out: Floats) -> None:
    """q [T, H, n], keys [S, n] float32, rows [T, K] int64; n a multiple of 16, K of 8 -> out [T, H, K] float32."""
    tokens, heads, n = q.shape
    count = rows.shape[1]
    for t in range(tokens):
        for s in range(0, count, 8):
            a, b, c, d = rows[t, s] * n, rows[t, s + 1] * n, rows[t, s + 2] * n, rows[t, s + 3] * n
            e, f, g, h = rows[t, s + 4] * n, rows[t, s + 5] * n, rows[t, s + 6] * n, rows[t, s + 7] * n
            for one in range(0, heads, 2):
                two = min(one + 1, heads - 1)  # an odd last head is multiplied twice
                x, y = (t * heads + one) * n, (t * heads + two) * n
                sums = fill(ZERO, 256)
                for i in range(0, n, 16):
                    eight = load_eight(keys, i, a, b, c, d, e, f, g, h)
                    both = join(EIGHT_TIMES(load(q, x + i, 16)), EIGHT_TIMES(load(q, y + i, 16)))
                    sums = sums + join(eight, eight) * both
                dots = fold_sixteen(sums)
                store(out, (t * heads + one) * count + s, low_half(dots))
                store(out, (t * heads + two) * count + s, high_half(dots))


@jit
def mix_rows(p: Floats, values: Floats, rows: Numbers, out: Floats) -> None:
    """p [T, H, K], values [S, m] float32, rows [T, K] int64; K and m multiples of 16 -> out [T, H, m] float32."""
    tokens, heads, count = p.shape
    m = values.shape[1]
    # 16 channels of the chosen rows, from a multiple of 64 bytes on
    column = np.empty(count * 16 + 16, np.float32)
    start = (-column.ctypes.data) % 64 // 4
    for t in range(tokens):
        for i in range(0, m, 16):
            for s in range(count):
                store(column, start + s * 16, load(values, rows[t, s] * m + i, 16))
            for h in range(heads):
                at = (t * heads + h) * count
                lanes = fill(ZERO, 256)
                for s in range(0, count, 16):
                    lanes = lanes + load(column, start + s * 16, 256) * SIXTEEN_OF_EACH(load(p, at + s, 16))
                eight = low_half(lanes) + high_half(lanes)
                four = low_half(eight) + high_half(eight)
                two = low_half(four) + high_half(four)
                store(out, (t * heads + h) * m + i, low_half(two) + high_half(two))
