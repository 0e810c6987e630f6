"""The order `tiled` of the codebook formats on vectors: tiled_simd.py multiplies plain blocks that are made of theirs.

| 256 codes + 64, one byte each | 16 scales: int16 | d times the factor: float32 |
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    first,
    join,
    lane,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import load, peek, store
from refimpl.dots import points_simd as points
from refimpl.dots import shifted_simd as shifted
from refimpl.dots.factors import FACTORS
from refimpl.dots.points_simd import EIGHT_HIGH, EIGHT_LOW, test_bits, twice_high, twice_low
from refimpl.dots.tiled_simd import add_under_scale, lay_out, multiply_tiles
from refimpl.dots.unpack_simd import TWICE, read_half
from refimpl.quants.formats import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

BIAS, SHIFT, ZERO = np.uint8(64), np.int16(6), np.float32(0)
SCALES, D, BYTES = 256, 288, 292
ROWS = 64  # taken apart at a time
S_QH, M_QH = shifted.S_QH, shifted.M_QH
EIGHT_EACH, FOURS = permutation([k // 8 for k in range(64)]), constants("uint32", [4 * k for k in range(8)])


@inlined
def put_rest(scales: Lanes, d: Any, plain: Bytes, i: Any) -> None:
    store(plain, i + SCALES, reinterpret(scales, np.uint8))
    store(plain, i + D, reinterpret(fill(d, 1), np.uint8))


@inlined
def put_signed(point: Lanes, signs: Lanes, plain: Bytes, i: Any) -> None:
    """64 points with their signs as codes from i on. See points_simd.multiply_points."""
    size = reinterpret(point, np.uint8)
    store(plain, i, select(test_bits(signs), BIAS - size, BIAS + size))


@inlined
def make_signed(read: Any, gather: Any, size: int, factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    """Plain blocks of those of IQ2 or IQ3. See points_simd.total_points."""
    for b in range(raw.size // size):
        at, i = b * size, b * BYTES
        signs, scales = read(raw, at)
        put_rest(convert(scales, np.int16), read_half(raw, at) * factor, plain, i)
        low, high = twice_low(signs), twice_high(signs)
        put_signed(gather(raw, at, 0), EIGHT_LOW(low), plain, i)
        put_signed(gather(raw, at, 1), EIGHT_HIGH(low), plain, i + 64)
        put_signed(gather(raw, at, 2), EIGHT_LOW(high), plain, i + 128)
        put_signed(gather(raw, at, 3), EIGHT_HIGH(high), plain, i + 192)


@jit
def make_iq2_xxs(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    make_signed(points.read_iq2_xxs, points.gather_iq2_xxs, points.XXS_BYTES, factor, raw, plain)


@jit
def make_iq2_xs(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    make_signed(points.read_iq2_xs, points.gather_iq2_xs, points.XS_BYTES, factor, raw, plain)


@jit
def make_iq2_s(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    make_signed(points.read_iq2_s, points.gather_iq2_s, points.S_BYTES, factor, raw, plain)


@jit
def make_iq3_xxs(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    make_signed(points.read_iq3_xxs, points.gather_iq3_xxs, points.XXS3_BYTES, factor, raw, plain)


@jit
def make_iq3_s(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    make_signed(points.read_iq3_s, points.gather_iq3_s, points.S3_BYTES, factor, raw, plain)


@inlined
def put_shifted(numbers: Lanes, shift: Any, raw: Bytes, at: Any, plain: Bytes, i: Any) -> None:
    """A block of IQ1 in eighths; shift(raw, at, k): 64 + 1 or 64 - 1 for the k-th 64 weights, from byte `at` on."""
    n, three = reinterpret(numbers, np.uint64), np.uint8(3)
    point = shifted.gather(lane(n, 0), lane(n, 1))
    store(plain, i, (reinterpret(point, np.uint8) << three) + shift(raw, at, 0))
    point = shifted.gather(lane(n, 2), lane(n, 3))
    store(plain, i + 64, (reinterpret(point, np.uint8) << three) + shift(raw, at, 1))
    point = shifted.gather(lane(n, 4), lane(n, 5))
    store(plain, i + 128, (reinterpret(point, np.uint8) << three) + shift(raw, at, 2))
    point = shifted.gather(lane(n, 6), lane(n, 7))
    store(plain, i + 192, (reinterpret(point, np.uint8) << three) + shift(raw, at, 3))


@inlined
def shift_s(raw: Bytes, at: Any, k: int) -> Lanes:
    one = peek(raw, at + 4 * k, np.uint16) >> np.uint16(15)
    two = peek(raw, at + 4 * k + 2, np.uint16) >> np.uint16(15)
    return join(fill(np.uint8(65 - 2 * one), 32), fill(np.uint8(65 - 2 * two), 32))


@inlined
def shift_m(raw: Bytes, at: Any, k: int) -> Lanes:
    bits = (fill(peek(raw, at + 4 * k, np.uint32), 8) >> FOURS()) & np.uint32(8)
    return EIGHT_EACH(convert(np.uint32(65) - (bits >> np.uint32(2)), np.uint8))


@jit
def make_iq1_s(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    for b in range(raw.size // shifted.S_BYTES):
        at, i = b * shifted.S_BYTES, b * BYTES
        put_rest(TWICE(shifted.scales_s(raw, at)[0]), read_half(raw, at) * factor, plain, i)
        put_shifted(shifted.numbers_s(raw, at), shift_s, raw, at + S_QH, plain, i)


@jit
def make_iq1_m(factor: np.float32, raw: Bytes, plain: Bytes) -> None:
    for b in range(raw.size // shifted.M_BYTES):
        at, i = b * shifted.M_BYTES, b * BYTES
        put_rest(shifted.scales_m(raw, at), shifted.read_m(raw, at) * factor, plain, i)
        put_shifted(shifted.numbers_m(raw, at), shift_m, raw, at + M_QH, plain, i)


@inlined
def unpack_plain(raw: Bytes, at: Any, q: Bytes, i: Any) -> Any:
    """As unpack_simd.unpack_X."""
    for k in range(0, 256, 64):
        store(q, i + k, load(raw, at + k, 64))
    scales = reinterpret(load(raw, at + SCALES, 32), np.int16)
    return scales, scales << SHIFT, first(reinterpret(load(raw, at + D, 4), np.float32)), ZERO


@jit
def tiled_by_16(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_plain, add_under_scale, 1, 4, False, BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_by_32(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_plain, add_under_scale, 1, 8, False, BYTES, raw, acts, sums, act_d, out)


KERNELS = {  # and how many groups of 16 a scale holds for
    IQ2_XXS.id: (make_iq2_xxs, 2),
    IQ2_XS.id: (make_iq2_xs, 1),
    IQ2_S.id: (make_iq2_s, 1),
    IQ3_XXS.id: (make_iq3_xxs, 2),
    IQ3_S.id: (make_iq3_s, 2),
    IQ1_S.id: (make_iq1_s, 2),
    IQ1_M.id: (make_iq1_m, 1),
}


def multiply(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    """Multiply rows of blocks of a codebook format with tokens, as codebooks_jit.multiply_tiled does."""
    make, joined = KERNELS[fmt]
    kernel = tiled_by_16 if joined == 1 else tiled_by_32
    laid = lay_out(acts, act_d, bsums, joined)
    plain = np.empty((ROWS, act_d.shape[1] * BYTES), np.uint8)
    for r in range(0, len(raw), ROWS):
        some = raw[r : r + ROWS]
        part = np.empty((len(acts), len(some)), np.float32)
        make(FACTORS[fmt], some, plain)
        kernel(plain[: len(some)], *laid, part)
        out[:, r : r + len(some)] = part
