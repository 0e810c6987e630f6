"""Round the vector encoders: blocks that they flag go to the scalar text, inputs too small for them are repeated."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
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
    build: Build,
) -> None:
    """Run a vector kernel over all blocks, then the scalar encoder over those it flags.

    together : the least number of blocks that the kernel takes
    kernel   : (x, imatrix, rows_per_expert, out, redo, build), redo [blocks] bool written
    scalar   : (x, imatrix, rows_per_expert, out, build)
    x, imatrix, rows_per_expert, out : as in every quantize(): [R, n], [E, n], [R, bytes]
    """
    if x.size < together * fmt.weights:
        more, importance = repeat_rows(x, imatrix, rows_per_expert, together * fmt.weights)
        raw = np.empty((len(more), out.shape[1]), np.uint8)
        encode(fmt, together, kernel, scalar, more, importance, 1, raw, build)
        out[:] = raw[: len(x)]
        return
    redo = np.zeros(x.size // fmt.weights, np.bool_)
    kernel(x, imatrix, rows_per_expert, out, redo, build)
    if redo.any():
        again = np.flatnonzero(redo)
        raw = np.empty((len(again), fmt.block.itemsize), np.uint8)
        weights = np.ascontiguousarray(x.reshape(-1, fmt.weights)[again])
        importance = pick_importance(fmt, again, x.shape[1], imatrix, rows_per_expert)
        scalar(weights, importance, 1, raw, build)
        out.reshape(-1, fmt.block.itemsize)[again] = raw


def repeat_rows(
    x: NDArray[np.float32], imatrix: NDArray[np.float32], rows_per_expert: int, weights: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The rows again and again until there are at least so many weights; and an imatrix row for each, if any."""
    shape = (-(-weights // x.shape[1]), x.shape[1])
    if not len(imatrix):
        return np.resize(x, shape), imatrix
    return np.resize(x, shape), np.resize(imatrix[np.arange(len(x)) // rows_per_expert], shape)


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
