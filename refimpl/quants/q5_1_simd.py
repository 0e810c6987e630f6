"""Q5_1 on explicit vectors: the bytes of q5_1_jit. Q4_1's ways with codes from 0 to 31."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_lanes import (
    convert,
    decode_half,
    first,
    high_half,
    join,
    low_half,
    mask_bits,
    reinterpret,
)
from refimpl.arith.simd_memory import fence, get, load, peek, poke, prefetch, stack, store
from refimpl.quants import q5_1_jit
from refimpl.quants.formats import Q5_1
from refimpl.quants.q4_1_simd import (
    bound_four,
    encode_rows,
    is_wild,
    round_codes,
    round_plain,
    round_searched,
)
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
    blocks = out.size // BYTES
    lows, inverses, heads = stack(np.float32, 4), stack(np.float32, 4), stack(np.uint32, 4)
    for block in range(0, blocks, 4):
        end = min(block + 4, blocks)
        if end - block == 4 and bound_four(x, block * 32, TOP, lows, inverses, heads):
            for k in range(4):
                codes = round_codes(x, (block + k) * 32, get(lows, k), get(inverses, k), build)
                write(out, block + k, get(heads, k), codes)
        else:
            for k in range(block, end):
                head, codes = round_plain(x, k * 32, TOP, build)
                write(out, k, head, codes)


@inlined
def write(out: Bytes, block: int, head: np.uint32, codes: Lanes) -> None:
    """A block's bytes from its scale and minimum as a pair of fp16, and codes, int32 [32] from 0 to 31."""
    low = codes & np.int32(15)
    poke(out, block * BYTES, head)
    poke(out, block * BYTES + QH, np.uint32(mask_bits(codes > np.int32(15))))
    store(out, block * BYTES + QS, convert(low_half(low) | (high_half(low) << np.int32(4)), np.uint8))


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
            head, codes = round_searched(x, (block + lane) * 32, s, lane, np.int32(31), build)
            write(out, block + lane, head, codes)
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
