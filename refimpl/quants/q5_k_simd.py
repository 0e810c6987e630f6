"""Q5_K on explicit vectors: the bytes of q5_k_jit, several times faster. Q4_K's search with codes from 0 to 31.

8 blocks of 256 go through the search of scale_min_simd.py together. What vectors do not reproduce is flagged
per block and redone by q5_k_jit, as in q4_k_simd.py.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_lanes import convert, mask_bits, reinterpret
from refimpl.arith.simd_memory import fence, get, load, prefetch, stack, store
from refimpl.quants import fallback_simd, q5_k_jit
from refimpl.quants.formats import Q5_K
from refimpl.quants.q4_k_simd import CHUNK, INFINITY, measure_spread, read_scales
from refimpl.quants.scale_min_simd import (
    BOTH,
    Search,
    allocate,
    lay_out,
    search,
    weigh_by_imatrix,
    weigh_plain,
)
from refimpl.quants.search_simd import ZERO, gather, is_streamed, nearest, put_weights
from refimpl.quants.six_bit_simd import (
    TOGETHER,
    Scales,
    allocate_scales,
    fit_scales,
    pack_scales,
    round_scales,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = Q5_K.block.itemsize
QH, QS = Q5_K.offset("qh"), Q5_K.offset("qs")
TOP = np.float32(31)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q5_k_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*176] uint8, written
    """
    kernel = encode_weighted if len(imatrix) else encode_plain
    scalar = q5_k_jit.quantize
    fallback_simd.encode(Q5_K, TOGETHER, kernel, scalar, x, imatrix, rows_per_expert, out, build)


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
        search(s, 32, TOP, np.float32(-0.5), np.float32(0.1), 16, False, build)
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
    """The same by an imatrix: other weights, finer steps, and scales that are fitted, to 63 at most."""
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
        store(c.scales, 0, minimum(load(c.scales, 0, BOTH), np.uint8(63)))
        store(c.mins, 0, minimum(load(c.mins, 0, BOTH), np.uint8(63)))
        for k in range(TOGETHER):
            redo[block + k] = write_block(x, block + k, s, c, k, out)


@inlined
def write_block(x: Floats, block: int, s: Search, c: Scales, k: int, out: Bytes) -> bool:
    """Final codes and the block's bytes. Returns whether the block must be redone."""
    at = block * BYTES
    store(out, at, reinterpret(load(c.halves, 2 * k, 2), np.uint8))
    pack_scales(c, k, out, at + 4)
    read_scales(out, at, c.steps, c.offsets)
    step = load(c.steps, 0, 8)
    lost = (step == ZERO) | (load(s.wild, 8 * k, 8) != ZERO)
    lost = lost & (load(s.low, 8 * k, 8) != load(s.high, 8 * k, 8))  # constant sub-blocks need no search
    store(c.steps, 0, select(step == ZERO, INFINITY, step))  # x/infinity gives code 0
    fifth = fill(np.uint8(0), 32)
    for pair in range(4):
        weights = block * 256 + 64 * pair
        low = round_codes(x, weights, get(c.steps, 2 * pair), get(c.offsets, 2 * pair))
        high = round_codes(x, weights + 32, get(c.steps, 2 * pair + 1), get(c.offsets, 2 * pair + 1))
        store(out, at + QS + 32 * pair, (low & np.uint8(15)) | (high << np.uint8(4)))
        bits = (low >> np.uint8(4)) | ((high >> np.uint8(4)) << np.uint8(1))
        fifth = fifth | (bits << np.uint8(2 * pair))
    store(out, at + QH, fifth)
    return bool(mask_bits(lost))


@inlined
def round_codes(x: Floats, at: int, step: np.float32, offset: np.float32) -> Lanes:
    """uint8 [32]: nearest((x + offset)/step), from 0 to 31."""
    code = nearest((load(x, at, 32) + offset) / step)
    return convert(minimum(maximum(code, np.int32(0)), np.int32(31)), np.uint8)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*176] uint8 -> out [R, n] float32, the bits of q5_k_jit.dequantize.

    w = (d*scale)*code - dmin*min
    """
    steps, offsets = stack(np.float32, 8), stack(np.float32, 8)
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        read_scales(raw, at, steps, offsets)
        fifth = load(raw, at + QH, 32)
        for pair in range(4):
            q = load(raw, at + QS + 32 * pair, 32)
            i = block * 256 + 64 * pair
            bits = fifth >> np.uint8(2 * pair)
            low = (q & np.uint8(15)) | ((bits & np.uint8(1)) << np.uint8(4))
            high = (q >> np.uint8(4)) | ((bits & np.uint8(2)) << np.uint8(3))
            step, offset = get(steps, 2 * pair), get(offsets, 2 * pair)
            put_weights(out, i, step * convert(convert(low, np.int32), np.float32) - offset, streamed)
            step, offset = get(steps, 2 * pair + 1), get(offsets, 2 * pair + 1)
            put_weights(out, i + 32, step * convert(convert(high, np.int32), np.float32) - offset, streamed)
    fence()
