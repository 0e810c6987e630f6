"""Q4_1 on explicit vectors: the bytes of q4_1_jit. What Q5_1 shares with it takes the largest code as `top`.

Without an imatrix four blocks of 32 are bounded together. With one, 64 blocks go through the search of
scale_min_simd.py together; rows with blocks that vectors do not reproduce (codes of the search far outside
their range, where ggml's nearest_int wraps) are redone by the portable kernel: degenerate data only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, Scratch, absolute, fill, inlined, maximum, minimum
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
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import fence, get, load, poke, prefetch, stack, store
from refimpl.quants import fallback_simd, q4_1_jit
from refimpl.quants.formats import Q4_1
from refimpl.quants.q5_0_simd import INFINITY, mean_squares, weigh
from refimpl.quants.scale_min_simd import BOTH, TILES, Search, allocate, search
from refimpl.quants.search_simd import ZERO, find_largest, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

BYTES, QS = Q4_1.block.itemsize, Q4_1.offset("qs")
HALF, TOP = np.float32(0.5), np.float32(15)
FOURTHS = permutation([0, 4, 8, 12])
EIGHTS, OTHER_EIGHTS = (permutation([16 * v + k + by for v in range(2) for k in range(8)]) for by in (0, 8))
FOURS, OTHER_FOURS = (permutation([8 * v + k + by for v in range(4) for k in range(4)]) for by in (0, 4))
SWAP_2, SWAP_1 = (permutation([k ^ by for k in range(16)]) for by in (2, 1))
INTERLEAVE = permutation([0, 4, 1, 5, 2, 6, 3, 7])


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q4_1_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/32*20] uint8, written
    """
    if len(imatrix):
        encode_rows(encode_weighted, q4_1_jit.quantize, x, imatrix, rows_per_expert, out, build)
    else:
        encode_plain(x, out, build)


def encode_rows(
    kernel: Callable[..., Any],
    scalar: Callable[..., Any],
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    build: Build,
) -> None:
    """Run a vector kernel over 64 blocks or more, then the portable one over the rows that it flags."""
    if x.size < TILES:
        more, importance = fallback_simd.repeat_rows(x, imatrix, rows_per_expert, TILES)
        raw = np.empty((len(more), out.shape[1]), np.uint8)
        encode_rows(kernel, scalar, more, importance, 1, raw, build)
        out[:] = raw[: len(x)]
        return
    redo = np.zeros(x.size // 32, np.bool_)
    kernel(x, imatrix, rows_per_expert, out, redo, build)
    again = np.flatnonzero(redo.reshape(len(x), -1).any(1))
    if len(again):
        raw = np.empty((len(again), out.shape[1]), np.uint8)
        scalar(x[again], imatrix[again // rows_per_expert], 1, raw, build)
        out[again] = raw


@jit
def encode_plain(x: Floats, out: Bytes, build: Build) -> None:
    """code = trunc((x - m)/d + 0.5), from m = min x, d = (max x - m)/15."""
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
def bound_four(x: Floats, at: int, top: np.float32, lows: Scratch, inverses: Scratch, heads: Scratch) -> bool:
    """m, 1/d, and d and m in fp16 side by side, of four blocks without an imatrix.

    Returns whether these are what round_plain finds: not for a minimum of zero, whose sign has to be looked for, nor
    for a d or 1/d that is zero or infinite.
    """
    for i in range(at + 512, at + 640, 16):
        prefetch(x, i)
    a, b, c, d = load(x, at, 32), load(x, at + 32, 32), load(x, at + 64, 32), load(x, at + 96, 32)
    high = FOURTHS(fold_four(a, b, c, d, True))
    low = FOURTHS(fold_four(a, b, c, d, False))
    step = (high - low) / top
    inverse = np.float32(1) / step
    store(lows, 0, low)
    store(inverses, 0, inverse)
    store(heads, 0, pair_halves(step, low))
    usable = (inverse < INFINITY) & (step < INFINITY) & (low != ZERO)
    return bool(mask_bits(usable) == np.uint64(15))


@inlined
def extreme(x: Lanes, y: Lanes, largest: bool) -> Lanes:
    """Per lane the larger or the smaller."""
    return maximum(x, y) if largest else minimum(x, y)


@inlined
def fold_four(a: Lanes, b: Lanes, c: Lanes, d: Lanes, largest: bool) -> Lanes:
    """The largest or smallest of 32 lanes of each, [16]: four times that of a, of b, of c, of d."""
    a, b = extreme(low_half(a), high_half(a), largest), extreme(low_half(b), high_half(b), largest)
    c, d = extreme(low_half(c), high_half(c), largest), extreme(low_half(d), high_half(d), largest)
    ab, cd = join(a, b), join(c, d)
    ab, cd = extreme(EIGHTS(ab), OTHER_EIGHTS(ab), largest), extreme(EIGHTS(cd), OTHER_EIGHTS(cd), largest)
    v = join(ab, cd)
    v = extreme(FOURS(v), OTHER_FOURS(v), largest)
    v = extreme(v, SWAP_2(v), largest)
    return extreme(v, SWAP_1(v), largest)


@inlined
def pair_halves(d: Lanes, m: Lanes) -> Lanes:
    """d and m, float32 [4] each, as pairs of fp16: uint32 [4]."""
    return reinterpret(INTERLEAVE(encode_half(join(d, m))), np.uint32)


@inlined
def round_codes(x: Floats, at: int, low: np.float32, inverse: np.float32, build: Build) -> Lanes:
    """trunc((x - m) * (1/d) + 0.5), int32 [32]."""
    v = load(x, at, 32) - low
    return convert(add_product(build.REF_RND, fill(HALF, 32), v, fill(inverse, 32)), np.int32)


@inlined
def round_plain(x: Floats, at: int, top: np.float32, build: Build) -> tuple[np.uint32, Lanes]:
    """d and m in fp16, side by side, and codes, int32 [32], of one block without an imatrix."""
    v = load(x, at, 32)
    largest, least = first(find_largest(v)), -first(find_largest(ZERO - v))
    high = get(x, at + lowest_lane(mask_bits(v == largest)))  # of -0 and +0 the one that comes first
    low = get(x, at + lowest_lane(mask_bits(v == least)))
    d = fill((high - low) / top, 1)
    inverse = np.float32(1) / d
    # d or 1/d is infinite: C then converts infinity or NaN, on x86 to a lowest byte of 0; d = 0 gives 0 too
    usable = (absolute(inverse) < INFINITY) & (absolute(d) < INFINITY) & (d != ZERO)
    if mask_bits(usable):
        codes = round_codes(x, at, low, first(inverse), build)
    else:
        codes = fill(np.int32(0), 32)
    return pair(d, fill(low, 1)), codes


@inlined
def pair(d: Lanes, m: Lanes) -> np.uint32:
    """d and m, float32 [1] each, as a pair of fp16."""
    return first(reinterpret(encode_half(join(d, m)), np.uint32))


@inlined
def write(out: Bytes, block: int, head: np.uint32, codes: Lanes) -> None:
    """A block's bytes from its scale and minimum as a pair of fp16, and codes, int32 [32] from 0 to 15."""
    poke(out, block * BYTES, head)
    store(out, block * BYTES + QS, convert(low_half(codes) | (high_half(codes) << np.int32(4)), np.uint8))


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
            head, codes = round_searched(x, (block + lane) * 32, s, lane, np.int32(15), build)
            write(out, block + lane, head, codes)
            redo[block + lane] = is_wild(s, lane)


@inlined
def round_searched(
    x: Floats, at: int, s: Search, lane: int, top: np.int32, build: Build
) -> tuple[np.uint32, Lanes]:
    """Scale and minimum that the search found, a pair of fp16, and the codes from which it did, int32 [32]."""
    if get(s.low, lane) == get(s.high, lane):
        return pair(fill(ZERO, 1), load(s.low, lane, 1)), fill(np.int32(0), 32)
    codes = nearest_product(build.QK_NI1, get(s.inverse, lane), load(x, at, 32) - get(s.origin, lane))
    codes = minimum(maximum(codes, np.int32(0)), top)
    return pair(load(s.scale, lane, 1), load(s.base, lane, 1)), codes


@inlined
def is_wild(s: Search, lane: int) -> bool:
    """Must the block be redone? Constant ones need no search."""
    return get(s.wild, lane) != ZERO and get(s.low, lane) != get(s.high, lane)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*20] uint8 -> out [R, n] float32. w = code*d + m"""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        halves = decode_half(reinterpret(load(raw, at, 4), np.uint16))
        q = load(raw, at + QS, 16)
        codes = convert(join(q & np.uint8(15), q >> np.uint8(4)), np.int32)
        weights = convert(codes, np.float32) * first(halves) + first(high_half(halves))
        put_weights(out, block * 32, weights, streamed)
    fence()
