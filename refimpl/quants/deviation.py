"""How far decoded weights lie from their source: error sums per block and row, in one fixed order."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.sums import add_lanes

Array = NDArray[Any]


def compare(y: Array, source: Array, weights: int) -> tuple[Array, Array, Array]:
    """Add up squared errors and squared weights of each block.

    d = y - source;  sse = sum of d^2,  ssx = sum of source^2

    y, source : [R, n] float32
    weights   : weights per block
    return    : sse [R, NB], ssx [R, NB] float64, max|d| [R] float32 (NaN where any d is NaN)

    Rounds: d, to float32; squares and sums, to float64, in the 32 lanes of sums.add_lanes.
    """
    shape = (*y.shape[:-1], y.shape[-1] // weights, weights)
    d = (y - source).astype(np.float64).reshape(shape)
    s = source.astype(np.float64).reshape(shape)
    return add_lanes(d * d), add_lanes(s * s), np.abs(y - source).max(1)


def summarize(sse: Array, ssx: Array) -> tuple[Array, Array]:
    """Add up the blocks of each row in ascending order, and find the worst.

    sse, ssx : [R, NB] float64
    return   : [R, 3] float64: sse, ssx, largest sse of a block; [R] int32: the first block that has it

    Rounds: every addition, to float64. A NaN counts as larger than any number.
    """
    sums = np.zeros((len(sse), 3))
    for b in range(sse.shape[1]):
        sums[:, 0] += sse[:, b]
        sums[:, 1] += ssx[:, b]
    worst = sse.argmax(1)  # the first; NumPy too takes NaN for the largest
    sums[:, 2] = sse[np.arange(len(sse)), worst]
    return sums, worst.astype(np.int32)
