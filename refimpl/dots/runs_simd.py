"""The orders `avx2` and `generic` on vectors for blocks of 256 that are taken apart first: the bits of the _jit texts.

What the formats share is here; unpack_simd.py knows each of them. Where a lane must hold codes around 0, `twos` takes
off what is too much: the bias times the sums of 2 activations.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_dot import fma, multiply_bytes, multiply_words
from refimpl.arith.simd_lanes import convert, first, high_half, low_half
from refimpl.arith.simd_memory import get, load, prefetch, put, stack
from refimpl.dots.super_simd import (
    G01,
    G23,
    G45,
    G67,
    S0123,
    S89AB,
    S4567,
    SCDEF,
    TURN,
    add_in_turn,
    fold8,
    keep,
    madd,
)
from refimpl.dots.unpack_simd import unpack_q2_k, unpack_q3_k, unpack_q5_k
from refimpl.quants.formats import Q2_K, Q3_K, Q5_K

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO = np.float32(0)
PLAIN, ONE_MIN, MINS_FIRST = 0, 1, 2  # what becomes of the mins
Q2_K_BYTES, Q3_K_BYTES, Q5_K_BYTES = Q2_K.block.itemsize, Q3_K.block.itemsize, Q5_K.block.itemsize


@inlined
def pair_codes(turn: Any, centred: bool, q: Bytes, k: int, acts: Codes, twos: Shorts, i: int) -> Lanes:
    """64 codes from k on times their activations, two by two: int16 [32]; i: where the block's activations begin."""
    pairs = multiply_bytes(turn(load(q, k, 64)), load(acts, i + k, 64))
    return pairs - load(twos, (i + k) // 2, 32) if centred else pairs


@inlined
def total_runs(centred: bool, q: Bytes, acts: Codes, twos: Shorts, i: int, scales: Lanes) -> Lanes:
    """The integers of a block in 8 lanes, runs of 4 weights."""
    total = multiply_words(pair_codes(keep, centred, q, 0, acts, twos, i), S0123(scales))
    total = total + multiply_words(pair_codes(keep, centred, q, 64, acts, twos, i), S4567(scales))
    total = total + multiply_words(pair_codes(keep, centred, q, 128, acts, twos, i), S89AB(scales))
    total = total + multiply_words(pair_codes(keep, centred, q, 192, acts, twos, i), SCDEF(scales))
    return low_half(total) + high_half(total)


@inlined
def total_turned(centred: bool, q: Bytes, acts: Codes, twos: Shorts, i: int, scales: Lanes) -> Lanes:
    """The integers of a block in 8 lanes, every eighth weight; activations and twos are turned."""
    total = multiply_words(pair_codes(TURN, centred, q, 0, acts, twos, i), G01(scales))
    total = total + multiply_words(pair_codes(TURN, centred, q, 64, acts, twos, i), G23(scales))
    total = total + multiply_words(pair_codes(TURN, centred, q, 128, acts, twos, i), G45(scales))
    total = total + multiply_words(pair_codes(TURN, centred, q, 192, acts, twos, i), G67(scales))
    return low_half(total) + high_half(total)


@inlined
def add_all(v: Lanes) -> np.int32:
    """The sum of 8 integers."""
    v = low_half(v) + high_half(v)
    v = low_half(v) + high_half(v)
    return first(v) + first(high_half(v))


@inlined
def multiply_avx2(
    unpack: Any,
    mins: int,
    centred: bool,
    size: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    bsums: Shorts,
    twos: Shorts,
    out: Floats,
) -> None:
    """The order avx2, row by row."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    q = stack(np.uint8, 256)
    for r in range(m):
        for t in range(tokens):
            lanes, least = fill(ZERO, 8), fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * size, t * blocks + b
                for k in range(0, size, 64):
                    prefetch(raw, at + AHEAD + k)
                scales, low, d, dmin = unpack(raw, at, q, 0)
                if mins != PLAIN:
                    taken = multiply_words(low, load(bsums, 16 * i, 16))
                    step = -get(act_d, i) * dmin
                    if mins == MINS_FIRST:
                        lanes = fma(fill(step, 8), convert(taken, np.float32), lanes)
                    else:
                        least = fma(fill(step, 1), fill(np.float32(add_all(taken)), 1), least)
                total = total_runs(centred, q, acts, twos, 256 * i, scales)
                lanes = fma(fill(get(act_d, i) * d, 8), convert(total, np.float32), lanes)
            put(out, t * m + r, fold8(lanes) + first(least) if mins == ONE_MIN else fold8(lanes))


@inlined
def multiply_in_lanes(
    unpack: Any,
    mins: int,
    centred: bool,
    size: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    bsums: Shorts,
    twos: Shorts,
    fused: bool,
    out: Floats,
) -> None:
    """The order generic.add_lanes, row by row."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    q = stack(np.uint8, 256)
    for r in range(m):
        for t in range(tokens):
            lanes, least = fill(ZERO, 8), fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * size, t * blocks + b
                for k in range(0, size, 64):
                    prefetch(raw, at + AHEAD + k)
                scales, low, d, dmin = unpack(raw, at, q, 0)
                total = total_turned(centred, q, acts, twos, 256 * i, scales)
                lanes = madd(fused, fill(d * get(act_d, i), 8), convert(total, np.float32), lanes)
                if mins != PLAIN:
                    taken = np.float32(add_all(multiply_words(low, load(bsums, 16 * i, 16))))
                    least = madd(fused, fill(-(dmin * get(act_d, i)), 1), fill(taken, 1), least)
            put(out, t * m + r, add_in_turn(first(least), lanes))


@jit
def avx2_q2_k(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, out: Floats) -> None:
    multiply_avx2(unpack_q2_k, MINS_FIRST, False, Q2_K_BYTES, raw, acts, act_d, bsums, twos, out)


@jit
def avx2_q3_k(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, out: Floats) -> None:
    multiply_avx2(unpack_q3_k, PLAIN, True, Q3_K_BYTES, raw, acts, act_d, bsums, twos, out)


@jit
def avx2_q5_k(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, out: Floats) -> None:
    multiply_avx2(unpack_q5_k, ONE_MIN, False, Q5_K_BYTES, raw, acts, act_d, bsums, twos, out)


@jit
def generic_q3_k(
    raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, fused: bool, out: Floats
) -> None:
    multiply_in_lanes(unpack_q3_k, PLAIN, True, Q3_K_BYTES, raw, acts, act_d, bsums, twos, fused, out)


@jit
def generic_q5_k(
    raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, fused: bool, out: Floats
) -> None:
    multiply_in_lanes(unpack_q5_k, ONE_MIN, False, Q5_K_BYTES, raw, acts, act_d, bsums, twos, fused, out)


@jit
def generic_q2_k(
    raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, twos: Shorts, fused: bool, out: Floats
) -> None:
    """Rows of Q2_K with tokens: see generic.add_less_mins."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    q = stack(np.uint8, 256)
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * Q2_K_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                prefetch(raw, at + AHEAD + 64)
                scales, low, d, dmin = unpack_q2_k(raw, at, q, 0)
                total = np.float32(add_all(total_runs(False, q, acts, twos, 256 * i, scales)))
                taken = np.float32(add_all(multiply_words(low, load(bsums, 16 * i, 16))))
                taken *= get(act_d, i) * dmin
                part = madd(fused, fill(get(act_d, i) * d, 1), fill(total, 1), fill(-taken, 1))
                result = result + part
            put(out, t * m + r, first(result))
