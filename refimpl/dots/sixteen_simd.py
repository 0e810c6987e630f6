"""Products of 16 rows with many others: a vector is one channel of all 16, so that their sums need no folding.

A sum has 16 lanes (arith.sums.dot_lanes). Here a lane is a vector, of 16 sums side by side, and 6 such vectors, for 6
rows of the other matrix, are added up at a time: what the 16 registers of AVX2 hold beside the factors. Lanes follow
one another, and are folded when all are there. The 16 rows are laid out first, which many others must be worth.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_lanes import as_float32
from refimpl.arith.simd_memory import get, load, stack, store, transpose16

Floats = NDArray[np.float32]
Weights = NDArray[Any]  # float32, or uint16: bf16 bits

ZERO = np.float32(0)
STEP = 256  # channels of 6 rows that stay in the nearest cache while their 16 lanes pass
SIX = 6 * 16  # a lane of all sums
ROOM = 16 * 6 * 16


@jit
def allocate_rows(n: int) -> Floats:
    """Room for 16 rows of n channels, from a multiple of 64 bytes on."""
    room = np.empty(16 * n + 16, np.float32)
    start = (-room.ctypes.data) % 64 // 4
    return room[start : start + 16 * n]


@jit
def lay_out(w: Weights, start: int, tile: Floats) -> None:
    """Rows start to start + 15, STEP channels at a time: the channels of a lane one after the other, 16 rows of each.

    Behind the last row comes the last one again. w : [m, n] float32, or bf16 bits; n a multiple of 16
    """
    m, n = w.shape
    rows = stack(np.float32, 256)
    for i in range(0, n, 16):
        for k in range(16):
            store(rows, k * 16, as_float32(load(w, min(start + k, m - 1) * n + i, 16)))
        block = i // STEP * STEP
        transpose16(rows, 0, 16, tile, block * 16 + (i - block), min(STEP, n - block))


@inlined
def fold(lanes: Any, i: Any) -> Lanes:
    """16 sums, each lane a vector, from i on: folded by halves."""
    a = load(lanes, i, 16) + load(lanes, i + 8 * SIX, 16)
    b = load(lanes, i + 4 * SIX, 16) + load(lanes, i + 12 * SIX, 16)
    c = load(lanes, i + 2 * SIX, 16) + load(lanes, i + 10 * SIX, 16)
    d = load(lanes, i + 6 * SIX, 16) + load(lanes, i + 14 * SIX, 16)
    even = (a + b) + (c + d)
    a = load(lanes, i + SIX, 16) + load(lanes, i + 9 * SIX, 16)
    b = load(lanes, i + 5 * SIX, 16) + load(lanes, i + 13 * SIX, 16)
    c = load(lanes, i + 3 * SIX, 16) + load(lanes, i + 11 * SIX, 16)
    d = load(lanes, i + 7 * SIX, 16) + load(lanes, i + 15 * SIX, 16)
    return even + ((a + b) + (c + d))


@jit
def multiply_six(tile: Floats, x: Floats, row: int, rows: int, n: int, sums: Any, at: int) -> None:
    """The 16 rows laid out in the tile times rows `row` to row + 5 of so many; behind the last comes the last again.

    x    : any shape, its rows of n channels one after the other
    sums : float32 scratch, written from `at` on: 16 sums for each of the 6
    """
    lanes = stack(np.float32, ROOM)
    last = rows - 1
    xa, xb, xc = min(row, last) * n, min(row + 1, last) * n, min(row + 2, last) * n
    xd, xe, xf = min(row + 3, last) * n, min(row + 4, last) * n, min(row + 5, last) * n
    for block in range(0, n, STEP):
        width = min(STEP, n - block)
        for lane in range(16):
            p = lane * SIX
            if block:
                a, b, c = load(lanes, p, 16), load(lanes, p + 16, 16), load(lanes, p + 32, 16)
                d, e, f = load(lanes, p + 48, 16), load(lanes, p + 64, 16), load(lanes, p + 80, 16)
            else:
                a, b, c = fill(ZERO, 16), fill(ZERO, 16), fill(ZERO, 16)
                d, e, f = fill(ZERO, 16), fill(ZERO, 16), fill(ZERO, 16)
            for i in range(0, width, 16):
                v = load(tile, block * 16 + lane * width + i, 16)
                channel = block + i + lane
                a = a + v * get(x, xa + channel)
                b = b + v * get(x, xb + channel)
                c = c + v * get(x, xc + channel)
                d = d + v * get(x, xd + channel)
                e = e + v * get(x, xe + channel)
                f = f + v * get(x, xf + channel)
            store(lanes, p, a)
            store(lanes, p + 16, b)
            store(lanes, p + 32, c)
            store(lanes, p + 48, d)
            store(lanes, p + 64, e)
            store(lanes, p + 80, f)
    for k in range(0, SIX, 16):
        store(sums, at + k, fold(lanes, k))
