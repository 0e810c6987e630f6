"""Q4_K on explicit vectors: the bytes of q4_k_jit, an order of magnitude faster.

8 blocks of 256 go through the search of scale_min_simd.py together. What vectors do not reproduce is flagged
per block and redone by q4_k_jit, degenerate data only: codes of the search far outside 0..15 (ggml's
nearest_int wraps there), and zero scales over weights that differ (ggml then keeps the codes of the search).
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, Scratch, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import add_product
from refimpl.arith.simd_lanes import convert, decode_half, first, high_half, mask_bits, reinterpret
from refimpl.arith.simd_memory import fence, get, load, prefetch, put, stack, store
from refimpl.quants import fallback_simd, q4_k_jit
from refimpl.quants.formats import Q4_K
from refimpl.quants.rounding_simd import add_lanes, note
from refimpl.quants.scale_min_simd import (
    BOTH,
    Search,
    allocate,
    lay_out,
    search,
    weigh_by_imatrix,
    weigh_plain,
)
from refimpl.quants.search_simd import ZERO, find_largest, gather, is_streamed, nearest, put_weights
from refimpl.quants.six_bit_simd import (
    TOGETHER,
    Scales,
    allocate_scales,
    fit_scales,
    pack_scales,
    round_scales,
    unpack_scales,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = Q4_K.block.itemsize
QS = Q4_K.offset("qs")
CHUNK = 2048  # weights of TOGETHER blocks
INFINITY, TOP = np.float32(np.inf), np.float32(15)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q4_k_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*144] uint8, written
    """
    kernel = encode_weighted if len(imatrix) else encode_plain
    scalar = q4_k_jit.quantize
    fallback_simd.encode(Q4_K, TOGETHER, kernel, scalar, x, imatrix, rows_per_expert, out, build)


@jit
def encode_plain(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """Encode 8 or more blocks, 8 at a time; where the last 8 are not whole, they reach back."""
    s, c = allocate(), allocate_scales()
    blocks = redo.size
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        lay_out(x, block * 256, s.values)
        weigh_plain(s, build)
        search(s, 32, TOP, np.float32(-1), np.float32(0.1), 21, False, build)
        for k in range(TOGETHER):
            round_scales(s, c, k, build)
        for k in range(TOGETHER):
            redo[block + k] = write_block(x, block + k, s, c, k, out)


@jit
def encode_weighted(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """The same by an imatrix: other weights, finer steps, and scales that are fitted in their turn."""
    s, c = allocate(), allocate_scales()
    wanted, sigma2 = stack(np.float32, CHUNK), stack(np.float32, BOTH)
    blocks, per_row = redo.size, x.shape[1] // 256
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        gather(imatrix, rows_per_expert, per_row, block, TOGETHER, 256, wanted)
        lay_out(x, block * 256, s.values)
        lay_out(wanted, 0, s.importance)
        measure_spread(x, block * 256, sigma2, build)
        weigh_by_imatrix(s.values, s.importance, 32, sigma2, build)
        search(s, 32, TOP, np.float32(-0.9), np.float32(0.05), 37, False, build)
        fit_scales(s, c, build)
        for k in range(TOGETHER):
            redo[block + k] = write_block(x, block + k, s, c, k, out)


@inlined
def measure_spread(x: Floats, at: int, sigma2: Scratch, build: Build) -> None:
    """2*Σx²/256 of 8 blocks, added in order, for each sub-block's lane. Four at a time hide the latency."""
    for k in range(0, TOGETHER, 4):
        a, b, c, d = ZERO, ZERO, ZERO, ZERO
        for i in range(at + 256 * k, at + 256 * k + 256):
            va, vb, vc, vd = get(x, i), get(x, i + 256), get(x, i + 512), get(x, i + 768)
            a = add_product(build.ROW_SUMX2, a, va, va)
            b = add_product(build.ROW_SUMX2, b, vb, vb)
            c = add_product(build.ROW_SUMX2, c, vc, vc)
            d = add_product(build.ROW_SUMX2, d, vd, vd)
        for j in range(8):
            put(sigma2, 8 * k + j, np.float32(2) * a / np.float32(256))
            put(sigma2, 8 * k + 8 + j, np.float32(2) * b / np.float32(256))
            put(sigma2, 8 * k + 16 + j, np.float32(2) * c / np.float32(256))
            put(sigma2, 8 * k + 24 + j, np.float32(2) * d / np.float32(256))


@inlined
def write_block(x: Floats, block: int, s: Search, c: Scales, k: int, out: Bytes) -> bool:
    """Final codes and the block's bytes. Returns whether the block must be redone."""
    at = block * BYTES
    store(out, at, reinterpret(load(c.halves, 2 * k, 2), np.uint8))
    pack_scales(c, k, out, at + 4)
    read_scales(out, at, c.steps, c.offsets)  # as stored: fitted scales may be wider than their 6 bits
    step = load(c.steps, 0, 8)
    lost = (step == ZERO) | (load(s.wild, 8 * k, 8) != ZERO)
    lost = lost & (load(s.low, 8 * k, 8) != load(s.high, 8 * k, 8))  # constant sub-blocks need no search
    store(c.steps, 0, select(step == ZERO, INFINITY, step))  # x/infinity gives code 0
    for pair in range(4):
        weights = block * 256 + 64 * pair
        low = round_codes(x, weights, get(c.steps, 2 * pair), get(c.offsets, 2 * pair))
        high = round_codes(x, weights + 32, get(c.steps, 2 * pair + 1), get(c.offsets, 2 * pair + 1))
        store(out, at + QS + 32 * pair, convert(low | (high << np.int32(4)), np.uint8))
    return bool(mask_bits(lost))


@inlined
def round_codes(x: Floats, at: int, step: np.float32, offset: np.float32) -> Lanes:
    """int32 [32]: nearest((x + offset)/step), from 0 to 15."""
    code = nearest((load(x, at, 32) + offset) / step)
    return minimum(maximum(code, np.int32(0)), np.int32(15))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*144] uint8 -> out [R, n] float32, the bits of q4_k_jit.dequantize.

    w = (d*scale)*code - dmin*min
    """
    steps, offsets = stack(np.float32, 8), stack(np.float32, 8)
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        read_scales(raw, at, steps, offsets)
        for pair in range(4):
            q = load(raw, at + QS + 32 * pair, 32)
            i = block * 256 + 64 * pair
            low, high = convert(q & np.uint8(15), np.int32), convert(q >> np.uint8(4), np.int32)
            step, offset = get(steps, 2 * pair), get(offsets, 2 * pair)
            put_weights(out, i, step * convert(low, np.float32) - offset, streamed)
            step, offset = get(steps, 2 * pair + 1), get(offsets, 2 * pair + 1)
            put_weights(out, i + 32, step * convert(high, np.float32) - offset, streamed)
    fence()


@inlined
def read_scales(raw: Bytes, at: int, steps: Scratch, offsets: Scratch) -> None:
    """d*scale and dmin*min of a block's 8 sub-blocks."""
    d = decode_half(reinterpret(load(raw, at, 4), np.uint16))
    scales, mins = unpack_scales(raw, at + 4)
    store(steps, 0, first(d) * convert(scales, np.float32))
    store(offsets, 0, first(high_half(d)) * convert(mins, np.float32))


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """raw [R, bytes] uint8, x [R, n] float32 -> off [R, NB] uint16: how many; far [R, NB] uint8: how far."""
    steps, offsets = stack(np.float32, 8), stack(np.float32, 8)
    for block in range(off.size):
        at = block * BYTES
        read_scales(raw, at, steps, offsets)
        count, most = fill(np.uint8(0), 32), fill(np.uint8(0), 32)
        for j in range(8):
            step = get(steps, j)
            if step != ZERO:  # a zero scale keeps any codes
                stored = (load(raw, at + QS + j // 2 * 32, 32) >> np.uint8(j % 2 * 4)) & np.uint8(15)
                code = convert(round_codes(x, block * 256 + j * 32, step, get(offsets, j)), np.uint8)
                count, most = note(stored, code, count, most)
        put(off, block, np.uint16(add_lanes(convert(count, np.int32))))
        put(far, block, first(find_largest(most)))
