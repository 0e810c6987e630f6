"""IQ1_S on explicit vectors: the bytes and bits of iq1_s_jit. See grids_simd.py for what decoders share.

As in iq1_m_simd.py the encoder looks for the cuts of a block's 8 groups side by side, a group a lane.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Scratch, fill, inlined
from refimpl.arith.simd_memory import fence, get, load, peek, prefetch, put, stack, store
from refimpl.quants.formats import IQ1_S
from refimpl.quants.grid_search_jit import mean_square
from refimpl.quants.grids import refuse
from refimpl.quants.grids_simd import load_eighths, put_eight, read_d, shift_weights
from refimpl.quants.iq1_s_jit import EPSILON, take_cuts, weigh_sub, write_scales, write_sub
from refimpl.quants.search_simd import ZERO, is_streamed, put_weights
from refimpl.quants.ternary_cuts_simd import Best, attempt, sort
from refimpl.quants.ternary_search_jit import LEAST, Search, find_size, make_search

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = IQ1_S.block.itemsize
QS, QH = IQ1_S.offset("qs"), IQ1_S.offset("qh")
EIGHTHS = load_eighths()
SUB, GROUPS = 32, 8  # weights of a group, groups of a block
TILE = 264  # sums up to each of 33 cuts, of 8 groups
UP, UP_LOW, UP_HIGH = np.float32(0.125), np.float32(-0.875), np.float32(1.125)
DOWN, DOWN_LOW, DOWN_HIGH = np.float32(-0.125), np.float32(-1.125), np.float32(0.875)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows: the bytes of iq1_s_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]
    out     : [R, n/256*50] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, make_search(SUB), out))


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, s: Search, out: Bytes) -> int:
    """Encode rows; return the first block, counted over all rows, that ggml aborts on, or -1."""
    scales, orders = np.empty(GROUPS, np.float32), np.empty((GROUPS, SUB), np.int32)
    sums_x, sums_w = stack(np.float32, TILE), stack(np.float32, TILE)
    places, found = stack(np.int32, GROUPS), stack(np.float32, GROUPS)
    blocks, refused = x.shape[1] // 256, -1
    for r in range(x.shape[0]):
        for b in range(blocks):
            weights = imatrix[r // rows_per_expert, b * 256 : (b + 1) * 256]
            group, block = x[r, b * 256 : (b + 1) * 256], out[r, b * BYTES : (b + 1) * BYTES]
            block[:] = 0
            mean, lost = mean_square(group, 2), False
            for j in range(GROUPS):
                weigh_sub(group, weights, mean, j, s)
                sort(group, SUB * j, SUB, orders[j])
                for k in range(SUB):
                    w = s.weights[orders[j, k]]
                    put(sums_x, GROUPS * (k + 1) + j, w * s.x[orders[j, k]])
                    put(sums_w, GROUPS * (k + 1) + j, w)
            best = find_cuts(sums_x, sums_w)
            store(places, 0, best.place)
            store(found, 0, best.scale)
            for j in range(GROUPS):
                place = int(get(places, j))
                weigh_sub(group, weights, mean, j, s)
                scales[j] = ZERO
                if place >= 0 and find_size(s) >= EPSILON:
                    s.order[:] = orders[j]
                    take_cuts(s, place // 66, place // 2 % 33, 1 - place % 2)
                    scales[j], gone = write_sub(s, get(found, j), block, j)
                    lost = lost or gone
            write_scales(scales, block)
            if lost and refused < 0:
                refused = r * blocks + b
    return refused


@inlined
def add_up(terms: Scratch) -> None:
    """Terms become their sums up to each cut."""
    total = fill(ZERO, 8)
    store(terms, 0, total)
    for at in range(8, 264, 8):
        total = total + load(terms, at, 8)
        store(terms, at, total)


@inlined
def find_cuts(sums_x: Scratch, sums_w: Scratch) -> Best:
    """Cut every group in three, under either shift, where the error is least: 2 * (33 * first + second) + down."""
    add_up(sums_x)
    add_up(sums_w)
    x_all, w_all = load(sums_x, 256, 8), load(sums_w, 256, 8)
    best = Best(fill(LEAST, 8), fill(ZERO, 8), fill(np.int32(-1), 8))
    for i in range(SUB + 1):
        x0, w0 = load(sums_x, GROUPS * i, 8), load(sums_w, GROUPS * i, 8)
        for j in range(i, SUB + 1):
            xj, wj = load(sums_x, GROUPS * j, 8), load(sums_w, GROUPS * j, 8)
            x1, x2, w1, w2 = xj - x0, x_all - xj, wj - w0, w_all - wj
            up = x0 * UP_LOW + x1 * UP + x2 * UP_HIGH
            up_q2 = w0 * UP_LOW * UP_LOW + w1 * UP * UP + w2 * UP_HIGH * UP_HIGH
            down = x0 * DOWN_LOW + x1 * DOWN + x2 * DOWN_HIGH
            down_q2 = w0 * DOWN_LOW * DOWN_LOW + w1 * DOWN * DOWN + w2 * DOWN_HIGH * DOWN_HIGH
            place = np.int32(2 * (33 * i + j))
            best = attempt(best, place, up, up_q2)
            best = attempt(best, np.int32(place + 1), down, down_q2)
    return best


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq1_s_jit.dequantize. raw : [R, n/256*50] uint8; out : [R, n] float32, written."""
    points, streamed = stack(np.int8, 256), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = read_d(raw, at)
        for j in range(8):
            word = np.int64(peek(raw, at + QH + 2 * j, np.uint16))
            for i in range(4):
                low = np.int64(peek(raw, at + QS + 4 * j + i, np.uint8))
                put_eight(EIGHTHS, low | (word >> 3 * i & 7) << 8, points, 4 * j + i)
        for k in range(16):
            word = np.int64(peek(raw, at + QH + 2 * (k // 2), np.uint16))
            step = d * np.float32(2 * (word >> 12 & 7) + 1)
            weights = shift_weights(points, np.uint16(0 - (word >> 15)), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
