"""Blocks of 256 taken apart on vectors, for whatever order.

Codes go to scratch, unsigned; scales, mins and steps stay in registers.

Each unpack_X(raw, at, q, i) stores 256 uint8 codes from q[i] on, and returns scales and `low`, int16 [16] each, one
per 16 codes; d; dmin. low are the mins; or, where codes are stored `bias` too large, bias times the scales.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.simd import Lanes, inlined
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    decode_half,
    first,
    high_half,
    join,
    low_half,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import load, store
from refimpl.quants.formats import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from refimpl.quants.six_bit_simd import unpack_scales

Bytes = NDArray[np.uint8]

ZERO = np.float32(0)
TWICE = permutation([k // 2 for k in range(16)])
SIX_QS, Q5_K_QS, Q5_K_QH = Q4_K.offset("qs"), Q5_K.offset("qs"), Q5_K.offset("qh")
Q2_K_QS, Q2_K_D = Q2_K.offset("qs"), Q2_K.offset("d")
Q3_K_QS, Q3_K_SCALES, Q3_K_D = Q3_K.offset("qs"), Q3_K.offset("scales"), Q3_K.offset("d")
Q6_K_QH, Q6_K_SCALES, Q6_K_D = Q6_K.offset("qh"), Q6_K.offset("scales"), Q6_K.offset("d")


def _shifts(low: int, high: int) -> Any:
    """Shift counts of the words of 64 bytes: one for the first 32 bytes, one for the rest."""
    return constants("uint16", [low] * 16 + [high] * 16)


BY_0_2, BY_4_2, BY_4_6, BY_4_3, BY_2_1 = (_shifts(*by) for by in ((0, 2), (4, 2), (4, 6), (4, 3), (2, 1)))
BY_0_1, BY_2_3, BY_4_5 = (_shifts(*by) for by in ((0, 1), (2, 3), (4, 5)))
THIRD_SHIFTS = constants("uint8", [2 * (k // 4) for k in range(16)])
FOURS = permutation([k % 4 for k in range(16)])
EIGHT_TWICE = permutation([k % 8 for k in range(16)])


@inlined
def twice(v: Lanes) -> Lanes:
    """32 bytes twice, as words: uint16 [32]."""
    return reinterpret(join(v, v), np.uint16)


@inlined
def down(words: Lanes, by: Lanes, mask: np.uint8) -> Lanes:
    """Bytes shifted down, and masked: uint8 [64]."""
    return reinterpret(words >> by, np.uint8) & mask


@inlined
def up(words: Lanes, by: Lanes, mask: np.uint8) -> Lanes:
    """Bytes shifted up, and masked: uint8 [64]."""
    return reinterpret(words << by, np.uint8) & mask


@inlined
def read_half(raw: Bytes, at: int) -> np.float32:
    """The float32 of the fp16 at a byte."""
    return first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))


@inlined
def read_six_bits(raw: Bytes, at: int) -> Any:
    """What Q4_K and Q5_K begin with: scales and mins, int16 [16]; d; dmin."""
    scales, mins = unpack_scales(raw, at + 4)
    d = decode_half(reinterpret(load(raw, at, 4), np.uint16))
    return TWICE(convert(scales, np.int16)), TWICE(convert(mins, np.int16)), first(d), first(high_half(d))


@inlined
def unpack_q4_k(raw: Bytes, at: int, q: Bytes, i: int) -> Any:
    for k in range(2):
        v = load(raw, at + SIX_QS + 64 * k, 64)
        low, high = v & np.uint8(15), v >> np.uint8(4)
        store(q, i + 128 * k, join(low_half(low), low_half(high)))
        store(q, i + 128 * k + 64, join(high_half(low), high_half(high)))
    return read_six_bits(raw, at)


@inlined
def unpack_q5_k(raw: Bytes, at: int, q: Bytes, i: int) -> Any:
    h = twice(load(raw, at + Q5_K_QH, 32))
    fifth = np.uint8(16)
    v = load(raw, at + Q5_K_QS, 64)
    low, high = v & np.uint8(15), v >> np.uint8(4)
    store(q, i, join(low_half(low), low_half(high)) | up(h, BY_4_3(), fifth))
    store(q, i + 64, join(high_half(low), high_half(high)) | up(h, BY_2_1(), fifth))
    v = load(raw, at + Q5_K_QS + 64, 64)
    low, high = v & np.uint8(15), v >> np.uint8(4)
    store(q, i + 128, join(low_half(low), low_half(high)) | down(h, BY_0_1(), fifth))
    store(q, i + 192, join(high_half(low), high_half(high)) | down(h, BY_2_3(), fifth))
    return read_six_bits(raw, at)


@inlined
def unpack_q6_k(raw: Bytes, at: int, q: Bytes, i: int) -> Any:
    """Codes as 0..63."""
    top = np.uint8(0x30)
    for h in range(2):
        v, high = load(raw, at + 64 * h, 64), twice(load(raw, at + Q6_K_QH + 32 * h, 32))
        store(q, i + 128 * h, (v & np.uint8(15)) | up(high, BY_4_2(), top))
        store(q, i + 128 * h + 64, (v >> np.uint8(4)) | down(high, BY_0_2(), top))
    scales = convert(reinterpret(load(raw, at + Q6_K_SCALES, 16), np.int8), np.int16)
    return scales, scales << np.int16(5), read_half(raw, at + Q6_K_D), ZERO


@inlined
def unpack_q2_k(raw: Bytes, at: int, q: Bytes, i: int) -> Any:
    for h in range(2):
        v = twice(load(raw, at + Q2_K_QS + 32 * h, 32))
        store(q, i + 128 * h, down(v, BY_0_2(), np.uint8(3)))
        store(q, i + 128 * h + 64, down(v, BY_4_6(), np.uint8(3)))
    both = load(raw, at, 16)
    scales, mins = convert(both & np.uint8(15), np.int16), convert(both >> np.uint8(4), np.int16)
    return scales, mins, read_half(raw, at + Q2_K_D), read_half(raw, at + Q2_K_D + 2)


@inlined
def unpack_q3_k(raw: Bytes, at: int, q: Bytes, i: int) -> Any:
    """Codes as 0..7."""
    h, two, third = twice(load(raw, at, 32)), np.uint8(3), np.uint8(4)
    v = twice(load(raw, at + Q3_K_QS, 32))
    store(q, i, down(v, BY_0_2(), two) | up(h, BY_2_1(), third))
    store(q, i + 64, down(v, BY_4_6(), two) | down(h, BY_0_1(), third))
    v = twice(load(raw, at + Q3_K_QS + 32, 32))
    store(q, i + 128, down(v, BY_0_2(), two) | down(h, BY_2_3(), third))
    store(q, i + 192, down(v, BY_4_6(), two) | down(h, BY_4_5(), third))
    eight, four = load(raw, at + Q3_K_SCALES, 8), load(raw, at + Q3_K_SCALES + 8, 4)
    low = join(eight & np.uint8(15), eight >> np.uint8(4))
    high = (FOURS(four) >> THIRD_SHIFTS()) & np.uint8(3)
    scales = convert(low | (high << np.uint8(4)), np.int16) - np.int16(32)
    return scales, scales << np.int16(2), read_half(raw, at + Q3_K_D), ZERO
