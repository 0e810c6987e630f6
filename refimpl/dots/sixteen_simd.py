"""Products of 16 rows with many others: a vector is one channel of all 16, so that their sums need no folding.

A sum has 16 lanes (arith.sums.dot_lanes). Here a lane is a vector, of 16 sums side by side, and such vectors of 6 rows
of the other matrix are added up at a time: of one lane, what the 16 registers of AVX2 hold beside the factors, or of 4
lanes. Lanes follow one another, and are folded when all are there. The 16 rows are laid out first, which many others
must be worth.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import ROOM, Lanes, fill, inlined
from refimpl.arith.simd_lanes import as_float32, high_half, join, low_half
from refimpl.arith.simd_memory import get, load, stack, store, transpose16

Floats = NDArray[np.float32]
Weights = NDArray[Any]  # float32, or uint16: bf16 bits

ZERO = np.float32(0)
STEP = 256  # channels of 6 rows that stay in the nearest cache while their 16 lanes pass
TOGETHER = 4 if ROOM == 32 else 1  # lanes that are added up at a time: l, l + 4, l + 8, l + 12
APART = 16 // TOGETHER
WIDE = TOGETHER * 16
SIX = 6 * WIDE  # lanes taken together, of all sums
LANES = APART * SIX


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
def load_lanes(tile: Floats, i: Any, width: Any) -> Lanes:
    """One channel of each of the lanes taken together."""
    if TOGETHER == 1:
        return load(tile, i, 16)
    a, b = load(tile, i, 16), load(tile, i + 4 * width, 16)
    c, d = load(tile, i + 8 * width, 16), load(tile, i + 12 * width, 16)
    return join(join(a, b), join(c, d))


@inlined
def spread(x: Floats, i: Any) -> Lanes:
    """What multiplies these channels: each lane's one in 16 elements."""
    if TOGETHER == 1:
        return fill(get(x, i), 16)
    a, b = fill(get(x, i), 16), fill(get(x, i + 4), 16)
    c, d = fill(get(x, i + 8), 16), fill(get(x, i + 12), 16)
    return join(join(a, b), join(c, d))


@inlined
def fold_together(lanes: Lanes) -> Lanes:
    """What there is to fold among the lanes taken together."""
    if TOGETHER == 1:
        return lanes
    half = low_half(lanes) + high_half(lanes)
    return low_half(half) + high_half(half)


@inlined
def quarter(lanes: Any, i: Any) -> Lanes:
    """16 sums of lanes l, l + 4, l + 8 and l + 12; l's are at i."""
    if TOGETHER == 4:
        return load(lanes, i, 16)
    a = load(lanes, i, 16) + load(lanes, i + 8 * SIX, 16)
    return a + (load(lanes, i + 4 * SIX, 16) + load(lanes, i + 12 * SIX, 16))


@inlined
def fold(lanes: Any, i: Any) -> Lanes:
    """16 sums of all lanes, from i on: folded by halves; none is -0, as none is of sums that begin with 0."""
    even = quarter(lanes, i) + quarter(lanes, i + 2 * SIX)
    return even + (quarter(lanes, i + SIX) + quarter(lanes, i + 3 * SIX)) + ZERO


@jit
def multiply_six(tile: Floats, x: Floats, row: int, rows: int, n: int, sums: Any, at: int) -> None:
    """The 16 rows laid out in the tile times rows `row` to row + 5 of so many; behind the last comes the last again.

    x    : any shape, its rows of n channels one after the other
    sums : float32 scratch, written from `at` on: 16 sums for each of the 6
    """
    lanes = stack(np.float32, LANES)
    last = rows - 1
    xa, xb, xc = min(row, last) * n, min(row + 1, last) * n, min(row + 2, last) * n
    xd, xe, xf = min(row + 3, last) * n, min(row + 4, last) * n, min(row + 5, last) * n
    for block in range(0, n, STEP):
        width = min(STEP, n - block)
        for lane in range(APART):
            p = lane * SIX
            if block:
                a, b, c = load(lanes, p, WIDE), load(lanes, p + WIDE, WIDE), load(lanes, p + 2 * WIDE, WIDE)
                d, e, f = (
                    load(lanes, p + 3 * WIDE, WIDE),
                    load(lanes, p + 4 * WIDE, WIDE),
                    load(lanes, p + 5 * WIDE, WIDE),
                )
            else:  # 0 + the first product is that product, but for -0: fold() sees to it
                v = load_lanes(tile, lane * width, width)
                a, b, c = v * spread(x, xa + lane), v * spread(x, xb + lane), v * spread(x, xc + lane)
                d, e, f = v * spread(x, xd + lane), v * spread(x, xe + lane), v * spread(x, xf + lane)
            for i in range(0 if block else 16, width, 16):
                v = load_lanes(tile, block * 16 + lane * width + i, width)
                channel = block + i + lane
                a = a + v * spread(x, xa + channel)
                b = b + v * spread(x, xb + channel)
                c = c + v * spread(x, xc + channel)
                d = d + v * spread(x, xd + channel)
                e = e + v * spread(x, xe + channel)
                f = f + v * spread(x, xf + channel)
            if block + STEP < n:
                store(lanes, p, a)
                store(lanes, p + WIDE, b)
                store(lanes, p + 2 * WIDE, c)
                store(lanes, p + 3 * WIDE, d)
                store(lanes, p + 4 * WIDE, e)
                store(lanes, p + 5 * WIDE, f)
            else:
                store(lanes, p, fold_together(a))
                store(lanes, p + WIDE, fold_together(b))
                store(lanes, p + 2 * WIDE, fold_together(c))
                store(lanes, p + 3 * WIDE, fold_together(d))
                store(lanes, p + 4 * WIDE, fold_together(e))
                store(lanes, p + 5 * WIDE, fold_together(f))
    for k in range(6):
        store(sums, at + k * 16, fold(lanes, k * WIDE))
