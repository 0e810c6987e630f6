"""What the vector encoders leave to the scalar text: blocks that they flag, and inputs too small for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.quants.formats import Format


def encode(
    fmt: Format,
    together: int,
    kernel: Callable[..., Any],
    scalar: Callable[..., Any],
    x: NDArray[np.float32],
    imatrix: NDArray[np.float32],
    rows_per_expert: int,
    out: NDArray[np.uint8],
) -> None:
    """Run a vector kernel over all blocks, then the scalar encoder over those it flags.

    together : the least number of blocks that the kernel takes
    kernel   : (x, imatrix, rows_per_expert, out, redo), redo [blocks] bool written
    scalar   : (x, imatrix, rows_per_expert, out)
    x, imatrix, rows_per_expert, out : as in every quantize(): [R, n], [E, n], [R, bytes]
    """
    blocks = x.size // fmt.weights
    if blocks < together:
        scalar(x, imatrix, rows_per_expert, out)
        return
    redo = np.zeros(blocks, np.bool_)
    kernel(x, imatrix, rows_per_expert, out, redo)
    if redo.any():
        again = np.flatnonzero(redo)
        raw = np.empty((len(again), fmt.block.itemsize), np.uint8)
        weights = np.ascontiguousarray(x.reshape(-1, fmt.weights)[again])
        scalar(weights, pick_importance(fmt, again, x.shape[1], imatrix, rows_per_expert), 1, raw)
        out.reshape(-1, fmt.block.itemsize)[again] = raw


def pick_importance(
    fmt: Format, blocks: NDArray[np.int64], n: int, imatrix: NDArray[np.float32], rows_per_expert: int
) -> NDArray[np.float32]:
    """The imatrix's part for each block: [len(blocks), weights], or [0, weights] without an imatrix."""
    if not len(imatrix):
        return np.empty((0, fmt.weights), np.float32)
    per_row = n // fmt.weights
    experts = blocks // per_row // rows_per_expert
    parts: NDArray[np.float32] = imatrix.reshape(-1, fmt.weights)[experts * per_row + blocks % per_row]
    return parts
