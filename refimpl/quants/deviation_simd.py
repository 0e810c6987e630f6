"""Compare decoded weights with their source on explicit vectors: the bits of deviation_jit at memory speed.

32 float64 lanes add d² and x², lane l the weights l, l + 32, … of a block; halves are then added until one lane
is left.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import INTEGER, function, jit, rows
from refimpl.arith.simd import Lanes, absolute, fill, inlined, maximum
from refimpl.arith.simd_dot import add_exact
from refimpl.arith.simd_lanes import as_float32, convert, first, high_half, low_half
from refimpl.arith.simd_memory import load, prefetch
from refimpl.quants.search_simd import find_largest

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def compare(
    y: Floats,
    bits: NDArray[np.uint16],
    values: Floats,
    weights: int,
    sse: Doubles,
    sums: Doubles,
    max_abs: Floats,
    worst: NDArray[np.int32],
) -> None:
    """Compare decoded rows with their source: the arguments and results of deviation_jit.compare."""
    measure(y, bits if bits.size else values, weights, sse, sums, max_abs, worst)


@jit
def measure(
    y: Floats,
    source: NDArray[Any],
    weights: int,
    sse: Doubles,
    sums: Doubles,
    max_abs: Floats,
    worst: NDArray[np.int32],
) -> None:
    """Compare decoded rows with their source.

    y       : [R, n] float32
    source  : [R, n] uint16 (bf16 bits) or float32
    weights : of a block
    sse     : [R, NB] float64 or [0, 0], written
    sums    : [R, 3] float64, max_abs : [R] float32, worst : [R] int32, all written
    """
    rows, n = y.shape
    for row in range(rows):
        largest = fill(np.float32(0), 32)
        total, power, most, at = 0.0, 0.0, -1.0, 0
        for block in range(n // weights):
            errors, squares = fill(0.0, 32), fill(0.0, 32)
            start = row * n + block * weights
            for i in range(start, start + weights, 32):
                prefetch(source, i + 4096)
                x = as_float32(load(source, i, 32))
                d = load(y, i, 32) - x
                largest = maximum(absolute(d), largest)
                d64, x64 = convert(d, np.float64), convert(x, np.float64)
                errors = add_exact(errors, d64, d64)
                squares = add_exact(squares, x64, x64)
            error = fold(errors)
            if sse.size:
                sse[row, block] = error
            total += error
            power += fold(squares)
            if error > most or (error != error and most == most):  # NaN is larger than any number
                most, at = error, block
        sums[row, 0], sums[row, 1], sums[row, 2] = total, power, most
        max_abs[row] = first(find_largest(largest)) if total == total else np.float32(np.nan)
        worst[row] = at


def measure_tiles(
    decode: Callable[[NDArray[np.uint8], Floats], None],
    raw: NDArray[np.uint8],
    tile: Floats,
    source: NDArray[Any],
    weights: int,
    sse: Doubles,
    sums: Doubles,
    max_abs: Floats,
    worst: NDArray[np.int32],
) -> None:
    """Decode some rows at a time into the tile and compare them there; all in one call, so the GIL is asked for once.

    raw  : [R, bytes] uint8; decode : the format's own kernel
    tile : [T, n] float32, scratch
    rest : as for measure
    """
    for row in range(0, len(raw), len(tile)):
        end = min(row + len(tile), len(raw))
        y = tile[: end - row]
        decode(raw[row:end], y)
        some = sse[row:end]
        measure(y, source[row:end], weights, some, sums[row:end], max_abs[row:end], worst[row:end])


@cache
def tiles_kernel(source: np.dtype[Any]) -> Callable[..., None]:
    """measure_tiles for sources of this type. Its types are given: so it takes any decoder, and compiles once."""
    decode = function(rows(np.uint8), rows(np.float32))
    result = rows(np.float64), rows(np.float64), rows(np.float32, 1), rows(np.int32, 1)
    types = decode, rows(np.uint8), rows(np.float32), rows(source), INTEGER, *result
    return jit(measure_tiles, types)


@inlined
def fold(lanes: Lanes) -> Any:
    """32 lanes to one by adding halves: l and l + 16, then l and l + 8, 4, 2, 1."""
    v = low_half(lanes) + high_half(lanes)
    v = low_half(v) + high_half(v)
    v = low_half(v) + high_half(v)
    v = low_half(v) + high_half(v)
    return first(low_half(v) + high_half(v))
