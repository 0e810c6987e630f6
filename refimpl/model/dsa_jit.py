"""The indexer for kernels: twins of dsa.hadamard, and of dsa.select_topk for queries that see more keys than K."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit

Array = NDArray[Any]
LOWEST, HIGHEST = -(2**31), 2**31 - 1


@jit
def order(x: np.float32, number: Array) -> Any:
    """An int32 that grows with x: equal zeros are equal, NaN is below all. number [1] float32 is scratch."""
    number[0] = x + np.float32(0)  # -0 becomes 0
    bits = number.view(np.int32)[0]
    return np.int32(LOWEST) if x != x else bits ^ ((bits >> np.int32(31)) & np.int32(HIGHEST))


@jit
def select_topk(scores: Array, first: int, chosen: Array) -> None:
    """Choose the best keys of each query among those not after it; equal scores: the lower index.

    The least score that is chosen is found bit by bit: whether at least so many keys reach a number is a count.

    scores : [T, S] float32; query t sees keys 0 to first + t, more than K
    chosen : [T, K] int64, written: ascending
    """
    count, number = chosen.shape[1], np.empty(1, np.float32)
    ranks = np.empty(scores.shape[1], np.int32)
    for t in range(scores.shape[0]):
        seen = min(first + t + 1, scores.shape[1])
        for s in range(seen):
            ranks[s] = order(scores[t, s], number)
        low, high = np.int64(LOWEST), np.int64(HIGHEST)  # `count` keys or more reach low, fewer high + 1
        while low < high:
            middle = np.int32((low + high + 1) >> 1)
            reach = np.int32(0)
            for s in range(seen):
                reach += np.int32(ranks[s] >= middle)
            low, high = (np.int64(middle), high) if reach >= count else (low, np.int64(middle - 1))
        above = 0
        for s in range(seen):
            above += ranks[s] > low
        level, k = count - above, 0  # so many of those that are just as good, the first ones
        for s in range(seen):
            if k < count and (ranks[s] > low or (ranks[s] == low and level > 0)):
                level -= ranks[s] == low
                chosen[t, k] = s
                k += 1


@jit
def hadamard(x: Array, scale: np.float32, out: Array) -> None:
    """x H * scale: sums and differences of neighbours, then of neighbouring pairs: x [N, n] -> out [N, n] float32."""
    n = x.shape[1]
    for t in range(x.shape[0]):
        out[t] = x[t]
        half = 1
        while half < n:
            for start in range(0, n, 2 * half):
                for i in range(start, start + half):
                    a, b = out[t, i], out[t, i + half]
                    out[t, i], out[t, i + half] = a + b, a - b
            half *= 2
        for i in range(n):
            out[t, i] = out[t, i] * scale
