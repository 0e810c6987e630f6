"""The orders `avx2` and `generic` of Q1_0 and Q2_0 on vectors, 4 rows at a time: the bits of avx2_jit and generic_jit.

Their blocks meet several blocks of 32 activations, so each has sums within. Codes are taken as unsigned, 1 too large:
see small_simd.py. A byte of Q2_0 holds 4 weights side by side; sort() lays activations out as its shifts find them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import add_small_fours, fma
from refimpl.arith.simd_lanes import convert, join, mask_from, permutation
from refimpl.arith.simd_memory import get, load, peek, prefetch, store
from refimpl.dots.small_simd import EACH_8, fold, load_steps, sum_fours, total_rows
from refimpl.dots.super_simd import madd
from refimpl.quants.formats import Q1_0, Q2_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

ROWS = 4  # the fewest that the kernels take
ZERO = np.float32(0)
Q1_0_BYTES, Q1_0_QS = Q1_0.block.itemsize, Q1_0.offset("qs")
Q2_0_BYTES, Q2_0_QS = Q2_0.block.itemsize, Q2_0.offset("qs")
FOUR_TIMES_16 = permutation([*range(16)] * 4)
FOUR_TIMES_4 = permutation([*range(4)] * 4)
# Of 4 lanes for each of 4 rows: those two that belong to the first 32 weights, and those of the others
ONE, TWO, THREE, FOUR = (permutation([4 * r + k for r in range(4)]) for k in range(4))


@inlined
def codes_q1_0(raw: Bytes, at: Any) -> Lanes:
    """uint8 [32]: code + 1, of 32 bits."""
    return select(mask_from(peek(raw, at, np.uint32)), fill(np.uint8(2), 32), fill(np.uint8(0), 32))


@inlined
def read_q1_0(raw: Bytes, at: Any, row: Any, acts: Codes, fours: Ints, i: Any, k: Any) -> Lanes:
    """The integers of the block's 32 weights k of 4 rows, int32 [4 x 8]; i: the first of its 4 activation blocks."""
    y, start = load(acts, 32 * (i + k), 32), load(fours, 8 * (i + k), 8)
    return total_rows(add_small_fours, codes_q1_0, raw, at + Q1_0_QS + 4 * k, row, y, start)


@inlined
def prefetch_rows(raw: Bytes, at: Any, row: Any) -> None:
    """The same place of the next 4 rows."""
    for k in range(4):
        prefetch(raw, at + (k + 4) * row)


@jit
def avx2_q1_0(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, out: Floats) -> None:
    """Rows of Q1_0 with tokens, 4 rows or more. See avx2.add_blocks_of_blocks."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks // 4 * Q1_0_BYTES
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            lanes = fill(ZERO, 32)
            for b in range(blocks // 4):
                at, i = r * row + b * Q1_0_BYTES, t * blocks + 4 * b
                prefetch_rows(raw, at, row)
                total = convert(read_q1_0(raw, at, row, acts, fours, i, 0), np.float32)
                part = fill(get(act_d, i), 32) * total
                for k in range(1, 4):
                    total = convert(read_q1_0(raw, at, row, acts, fours, i, k), np.float32)
                    part = fma(fill(get(act_d, i + k), 32), total, part)
                lanes = fma(EACH_8(load_steps(raw, at, row)), part, lanes)
            store(out, t * m + r, fold(lanes))


@jit
def generic_q1_0(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, fused: bool, out: Floats) -> None:
    """Rows of Q1_0 with tokens, 4 rows or more. See generic.add_blocks_of_blocks."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks // 4 * Q1_0_BYTES
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            result = fill(ZERO, 4)
            for b in range(blocks // 4):
                at, i = r * row + b * Q1_0_BYTES, t * blocks + 4 * b
                prefetch_rows(raw, at, row)
                part = fill(ZERO, 4)
                for k in range(4):
                    total = convert(fold(read_q1_0(raw, at, row, acts, fours, i, k)), np.float32)
                    part = madd(fused, fill(get(act_d, i + k), 4), total, part)
                result = madd(fused, load_steps(raw, at, row), part, result)
            store(out, t * m + r, result)


@inlined
def total_q2_0(raw: Bytes, at: Any, row: Any, acts: Codes, sums: Ints, i: Any) -> Lanes:
    """The integers of a block of 4 rows, int32 [4 x 4]: a lane has those of 16 weights; i: its first activation."""
    q = join(
        join(load(raw, at, 16), load(raw, at + row, 16)),
        join(load(raw, at + 2 * row, 16), load(raw, at + 3 * row, 16)),
    )
    three, total = np.uint8(3), FOUR_TIMES_4(load(sums, i // 16, 4))
    total = add_small_fours(total, q & three, FOUR_TIMES_16(load(acts, i, 16)))
    total = add_small_fours(total, (q >> np.uint8(2)) & three, FOUR_TIMES_16(load(acts, i + 16, 16)))
    total = add_small_fours(total, (q >> np.uint8(4)) & three, FOUR_TIMES_16(load(acts, i + 32, 16)))
    return add_small_fours(total, q >> np.uint8(6), FOUR_TIMES_16(load(acts, i + 48, 16)))


@jit
def generic_q2_0(raw: Bytes, acts: Codes, act_d: Floats, sums: Ints, fused: bool, out: Floats) -> None:
    """Rows of Q2_0 with tokens, 4 rows or more; acts sorted, sums of 16. See generic.add_blocks_of_blocks."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks // 2 * Q2_0_BYTES
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            result = fill(ZERO, 4)
            for b in range(blocks // 2):
                at, i = r * row + b * Q2_0_BYTES, t * blocks + 2 * b
                prefetch_rows(raw, at, row)
                v = total_q2_0(raw, at + Q2_0_QS, row, acts, sums, 32 * i)
                first = convert(ONE(v) + TWO(v), np.float32)
                second = convert(THREE(v) + FOUR(v), np.float32)
                part = madd(fused, fill(get(act_d, i), 4), first, fill(ZERO, 4))
                part = madd(fused, fill(get(act_d, i + 1), 4), second, part)
                result = madd(fused, load_steps(raw, at, row), part, result)
            store(out, t * m + r, result)


def sort(acts: Codes) -> Codes:
    """Of each 64 activations every fourth, from the first, second, third and fourth on. [t, n] int8"""
    return np.ascontiguousarray(acts.reshape(len(acts), -1, 16, 4).swapaxes(2, 3)).reshape(acts.shape)


def multiply_generic(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    """Multiply rows of Q1_0 or Q2_0 with tokens, 4 rows or more."""
    fours = sum_fours(acts, 1)
    if fmt == Q1_0.id:
        generic_q1_0(raw, acts, act_d, fours, fused, out)
    else:
        sums = fours.reshape(len(acts), -1, 4).sum(2, dtype=np.int32)
        generic_q2_0(raw, sort(acts), act_d, sums, fused, out)


def multiply_avx2(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """Multiply rows of Q1_0 or Q2_0 with tokens, 4 rows or more. See avx2.add_as_generic."""
    if fmt == Q1_0.id:
        avx2_q1_0(raw, acts, act_d, sum_fours(acts, 1), out)
    else:
        multiply_generic(fmt, raw, acts, act_d, True, out)


FORMATS = (Q1_0.id, Q2_0.id)
