"""Q5_1 on explicit vectors: the bytes of q5_1_jit. Q4_1's ways with codes from 0 to 31."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_lanes import (
    convert,
    decode_half,
    encode_half,
    first,
    high_half,
    join,
    low_half,
    mask_bits,
    reinterpret,
)
from refimpl.arith.simd_memory import fence, load, peek, poke, prefetch, stack, store
from refimpl.quants import q5_1_jit
from refimpl.quants.formats import Q5_1
from refimpl.quants.q4_1_simd import encode_rows, is_wild, round_plain, round_searched
from refimpl.quants.q5_0_simd import BITS, mean_squares, weigh
from refimpl.quants.scale_min_simd import BOTH, TILES, allocate, search
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

BYTES, QH, QS = Q5_1.block.itemsize, Q5_1.offset("qh"), Q5_1.offset("qs")
TOP = np.float32(31)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q5_1_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/32*24] uint8, written
    """
    if len(imatrix):
        encode_rows(encode_weighted, q5_1_jit.quantize, x, imatrix, rows_per_expert, out, build)
    else:
        encode_plain(x, out, build)


@jit
def encode_plain(x: Floats, out: Bytes, build: Build) -> None:
    """code = trunc((x - m)/d + 0.5), from m = min x, d = (max x - m)/31."""
    for block in range(out.size // BYTES):
        prefetch(x, block * 32 + 1024)
        prefetch(x, block * 32 + 1040)
        d, m, codes = round_plain(x, block * 32, TOP, build)
        write(out, block, d, m, codes)


@inlined
def write(out: Bytes, block: int, d: Lanes, m: Lanes, codes: Lanes) -> None:
    """A block's bytes from its scale and minimum, float32 [1], and codes, int32 [32] from 0 to 31."""
    low = convert(codes & np.int32(15), np.uint8)
    store(out, block * BYTES, reinterpret(encode_half(join(d, m)), np.uint8))
    poke(out, block * BYTES + QH, np.uint32(mask_bits(codes > np.int32(15))))
    store(out, block * BYTES + QS, low_half(low) | (high_half(low) << np.uint8(4)))


@jit
def encode_weighted(
    x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, redo: Flags, build: Build
) -> None:
    """Encode 64 or more blocks, 64 at a time; where the last 64 are not whole, they reach back."""
    s = allocate()
    wanted = stack(np.float32, TILES)
    squares = np.empty(len(x), np.float32)
    mean_squares(x, squares, build)
    blocks = redo.size
    for start in range(0, blocks, BOTH):
        block = min(start, blocks - BOTH)
        weigh(x, imatrix, rows_per_expert, block, squares, wanted, s.values, s.importance, s.error, build)
        search(s, 32, TOP, np.float32(-0.9), np.float32(0.05), 37, False, build)
        for lane in range(BOTH):
            d, m, codes = round_searched(x, (block + lane) * 32, s, lane, np.int32(31), build)
            write(out, block + lane, d, m, codes)
            redo[block + lane] = is_wild(s, lane)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*24] uint8 -> out [R, n] float32.

    w = code*d + m; bit k of qh is the fifth bit of code k
    """
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        halves = decode_half(reinterpret(load(raw, at, 4), np.uint16))
        q = load(raw, at + QS, 16)
        low = convert(join(q & np.uint8(15), q >> np.uint8(4)), np.int32)
        fifth = (fill(peek(raw, at + QH, np.uint32), 32) & BITS()) != np.uint32(0)
        codes = select(fifth, low + np.int32(16), low)
        weights = convert(codes, np.float32) * first(halves) + first(high_half(halves))
        put_weights(out, block * 32, weights, streamed)
    fence()
