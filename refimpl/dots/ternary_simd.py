"""The orders `avx2` and `generic` of TQ1_0 and TQ2_0 on vectors, row by row: the bits of avx2_jit and generic_jit.

Codes are multiplied as they are stored, 1 too large, and pairs of products are added up as 16-bit integers: 8 of at
most 3 * 127 * 2. What is too much comes off by the sums of 16 activations.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_dot import fma, multiply_bytes, multiply_words, table
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    first,
    high_half,
    join,
    low_half,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import get, load, prefetch, put
from refimpl.dots.runs_simd import add_all
from refimpl.dots.super_simd import fold8, load_pair, madd
from refimpl.dots.unpack_simd import read_half
from refimpl.quants.formats import TQ1_0, TQ2_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO, ONES = np.float32(0), np.int16(1)
TQ1_0_BYTES, TQ1_0_QH, TQ1_0_D = TQ1_0.block.itemsize, TQ1_0.offset("qh"), TQ1_0.offset("d")
TQ2_0_BYTES, TQ2_0_D = TQ2_0.block.itemsize, TQ2_0.offset("d")
REPEAT = permutation([i % 4 for i in range(16)])
THREE, NINE = np.uint32(3), np.uint32(9)
EIGHT, TOP = np.uint16(8), np.uint16(0xFF00)
# Of 16 bytes, 8 words, digits 0 and 1, and 2 and 3; the last one, and of 4 bytes four times 0 to 3
FROM_0, FROM_2 = (constants("uint16", [3**k] * 8 + [3 ** (k + 1)] * 8) for k in (0, 2))
FROM_4 = constants("uint16", [81] * 8 + [3 ** (k // 2) for k in range(8)])
first_of = table([k // 3 for k in range(9)] + [0] * 7)
second_of = table([k % 3 for k in range(9)] + [0] * 7)


@inlined
def total_tq2_0(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    """The integers of a block in 8 lanes, codes 1 too large."""
    q, three = load(raw, at, 64), np.uint8(3)
    pairs = multiply_bytes(q & three, load_pair(acts, i, i + 128))
    pairs = pairs + multiply_bytes((q >> np.uint8(2)) & three, load_pair(acts, i + 32, i + 160))
    pairs = pairs + multiply_bytes((q >> np.uint8(4)) & three, load_pair(acts, i + 64, i + 192))
    pairs = pairs + multiply_bytes(q >> np.uint8(6), load_pair(acts, i + 96, i + 224))
    total = multiply_words(pairs, fill(ONES, 32))
    return low_half(total) + high_half(total)


@inlined
def take_digits(even: Lanes, odd: Lanes, base: np.uint32) -> Lanes:
    """The first digit of fractions of 2^16, uint16 [n] each: uint8 [2n], those of even bytes and odd ones in turn."""
    low = convert((convert(even, np.uint32) * base) >> np.uint32(16), np.uint16)
    high = convert((convert(odd, np.uint32) * np.uint32(base << np.uint32(8))) >> np.uint32(16), np.uint16)
    return reinterpret(low | (high & TOP), np.uint8)


@inlined
def total_tq1_0(raw: Bytes, at: Any, acts: Codes, i: Any) -> Lanes:
    """The integers of a block in 8 lanes, codes 1 too large: 5 digits of 32 bytes, of 16, and 4 of 4 bytes.

    A byte is a fraction in base 3, whose first digit is carried over by a multiplication. Two at a time are one of
    base 9, which tables take apart.
    """
    many = reinterpret(load(raw, at, 32), np.uint16)
    even, odd = many << EIGHT, many & TOP
    twos = take_digits(even, odd, NINE)
    pairs = multiply_bytes(reinterpret(first_of(twos), np.uint8), load(acts, i, 32))
    pairs = pairs + multiply_bytes(reinterpret(second_of(twos), np.uint8), load(acts, i + 32, 32))
    twos = take_digits(even * np.uint16(9), odd * np.uint16(9), NINE)
    pairs = pairs + multiply_bytes(reinterpret(first_of(twos), np.uint8), load(acts, i + 64, 32))
    pairs = pairs + multiply_bytes(reinterpret(second_of(twos), np.uint8), load(acts, i + 96, 32))
    digits = take_digits(even * np.uint16(81), odd * np.uint16(81), THREE)
    pairs = pairs + multiply_bytes(digits, load(acts, i + 128, 32))
    some = load(raw, at + 32, 16)
    twice = reinterpret(join(some, some), np.uint16)
    even, odd = twice << EIGHT, twice & TOP
    digits = take_digits(even * FROM_0(), odd * FROM_0(), THREE)
    pairs = pairs + multiply_bytes(digits, load(acts, i + 160, 32))
    digits = take_digits(even * FROM_2(), odd * FROM_2(), THREE)
    pairs = pairs + multiply_bytes(digits, load(acts, i + 192, 32))
    last = reinterpret(join(some, REPEAT(load(raw, at + TQ1_0_QH, 4))), np.uint16)
    digits = take_digits((last << EIGHT) * FROM_4(), (last & TOP) * FROM_4(), THREE)
    pairs = pairs + multiply_bytes(digits, load(acts, i + 224, 32))
    return multiply_words(pairs, fill(ONES, 16))


@inlined
def multiply_avx2(
    total: Any, size: int, d: int, raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats
) -> None:
    """avx2.add_around of blocks of `size` bytes with an fp16 at byte d."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes = fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * size, t * blocks + b
                prefetch(raw, at + AHEAD)
                too_many = multiply_words(load(bsums, 16 * i, 16), fill(ONES, 16))
                integers = convert(total(raw, at, acts, 256 * i) - too_many, np.float32)
                lanes = fma(fill(get(act_d, i) * read_half(raw, at + d), 8), integers, lanes)
            put(out, t * m + r, fold8(lanes))


@inlined
def multiply_generic(
    total: Any,
    size: int,
    d: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    bsums: Shorts,
    fused: bool,
    out: Floats,
) -> None:
    """generic.add_blocks of the same blocks."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * size, t * blocks + b
                prefetch(raw, at + AHEAD)
                too_many = multiply_words(load(bsums, 16 * i, 16), fill(ONES, 16))
                integers = fill(np.float32(add_all(total(raw, at, acts, 256 * i) - too_many)), 1)
                step = fill(get(act_d, i) * read_half(raw, at + d), 1)
                result = madd(fused, step, integers, result)
            put(out, t * m + r, first(result))


@jit
def avx2_tq1_0(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    multiply_avx2(total_tq1_0, TQ1_0_BYTES, TQ1_0_D, raw, acts, act_d, bsums, out)


@jit
def avx2_tq2_0(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    multiply_avx2(total_tq2_0, TQ2_0_BYTES, TQ2_0_D, raw, acts, act_d, bsums, out)


@jit
def generic_tq1_0(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, fused: bool, out: Floats) -> None:
    multiply_generic(total_tq1_0, TQ1_0_BYTES, TQ1_0_D, raw, acts, act_d, bsums, fused, out)


@jit
def generic_tq2_0(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, fused: bool, out: Floats) -> None:
    multiply_generic(total_tq2_0, TQ2_0_BYTES, TQ2_0_D, raw, acts, act_d, bsums, fused, out)


AVX2 = {TQ1_0.id: avx2_tq1_0, TQ2_0.id: avx2_tq2_0}
GENERIC = {TQ1_0.id: generic_tq1_0, TQ2_0.id: generic_tq2_0}
