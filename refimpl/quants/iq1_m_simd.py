"""IQ1_M on explicit vectors: the bytes and bits of iq1_m_jit. See grids_simd.py for what decoders share.

The encoder looks for the cuts of a block's 16 groups side by side, a group a lane, so that each lane adds and
compares in ggml's order. What follows a cut, the search among neighbours, is the portable kernel's.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Scratch, fill, inlined
from refimpl.arith.simd_lanes import decode_half, first
from refimpl.arith.simd_memory import fence, get, load, peek, prefetch, put, stack, store
from refimpl.quants.formats import IQ1_M
from refimpl.quants.grid_search_jit import mean_square
from refimpl.quants.grids import refuse
from refimpl.quants.grids_simd import load_eighths, put_eight, shift_weights
from refimpl.quants.iq1_m_jit import EPSILON, take_cuts, weigh_sub, write_scales, write_sub
from refimpl.quants.search_simd import ZERO, is_streamed, put_weights
from refimpl.quants.ternary_cuts_simd import Best, attempt, sort
from refimpl.quants.ternary_search_jit import LEAST, Search, find_size, make_search

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

BYTES = IQ1_M.block.itemsize
QS, QH, SCALES = IQ1_M.offset("qs"), IQ1_M.offset("qh"), IQ1_M.offset("scales")
EIGHTHS = load_eighths()
SUB = 16  # weights of a group, and groups of a block
TILE = 272  # sums up to each of 17 cuts, of 16 groups
# With a, b, c = shift - 1, shift, shift + 1 for shift = 1/8 and -1/8: c, a*a - b*b, b*b - c*c, all of them exact
UP, UP_LOW, UP_HIGH = np.float32(1.125), np.float32(0.75), np.float32(-1.25)
DOWN, DOWN_LOW, DOWN_HIGH = np.float32(0.875), np.float32(1.25), np.float32(-0.75)


class Cuts(NamedTuple):
    """Scratch for the sums up to each cut, float32 [cut, group]: of w x and of w, of either half of a group."""

    x0: Scratch
    x1: Scratch
    w0: Scratch
    w1: Scratch


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows: the bytes of iq1_m_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*56] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, make_search(SUB), out))


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, s: Search, out: Bytes) -> int:
    """Encode rows; return the first block, counted over all rows, that ggml aborts on, or -1."""
    scales, orders = np.empty(SUB, np.float32), np.empty((SUB, SUB), np.int32)
    cuts = Cuts(
        stack(np.float32, TILE), stack(np.float32, TILE), stack(np.float32, TILE), stack(np.float32, TILE)
    )
    blocks, refused = x.shape[1] // 256, -1
    weights = np.empty(0, np.float32)
    for r in range(x.shape[0]):
        for b in range(blocks):
            if imatrix.shape[0] > 0:
                weights = imatrix[r // rows_per_expert, b * 256 : (b + 1) * 256]
            group, block = x[r, b * 256 : (b + 1) * 256], out[r, b * BYTES : (b + 1) * BYTES]
            block[:] = 0
            mean = mean_square(group, 2)
            for j in range(SUB):
                weigh_sub(group, weights, mean, j, s)
                sort(group, SUB * j, SUB, orders[j])
                lay_out(s, orders[j], cuts, j)
            lost = write_groups(group, weights, mean, s, orders, scales, cuts, block)
            if lost and refused < 0:
                refused = r * blocks + b
    return refused


@inlined
def lay_out(s: Search, order: Integers, cuts: Cuts, j: int) -> None:
    """Group j's terms of the sums, in its order; a term of the other half is 0."""
    for k in range(SUB):
        i, at = order[k], SUB * (k + 1) + j
        w = s.weights[i]
        product, upper = w * s.x[i], i >= 8
        put(cuts.x0, at, ZERO if upper else product)
        put(cuts.x1, at, product if upper else ZERO)
        put(cuts.w0, at, ZERO if upper else w)
        put(cuts.w1, at, w if upper else ZERO)


@inlined
def add_up(terms: Scratch) -> None:
    """Terms become their sums up to each cut."""
    total = fill(ZERO, 16)
    store(terms, 0, total)
    for at in range(16, 272, 16):
        total = total + load(terms, at, 16)
        store(terms, at, total)


@inlined
def find_cuts(c: Cuts) -> Best:
    """Cut every group in three, under either shift of either half, where the error is least."""
    add_up(c.x0)
    add_up(c.x1)
    add_up(c.w0)
    add_up(c.w1)
    x0, x1, w0, w1 = load(c.x0, 256, 16), load(c.x1, 256, 16), load(c.w0, 256, 16), load(c.w1, 256, 16)
    best = Best(
        fill(LEAST, 16), fill(ZERO, 16), fill(np.int32(-1), 16)
    )  # place: 4 * (17 * first + second) + found
    for i in range(SUB + 1):
        xi0, xi1, wi0, wi1 = (
            load(c.x0, SUB * i, 16),
            load(c.x1, SUB * i, 16),
            load(c.w0, SUB * i, 16),
            load(c.w1, SUB * i, 16),
        )
        for j in range(i, SUB + 1):
            below0, below1 = xi0 + load(c.x0, SUB * j, 16), xi1 + load(c.x1, SUB * j, 16)
            wj0, wj1 = load(c.w0, SUB * j, 16), load(c.w1, SUB * j, 16)
            up0, down0 = x0 * UP - below0, x0 * DOWN - below0
            up1, down1 = x1 * UP - below1, x1 * DOWN - below1
            up0_q2 = w0 * UP * UP + wi0 * UP_LOW + wj0 * UP_HIGH
            up1_q2 = w1 * UP * UP + wi1 * UP_LOW + wj1 * UP_HIGH
            down0_q2 = w0 * DOWN * DOWN + wi0 * DOWN_LOW + wj0 * DOWN_HIGH
            down1_q2 = w1 * DOWN * DOWN + wi1 * DOWN_LOW + wj1 * DOWN_HIGH
            place = np.int32(4 * (17 * i + j))
            best = attempt(best, place, up0 + up1, up0_q2 + up1_q2)
            best = attempt(best, np.int32(place + 1), up0 + down1, up0_q2 + down1_q2)
            best = attempt(best, np.int32(place + 2), down0 + up1, down0_q2 + up1_q2)
            best = attempt(best, np.int32(place + 3), down0 + down1, down0_q2 + down1_q2)
    return best


@inlined
def write_groups(
    x: Floats,
    imatrix: Floats,
    mean: np.float32,
    s: Search,
    orders: Integers,
    scales: Floats,
    cuts: Cuts,
    block: Bytes,
) -> bool:
    """A block's bytes, from its groups' orders and terms. Returns whether ggml aborts on it."""
    best, lost = find_cuts(cuts), False
    places, found = stack(np.int32, 16), stack(np.float32, 16)
    store(places, 0, best.place)
    store(found, 0, best.scale)
    for j in range(SUB):
        place = int(get(places, j))
        weigh_sub(x, imatrix, mean, j, s)
        scales[j] = ZERO
        if place >= 0 and find_size(s) >= EPSILON:
            s.order[:] = orders[j]
            take_cuts(s, place // 68, place // 4 % 17, place % 4)
            scales[j], gone = write_sub(s, get(found, j), block, j)
            lost = lost or gone
    write_scales(x, imatrix, mean, s, scales, block)
    return lost


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq1_m_jit.dequantize. raw : [R, n/256*56] uint8; out : [R, n] float32, written."""
    points, streamed = stack(np.int8, 256), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        half = np.int64(0)
        for k in range(4):
            half |= np.int64(peek(raw, at + SCALES + 2 * k, np.uint16)) >> 12 << 4 * k
        d = first(decode_half(fill(np.uint16(half), 2)))
        for k in range(32):
            upper = np.int64(peek(raw, at + QH + k // 2, np.uint8)) >> k % 2 * 4 & 7
            put_eight(EIGHTHS, np.int64(peek(raw, at + QS + k, np.uint8)) | upper << 8, points, k)
        for k in range(16):
            word = np.int64(peek(raw, at + SCALES + k // 4 * 2, np.uint16))
            step = d * np.float32(2 * (word >> k % 4 * 3 & 7) + 1)
            fours = np.int64(peek(raw, at + QH + k, np.uint8))
            down = (fours >> 3 & 1) * 0x00FF | (fours >> 7) * 0xFF00
            weights = shift_weights(points, np.uint16(down), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
