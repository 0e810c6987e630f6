"""IQ4_XS on explicit vectors: the bytes of iq4_xs_jit for every input. 8 blocks are searched together."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Scratch, absolute, fill, inlined, maximum, minimum
from refimpl.arith.simd_fused import nearest_product
from refimpl.arith.simd_lanes import (
    convert,
    decode_half,
    encode_half,
    first,
    high_half,
    low_half,
    lowest_lane,
    mask_bits,
    reinterpret,
)
from refimpl.arith.simd_memory import fence, get, load, peek, poke, prefetch, stack, store
from refimpl.quants import fallback_simd
from refimpl.quants.formats import IQ4_XS
from refimpl.quants.iq4_simd import (
    decode,
    pack_codes,
    search,
    spread_squares,
    sum_squares,
    weigh_by_imatrix,
    weigh_plain,
)
from refimpl.quants.q5_0_simd import lay_out
from refimpl.quants.scale_simd import BOTH, TILES, ScaleSearch, allocate
from refimpl.quants.search_simd import ONE, ZERO, gather, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = IQ4_XS.block.itemsize
HIGH, LOW, QS = IQ4_XS.offset("scales_h"), IQ4_XS.offset("scales_l"), IQ4_XS.offset("qs")
LEAST = 2 * TILES  # weights: 16 blocks
SHARE = np.float32(2 / 256)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of iq4_xs_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*136] uint8, written
    """
    if x.size < LEAST:
        more, importance = fallback_simd.repeat_rows(x, imatrix, rows_per_expert, LEAST)
        raw = np.empty((len(more), out.shape[1]), np.uint8)
        encode(more, importance, 1, raw, build)
        out[:] = raw[: len(x)]
    else:
        encode(x, imatrix, rows_per_expert, out, build)


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode 16 or more blocks, 8 at a time; where the last of them are not whole, they reach back."""
    s = allocate()
    wanted = stack(np.float32, TILES)
    subs, per_row = x.size // 32, x.shape[1] // 32
    weighed = imatrix.shape[0] > 0
    squares = np.empty(x.size // 256 if weighed else 0, np.float32)
    if weighed:
        sum_squares(x, 256, squares, build)
    for start in range(0, subs, BOTH):
        sub = min(start, subs - BOTH)
        lay_out(x, sub * 32, s.values)
        if weighed:
            gather(imatrix, rows_per_expert, per_row, sub, BOTH, 32, wanted)
            lay_out(wanted, 0, s.importance)
            spread_squares(s, squares, sub, 8, SHARE)
            weigh_by_imatrix(s, build)
        else:
            weigh_plain(s)
        search(s, build)
        for lane in range(0, BOTH, 8):
            write(x, (sub + lane) // 8, s, lane, out, build)


@inlined
def write(x: Floats, block: int, s: ScaleSearch, lane: int, out: Bytes, build: Build) -> None:
    """A block's bytes: 6-bit scales under the first that is largest in size, codes under their products."""
    found = load(s.scale, lane, 8)
    sizes = maximum(absolute(found), fill(ZERO, 8))  # a NaN counts as 0
    top = maximum(low_half(sizes), high_half(sizes))
    top = maximum(low_half(top), high_half(top))
    largest = first(maximum(low_half(top), high_half(top)))
    peak = get(s.scale, lane + lowest_lane(mask_bits(sizes == largest))) if largest > ZERO else ZERO
    d = peak / np.float32(-32)
    inverse = ONE / d if d != ZERO else ZERO
    codes = nearest_product(build.NL_NI, fill(inverse, 8), found)
    codes = minimum(maximum(codes, fill(np.int32(-32), 8)), fill(np.int32(31), 8))
    steps = stack(np.float32, 8)
    store(steps, 0, d * convert(codes, np.float32))
    stored = stack(np.int32, 8)
    store(stored, 0, codes + np.int32(32))
    low, high = 0, 0
    for k in range(8):
        code = int(get(stored, k))
        low |= (code & 15) << (4 * k)
        high |= (code >> 4) << (2 * k)
    at = block * BYTES
    store(out, at, reinterpret(encode_half(fill(d, 1)), np.uint8))
    poke(out, at + HIGH, np.uint16(high))
    poke(out, at + LOW, np.uint32(low))
    for k in range(8):
        step = get(steps, k)
        packed = pack_codes(x, block * 256 + 32 * k, ONE / step if step != ZERO else ZERO)
        store(out, at + QS + 16 * k, packed)


@inlined
def read_scales(raw: Bytes, at: int, steps: Scratch) -> None:
    """d * scale of a block's 8 sub-blocks."""
    d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
    high, low = np.int64(peek(raw, at + HIGH, np.uint16)), np.int64(peek(raw, at + LOW, np.uint32))
    for k in range(8):
        scale = (low >> (4 * k)) & 15 | ((high >> (2 * k)) & 3) << 4
        store(steps, k, fill(d * np.float32(scale - 32), 1))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*136] uint8 -> out [R, n] float32: w = (d * scale) * IQ4[code]."""
    steps, streamed = stack(np.float32, 8), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        read_scales(raw, at, steps)
        for k in range(8):
            levels = decode(load(raw, at + QS + 16 * k, 16))
            put_weights(out, block * 256 + 32 * k, get(steps, k) * levels, streamed)
    fence()
