"""Q5_0 on explicit vectors: the bytes of q5_0_jit for every input.

Without an imatrix one block of 32 is one vector. With one, 64 blocks go through the search of scale_simd.py
together.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, Scratch, absolute, fill, inlined, maximum, minimum, select, sqrt
from refimpl.arith.simd_fused import add_product, nearest_product
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    decode_half,
    encode_half,
    first,
    high_half,
    join,
    low_half,
    lowest_lane,
    mask_bits,
    reinterpret,
)
from refimpl.arith.simd_memory import fence, get, load, peek, poke, prefetch, put, stack, store, transpose16
from refimpl.quants import fallback_simd
from refimpl.quants.formats import Q5_0
from refimpl.quants.scale_simd import BOTH, LANES, TILES, ScaleSearch, allocate, search
from refimpl.quants.search_simd import ZERO, find_largest, gather, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MIDDLE, INFINITY = np.float32(16.5), np.float32(np.inf)
BYTES = Q5_0.block.itemsize
QH, QS = Q5_0.offset("qh"), Q5_0.offset("qs")
BITS = constants("uint32", [1 << k for k in range(32)])


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q5_0_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/32*22] uint8, written
    """
    if not len(imatrix):
        encode_plain(x, out, build)
    elif x.size < TILES:
        more, importance = fallback_simd.repeat_rows(x, imatrix, rows_per_expert, TILES)
        raw = np.empty((len(more), out.shape[1]), np.uint8)
        encode_weighted(more, importance, 1, raw, build)
        out[:] = raw[: len(x)]
    else:
        encode_weighted(x, imatrix, rows_per_expert, out, build)


@jit
def encode_plain(x: Floats, out: Bytes, build: Build) -> None:
    """code = trunc(x/d + 16.5), d = peak/-16, peak the first of the weights that are largest in size."""
    for block in range(out.size // BYTES):
        prefetch(x, block * 32 + 1024)
        prefetch(x, block * 32 + 1040)
        v = load(x, block * 32, 32)
        size = absolute(v)
        top = first(find_largest(size))
        peak = get(x, block * 32 + lowest_lane(mask_bits(size == top))) if top > ZERO else ZERO  # never -0
        d = fill(peak / np.float32(-16), 1)
        inverse = np.float32(1) / d
        finite = absolute(inverse) < INFINITY
        # 1/d is infinite for subnormal d: C then converts ±infinity or NaN, on x86 to a lowest byte of 0
        middle = select(finite | (d == ZERO), fill(MIDDLE, 1), ZERO)
        raised = add_product(build.REF_RND, first(middle), v, first(select(finite, inverse, ZERO)))
        write(out, block, d, minimum(convert(raised, np.int32), np.int32(31)))


@inlined
def write(out: Bytes, block: int, d: Lanes, codes: Lanes) -> None:
    """A block's bytes from its scale, float32 [1], and codes, int32 [32] from 0 to 31."""
    low = convert(codes & np.int32(15), np.uint8)
    store(out, block * BYTES, reinterpret(encode_half(d), np.uint8))
    poke(out, block * BYTES + QH, np.uint32(mask_bits(codes > np.int32(15))))
    store(out, block * BYTES + QS, low_half(low) | (high_half(low) << np.uint8(4)))


@jit
def encode_weighted(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode 64 or more blocks, 64 at a time; where the last 64 are not whole, they reach back."""
    s = allocate()
    wanted = stack(np.float32, TILES)
    squares = np.empty(len(x), np.float32)
    mean_squares(x, squares, build)
    blocks = out.size // BYTES
    for start in range(0, blocks, BOTH):
        block = min(start, blocks - BOTH)
        weigh(x, imatrix, rows_per_expert, block, squares, wanted, s.values, s.importance, s.peak, build)
        search(s, 32, 16, build)
        for lane in range(BOTH):
            write_searched(x, block + lane, s, lane, out, build)


@inlined
def weigh(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    block: int,
    squares: Floats,
    wanted: Scratch,
    values: Scratch,
    importance: Scratch,
    means: Scratch,
    build: Build,
) -> None:
    """Lay out 64 blocks and their weights: imatrix * sqrt(mean square of the row + x²).

    squares : [R] float32, the rows' mean squares; wanted and means are scratch
    """
    per_row = x.shape[1] // 32
    gather(imatrix, rows_per_expert, per_row, block, BOTH, 32, wanted)
    lay_out(x, block * 32, values)
    lay_out(wanted, 0, importance)
    for lane in range(BOTH):
        put(means, lane, squares[(block + lane) // per_row])
    for i in range(0, TILES, LANES):
        v = load(values, i, LANES)
        square = load(means, i // (LANES * 32) * LANES, LANES)
        store(importance, i, load(importance, i, LANES) * sqrt(add_product(build.ROW_W, square, v, v)))


@inlined
def lay_out(x: Floats, at: int, tiles: Scratch) -> None:
    """tiles[group, i, lane] = x[at + 32*(32*group + lane) + i]"""
    for lane in range(0, BOTH, 16):
        corner = lane // LANES * 32 * LANES + lane % LANES
        transpose16(x, at + 32 * lane, 32, tiles, corner, LANES)
        transpose16(x, at + 32 * lane + 16, 32, tiles, corner + 16 * LANES, LANES)


@inlined
def write_searched(x: Floats, block: int, s: ScaleSearch, lane: int, out: Bytes, build: Build) -> None:
    """The codes of the best trial: nearest(inverse*x) + 16, or 0 for a block of (nearly) zeros."""
    inverse = get(s.inverse, lane)
    codes = nearest_product(build.QX_NI2, inverse, load(x, block * 32, 32))
    codes = minimum(maximum(codes, np.int32(-16)), np.int32(15))
    if inverse == ZERO:
        codes = fill(np.int32(-16), 32)
    write(out, block, load(s.scale, lane, 1), codes + np.int32(16))


@inlined
def mean_squares(x: Floats, out: Floats, build: Build) -> None:
    """out[r] = Σx[r]²/n, each row added in order, 16 rows side by side where there are as many."""
    rows, n = x.shape
    tile = stack(np.float32, 256)
    for start in range(0, rows, 16):
        row = min(start, max(rows - 16, 0))
        total = fill(ZERO, 16)
        if rows >= 16:
            for i in range(0, n, 16):
                transpose16(x, row * n + i, n, tile, 0, 16)
                for k in range(0, 256, 16):
                    v = load(tile, k, 16)
                    total = add_product(build.ROW_SUMX2, total, v, v)
            store(out, row, total / np.float32(n))
        else:
            for r in range(rows):
                out[r] = mean_square(x, r, build)


@inlined
def mean_square(x: Floats, row: int, build: Build) -> np.float32:
    """Σx²/n of one row."""
    total = ZERO
    for i in range(x.shape[1]):
        total = add_product(build.ROW_SUMX2, total, x[row, i], x[row, i])
    return total / np.float32(x.shape[1])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*22] uint8 -> out [R, n] float32.

    w = (code - 16)*d; bit k of qh is the fifth bit of code k
    """
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
        q = load(raw, at + QS, 16)
        low = convert(join(q & np.uint8(15), q >> np.uint8(4)), np.int32)
        fifth = (fill(peek(raw, at + QH, np.uint32), 32) & BITS()) != np.uint32(0)
        codes = select(fifth, low, low - np.int32(16))
        put_weights(out, block * 32, convert(codes, np.float32) * d, streamed)
    fence()
