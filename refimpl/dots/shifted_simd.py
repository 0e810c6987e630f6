"""The products of IQ1 in the orders `avx2` and `generic` on vectors, row by row: the bits of codebooks_jit.

Points and shifts are added up apart. A point is -1, 0 or 1: it gives its sign to an activation.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import add_small_fours, fma, give_signs, multiply_bytes, multiply_words
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    decode_half,
    first,
    high_half,
    join,
    lane,
    low_half,
    of_eight,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import get, load, peek, prefetch, put, store
from refimpl.dots.factors import EIGHTH
from refimpl.dots.points_simd import EACH_4, eight, word
from refimpl.dots.runs_simd import add_all
from refimpl.dots.super_simd import EVEN, ODD, fold8, madd
from refimpl.dots.unpack_simd import read_half
from refimpl.quants.formats import IQ1_M, IQ1_S
from refimpl.quants.grids import load_grid

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO = np.float32(0)
POINTS = load_grid("iq1_s").points
S_BYTES, S_QS, S_QH = IQ1_S.block.itemsize, IQ1_S.offset("qs"), IQ1_S.offset("qh")
M_BYTES, M_QS, M_QH, M_SCALES = IQ1_M.block.itemsize, *map(IQ1_M.offset, ("qs", "qh", "scales"))
THREES_8 = constants("uint16", [k % 4 * 3 for k in range(32)])
FOUR_EACH, THREES = (
    permutation([k // 4 for k in range(16)]),
    constants("uint16", [k % 4 * 3 for k in range(16)]),
)
IN_TURN_8, IN_TURN_16, IN_TURN_32 = (
    permutation([k // 2 + k % 2 * n for k in range(2 * n)]) for n in (8, 16, 32)
)
# Of 16 bytes twice, as in points_simd.py, each for its share of 64 weights: the low ones of 8 words; all
B01, B23, B45, B67 = (
    permutation([k // 16 % 2 * 16 + 4 * j + k // 32 * 2 for k in range(64)]) for j in range(4)
)
B0123, B4567, B89AB, BCDEF = (
    permutation([k // 16 % 2 * 16 + 4 * j + k // 16 for k in range(64)]) for j in range(4)
)
# What holds for 16 weights each: of the p-th 64 weights, of their 32 weights e, half h. From [p][e][h] to [p][h][e],
# pairs for multiply_words(); p is 0, 2, 1, 3, as UNPACK_LOW and UNPACK_HIGH then stay within halves of a register.
SWAP = permutation([4 * p + 2 * e + h for p in (0, 2, 1, 3) for h in (0, 1) for e in (0, 1)])
UNPACK_LOW, UNPACK_HIGH = (permutation([k + h for k in (0, 8, 1, 9, 4, 12, 5, 13)]) for h in (0, 2))
TWICE_LOW, TWICE_HIGH = (permutation([h + k // 2 for k in range(8)]) for h in (0, 4))


@inlined
def numbers_s(raw: Bytes, at: Any) -> Lanes:
    """The numbers of the points of a block of IQ1_S, uint16 [32]: bytes, and 3 bits each of words of 16."""
    words = EACH_4(reinterpret(load(raw, at + S_QH, 16), np.uint16)) >> THREES_8()
    return convert(load(raw, at + S_QS, 32), np.uint16) | ((words & np.uint16(7)) << np.uint16(8))


@inlined
def numbers_m(raw: Bytes, at: Any) -> Lanes:
    """The numbers of the points of a block of IQ1_M, uint16 [32]: bytes, and 3 bits each of nibbles."""
    q = load(raw, at + M_QH, 16)
    high = IN_TURN_16(join(q & np.uint8(7), (q >> np.uint8(4)) & np.uint8(7)))
    return reinterpret(IN_TURN_32(join(load(raw, at + M_QS, 32), high)), np.uint16)


@inlined
def gather(a: Any, b: Any) -> Lanes:
    """64 points of IQ1 by their numbers, 4 in a word: int8 [64]."""
    p = POINTS
    return reinterpret(
        of_eight(
            eight(p, word(a, 0)), eight(p, word(a, 1)), eight(p, word(a, 2)), eight(p, word(a, 3)),
            eight(p, word(b, 0)), eight(p, word(b, 1)), eight(p, word(b, 2)), eight(p, word(b, 3)),
        ),
        np.int8,
    )  # fmt: skip


@inlined
def multiply_points(points: Lanes, acts: Codes, i: Any, scales: Lanes) -> Lanes:
    """64 points times activations from i on times scales, uint8 [64]: int16 [32].

    Eight of them fit in 16 bits: 8 * 2 * 15 * 127 = 30480.
    """
    return multiply_bytes(scales, give_signs(load(acts, i, 64), points))


@inlined
def total_points(numbers: Lanes, acts: Codes, i: Any, a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> Lanes:
    """The points of a block in 8 lanes: int32 [8]. a, b, c, d: scales of 64 weights each."""
    n = reinterpret(numbers, np.uint64)
    total = multiply_points(gather(lane(n, 0), lane(n, 1)), acts, i, a)
    total = total + multiply_points(gather(lane(n, 2), lane(n, 3)), acts, i + 64, b)
    total = total + multiply_points(gather(lane(n, 4), lane(n, 5)), acts, i + 128, c)
    total = total + multiply_points(gather(lane(n, 6), lane(n, 7)), acts, i + 192, d)
    return multiply_words(low_half(total) + high_half(total), fill(np.int16(1), 16))


@inlined
def total_s(raw: Bytes, at: Any, acts: Codes, i: Any, scales: Lanes) -> Lanes:
    s = reinterpret(join(scales, scales), np.uint8)
    return total_points(numbers_s(raw, at), acts, i, B01(s), B23(s), B45(s), B67(s))


@inlined
def total_m(raw: Bytes, at: Any, acts: Codes, i: Any, scales: Lanes) -> Lanes:
    s = convert(join(scales, scales), np.uint8)
    return total_points(numbers_m(raw, at), acts, i, B0123(s), B4567(s), B89AB(s), BCDEF(s))


@jit
def sum_fours(acts: Codes) -> Shorts:
    """Sums of 4 activations, as shifts_m() meets them: of each 64 the first 32's and the others' in turn.

    [t, n] int8 -> [t, n/4] int16
    """
    out = np.empty((acts.shape[0], acts.shape[1] // 4), np.int16)
    for i in range(0, acts.size, 64):
        fours = add_small_fours(fill(np.int32(0), 16), fill(np.uint8(1), 64), load(acts, i, 64))
        store(out, i // 4, IN_TURN_8(convert(fours, np.int16)))
    return out


@inlined
def shifts_m(raw: Bytes, at: Any, fours: Shorts, i: Any, scales: Lanes) -> Lanes:
    """The shifts of a block of IQ1_M in 8 lanes; i: where its sums begin.

    Of 32 weights a byte of qh and a scale hold for 16, half of the byte for 8, which are 2 lanes.
    """
    q, s = convert(SWAP(load(raw, at + M_QH, 16)), np.uint16), SWAP(scales)
    less = fill(np.int16(0), 16) - s
    low = reinterpret(select((q & np.uint16(8)) > np.uint16(0), less, s), np.uint32)
    high = reinterpret(select((q & np.uint16(128)) > np.uint16(0), less, s), np.uint32)
    one, two = UNPACK_LOW(join(low, high)), UNPACK_HIGH(join(low, high))
    total = multiply_words(load(fours, i, 16), reinterpret(TWICE_LOW(one), np.int16))
    total = total + multiply_words(load(fours, i + 16, 16), reinterpret(TWICE_HIGH(one), np.int16))
    total = total + multiply_words(load(fours, i + 32, 16), reinterpret(TWICE_LOW(two), np.int16))
    return total + multiply_words(load(fours, i + 48, 16), reinterpret(TWICE_HIGH(two), np.int16))


@inlined
def scales_s(raw: Bytes, at: Any) -> Any:
    """Scales of IQ1_S, int16 [8], and the same with the signs of the shifts."""
    words = reinterpret(load(raw, at + S_QH, 16), np.uint16)
    scales = reinterpret(((words >> np.uint16(11)) & np.uint16(14)) | np.uint16(1), np.int16)
    return scales, select(words > np.uint16(0x7FFF), fill(np.int16(0), 8) - scales, scales)


@inlined
def shifts_s(shifts: Lanes, bsums: Shorts, i: Any) -> np.float32:
    """The shifts of a block of IQ1_S: scales with their signs times sums of 32 activations, those of 16 from i on."""
    sums = load(bsums, i, 16)
    v = multiply_words(shifts, EVEN(sums) + ODD(sums))
    v = low_half(v) + high_half(v)
    return np.float32(first(v) + first(high_half(v)))


@inlined
def scales_m(raw: Bytes, at: Any) -> Lanes:
    """Scales of IQ1_M, int16 [16]."""
    words = reinterpret(load(raw, at + M_SCALES, 8), np.uint16)
    levels = (FOUR_EACH(words) >> THREES()) & np.uint16(7)
    return reinterpret((levels + levels) | np.uint16(1), np.int16)


@inlined
def read_m(raw: Bytes, at: Any) -> np.float32:
    """d of IQ1_M, the top bits of four words."""
    s = peek(raw, at + M_SCALES, np.uint64)
    a, b = (s >> np.uint64(12)) & np.uint64(0xF), (s >> np.uint64(24)) & np.uint64(0xF0)
    c, d = (s >> np.uint64(36)) & np.uint64(0xF00), (s >> np.uint64(48)) & np.uint64(0xF000)
    return first(decode_half(convert(fill(a | b | c | d, 1), np.uint16)))


@jit
def avx2_iq1_s(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes, least = fill(ZERO, 8), fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * S_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales, shifts = scales_s(raw, at)
                step = get(act_d, i) * read_half(raw, at)
                total = convert(total_s(raw, at, acts, 256 * i, scales), np.float32)
                lanes = fma(fill(step, 8), total, lanes)
                least = fma(fill(step, 1), fill(shifts_s(shifts, bsums, 16 * i), 1), least)
            put(out, t * m + r, first(fma(fill(EIGHTH, 1), least, fill(fold8(lanes), 1))))


@jit
def avx2_iq1_m(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    fours = sum_fours(acts)
    for r in range(m):
        for t in range(tokens):
            lanes, more = fill(ZERO, 8), fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * M_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales, step = scales_m(raw, at), fill(get(act_d, i) * read_m(raw, at), 8)
                lanes = fma(step, convert(total_m(raw, at, acts, 256 * i, scales), np.float32), lanes)
                more = fma(step, convert(shifts_m(raw, at, fours, 64 * i, scales), np.float32), more)
            put(out, t * m + r, first(fma(fill(EIGHTH, 1), fill(fold8(more), 1), fill(fold8(lanes), 1))))


@jit
def generic_iq1_s(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, fused: bool, out: Floats) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * S_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales, shifts = scales_s(raw, at)
                points = np.float32(add_all(total_s(raw, at, acts, 256 * i, scales)))
                total = fill(points + EIGHTH * shifts_s(shifts, bsums, 16 * i), 1)
                result = madd(fused, fill(get(act_d, i) * read_half(raw, at), 1), total, result)
            put(out, t * m + r, first(result))


@jit
def generic_iq1_m(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, fused: bool, out: Floats) -> None:
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    fours = sum_fours(acts)
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * M_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                scales = scales_m(raw, at)
                points = add_all(total_m(raw, at, acts, 256 * i, scales))
                off = add_all(shifts_m(raw, at, fours, 64 * i, scales))
                total = fill(np.float32(points) + EIGHTH * np.float32(off), 1)
                result = madd(fused, fill(get(act_d, i) * read_m(raw, at), 1), total, result)
            put(out, t * m + r, first(result))


AVX2 = {IQ1_S.id: avx2_iq1_s, IQ1_M.id: avx2_iq1_m}
GENERIC = {IQ1_S.id: generic_iq1_s, IQ1_M.id: generic_iq1_m}
