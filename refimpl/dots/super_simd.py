"""The orders `avx2` and `generic` on vectors for blocks of 256: the bits of avx2_jit and generic_jit.

64 codes at a time are multiplied with activations and scaled, all as integers, in 8 lanes. In avx2 a lane holds runs
of 4 weights; in generic every eighth weight: there codes and activations are turned first, so that the weights
l, l + 8, l + 16, l + 24 of each 32 lie side by side.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_dot import fma, multiply_bytes, multiply_words
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
from refimpl.arith.simd_memory import get, load, prefetch, put, stack, store
from refimpl.quants.formats import Q4_K, Q6_K
from refimpl.quants.six_bit_simd import unpack_scales

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO = np.float32(0)
Q4_K_BYTES, Q4_K_QS = Q4_K.block.itemsize, Q4_K.offset("qs")
Q6_K_BYTES, QH, SCALES, D = Q6_K.block.itemsize, Q6_K.offset("qh"), Q6_K.offset("scales"), Q6_K.offset("d")


def _spread(*groups: int) -> Any:
    """Scales of so many groups of codes, each for its share of 32 pairs."""
    return permutation([g for g in groups for _ in range(32 // len(groups))])


S02, S13, S46, S57 = _spread(0, 2), _spread(1, 3), _spread(4, 6), _spread(5, 7)
S0123, S4567, S89AB, SCDEF = (_spread(*range(g, g + 4)) for g in (0, 4, 8, 12))
UP, DOWN = constants("uint16", [4] * 16 + [2] * 16), constants("uint16", [0] * 16 + [2] * 16)
TURN_4, TURN_2, TURN_1 = (permutation([(k + by) % 8 for k in range(8)]) for by in (4, 2, 1))
EACH_EIGHTH = [8 * (k % 4) + k // 4 for k in range(32)]  # 0, 8, 16, 24, 1, 9, ...
TURN = permutation([32 * h + k for h in (0, 1) for k in EACH_EIGHTH])
TURN_HALF = permutation(EACH_EIGHTH)
G01, G23, G45, G67 = (permutation([g, g + 1] * 8 + [g + 2, g + 3] * 8) for g in (0, 4, 8, 12))
EVEN, ODD = permutation(range(0, 16, 2)), permutation(range(1, 16, 2))


@jit
def sum_twos(acts: Codes, bias: int) -> Shorts:
    """The bias times the sums of 2 activations: [t, n] int8 -> [t, n/2] int16; n a multiple of 32. None for bias 0."""
    if bias == 0:
        return np.empty((acts.shape[0], 0), np.int16)
    out = np.empty((acts.shape[0], acts.shape[1] // 2), np.int16)
    for i in range(0, acts.size, 32):
        twos = multiply_bytes(fill(np.uint8(1), 32), load(acts, i, 32))
        store(out, i // 2, twos * np.int16(bias))
    return out


@inlined
def fold8(v: Lanes) -> Any:
    """Add 8 lanes as ggml does: see avx2.fold."""
    h = v + TURN_4(v)
    pair = h + TURN_2(h)
    return first(pair + TURN_1(pair))


@inlined
def fold4(v: Lanes) -> Any:
    """Add 4 lanes: (v0 + v2) + (v1 + v3)."""
    pair = low_half(v) + high_half(v)
    return first(low_half(pair) + high_half(pair))


@inlined
def keep(v: Lanes) -> Lanes:
    """Lanes as they are: what avx2 does where generic turns them."""
    return v


@inlined
def madd(fused: bool, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a*b + c, rounded once or twice."""
    return fma(a, b, c) if fused else a * b + c


@inlined
def load_pair(acts: Codes, i: int, j: int) -> Lanes:
    """int8 [64]: 32 activations from i on, and 32 from j on."""
    return join(load(acts, i, 32), load(acts, j, 32))


@inlined
def total_q4_k(turn: Any, raw: Bytes, at: int, acts: Codes, i: int, scales: Lanes) -> Lanes:
    """The integers of a block in 8 lanes."""
    q = turn(load(raw, at, 64))
    total = multiply_words(multiply_bytes(q & np.uint8(15), load_pair(acts, i, i + 64)), S02(scales))
    low = multiply_bytes(q >> np.uint8(4), load_pair(acts, i + 32, i + 96))
    total = total + multiply_words(low, S13(scales))
    q = turn(load(raw, at + 64, 64))
    low = multiply_bytes(q & np.uint8(15), load_pair(acts, i + 128, i + 192))
    total = total + multiply_words(low, S46(scales))
    low = multiply_bytes(q >> np.uint8(4), load_pair(acts, i + 160, i + 224))
    total = total + multiply_words(low, S57(scales))
    return low_half(total) + high_half(total)


@jit
def avx2_q4_k(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    """Rows of Q4_K with tokens: raw [m, bytes]; acts [t, n]; act_d [t, blocks]; bsums [t, n/16]; out [t, m]."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes, least = fill(ZERO, 8), fill(ZERO, 4)
            for b in range(blocks):
                at, i = (r * blocks + b) * Q4_K_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                prefetch(raw, at + AHEAD + 64)
                scales, mins = unpack_scales(raw, at + 4)
                d = decode_half(reinterpret(load(raw, at, 4), np.uint16))
                step, low = get(act_d, i) * first(d), get(act_d, i) * first(high_half(d))
                total = total_q4_k(keep, raw, at + Q4_K_QS, acts, 256 * i, convert(scales, np.int16))
                lanes = fma(fill(step, 8), convert(total, np.float32), lanes)
                sums = load(bsums, 16 * i, 16)
                taken = multiply_words(convert(mins, np.int16), EVEN(sums) + ODD(sums))
                least = fma(fill(-low, 4), convert(taken, np.float32), least)
            put(out, t * m + r, fold8(lanes) + fold4(least))


@inlined
def total_q6_k_half(raw: Bytes, ql: int, qh: int, acts: Codes, i: int, a: Lanes, b: Lanes) -> Lanes:
    """The integers of 128 weights in 16 lanes, codes as 0..63; a, b: the scales of the first 64, of the rest."""
    low, high = load(raw, ql, 64), load(raw, qh, 32)
    twice = reinterpret(join(high, high), np.uint16)
    top = reinterpret(twice << UP(), np.uint8) & np.uint8(0x30)
    total = multiply_words(multiply_bytes((low & np.uint8(15)) | top, load(acts, i, 64)), a)
    top = reinterpret(twice >> DOWN(), np.uint8) & np.uint8(0x30)
    return total + multiply_words(multiply_bytes((low >> np.uint8(4)) | top, load(acts, i + 64, 64)), b)


@jit
def avx2_q6_k(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    """Rows of Q6_K with tokens: raw [m, bytes]; acts [t, n]; act_d [t, blocks]; bsums [t, n/16]; out [t, m]."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes = fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * Q6_K_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                prefetch(raw, at + AHEAD + 64)
                prefetch(raw, at + AHEAD + 128)
                scales = convert(reinterpret(load(raw, at + SCALES, 16), np.int8), np.int16)
                total = total_q6_k_half(raw, at, at + QH, acts, 256 * i, S0123(scales), S4567(scales))
                total = total + total_q6_k_half(
                    raw, at + 64, at + QH + 32, acts, 256 * i + 128, S89AB(scales), SCDEF(scales)
                )
                too_many = multiply_words(load(bsums, 16 * i, 16), scales) << np.int32(5)
                total8 = low_half(total) + high_half(total) - too_many
                d = first(decode_half(reinterpret(load(raw, at + D, 2), np.uint16)))
                lanes = fma(fill(get(act_d, i) * d, 8), convert(total8, np.float32), lanes)
            put(out, t * m + r, fold8(lanes))


@inlined
def add_in_turn(result: Any, lanes: Lanes) -> Any:
    """result + lane 0, + lane 1, ... + lane 7."""
    each = stack(np.float32, 8)
    store(each, 0, lanes)
    for k in range(8):
        result += get(each, k)
    return result


@jit
def generic_q4_k(raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, fused: bool, out: Floats) -> None:
    """Rows of Q4_K with tokens; acts turned."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes, least = fill(ZERO, 8), fill(ZERO, 4)
            for b in range(blocks):
                at, i = (r * blocks + b) * Q4_K_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                prefetch(raw, at + AHEAD + 64)
                scales, mins = unpack_scales(raw, at + 4)
                d = decode_half(reinterpret(load(raw, at, 4), np.uint16))
                step, low = get(act_d, i) * first(d), get(act_d, i) * first(high_half(d))
                total = total_q4_k(TURN, raw, at + Q4_K_QS, acts, 256 * i, convert(scales, np.int16))
                lanes = madd(fused, fill(step, 8), convert(total, np.float32), lanes)
                sums = load(bsums, 16 * i, 16)
                taken = multiply_words(convert(mins, np.int16), EVEN(sums) + ODD(sums))
                pair = low_half(taken) + high_half(taken)
                all_taken = fill(first(low_half(pair) + high_half(pair)), 4)
                least = madd(fused, fill(-low, 4), convert(all_taken, np.float32), least)
            put(out, t * m + r, add_in_turn(first(least), lanes))


@inlined
def generic_q6_k_half(
    raw: Bytes, ql: int, qh: int, acts: Codes, twos: Shorts, i: int, a: Lanes, b: Lanes
) -> Lanes:
    """The integers of 128 weights in 16 lanes, every eighth weight; twos: 32 times the sums of 2 activations."""
    low, high = TURN(load(raw, ql, 64)), TURN_HALF(load(raw, qh, 32))
    twice = reinterpret(join(high, high), np.uint16)
    top = reinterpret(twice << UP(), np.uint8) & np.uint8(0x30)
    pairs = multiply_bytes((low & np.uint8(15)) | top, load(acts, i, 64)) - load(twos, i // 2, 32)
    total = multiply_words(pairs, a)
    top = reinterpret(twice >> DOWN(), np.uint8) & np.uint8(0x30)
    pairs = multiply_bytes((low >> np.uint8(4)) | top, load(acts, i + 64, 64))
    return total + multiply_words(pairs - load(twos, i // 2 + 32, 32), b)


@jit
def generic_q6_k(raw: Bytes, acts: Codes, act_d: Floats, twos: Shorts, fused: bool, out: Floats) -> None:
    """Rows of Q6_K with tokens; acts turned, twos [t, n/2]: 32 times the sums of 2 of them."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes = fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * Q6_K_BYTES, t * blocks + b
                prefetch(raw, at + AHEAD)
                prefetch(raw, at + AHEAD + 64)
                prefetch(raw, at + AHEAD + 128)
                scales = convert(reinterpret(load(raw, at + SCALES, 16), np.int8), np.int16)
                total = generic_q6_k_half(raw, at, at + QH, acts, twos, 256 * i, G01(scales), G23(scales))
                total = total + generic_q6_k_half(
                    raw, at + 64, at + QH + 32, acts, twos, 256 * i + 128, G45(scales), G67(scales)
                )
                total8 = low_half(total) + high_half(total)
                d = first(decode_half(reinterpret(load(raw, at + D, 2), np.uint16)))
                lanes = madd(fused, fill(get(act_d, i) * d, 8), convert(total8, np.float32), lanes)
            put(out, t * m + r, add_in_turn(ZERO, lanes))
