"""The integers of blocks of IQ2 and IQ3, times activations, on vectors: for signed_simd.py.

Each total_X(raw, at, acts, i) gives them in lanes of 4 weights, int32 [16]: lanes k and k + 8 belong together. Points
go from their grids to their lanes, 8 or 16 at a time; signs are given to the activations.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import multiply_bytes, multiply_words
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    high_half,
    join,
    lane,
    low_half,
    mask_from,
    of_eight,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import get, load, peek
from refimpl.quants.formats import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from refimpl.quants.grids import load_grid

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

XXS_BYTES, XXS_QS = IQ2_XXS.block.itemsize, IQ2_XXS.offset("qs")
XS_BYTES, XS_QS, XS_SCALES = IQ2_XS.block.itemsize, IQ2_XS.offset("qs"), IQ2_XS.offset("scales")
S_BYTES, S_QS, S_QH, S_SCALES = IQ2_S.block.itemsize, *map(IQ2_S.offset, ("qs", "qh", "scales"))
S_SIGNS = S_QS + 32
XXS3_BYTES, XXS3_QS = IQ3_XXS.block.itemsize, IQ3_XXS.offset("qs")
S3_BYTES, S3_QS, S3_QH = IQ3_S.block.itemsize, IQ3_S.offset("qs"), IQ3_S.offset("qh")
S3_SIGNS, S3_SCALES = IQ3_S.offset("signs"), IQ3_S.offset("scales")
XXS_POINTS, XS_POINTS, S_POINTS = (load_grid(name).points for name in ("iq2_xxs", "iq2_xs", "iq2_s"))
XXS3_POINTS, S3_POINTS = (load_grid(name).points for name in ("iq3_xxs", "iq3_s"))

ODD_WORDS = permutation(range(1, 16, 2))
TWICE = permutation([k // 2 for k in range(16)])
# 8 times each of 8 bytes; there are 16 twice, as each half of a 32-byte register reads its own
EIGHT_LOW, EIGHT_HIGH = (permutation([k // 16 % 2 * 16 + 8 * h + k // 8 for k in range(64)]) for h in (0, 1))
# A scale's byte for 8 words; of 16 scales twice, too
SCALES_0, SCALES_1, SCALES_2, SCALES_3 = (
    permutation([-1 if k % 2 else k // 16 % 2 * 16 + 4 * j + k // 16 for k in range(64)]) for j in range(4)
)
BITS = constants("uint8", [1 << k % 8 for k in range(64)])
EACH_4, PAIRS_UP = (
    permutation([k // 4 for k in range(32)]),
    constants("uint16", [8 - k % 4 * 2 for k in range(32)]),
)
IN_TURN_64 = permutation([k // 2 + k % 2 * 64 for k in range(128)])


@inlined
def complete(seven: Lanes) -> Lanes:
    """Seven signs and the eighth, which makes their number even: 4 bytes in each uint32.

    What shifts bring from the byte above stays clear of the bit that counts.
    """
    odd = seven ^ (seven >> np.uint32(4))
    odd = odd ^ (odd >> np.uint32(2))
    odd = odd ^ (odd >> np.uint32(1))
    return seven | ((odd << np.uint32(7)) & np.uint32(0x80808080))


@inlined
def split_words(words: Lanes) -> Any:
    """Of 8 words of 4 times seven signs and a level of 4 bits: signs, uint8 [32]; scales, uint8 [16]."""
    pairs = (words & np.uint32(0x3FFF)) | ((words & np.uint32(0x0FFFC000)) << np.uint32(2))
    sevens = (pairs & np.uint32(0x007F007F)) | ((pairs & np.uint32(0x3F803F80)) << np.uint32(1))
    scales = TWICE(make_scales(convert(words >> np.uint32(28), np.uint8)))
    return reinterpret(complete(sevens), np.uint8), scales


@inlined
def split_nibbles(v: Lanes) -> Lanes:
    """The low nibble of each byte, and the high one: twice as many bytes."""
    low, high = v & np.uint8(15), v >> np.uint8(4)
    return reinterpret(convert(low, np.uint16) | (convert(high, np.uint16) << np.uint16(8)), np.uint8)


@inlined
def make_scales(levels: Lanes) -> Lanes:
    """2 * level + 1 of bytes."""
    return (levels + levels) | np.uint8(1)


@inlined
def twice_low(v: Lanes) -> Lanes:
    return join(low_half(v), low_half(v))


@inlined
def twice_high(v: Lanes) -> Lanes:
    return join(high_half(v), high_half(v))


@inlined
def test_bits(each: Lanes) -> Lanes:
    """The mask of 64 weights whose bit is set; each : uint8 [64], 8 times a byte of 8 bits."""
    return (each & BITS()) == BITS()


@inlined
def multiply_points(point: Lanes, signs: Lanes, acts: Codes, i: Any, scales: Lanes) -> Lanes:
    """64 weights' integers, int32 [16].

    point  : 64 points, side by side in wider lanes
    signs  : as test_bits() takes them
    acts   : from i on
    scales : uint8 [64], the low byte of one for two weights, then 0
    """
    x = load(acts, i, 64)
    signed = select(test_bits(signs), fill(np.int8(0), 64) - x, x)
    return multiply_words(multiply_bytes(reinterpret(point, np.uint8), signed), reinterpret(scales, np.int16))


@inlined
def total_points(read: Any, gather: Any, raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    """The integers of a block.

    read(raw, at)      : its signs, uint8 [32], and its scales, uint8 [16]
    gather(raw, at, k) : its points k * 64 to k * 64 + 63, side by side in wider lanes
    """
    signs, scales = read(raw, at)
    scales = join(scales, scales)
    low, high = twice_low(signs), twice_high(signs)
    total = multiply_points(gather(raw, at, 0), EIGHT_LOW(low), acts, i, SCALES_0(scales))
    total = total + multiply_points(gather(raw, at, 1), EIGHT_HIGH(low), acts, i + 64, SCALES_1(scales))
    total = total + multiply_points(gather(raw, at, 2), EIGHT_LOW(high), acts, i + 128, SCALES_2(scales))
    return total + multiply_points(gather(raw, at, 3), EIGHT_HIGH(high), acts, i + 192, SCALES_3(scales))


@inlined
def eight(points: Codes, number: Any) -> np.float64:
    """A point of eight weights; read as float64, so that it goes from memory to its lane."""
    return peek(points, 8 * np.int64(number), np.float64)


@inlined
def four(points: Codes, number: Any) -> np.uint32:
    """A point of four weights."""
    return peek(points, 4 * np.int64(number), np.uint32)


@inlined
def word(words: Any, k: int) -> np.int64:
    return np.int64((words >> np.uint64(16 * k)) & np.uint64(0xFFFF))


@inlined
def byte(words: Any, k: int) -> np.int64:
    return np.int64((words >> np.uint64(8 * k)) & np.uint64(255))


@inlined
def gather_iq2_xxs(raw: Bytes, at: Any, k: Any) -> Lanes:
    j, p = at + XXS_QS + 16 * k, XXS_POINTS
    m, n = np.uint64(peek(raw, j, np.uint32)), np.uint64(peek(raw, j + 8, np.uint32))
    return of_eight(
        eight(p, byte(m, 0)), eight(p, byte(m, 1)), eight(p, byte(m, 2)), eight(p, byte(m, 3)),
        eight(p, byte(n, 0)), eight(p, byte(n, 1)), eight(p, byte(n, 2)), eight(p, byte(n, 3)),
    )  # fmt: skip


@inlined
def read_iq2_xxs(raw: Bytes, at: Any) -> Any:
    return split_words(ODD_WORDS(reinterpret(load(raw, at + XXS_QS, 64), np.uint32)))


@inlined
def total_iq2_xxs(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    return total_points(read_iq2_xxs, gather_iq2_xxs, raw, at, acts, i)


@inlined
def number_xs(raw: Bytes, at: Any) -> np.int64:
    return np.int64(peek(raw, at, np.uint16)) & 511


@inlined
def gather_iq2_xs(raw: Bytes, at: Any, k: Any) -> Lanes:
    j, p = at + XS_QS + 16 * k, XS_POINTS
    return of_eight(
        eight(p, number_xs(raw, j)), eight(p, number_xs(raw, j + 2)),
        eight(p, number_xs(raw, j + 4)), eight(p, number_xs(raw, j + 6)),
        eight(p, number_xs(raw, j + 8)), eight(p, number_xs(raw, j + 10)),
        eight(p, number_xs(raw, j + 12)), eight(p, number_xs(raw, j + 14)),
    )  # fmt: skip


@inlined
def read_iq2_xs(raw: Bytes, at: Any) -> Any:
    words = reinterpret(load(raw, at + XS_QS, 64), np.uint16)
    sevens = reinterpret(convert(words >> np.uint16(9), np.uint8), np.uint32)
    levels = split_nibbles(load(raw, at + XS_SCALES, 8))
    return reinterpret(complete(sevens), np.uint8), make_scales(levels)


@inlined
def total_iq2_xs(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    return total_points(read_iq2_xs, gather_iq2_xs, raw, at, acts, i)


@inlined
def numbers_iq2_s(raw: Bytes, at: Any) -> Lanes:
    """Each number is a byte, and two bits of qh: 4 in a word, uint64 [8]."""
    high = (EACH_4(convert(load(raw, at + S_QH, 8), np.uint16)) << PAIRS_UP()) & np.uint16(768)
    return reinterpret(convert(load(raw, at + S_QS, 32), np.uint16) | high, np.uint64)


@inlined
def gather_iq2_s(raw: Bytes, at: Any, k: Any) -> Lanes:
    n, p = numbers_iq2_s(raw, at), S_POINTS
    a, b = lane(n, 2 * k), lane(n, 2 * k + 1)
    return of_eight(
        eight(p, word(a, 0)), eight(p, word(a, 1)), eight(p, word(a, 2)), eight(p, word(a, 3)),
        eight(p, word(b, 0)), eight(p, word(b, 1)), eight(p, word(b, 2)), eight(p, word(b, 3)),
    )  # fmt: skip


@inlined
def read_iq2_s(raw: Bytes, at: Any) -> Any:
    levels = split_nibbles(load(raw, at + S_SCALES, 8))
    return load(raw, at + S_SIGNS, 32), make_scales(levels)


@inlined
def total_iq2_s(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    return total_points(read_iq2_s, gather_iq2_s, raw, at, acts, i)


@inlined
def fours_s(a: Any, b: Any) -> Lanes:
    """8 points of IQ3_S by their numbers, 4 in a word: uint32 [8]."""
    p = S3_POINTS
    return of_eight(
        four(p, word(a, 0)), four(p, word(a, 1)), four(p, word(a, 2)), four(p, word(a, 3)),
        four(p, word(b, 0)), four(p, word(b, 1)), four(p, word(b, 2)), four(p, word(b, 3)),
    )  # fmt: skip


@inlined
def numbers_iq3_s(raw: Bytes, at: Any) -> Lanes:
    """Each number is a byte, and a bit of qh: 4 in a word, uint64 [16]."""
    high = select(mask_from(peek(raw, at + S3_QH, np.uint64)), fill(np.uint8(1), 64), np.uint8(0))
    return reinterpret(IN_TURN_64(join(load(raw, at + S3_QS, 64), high)), np.uint64)


@inlined
def gather_iq3_s(raw: Bytes, at: Any, k: Any) -> Lanes:
    n = numbers_iq3_s(raw, at)
    low, high = fours_s(lane(n, 4 * k), lane(n, 4 * k + 1)), fours_s(lane(n, 4 * k + 2), lane(n, 4 * k + 3))
    return join(low, high)


@inlined
def read_iq3_s(raw: Bytes, at: Any) -> Any:
    levels = TWICE(split_nibbles(load(raw, at + S3_SCALES, 4)))
    return load(raw, at + S3_SIGNS, 32), make_scales(levels)


@inlined
def total_iq3_s(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    return total_points(read_iq3_s, gather_iq3_s, raw, at, acts, i)


@inlined
def fours_xxs(raw: Bytes, at: Any) -> Lanes:
    """8 points of IQ3_XXS, whose numbers are bytes: uint32 [8]."""
    p = XXS3_POINTS
    return of_eight(
        four(p, get(raw, at)), four(p, get(raw, at + 1)), four(p, get(raw, at + 2)), four(p, get(raw, at + 3)),
        four(p, get(raw, at + 4)), four(p, get(raw, at + 5)), four(p, get(raw, at + 6)), four(p, get(raw, at + 7)),
    )  # fmt: skip


@inlined
def gather_iq3_xxs(raw: Bytes, at: Any, k: Any) -> Lanes:
    j = at + XXS3_QS + 16 * k
    return join(fours_xxs(raw, j), fours_xxs(raw, j + 8))


@inlined
def read_iq3_xxs(raw: Bytes, at: Any) -> Any:
    return split_words(reinterpret(load(raw, at + XXS3_QS + 64, 32), np.uint32))


@inlined
def total_iq3_xxs(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    return total_points(read_iq3_xxs, gather_iq3_xxs, raw, at, acts, i)
