"""Parts of the vector encoders of IQ1_S and IQ1_M: groups are sorted, and cut side by side, a group a lane."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_lanes import constants, mask_bits
from refimpl.arith.simd_memory import get, load, stack, store

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

LANES = constants("int32", range(32))


class Best(NamedTuple):
    """The best cuts so far of each lane's group."""

    merit: Lanes  # what they take off the error
    scale: Lanes
    place: Lanes  # which cuts they are, int32; -1: none


@inlined
def attempt(best: Best, place: np.int32, sum_qx: Lanes, sum_q2: Lanes) -> Best:
    """The better of what is best so far and one pair of cuts. Records are rare: divisions wait for one."""
    better = (sum_q2 > np.float32(0)) & (sum_qx * sum_qx > best.merit * sum_q2)
    if mask_bits(better) != np.uint64(0):
        scale = sum_qx / sum_q2
        best = Best(
            select(better, scale * sum_qx, best.merit),
            select(better, scale, best.scale),
            select(better, place, best.place),
        )
    return best


@inlined
def sort(x: Floats, at: int, size: int, order: Integers) -> None:
    """order: 16 or 32 weights in ascending order, equal ones in order. The rank of one counts those before it."""
    values, ranks = stack(np.float32, 32), stack(np.int32, 32)
    store(values, 0, fill(np.float32(0), 32))
    for k in range(0, size, 16):
        store(values, k, load(x, at + k, 16))
    v, rank = load(values, 0, 32), fill(np.int32(0), 32)
    for k in range(size):
        before = (get(values, k) < v) | ((get(values, k) == v) & (LANES() > np.int32(k)))
        rank += select(before, fill(np.int32(1), 32), np.int32(0))
    store(ranks, 0, rank)
    for k in range(size):
        order[get(ranks, k)] = k
