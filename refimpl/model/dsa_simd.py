"""The indexer's scores on vectors: the bits of dsa.add_heads, for the keys that a query may see."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import fill, select
from refimpl.arith.simd_memory import get, load, put, stack, store
from refimpl.dots.sixteen_simd import allocate_rows, lay_out, multiply_six

Floats = NDArray[np.float32]

QUERIES = 96  # of all heads, whose products with 16 keys exist at a time: a multiple of 6
DOTS = 96 * 16
ZERO = np.float32(0)


@jit
def add_heads(q: Floats, k: Floats, weights: Floats, first: int, out: Floats) -> None:
    """Score the keys up to `first` + t for query t: the sum over heads of weight * relu(q . k).

    q [T, H, n], k [S, n], weights [T, H] float32, n a multiple of 16 -> out [T, S] float32: of the keys behind, some
    """
    tokens, heads, n = q.shape
    keys, rows = k.shape[0], tokens * heads
    tile, dots, last = allocate_rows(n), stack(np.float32, DOTS), stack(np.float32, 16)
    for start in range(0, keys, 16):
        lay_out(k, start, tile)
        at = DOTS  # of the next products
        for t in range(max(0, start - first), tokens):
            total = fill(ZERO, 16)
            for row in range(t * heads, (t + 1) * heads):
                if at == DOTS:
                    for r in range(0, min(QUERIES, rows - row), 6):
                        multiply_six(tile, q, row + r, rows, n, dots, r * 16)
                    at = 0
                products = load(dots, at, 16)
                total = total + select(products < ZERO, ZERO, products) * get(weights, row)
                at += 16
            if start + 16 <= keys:
                store(out, t * keys + start, total)
                continue
            store(last, 0, total)
            for s in range(start, keys):
                put(out, t * keys + s, get(last, s - start))
