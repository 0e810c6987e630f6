"""Q3_K on explicit vectors: the bytes of q3_k_jit, several times faster.

64 blocks of 256 are encoded together, 4 at a time as long as their sub-blocks' scales are sought: by
moves_simd.py, or with an imatrix by scale_simd.py, which then fits the scales of all 64 blocks too, a block a
lane. A block with a zero scale over weights that are not zero (ggml then keeps the codes of the search) is
flagged and redone by q3_k_jit: degenerate data only.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, Scratch, absolute, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import nearest_product
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
from refimpl.quants import fallback_simd, q3_k_jit
from refimpl.quants.formats import Q3_K
from refimpl.quants.moves_simd import LANES as MOVED
from refimpl.quants.moves_simd import allocate_moves, fit_settled, fit_waiting
from refimpl.quants.q2_k_simd import measure_spread
from refimpl.quants.q6_k_simd import find_largest, lay_out
from refimpl.quants.scale_min_simd import weigh_by_imatrix
from refimpl.quants.scale_simd import BOTH, GROUPS, LANES, ScaleSearch, allocate, search
from refimpl.quants.search_simd import TINY, ZERO, gather, is_streamed, nearest, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = Q3_K.block.itemsize
QS, SCALES, D = Q3_K.offset("qs"), Q3_K.offset("scales"), Q3_K.offset("d")
TOGETHER = 64  # blocks encoded together
FOUR = 4  # blocks whose sub-blocks are searched together
CHUNK = 1024  # their weights, and the sub-blocks of TOGETHER blocks
INFINITY, PEAK = np.float32(np.inf), np.float32(-32)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q3_k_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*110] uint8, written
    """
    kernel = encode_weighted if len(imatrix) else encode_plain
    scalar = q3_k_jit.quantize
    fallback_simd.encode(Q3_K, TOGETHER, kernel, scalar, x, imatrix, rows_per_expert, out, build)


@jit
def encode_plain(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """Encode 64 or more blocks, 64 at a time; where the last 64 are not whole, they reach back."""
    m = allocate_moves()
    scales = stack(np.float32, CHUNK)
    blocks = redo.size
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        waiting = 0
        for place in range(0, CHUNK, MOVED):
            waiting = fit_settled(x, block * 256 + 16 * place, m, scales, place, waiting, build)
            if waiting >= MOVED:
                fit_waiting(m, scales, waiting - MOVED, waiting, build)
                waiting -= MOVED
        fit_waiting(m, scales, 0, waiting, build)
        for k in range(TOGETHER):
            scale = load(scales, 16 * k, 16)
            sizes = maximum(absolute(scale), fill(ZERO, 16))  # a NaN counts as 0
            top = find_largest(sizes)
            inverse = PEAK / get(scales, 16 * k + lowest_lane(mask_bits(sizes == top)))
            code = nearest_product(build.ROW_NISC, inverse, scale)
            code = (code << np.int32(24)) >> np.int32(24)  # ggml stores them as int8
            code = minimum(maximum(code, np.int32(-32)), np.int32(31)) + np.int32(32)
            d = np.float32(1) / inverse
            if first(top) == ZERO:
                code, d = fill(np.int32(0), 16), ZERO
            redo[block + k] = write_block(x, block + k, d, code, out)


@jit
def encode_weighted(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """The same by an imatrix: other weights, another search, and scales that are fitted in their turn."""
    s = allocate()
    scales, sums = stack(np.float32, CHUNK), stack(np.float32, CHUNK)
    wanted, sigma2 = stack(np.float32, CHUNK), stack(np.float32, BOTH)
    blocks, per_row = redo.size, x.shape[1] // 256
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        for k in range(0, TOGETHER, FOUR):
            gather(imatrix, rows_per_expert, per_row, block + k, FOUR, 256, wanted)
            lay_out(x, (block + k) * 256, s.values)
            lay_out(wanted, 0, s.importance)
            measure_spread(x, (block + k) * 256, np.float32(2), sigma2, build)
            weigh_by_imatrix(s.values, s.importance, 16, sigma2, build)
            search(s, 16, 4, build)
            add_up(s, sums, 16 * k)
            for lane in range(0, BOTH, LANES):
                store(scales, 16 * k + lane, load(s.scale, lane, LANES))
        lay_out(scales, 0, s.values)
        lay_out(sums, 0, s.importance)
        search(s, 16, 32, build)
        for k in range(TOGETHER):
            scale = load(scales, 16 * k, 16)
            code = nearest_product(build.QX_NI2, get(s.inverse, k), scale)
            code = minimum(maximum(code, np.int32(-32)), np.int32(31)) + np.int32(32)
            if abs(get(s.peak, k)) < TINY:
                code = fill(np.int32(0), 16)
            infinite = mask_bits(absolute(scale) < INFINITY) != np.uint64(
                0xFFFF
            )  # codes are NaN, not 0, in search()
            redo[block + k] = write_block(x, block + k, get(s.scale, k), code, out) or infinite


@inlined
def add_up(s: ScaleSearch, sums: Scratch, place: int) -> None:
    """The sum of weights of each of the 64 sub-blocks, from sums[place] on."""
    for group in range(GROUPS):
        total = fill(ZERO, LANES)
        for i in range(group * 16 * LANES, (group + 1) * 16 * LANES, LANES):
            total += load(s.importance, i, LANES)
        store(sums, place + group * LANES, total)


@inlined
def write_block(x: Floats, block: int, d: np.float32, scales: Lanes, out: Bytes) -> bool:
    """A block's bytes: d, 16 scales of 0..63, final codes. Returns whether the block must be redone."""
    at = block * BYTES
    steps, centres = stack(np.float32, 16), stack(np.int32, 16)
    half = encode_half(fill(d, 1))
    step = first(decode_half(half)) * convert(scales - np.int32(32), np.float32)
    zero = step == ZERO
    store(out, at + D, reinterpret(half, np.uint8))
    pack_scales(convert(scales, np.uint8), out, at + SCALES)
    store(steps, 0, select(zero, INFINITY, step))  # zero weights under a zero step have the code 0, not 4
    store(centres, 0, select(zero, fill(np.int32(0), 16), fill(np.int32(4), 16)))
    third = fill(np.uint8(0), 32)
    for half_block in range(2):
        low = fill(np.uint8(0), 32)
        for quarter in range(4):
            j = 8 * half_block + 2 * quarter
            code = join(
                round_codes(x, block * 256 + 16 * j, get(steps, j), get(centres, j)),
                round_codes(x, block * 256 + 16 * j + 16, get(steps, j + 1), get(centres, j + 1)),
            )
            low = low | ((code & np.uint8(3)) << np.uint8(2 * quarter))
            third = third | ((code >> np.uint8(2)) << np.uint8(j // 2))
        store(out, at + QS + 32 * half_block, low)
    store(out, at, third)
    return holds_more_than_zeros(x, block, mask_bits(zero))


@inlined
def holds_more_than_zeros(x: Floats, block: int, subs: np.uint64) -> bool:
    """Is any weight of these sub-blocks not (nearly) zero?"""
    found = False
    while subs != np.uint64(0):
        v = load(x, block * 256 + 16 * lowest_lane(subs), 16)
        found = found or mask_bits(absolute(v) < TINY) != np.uint64(0xFFFF)
        subs &= subs - np.uint64(1)
    return found


@inlined
def round_codes(x: Floats, at: int, step: np.float32, centre: np.int32) -> Lanes:
    """uint8 [16]: nearest(x/step) from -4 to 3, plus 4."""
    code = minimum(maximum(nearest(load(x, at, 16) / step), np.int32(-4)), np.int32(3))
    return convert(code + centre, np.uint8)


@inlined
def pack_scales(scales: Lanes, out: Bytes, at: int) -> None:
    """12 bytes: low 4 bits of scales j and j + 8, then high 2 bits of j, j + 4, j + 8 and j + 12."""
    low, high = scales & np.uint8(15), scales >> np.uint8(4)
    a, b = low_half(high), high_half(high)
    store(out, at, low_half(low) | (high_half(low) << np.uint8(4)))
    pairs = join(low_half(a), low_half(b)) | (join(high_half(a), high_half(b)) << np.uint8(2))
    store(out, at + 8, low_half(pairs) | (high_half(pairs) << np.uint8(4)))


@inlined
def read_scales(raw: Bytes, at: int, steps: Scratch) -> None:
    """d*(scale - 32) of a block's 16 sub-blocks: the inverse of pack_scales."""
    packed, more = load(raw, at + SCALES, 8), load(raw, at + SCALES + 8, 4)
    low = join(packed & np.uint8(15), packed >> np.uint8(4))
    high = join(join(more, more >> np.uint8(2)), join(more >> np.uint8(4), more >> np.uint8(6)))
    scales = low | ((high & np.uint8(3)) << np.uint8(4))
    d = first(decode_half(reinterpret(load(raw, at + D, 2), np.uint16)))
    store(steps, 0, d * convert(convert(scales, np.int32) - np.int32(32), np.float32))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*110] uint8 -> out [R, n] float32, the bits of q3_k_jit.dequantize.

    w = (d*(scale - 32))*(code - 4)
    """
    steps, streamed = stack(np.float32, 16), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        read_scales(raw, at, steps)
        third = load(raw, at, 32)
        for half in range(2):
            packed = load(raw, at + QS + 32 * half, 32)
            for quarter in range(4):
                j = 8 * half + 2 * quarter
                low = (packed >> np.uint8(2 * quarter)) & np.uint8(3)
                high = ((third >> np.uint8(j // 2)) & np.uint8(1)) << np.uint8(2)
                signed = reinterpret(low | high, np.int8) - np.int8(4)
                q = convert(convert(signed, np.int32), np.float32)
                i = block * 256 + 16 * j
                put_weights(out, i, get(steps, j) * low_half(q), streamed)
                put_weights(out, i + 16, get(steps, j + 1) * high_half(q), streamed)
    fence()
