"""The 6-bit scales and mins of Q4_K blocks on vectors: rounded or fitted, packed, unpacked."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build, Form
from refimpl.arith.simd import Lanes, Scratch, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import nearest_product
from refimpl.arith.simd_lanes import convert, encode_half, join, low_half, permutation, reinterpret
from refimpl.arith.simd_memory import get, load, peek, poke, put, stack, store, transpose16
from refimpl.quants.scale_min_simd import BOTH, Search
from refimpl.quants.search_simd import ZERO, fit_positive

Bytes = NDArray[np.uint8]

TOGETHER = 8  # blocks encoded together: BOTH sub-blocks
HIGH_BITS, LOW_BITS, SIX_BITS = np.uint64(0x30303030), np.uint64(0x0F0F0F0F), np.uint64(0x3F3F3F3F)
ROTATE_4, ROTATE_2, ROTATE_1 = [permutation([(k + by) % 8 for k in range(8)]) for by in (4, 2, 1)]


class Scales(NamedTuple):
    """Scratch for the 6-bit scales and mins of 8 blocks."""

    halves: Scratch  # uint16 [block, 2]: d and dmin
    scales: Scratch  # uint8 [block, 8]
    mins: Scratch  # uint8 [block, 8]
    steps: Scratch  # float32 [8]: d*scale of a block's sub-blocks, infinity for 0
    offsets: Scratch  # float32 [8]: dmin*min


@inlined
def allocate_scales() -> Scales:
    """Scratch on the caller's stack."""
    return Scales(
        stack(np.uint16, 16),
        stack(np.uint8, BOTH),
        stack(np.uint8, BOTH),
        stack(np.float32, 8),
        stack(np.float32, 8),
    )


@inlined
def find_largest(v: Lanes) -> Lanes:
    """max(0, lanes) of 8 lanes, in all of them."""
    v = maximum(v, fill(ZERO, 8))
    v = maximum(v, ROTATE_4(v))
    v = maximum(v, ROTATE_2(v))
    return maximum(v, ROTATE_1(v))


@inlined
def recall(s: Search, k: int) -> tuple[Lanes, Lanes]:
    """What the search found for a block: 8 scales, 0 for constant sub-blocks, and 8 mins, -base."""
    low = load(s.low, 8 * k, 8)
    flat = low == load(s.high, 8 * k, 8)
    scale = select(flat, ZERO, load(s.scale, 8 * k, 8))
    return scale, ZERO - select(flat, low, load(s.base, 8 * k, 8))


@inlined
def round_scales(s: Search, c: Scales, k: int, build: Build) -> None:
    """Scales and mins of block k to 6 bits under their largest: the rule without an imatrix."""
    scale, least = recall(s, k)
    top, depth = find_largest(scale), find_largest(least)
    store(c.scales, 8 * k, round_six_bits(scale, top, build.ROW_NISC))
    store(c.mins, 8 * k, round_six_bits(least, depth, build.ROW_NISC))
    d, dmin = low_half(low_half(low_half(top))), low_half(low_half(low_half(depth)))
    store(c.halves, 2 * k, encode_half(join(d, dmin) / np.float32(63)))


@inlined
def round_six_bits(v: Lanes, top: Lanes, form: Form) -> Lanes:
    """nearest(63 * v/top) as ggml writes it: through uint8, then at most 63."""
    inverse = select(top > ZERO, np.float32(63) / top, ZERO)
    code = nearest_product(form, inverse, v) & np.int32(255)
    return convert(minimum(code, fill(np.int32(63), 8)), np.uint8)


@inlined
def fit_scales(s: Search, c: Scales, build: Build) -> None:
    """Scales and mins of 8 blocks to 6 bits, fitted with the sums of weights: the rule with an imatrix.

    Lanes 0-7 of the fit are the scales of the 8 blocks, lanes 8-15 their mins.
    """
    found, weights = stack(np.float32, 136), stack(np.float32, 136)  # 8 more: the transpose reads 16 columns
    for k in range(TOGETHER):
        scale, least = recall(s, k)
        store(found, 8 * k, scale)
        store(found, 64 + 8 * k, least)
        store(weights, 8 * k, load(s.sum_w, 8 * k, 8))
        store(weights, 64 + 8 * k, load(s.sum_w, 8 * k, 8))
    store(found, 128, fill(ZERO, 8))
    store(weights, 128, fill(ZERO, 8))
    values, importance, codes = stack(np.float32, 256), stack(np.float32, 256), stack(np.int32, 128)
    transpose16(found, 0, 8, values, 0, 16)
    transpose16(weights, 0, 8, importance, 0, 16)
    scale = encode_half(fit_positive(values, importance, codes, 8, 63, build))
    halves = stack(np.uint16, 16)
    store(halves, 0, scale)
    for k in range(TOGETHER):
        put(c.halves, 2 * k, get(halves, k))
        put(c.halves, 2 * k + 1, get(halves, 8 + k))
        for j in range(8):
            put(c.scales, 8 * k + j, np.uint8(get(codes, 16 * j + k)))
            put(c.mins, 8 * k + j, np.uint8(get(codes, 16 * j + 8 + k)))


@inlined
def pack_scales(c: Scales, k: int, out: Bytes, at: int) -> None:
    """Write 12 bytes: scales 0-3, mins 0-3, each with the high 2 bits of 4-7 on top; low 4 bits of 4-7."""
    scales, mins = peek(c.scales, 8 * k, np.uint64), peek(c.mins, 8 * k, np.uint64)
    later_scales, later_mins = scales >> np.uint64(32), mins >> np.uint64(32)
    scales |= (later_scales & HIGH_BITS) << np.uint64(2)
    mins |= (later_mins & HIGH_BITS) << np.uint64(2)
    poke(out, at, np.uint32(scales))
    poke(out, at + 4, np.uint32(mins))
    poke(out, at + 8, np.uint32((later_scales & LOW_BITS) | ((later_mins & LOW_BITS) << np.uint64(4))))


@inlined
def unpack_scales(raw: Bytes, at: int) -> tuple[Lanes, Lanes]:
    """8 scales and 8 mins, uint8, from 12 bytes: the inverse of pack_scales."""
    scales, mins = np.uint64(peek(raw, at, np.uint32)), np.uint64(peek(raw, at + 4, np.uint32))
    later = np.uint64(peek(raw, at + 8, np.uint32))
    later_scales = (later & LOW_BITS) | ((scales >> np.uint64(2)) & HIGH_BITS)
    later_mins = ((later >> np.uint64(4)) & LOW_BITS) | ((mins >> np.uint64(2)) & HIGH_BITS)
    scales = (scales & SIX_BITS) | (later_scales << np.uint64(32))
    mins = (mins & SIX_BITS) | (later_mins << np.uint64(32))
    return reinterpret(fill(scales, 1), np.uint8), reinterpret(fill(mins, 1), np.uint8)
