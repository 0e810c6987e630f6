"""Q4_0 on explicit vectors: the bytes of q4_0_jit for every input. Q5_0's ways with codes from 0 to 15.

Without an imatrix one block of 32 is one vector. With one, 64 blocks go through the search of scale_simd.py
together.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, absolute, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import add_product, nearest_product
from refimpl.arith.simd_lanes import (
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
from refimpl.arith.simd_memory import fence, get, load, prefetch, stack, store
from refimpl.quants import fallback_simd
from refimpl.quants.formats import Q4_0
from refimpl.quants.q5_0_simd import INFINITY, mean_squares, weigh
from refimpl.quants.scale_simd import BOTH, TILES, ScaleSearch, allocate, search
from refimpl.quants.search_simd import ZERO, find_largest, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MIDDLE = np.float32(8.5)
BYTES, QS = Q4_0.block.itemsize, Q4_0.offset("qs")


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q4_0_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/32*18] uint8, written
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
    """code = trunc(x/d + 8.5), d = peak/-8, peak the first of the weights that are largest in size."""
    for block in range(out.size // BYTES):
        prefetch(x, block * 32 + 1024)
        prefetch(x, block * 32 + 1040)
        v = load(x, block * 32, 32)
        size = absolute(v)
        top = first(find_largest(size))
        peak = get(x, block * 32 + lowest_lane(mask_bits(size == top))) if top > ZERO else ZERO  # never -0
        d = fill(peak / np.float32(-8), 1)
        inverse = np.float32(1) / d
        finite = absolute(inverse) < INFINITY
        # 1/d is infinite for subnormal d: C then converts ±infinity or NaN, on x86 to a lowest byte of 0
        middle = select(finite | (d == ZERO), fill(MIDDLE, 1), ZERO)
        raised = add_product(build.REF_RND, first(middle), v, first(select(finite, inverse, ZERO)))
        write(out, block, d, minimum(convert(raised, np.int32), np.int32(15)))


@inlined
def write(out: Bytes, block: int, d: Lanes, codes: Lanes) -> None:
    """A block's bytes from its scale, float32 [1], and codes, int32 [32] from 0 to 15."""
    low = convert(codes, np.uint8)
    store(out, block * BYTES, reinterpret(encode_half(d), np.uint8))
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
        search(s, 32, 8, build)
        for lane in range(BOTH):
            write_searched(x, block + lane, s, lane, out, build)


@inlined
def write_searched(x: Floats, block: int, s: ScaleSearch, lane: int, out: Bytes, build: Build) -> None:
    """The codes of the best trial: nearest(inverse*x) + 8, or 0 for a block of (nearly) zeros."""
    inverse = get(s.inverse, lane)
    codes = nearest_product(build.QX_NI2, inverse, load(x, block * 32, 32))
    codes = minimum(maximum(codes, np.int32(-8)), np.int32(7))
    if inverse == ZERO:
        codes = fill(np.int32(-8), 32)
    write(out, block, load(s.scale, lane, 1), codes + np.int32(8))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*18] uint8 -> out [R, n] float32. w = (code - 8)*d"""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
        q = load(raw, at + QS, 16)
        codes = convert(join(q & np.uint8(15), q >> np.uint8(4)), np.int32) - np.int32(8)
        put_weights(out, block * 32, convert(codes, np.float32) * d, streamed)
    fence()
