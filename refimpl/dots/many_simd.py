"""The order `avx2` on vectors for blocks of 32 and many tokens, and `tiled` of IQ4_NL: the bits of avx2_jit, tiled_jit.

Rows are taken apart once, 4 side by side, and meet 4 tokens at a time. Here it is the activations that are taken as
unsigned, 128 too large; what that is too much depends on the weights alone, and is where their lanes start. CPUs that
do not multiply and add 4 bytes at once take words instead: words_simd.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_dot import HAS_FOURS, add_fours, add_small_fours, fma
from refimpl.arith.simd_lanes import convert, join, reinterpret
from refimpl.arith.simd_memory import get, load, store
from refimpl.dots.levels_simd import IQ4_BIAS, IQ4_NL_BYTES, IQ4_NL_QS, four_times, read_iq4
from refimpl.dots.small_simd import (
    EACH_8,
    Q4_0_BYTES,
    Q5_0_BYTES,
    Q8_0_BYTES,
    codes_q4_0,
    codes_q5_0,
    codes_q8_0,
    fold,
    load_nibbles,
    load_steps,
)
from refimpl.dots.words_simd import multiply_by_words
from refimpl.quants.formats import Q4_0, Q5_0, Q8_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

ROWS = TOKENS = 4  # the fewest that the kernels take; so many rows meet at a time
PANEL = 1 << 19  # codes of rows taken apart at a time: they stay in the second cache
TOO_MUCH = 128  # of an activation
ZERO = np.float32(0)


@inlined
def load_codes(codes: Any, bias: int, raw: Bytes, at: Any, row: Any) -> Lanes:
    """The codes of a block of 4 rows: int8 [4 x 32]."""
    low, high = (
        join(codes(raw, at), codes(raw, at + row)),
        join(codes(raw, at + 2 * row), codes(raw, at + 3 * row)),
    )
    return reinterpret(join(low, high) - np.uint8(bias), np.int8)


@inlined
def take_apart(
    codes: Any, size: int, bias: int, raw: Bytes, r: int, groups: int, q: Codes, starts: Ints, steps: Floats
) -> None:
    """Groups of 4 rows from r on, block by block.

    bias   : how much too large the codes are taken
    q      : [groups, blocks, 4 x 32] the codes
    starts : [groups, blocks, 4 x 8] where the lanes start
    steps  : [groups, blocks, 4]
    """
    m, blocks = raw.shape[0], raw.shape[1] // size
    row = blocks * size
    for g in range(groups):
        top = min(r + ROWS * g, m - ROWS) * row
        for b in range(blocks):
            at, i = top + b * size, g * blocks + b
            signed = load_codes(codes, bias, raw, at, row)
            store(q, 128 * i, signed)
            sums = add_small_fours(fill(np.int32(0), 32), fill(np.uint8(1), 128), signed)
            store(starts, 32 * i, sums * np.int32(-TOO_MUCH))
            store(steps, ROWS * i, load_steps(raw, at, row))


@inlined
def add_block(x: Lanes, start: Lanes, step: Lanes, acts: Bytes, act_d: Floats, i: int, lanes: Lanes) -> Lanes:
    """lanes + a block of 4 rows times a block of a token, its i-th of all."""
    total = add_fours(start, four_times(load(acts, 32 * i, 32)), x)
    return fma(step * fill(get(act_d, i), 32), convert(total, np.float32), lanes)


@inlined
def multiply_panel(
    q: Codes, starts: Ints, steps: Floats, r: int, groups: int, acts: Bytes, act_d: Floats, out: Floats
) -> None:
    """Rows taken apart, from r on, with all tokens; acts [t, n] uint8, 128 too large."""
    (tokens, blocks), m = act_d.shape, out.shape[1]
    for first in range(0, tokens, 4):
        t = min(first, tokens - 4)
        for g in range(groups):
            a, b, e, f = fill(ZERO, 32), fill(ZERO, 32), fill(ZERO, 32), fill(ZERO, 32)
            for k in range(blocks):
                i, j = g * blocks + k, t * blocks + k
                x, start, step = (
                    load(q, 128 * i, 128),
                    load(starts, 32 * i, 32),
                    EACH_8(load(steps, 4 * i, 4)),
                )
                a = add_block(x, start, step, acts, act_d, j, a)
                b = add_block(x, start, step, acts, act_d, j + blocks, b)
                e = add_block(x, start, step, acts, act_d, j + 2 * blocks, e)
                f = add_block(x, start, step, acts, act_d, j + 3 * blocks, f)
            at = t * m + min(r + ROWS * g, m - ROWS)
            store(out, at, fold(a))
            store(out, at + m, fold(b))
            store(out, at + 2 * m, fold(e))
            store(out, at + 3 * m, fold(f))


@inlined
def multiply_many(
    codes: Any, size: int, bias: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats
) -> None:
    """Blocks of `size` bytes that begin with d; 4 rows or more with 4 tokens or more."""
    if HAS_FOURS:
        m, n = raw.shape[0], acts.shape[1]
        most = max(1, min(PANEL // (ROWS * n), -(-m // ROWS)))
        q, starts, steps, unsigned = (
            np.empty(most * ROWS * n, np.int8),
            np.empty(most * n, np.int32),
            np.empty(most * ROWS * (n // 32), np.float32),
            np.empty(acts.shape, np.uint8),
        )
        for i in range(0, acts.size, 32):
            store(unsigned, i, reinterpret(load(acts, i, 32), np.uint8) ^ np.uint8(TOO_MUCH))
        for r in range(0, m, most * ROWS):
            groups = min(most, -(-(m - r) // ROWS))
            take_apart(codes, size, bias, raw, r, groups, q, starts, steps)
            multiply_panel(q, starts, steps, r, groups, unsigned, act_d, out)
    else:
        multiply_by_words(codes, size, bias, raw, acts, act_d, out)


@jit
def many_q8_0(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_many(codes_q8_0, Q8_0_BYTES, 128, raw, acts, act_d, out)


@jit
def many_q4_0(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_many(codes_q4_0, Q4_0_BYTES, 8, raw, acts, act_d, out)


@jit
def many_q5_0(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_many(codes_q5_0, Q5_0_BYTES, 16, raw, acts, act_d, out)


@inlined
def codes_iq4_nl(raw: Bytes, at: Any) -> Lanes:
    """uint8 [32]: level + 128."""
    return reinterpret(read_iq4(load_nibbles(raw, at + IQ4_NL_QS)), np.uint8)


@jit
def many_iq4_nl(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """In the order tiled, which is avx2's of the others: avx2.add_plain."""
    multiply_many(codes_iq4_nl, IQ4_NL_BYTES, IQ4_BIAS, raw, acts, act_d, out)


KERNELS = {Q8_0.id: many_q8_0, Q4_0.id: many_q4_0, Q5_0.id: many_q5_0}


def multiply(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """Multiply rows of blocks of a format in KERNELS with tokens."""
    KERNELS[fmt](raw, acts, act_d, out)
