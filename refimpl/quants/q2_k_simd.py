"""Q2_K on explicit vectors: the bytes of q2_k_jit, several times faster.

4 blocks of 256 go through the search of scale_min_simd.py together. What vectors do not reproduce is flagged
per block and redone by q2_k_jit, as in q4_k_simd.py.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build, Form
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, Scratch, absolute, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import add_product, nearest_product
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
from refimpl.arith.simd_memory import fence, get, load, prefetch, put, stack, store, transpose16
from refimpl.quants import fallback_simd, q2_k_jit
from refimpl.quants.formats import Q2_K
from refimpl.quants.q6_k_simd import find_largest, lay_out
from refimpl.quants.scale_min_simd import BOTH, LANES, Search, allocate, search, weigh_by_imatrix
from refimpl.quants.search_simd import ZERO, fit_positive, gather, is_streamed, nearest, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = Q2_K.block.itemsize
QS, D = Q2_K.offset("qs"), Q2_K.offset("d")
TOGETHER = 4  # blocks encoded together: BOTH sub-blocks
CHUNK = 1024  # their weights
TOP, INFINITY = np.float32(3), np.float32(np.inf)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q2_k_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*84] uint8, written
    """
    kernel = encode_weighted if len(imatrix) else encode_plain
    scalar = q2_k_jit.quantize
    fallback_simd.encode(Q2_K, TOGETHER, kernel, scalar, x, imatrix, rows_per_expert, out, build)


@jit
def encode_plain(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """Encode 4 or more blocks, 4 at a time; where the last 4 are not whole, they reach back."""
    s = allocate()
    steps, offsets = stack(np.float32, 16), stack(np.float32, 16)
    blocks = redo.size
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        lay_out(x, block * 256, s.values)
        for i in range(0, CHUNK, LANES):
            store(s.importance, i, absolute(load(s.values, i, LANES)))
        search(s, 16, TOP, np.float32(-0.5), np.float32(0.1), 16, True, build)
        for k in range(TOGETHER):
            at = (block + k) * BYTES
            scale, least = recall(s, k)
            largest, deepest = (
                find_largest(maximum(scale, fill(ZERO, 16))),
                find_largest(maximum(least, fill(ZERO, 16))),
            )
            low = round_four_bits(scale, largest, build.ROW_NISC)
            high = round_four_bits(least, deepest, build.ROW_NISC)
            store(out, at, convert(low | (high << np.int32(4)), np.uint8))
            both = join(fill(first(largest), 1), fill(first(deepest), 1)) / np.float32(15)
            store(out, at + D, reinterpret(encode_half(both), np.uint8))
            redo[block + k] = write_codes(x, block + k, s, k, steps, offsets, out)


@inlined
def round_four_bits(v: Lanes, top: Lanes, form: Form) -> Lanes:
    """nearest(15 * v/top), int32 [16]; negative for negative v, as in ggml."""
    inverse = select(top > ZERO, np.float32(15) / top, ZERO)
    return nearest_product(form, inverse, v)


@jit
def encode_weighted(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """The same by an imatrix: other weights, finer steps, squares of errors, and scales that are fitted."""
    s = allocate()
    steps, offsets = stack(np.float32, 16), stack(np.float32, 16)
    wanted, sigma2 = stack(np.float32, CHUNK), stack(np.float32, BOTH)
    blocks, per_row = redo.size, x.shape[1] // 256
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        gather(imatrix, rows_per_expert, per_row, block, TOGETHER, 256, wanted)
        lay_out(x, block * 256, s.values)
        lay_out(wanted, 0, s.importance)
        measure_spread(x, block * 256, np.float32(1), sigma2, build)
        weigh_by_imatrix(s.values, s.importance, 16, sigma2, build)
        search(s, 16, TOP, np.float32(-0.9), np.float32(0.05), 37, False, build)
        fit_scales(s, block, out, build)
        for k in range(TOGETHER):
            redo[block + k] = write_codes(x, block + k, s, k, steps, offsets, out)


@inlined
def measure_spread(x: Floats, at: int, factor: np.float32, sigma2: Scratch, build: Build) -> None:
    """factor*Σx²/256 of 4 blocks, added in order side by side, for each sub-block's lane."""
    a, b, c, d = ZERO, ZERO, ZERO, ZERO
    for i in range(at, at + 256):
        va, vb, vc, vd = get(x, i), get(x, i + 256), get(x, i + 512), get(x, i + 768)
        a = add_product(build.ROW_SUMX2, a, va, va)
        b = add_product(build.ROW_SUMX2, b, vb, vb)
        c = add_product(build.ROW_SUMX2, c, vc, vc)
        d = add_product(build.ROW_SUMX2, d, vd, vd)
    store(sigma2, 0, fill(factor * a / np.float32(256), 16))
    store(sigma2, 16, fill(factor * b / np.float32(256), 16))
    store(sigma2, 32, fill(factor * c / np.float32(256), 16))
    store(sigma2, 48, fill(factor * d / np.float32(256), 16))


@inlined
def recall(s: Search, k: int) -> tuple[Lanes, Lanes]:
    """What the search found for a block: 16 scales, 0 for constant sub-blocks, and 16 mins, -base."""
    low = load(s.low, 16 * k, 16)
    flat = low == load(s.high, 16 * k, 16)
    scale = select(flat, ZERO, load(s.scale, 16 * k, 16))
    return scale, ZERO - select(flat, low, load(s.base, 16 * k, 16))


@inlined
def fit_scales(s: Search, block: int, out: Bytes, build: Build) -> None:
    """Scales and mins of 4 blocks to 4 bits, fitted with the sums of weights; writes scales, d and dmin.

    Lanes 0-3 of the fit are the scales of the 4 blocks, lanes 4-7 their mins; the others are idle.
    """
    found, weights = stack(np.float32, 256), stack(np.float32, 256)
    for k in range(TOGETHER):
        scale, least = recall(s, k)
        store(found, 16 * k, scale)
        store(found, 64 + 16 * k, least)
        store(weights, 16 * k, load(s.sum_w, 16 * k, 16))
        store(weights, 64 + 16 * k, load(s.sum_w, 16 * k, 16))
    for k in range(128, 256, 16):
        store(found, k, fill(ZERO, 16))
        store(weights, k, fill(ZERO, 16))
    values, importance, codes = stack(np.float32, 256), stack(np.float32, 256), stack(np.int32, 256)
    transpose16(found, 0, 16, values, 0, 16)
    transpose16(weights, 0, 16, importance, 0, 16)
    halves = stack(np.uint16, 16)
    store(halves, 0, encode_half(fit_positive(values, importance, codes, 16, 15, build)))
    for k in range(TOGETHER):
        at = (block + k) * BYTES
        for j in range(16):
            byte = get(codes, 16 * j + k) | (get(codes, 16 * j + 4 + k) << np.int32(4))
            put(out, at + j, np.uint8(byte & 255))
        both = join(fill(get(halves, k), 1), fill(get(halves, 4 + k), 1))
        store(out, at + D, reinterpret(both, np.uint8))


@inlined
def write_codes(
    x: Floats, block: int, s: Search, k: int, steps: Scratch, offsets: Scratch, out: Bytes
) -> bool:
    """Final codes under the scales that are stored. Returns whether the block must be redone."""
    at = block * BYTES
    read_scales(out, at, steps, offsets)
    step = load(steps, 0, 16)
    lost = (step == ZERO) | (load(s.wild, 16 * k, 16) != ZERO)
    lost = lost & (load(s.low, 16 * k, 16) != load(s.high, 16 * k, 16))  # constant sub-blocks need no search
    store(steps, 0, select(step == ZERO, INFINITY, step))  # x/infinity gives code 0
    for half in range(2):
        packed = fill(np.uint8(0), 32)
        for quarter in range(4):
            i, j = block * 256 + 128 * half + 32 * quarter, 8 * half + 2 * quarter
            low = round_codes(x, i, get(steps, j), get(offsets, j))
            high = round_codes(x, i + 16, get(steps, j + 1), get(offsets, j + 1))
            packed = packed | (join(low, high) << np.uint8(2 * quarter))
        store(out, at + QS + 32 * half, packed)
    return bool(mask_bits(lost))


@inlined
def round_codes(x: Floats, at: int, step: np.float32, offset: np.float32) -> Lanes:
    """uint8 [16]: nearest((x + offset)/step), from 0 to 3."""
    code = nearest((load(x, at, 16) + offset) / step)
    return convert(minimum(maximum(code, np.int32(0)), np.int32(3)), np.uint8)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*84] uint8 -> out [R, n] float32, the bits of q2_k_jit.dequantize.

    w = (d*scale)*code - dmin*min
    """
    steps, offsets = stack(np.float32, 16), stack(np.float32, 16)
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        read_scales(raw, at, steps, offsets)
        for half in range(2):
            packed = load(raw, at + QS + 32 * half, 32)
            for quarter in range(4):
                i, j = block * 256 + 128 * half + 32 * quarter, 8 * half + 2 * quarter
                q = convert(convert((packed >> np.uint8(2 * quarter)) & np.uint8(3), np.int32), np.float32)
                put_weights(out, i, get(steps, j) * low_half(q) - get(offsets, j), streamed)
                put_weights(out, i + 16, get(steps, j + 1) * high_half(q) - get(offsets, j + 1), streamed)
    fence()


@inlined
def read_scales(raw: Bytes, at: int, steps: Scratch, offsets: Scratch) -> None:
    """d*scale and dmin*min of a block's 16 sub-blocks."""
    halves = decode_half(reinterpret(load(raw, at + D, 4), np.uint16))
    packed = load(raw, at, 16)
    scales, mins = convert(packed & np.uint8(15), np.int32), convert(packed >> np.uint8(4), np.int32)
    store(steps, 0, first(halves) * convert(scales, np.float32))
    store(offsets, 0, first(high_half(halves)) * convert(mins, np.float32))
