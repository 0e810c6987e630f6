"""The indexer's scores on vectors: the bits of dsa.add_heads.

16 keys are multiplied with one head's query at a time: a sum's 16 lanes are one vector, so that 16 sums are folded
together and their lanes are keys. The keys of a tile are copied side by side first, for all queries and heads.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import fill, select
from refimpl.arith.simd_lanes import permutation
from refimpl.arith.simd_memory import get, load, put, stack, store
from refimpl.dots.folds_simd import fold_sixteen

Floats = NDArray[np.float32]

MOST = 256  # channels of a key
ROOM = 16 * 256
ZERO = np.float32(0)
SIXTEEN_TIMES = permutation([*range(16)] * 16)


@jit
def gather_keys(k: Floats, start: int, tile: Any) -> None:
    """16 keys from `start` on, 16 channels of each in turn; behind the last key comes the last one again."""
    n = k.shape[1]
    for r in range(16):
        at = min(start + r, k.shape[0] - 1) * n
        for i in range(0, n, 16):
            store(tile, i * 16 + r * 16, load(k, at + i, 16))


@jit
def add_heads(q: Floats, k: Floats, weights: Floats, out: Floats) -> None:
    """Score every key for every query: the sum over heads of weight * relu(q . k).

    q [T, H, n], k [S, n], weights [T, H] float32, n a multiple of 16, at most MOST -> out [T, S] float32
    """
    tokens, heads, n = q.shape
    keys = k.shape[0]
    tile, last = stack(np.float32, ROOM), stack(np.float32, 16)
    for start in range(0, keys, 16):
        gather_keys(k, start, tile)
        for t in range(tokens):
            total = fill(ZERO, 16)
            for h in range(heads):
                at = (t * heads + h) * n
                sums = fill(ZERO, 256)
                for i in range(0, n, 16):
                    sums = sums + load(tile, i * 16, 256) * SIXTEEN_TIMES(load(q, at + i, 16))
                dots = fold_sixteen(sums)
                total = total + select(dots < ZERO, ZERO, dots) * get(weights, t * heads + h)
            if start + 16 <= keys:
                store(out, t * keys + start, total)
                continue
            store(last, 0, total)
            for s in range(start, keys):
                put(out, t * keys + s, get(last, s - start))
