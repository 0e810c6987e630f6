"""Q6_K on explicit vectors: the bytes of q6_k_jit, an order of magnitude faster.

4 blocks of 256 go through the search of scale_simd.py together. A block with a zero scale beside others that
are not (ggml then keeps the codes of the search) is flagged and redone by q6_k_jit: degenerate data only.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, Scratch, absolute, fill, inlined, maximum, minimum
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
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import fence, get, load, prefetch, put, stack, store, transpose16
from refimpl.quants import fallback_simd, q6_k_jit
from refimpl.quants.formats import Q6_K
from refimpl.quants.rounding_simd import add_lanes, note
from refimpl.quants.scale_simd import BOTH, LANES, allocate, search
from refimpl.quants.search_simd import TINY, ZERO, gather, is_streamed, nearest, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = Q6_K.block.itemsize
TOGETHER = 4  # blocks encoded together
CHUNK = 1024  # their weights
QH, SCALES, D = Q6_K.offset("qh"), Q6_K.offset("scales"), Q6_K.offset("d")
ROTATE_8, ROTATE_4, ROTATE_2, ROTATE_1 = [
    permutation([(k + by) % 16 for k in range(16)]) for by in (8, 4, 2, 1)
]


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of q6_k_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*210] uint8, written
    """
    scalar = q6_k_jit.quantize
    fallback_simd.encode(Q6_K, TOGETHER, encode, scalar, x, imatrix, rows_per_expert, out, build)


@jit
def encode(
    x: Floats,
    imatrix: Floats,
    rows_per_expert: int,
    out: Bytes,
    redo: NDArray[np.bool_],
    build: Build,
) -> None:
    """Encode 4 or more blocks, 4 at a time; where the last 4 are not whole, they reach back."""
    s = allocate()
    wanted, steps = stack(np.float32, CHUNK), stack(np.float32, 16)
    blocks, per_row = redo.size, x.shape[1] // 256
    for start in range(0, blocks, TOGETHER):
        block = min(start, blocks - TOGETHER)
        lay_out(x, block * 256, s.values)
        if len(imatrix):
            gather(imatrix, rows_per_expert, per_row, block, TOGETHER, 256, wanted)
            lay_out(wanted, 0, s.importance)
        else:
            for i in range(0, CHUNK, LANES):
                v = load(s.values, i, LANES)
                store(s.importance, i, v * v)
        search(s, 16, 32, build)
        for k in range(TOGETHER):
            redo[block + k] = write_block(x, block + k, s.scale, 16 * k, steps, out, build)


@inlined
def lay_out(x: Floats, at: int, tiles: Scratch) -> None:
    """tiles[group, i, lane] = x[at + 16*(32*group + lane) + i]"""
    for lane in range(0, BOTH, 16):
        transpose16(x, at + 16 * lane, 16, tiles, lane // LANES * 16 * LANES + lane % LANES, LANES)


@inlined
def find_largest(v: Lanes) -> Lanes:
    """The largest of 16 lanes, in all of them."""
    v = maximum(v, ROTATE_8(v))
    v = maximum(v, ROTATE_4(v))
    v = maximum(v, ROTATE_2(v))
    return maximum(v, ROTATE_1(v))


@inlined
def write_block(
    x: Floats, block: int, scales: Scratch, lane: int, steps: Scratch, out: Bytes, build: Build
) -> bool:
    """8-bit scales under the first that is largest in size, final codes, bytes. Also: must it be redone?"""
    at = block * BYTES
    scale = load(scales, lane, 16)
    sizes = maximum(absolute(scale), fill(ZERO, 16))  # a NaN counts as 0
    top = find_largest(sizes)
    if first(top) < TINY:
        for i in range(BYTES):
            put(out, at + i, np.uint8(0))
        return False
    inverse = np.float32(-128) / get(scales, lane + lowest_lane(mask_bits(sizes == top)))
    d = encode_half(fill(np.float32(1) / inverse, 1))
    code = minimum(nearest_product(build.ROW_NISC, inverse, scale), fill(np.int32(127), 16))
    step = first(decode_half(d)) * convert(code, np.float32)
    store(steps, 0, step)
    store(out, at + SCALES, convert(code, np.uint8))
    store(out, at + D, reinterpret(d, np.uint8))
    for half in range(2):
        codes = round_half(x, block * 256 + 128 * half, steps, 8 * half)
        write_half(codes, out, at + 64 * half, at + QH + 32 * half)
    return bool(mask_bits(step == ZERO))


@inlined
def write_half(codes: tuple[Lanes, Lanes, Lanes, Lanes], out: Bytes, ql: int, qh: int) -> None:
    """128 codes: low 4 bits of two weights 64 apart share a byte of ql, high 2 bits of four a byte of qh."""
    a, b, c, d = codes
    low, two, four, six = np.uint8(15), np.uint8(2), np.uint8(4), np.uint8(6)
    store(out, ql, (a & low) | (c << four))
    store(out, ql + 32, (b & low) | (d << four))
    store(out, qh, (a >> four) | ((b >> four) << two) | ((c >> four) << four) | ((d >> four) << six))


@inlined
def read_half(raw: Bytes, ql: int, qh: int) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """128 codes, uint8 [32] each: the inverse of write_half."""
    low, next_low, high = load(raw, ql, 32), load(raw, ql + 32, 32), load(raw, qh, 32)
    two, four, ones, twos = np.uint8(2), np.uint8(4), np.uint8(15), np.uint8(0x30)
    return (
        (low & ones) | ((high << four) & twos),
        (next_low & ones) | ((high << two) & twos),
        (low >> four) | (high & twos),
        (next_low >> four) | ((high >> two) & twos),
    )


@inlined
def round_half(x: Floats, i: int, steps: Scratch, j: int) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """The codes of 128 weights under 8 steps, uint8 [32] each."""
    return (
        round_codes(x, i, get(steps, j), get(steps, j + 1)),
        round_codes(x, i + 32, get(steps, j + 2), get(steps, j + 3)),
        round_codes(x, i + 64, get(steps, j + 4), get(steps, j + 5)),
        round_codes(x, i + 96, get(steps, j + 6), get(steps, j + 7)),
    )


@inlined
def round_codes(x: Floats, i: int, step: np.float32, next_step: np.float32) -> Lanes:
    """uint8 [32]: nearest(x/step) from -32 to 31, plus 32; 16 weights a step."""
    code = join(nearest(load(x, i, 16) / step), nearest(load(x, i + 16, 16) / next_step))
    code = minimum(maximum(code, np.int32(-32)), np.int32(31))
    return convert(code + np.int32(32), np.uint8)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*210] uint8 -> out [R, n] float32, the bits of q6_k_jit.dequantize.

    w = (d*scale)*(code - 32)
    """
    steps, streamed = stack(np.float32, 16), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        read_scales(raw, at, steps)
        for half in range(2):
            a, b, c, d = read_half(raw, at + 64 * half, at + QH + 32 * half)
            i, j = block * 256 + 128 * half, 8 * half
            scale(steps, j, a, out, i, streamed)
            scale(steps, j + 2, b, out, i + 32, streamed)
            scale(steps, j + 4, c, out, i + 64, streamed)
            scale(steps, j + 6, d, out, i + 96, streamed)
    fence()


@inlined
def read_scales(raw: Bytes, at: int, steps: Scratch) -> None:
    """d*scale of a block's 16 sub-blocks."""
    d = first(decode_half(reinterpret(load(raw, at + D, 2), np.uint16)))
    scales = reinterpret(load(raw, at + SCALES, 16), np.int8)
    store(steps, 0, d * convert(convert(scales, np.int32), np.float32))


@inlined
def scale(steps: Scratch, j: int, codes: Lanes, out: Floats, i: int, streamed: bool) -> None:
    """out = step*(code - 32) for 32 weights, 16 a step."""
    signed = convert(convert(reinterpret(codes, np.int8) - np.int8(32), np.int32), np.float32)
    put_weights(out, i, get(steps, j) * low_half(signed), streamed)
    put_weights(out, i + 16, get(steps, j + 1) * high_half(signed), streamed)


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """raw [R, bytes] uint8, x [R, n] float32 -> off [R, NB] uint16: how many; far [R, NB] uint8: how far."""
    steps = stack(np.float32, 16)
    for block in range(off.size):
        at = block * BYTES
        read_scales(raw, at, steps)
        count, most = fill(np.uint8(0), 16), fill(np.uint8(0), 16)
        for half in range(2):
            stored = read_half(raw, at + 64 * half, at + QH + 32 * half)
            codes = round_half(x, block * 256 + 128 * half, steps, 8 * half)
            for k in range(4):
                if get(steps, 8 * half + 2 * k) != ZERO:  # a zero scale keeps any codes
                    count, most = note(low_half(stored[k]), low_half(codes[k]), count, most)
                if get(steps, 8 * half + 2 * k + 1) != ZERO:
                    count, most = note(high_half(stored[k]), high_half(codes[k]), count, most)
        put(off, block, np.uint16(add_lanes(convert(join(count, fill(np.uint8(0), 16)), np.int32))))
        put(far, block, first(find_largest(most)))
