"""The products of IQ1 in the orders `avx2` and `generic` on vectors, row by row: the bits of codebooks_jit.

Points and shifts are added up apart. Points are taken as 0 to 2, 1 too large; that comes off each two of them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import fma, multiply_bytes, multiply_words
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    decode_half,
    first,
    high_half,
    low_half,
    of_eight,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import get, load, peek, prefetch, put
from refimpl.dots.factors import EIGHTH
from refimpl.dots.points_simd import eight, make_scales
from refimpl.dots.runs_simd import add_all
from refimpl.dots.super_simd import S0123, S89AB, S4567, SCDEF, fold8, madd
from refimpl.dots.unpack_simd import read_half
from refimpl.quants.formats import IQ1_M, IQ1_S
from refimpl.quants.grids import load_grid

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO = np.float32(0)
POINTS = load_grid("iq1_s").points + np.int8(1)
S_BYTES, S_QS, S_QH = IQ1_S.block.itemsize, IQ1_S.offset("qs"), IQ1_S.offset("qh")
M_BYTES, M_QS, M_QH, M_SCALES = IQ1_M.block.itemsize, *map(IQ1_M.offset, ("qs", "qh", "scales"))
TWICE = permutation([k // 2 for k in range(16)])
FOUR_EACH, THREES = (
    permutation([k // 4 for k in range(16)]),
    constants("uint16", [k % 4 * 3 for k in range(16)]),
)
FOURS = constants("uint32", [4 * k for k in range(8)])
EACH_4 = permutation([k // 4 for k in range(32)])


@inlined
def gather_s(raw: Bytes, at: Any, k: int) -> Lanes:
    """64 points of IQ1_S, int8 [64]: the k-th of a block."""
    j, p = at + S_QS + 8 * k, POINTS
    a, b = (
        np.int64(peek(raw, at + S_QH + 4 * k, np.uint16)),
        np.int64(peek(raw, at + S_QH + 4 * k + 2, np.uint16)),
    )
    return reinterpret(
        of_eight(
            eight(p, np.int64(peek(raw, j, np.uint8)) | (a << 8 & 1792)),
            eight(p, np.int64(peek(raw, j + 1, np.uint8)) | (a << 5 & 1792)),
            eight(p, np.int64(peek(raw, j + 2, np.uint8)) | (a << 2 & 1792)),
            eight(p, np.int64(peek(raw, j + 3, np.uint8)) | (a >> 1 & 1792)),
            eight(p, np.int64(peek(raw, j + 4, np.uint8)) | (b << 8 & 1792)),
            eight(p, np.int64(peek(raw, j + 5, np.uint8)) | (b << 5 & 1792)),
            eight(p, np.int64(peek(raw, j + 6, np.uint8)) | (b << 2 & 1792)),
            eight(p, np.int64(peek(raw, j + 7, np.uint8)) | (b >> 1 & 1792)),
        ),
        np.int8,
    )


@inlined
def gather_m(raw: Bytes, at: Any, k: int) -> Lanes:
    """64 points of IQ1_M, int8 [64]: the k-th of a block."""
    j, p, h = at + M_QS + 8 * k, POINTS, np.int64(peek(raw, at + M_QH + 4 * k, np.uint32))
    return reinterpret(
        of_eight(
            eight(p, np.int64(peek(raw, j, np.uint8)) | (h << 8 & 1792)),
            eight(p, np.int64(peek(raw, j + 1, np.uint8)) | (h << 4 & 1792)),
            eight(p, np.int64(peek(raw, j + 2, np.uint8)) | (h & 1792)),
            eight(p, np.int64(peek(raw, j + 3, np.uint8)) | (h >> 4 & 1792)),
            eight(p, np.int64(peek(raw, j + 4, np.uint8)) | (h >> 8 & 1792)),
            eight(p, np.int64(peek(raw, j + 5, np.uint8)) | (h >> 12 & 1792)),
            eight(p, np.int64(peek(raw, j + 6, np.uint8)) | (h >> 16 & 1792)),
            eight(p, np.int64(peek(raw, j + 7, np.uint8)) | (h >> 20 & 1792)),
        ),
        np.int8,
    )


@inlined
def multiply_points(points: Lanes, acts: Codes, twos: Shorts, i: Any, scales: Lanes) -> Lanes:
    """64 points, 1 too large, times activations from i on times scales: int32 [16]; twos: sums of 2 activations."""
    pairs = multiply_bytes(reinterpret(points, np.uint8), load(acts, i, 64)) - load(twos, i // 2, 32)
    return multiply_words(pairs, scales)


@inlined
def fold16(v: Lanes) -> Lanes:
    return low_half(v) + high_half(v)


@inlined
def total_s(raw: Bytes, at: Any, acts: Codes, twos: Shorts, i: Any, scales: Lanes) -> Lanes:
    """The points of a block of IQ1_S in 8 lanes."""
    total = multiply_points(gather_s(raw, at, 0), acts, twos, i, S0123(scales))
    total = total + multiply_points(gather_s(raw, at, 1), acts, twos, i + 64, S4567(scales))
    total = total + multiply_points(gather_s(raw, at, 2), acts, twos, i + 128, S89AB(scales))
    return fold16(total + multiply_points(gather_s(raw, at, 3), acts, twos, i + 192, SCDEF(scales)))


@inlined
def total_m(raw: Bytes, at: Any, acts: Codes, twos: Shorts, i: Any, scales: Lanes) -> Lanes:
    """The points of a block of IQ1_M in 8 lanes."""
    total = multiply_points(gather_m(raw, at, 0), acts, twos, i, S0123(scales))
    total = total + multiply_points(gather_m(raw, at, 1), acts, twos, i + 64, S4567(scales))
    total = total + multiply_points(gather_m(raw, at, 2), acts, twos, i + 128, S89AB(scales))
    return fold16(total + multiply_points(gather_m(raw, at, 3), acts, twos, i + 192, SCDEF(scales)))


@inlined
def shift_64(raw: Bytes, at: Any, twos: Shorts, i: Any, scales: Lanes) -> Lanes:
    """64 activations, added by twos, under the shifts of IQ1_M, 4 bytes of qh, times scales: int32 [16]."""
    v, bits = load(twos, i // 2, 32), fill(peek(raw, at, np.uint32), 8) >> FOURS()
    minus = EACH_4(convert(bits & np.uint32(8), np.uint16)) > np.uint16(0)
    return multiply_words(select(minus, fill(np.int16(0), 32) - v, v), scales)


@inlined
def shifts_m(raw: Bytes, at: Any, twos: Shorts, i: Any, scales: Lanes) -> Lanes:
    """The shifts of a block of IQ1_M in 8 lanes."""
    j = at + M_QH
    total = shift_64(raw, j, twos, i, S0123(scales)) + shift_64(raw, j + 4, twos, i + 64, S4567(scales))
    total = total + shift_64(raw, j + 8, twos, i + 128, S89AB(scales))
    return fold16(total + shift_64(raw, j + 12, twos, i + 192, SCDEF(scales)))


@inlined
def scales_s(raw: Bytes, at: Any) -> Any:
    """Scales of IQ1_S, int16 [16], and the same with the signs of the shifts."""
    words = reinterpret(load(raw, at + S_QH, 16), np.uint16)
    scales = make_scales((words >> np.uint16(12)) & np.uint16(7))
    shifts = select(words > np.uint16(0x7FFF), fill(np.int16(0), 8) - scales, scales)
    return TWICE(scales), TWICE(shifts)


@inlined
def scales_m(raw: Bytes, at: Any) -> Lanes:
    """Scales of IQ1_M, int16 [16]."""
    words = reinterpret(load(raw, at + M_SCALES, 8), np.uint16)
    return make_scales((FOUR_EACH(words) >> THREES()) & np.uint16(7))


@inlined
def read_m(raw: Bytes, at: Any) -> np.float32:
    """d of IQ1_M, the top bits of four words."""
    s = peek(raw, at + M_SCALES, np.uint64)
    a, b = (s >> np.uint64(12)) & np.uint64(0xF), (s >> np.uint64(24)) & np.uint64(0xF0)
    c, d = (s >> np.uint64(36)) & np.uint64(0xF00), (s >> np.uint64(48)) & np.uint64(0xF000)
    return first(decode_half(convert(fill(a | b | c | d, 1), np.uint16)))


@jit
def avx2_iq1_s(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, out: Floats) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes, least = fill(ZERO, 8), fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * S_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales, shifts = scales_s(raw, at)
                step = get(act_d, i) * read_half(raw, at)
                lanes = fma(
                    fill(step, 8), convert(total_s(raw, at, acts, twos, 256 * i, scales), np.float32), lanes
                )
                off = np.float32(add_all(multiply_words(shifts, load(bsums, 16 * i, 16))))
                least = fma(fill(step, 1), fill(off, 1), least)
            put(out, t * m + r, first(fma(fill(EIGHTH, 1), least, fill(fold8(lanes), 1))))


@jit
def avx2_iq1_m(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, out: Floats) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes, more = fill(ZERO, 8), fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * M_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales, step = scales_m(raw, at), fill(get(act_d, i) * read_m(raw, at), 8)
                lanes = fma(step, convert(total_m(raw, at, acts, twos, 256 * i, scales), np.float32), lanes)
                more = fma(step, convert(shifts_m(raw, at, twos, 256 * i, scales), np.float32), more)
            put(out, t * m + r, first(fma(fill(EIGHTH, 1), fill(fold8(more), 1), fill(fold8(lanes), 1))))


@jit
def generic_iq1_s(
    raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, fused: bool, out: Floats
) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * S_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales, shifts = scales_s(raw, at)
                points = add_all(total_s(raw, at, acts, twos, 256 * i, scales))
                off = add_all(multiply_words(shifts, load(bsums, 16 * i, 16)))
                total = fill(np.float32(points) + EIGHTH * np.float32(off), 1)
                result = madd(fused, fill(get(act_d, i) * read_half(raw, at), 1), total, result)
            put(out, t * m + r, first(result))


@jit
def generic_iq1_m(
    raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, fused: bool, out: Floats
) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * M_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales = scales_m(raw, at)
                points = add_all(total_m(raw, at, acts, twos, 256 * i, scales))
                off = add_all(shifts_m(raw, at, twos, 256 * i, scales))
                total = fill(np.float32(points) + EIGHTH * np.float32(off), 1)
                result = madd(fused, fill(get(act_d, i) * read_m(raw, at), 1), total, result)
            put(out, t * m + r, first(result))


AVX2 = {IQ1_S.id: avx2_iq1_s, IQ1_M.id: avx2_iq1_m}
GENERIC = {IQ1_S.id: generic_iq1_s, IQ1_M.id: generic_iq1_m}
