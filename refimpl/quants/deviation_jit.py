"""Compare decoded weights with their source: the twin of deviation.py.

The source comes as bf16 bits or as float32: two arrays of which one is [0, 0].
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_bf16
from refimpl.arith.jit import jit

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Words = NDArray[np.uint16]
Integers = NDArray[np.int32]

LANES = 32
ZERO = np.float32(0)


@jit
def load_source(bits: Words, values: Floats, r: int, at: int, s: Floats) -> None:
    """Fill s with the source's weights from column `at` of row r."""
    if bits.size > 0:
        for i in range(s.size):
            s[i] = decode_bf16(bits[r, at + i])
    else:
        for i in range(s.size):
            s[i] = values[r, at + i]


@jit
def fold(lanes: Doubles) -> Any:
    """Add 32 lanes by halves; lanes is used up."""
    half = LANES // 2
    while half > 0:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    return lanes[0]


@jit
def measure(y: Floats, s: Floats, lanes: Doubles) -> Any:
    """Compare one block. y, s : [n] float32; lanes : [2, 32] float64, scratch; return : sse, ssx, max|d|."""
    errors, squares = lanes[0], lanes[1]
    for k in range(LANES):
        errors[k] = squares[k] = 0.0
    largest = ZERO
    for start in range(0, y.size, LANES):
        for k in range(min(LANES, y.size - start)):
            d = y[start + k] - s[start + k]
            largest = max(largest, abs(d))
            errors[k] += np.float64(d) * np.float64(d)
            squares[k] += np.float64(s[start + k]) * np.float64(s[start + k])
    return fold(errors), fold(squares), largest


@jit
def add_block(
    sse: Any, ssx: Any, largest: Any, r: int, b: int, sums: Doubles, max_abs: Floats, worst: Any
) -> None:
    """Add block b to the sums of row r; a NaN counts as larger than any number."""
    sums[r, 0] += sse
    sums[r, 1] += ssx
    max_abs[r] = max(max_abs[r], largest)
    if b == 0 or sse > sums[r, 2] or (sse != sse and sums[r, 2] == sums[r, 2]):
        sums[r, 2] = sse
        worst[r] = b


@jit
def compare(
    y: Floats,
    bits: Words,
    values: Floats,
    weights: int,
    sse: Doubles,
    sums: Doubles,
    max_abs: Floats,
    worst: Integers,
) -> None:
    """Compare decoded rows with their source.

    y       : [R, n] float32
    bits    : [R, n] uint16, the source in bf16, or [0, 0]
    values  : [R, n] float32, the source in float32, or [0, 0]
    weights : of a block
    sse     : [R, NB] float64 or [0, 0], written: sum of d^2 of each block
    sums    : [R, 3] float64, max_abs : [R] float32, worst : [R] int32, all written: see deviation.summarize
    """
    s, lanes = np.empty(weights, np.float32), np.empty((2, LANES), np.float64)
    for r in range(y.shape[0]):
        sums[r, 0], sums[r, 1], max_abs[r] = 0.0, 0.0, ZERO
        for b in range(y.shape[1] // weights):
            load_source(bits, values, r, b * weights, s)
            error, square, largest = measure(y[r, b * weights : (b + 1) * weights], s, lanes)
            if sse.size > 0:
                sse[r, b] = error
            add_block(error, square, largest, r, b, sums, max_abs, worst)
        if sums[r, 0] != sums[r, 0]:
            max_abs[r] = np.nan


@jit
def compare_values(
    y: Floats, bits: Words, values: Floats, sse: Doubles, sums: Doubles, max_abs: Floats, worst: Integers
) -> None:
    """Compare decoded rows of single weights with their source. y : [R, n] float32; the rest as above."""
    s = np.empty(1, np.float32)
    for r in range(y.shape[0]):
        sums[r, 0], sums[r, 1], max_abs[r] = 0.0, 0.0, ZERO
        for b in range(y.shape[1]):
            load_source(bits, values, r, b, s)
            d = y[r, b] - s[0]
            error, square = np.float64(d) * np.float64(d), np.float64(s[0]) * np.float64(s[0])
            if sse.size > 0:
                sse[r, b] = error
            add_block(error, square, abs(d), r, b, sums, max_abs, worst)
        if sums[r, 0] != sums[r, 0]:
            max_abs[r] = np.nan
