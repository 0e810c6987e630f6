"""The orders `avx2` and `generic` on vectors for blocks of 32: the bits of avx2_jit and generic_jit.

4 rows at a time: a row's block is 8 lanes of integers. Codes are taken as unsigned, `bias` too large, and what that is
too much has been taken off before: `fours` holds -bias times the sums of 4 activations each, where the lanes start.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import HAS_FOURS, add_fours, add_small_fours, fma
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    decode_half,
    join,
    mask_from,
    permutation,
    reinterpret,
)
from refimpl.arith.simd_memory import get, load, peek, prefetch, store
from refimpl.dots.super_simd import madd
from refimpl.quants.formats import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

ROWS = 4  # the fewest that the kernels take
ZERO = np.float32(0)
PLAIN, WITH_M, IN_TURN = 0, 1, 2  # sum += d*d' * total; the same + m*s; sum += total*d * d'
Q8_0_BYTES, Q8_0_QS = Q8_0.block.itemsize, Q8_0.offset("qs")
Q4_0_BYTES, Q4_0_QS = Q4_0.block.itemsize, Q4_0.offset("qs")
Q4_1_BYTES, Q4_1_QS = Q4_1.block.itemsize, Q4_1.offset("qs")
Q5_0_BYTES, Q5_0_QH, Q5_0_QS = Q5_0.block.itemsize, Q5_0.offset("qh"), Q5_0.offset("qs")
Q5_1_BYTES, Q5_1_QH, Q5_1_QS = Q5_1.block.itemsize, Q5_1.offset("qh"), Q5_1.offset("qs")

EACH_8 = permutation([k for k in range(4) for _ in range(8)])
FOUR_TIMES = permutation([*range(8)] * 4)
BY_HALVES = constants("uint64", [0, 0, 4, 4])


def _half(lanes: int, high: int) -> Any:
    """The lower or upper half of each of 4 groups of lanes."""
    return permutation([g * lanes + high * lanes // 2 + k for g in range(4) for k in range(lanes // 2)])


LOW_4, HIGH_4, LOW_2, HIGH_2, LOW_1, HIGH_1 = (_half(n, high) for n in (8, 4, 2) for high in (0, 1))


@jit
def sum_fours(acts: Codes, bias: int) -> Ints:
    """Minus bias times the sums of 4 activations: [t, n] int8 -> [t, n/4] int32; n a multiple of 32."""
    out = np.empty((acts.shape[0], acts.shape[1] // 4), np.int32)
    for i in range(0, acts.size, 32):
        fours = add_small_fours(fill(np.int32(0), 8), fill(np.uint8(1), 32), load(acts, i, 32))
        store(out, i // 4, fours * np.int32(-bias))
    return out


@inlined
def codes_q8_0(raw: Bytes, at: int) -> Lanes:
    """uint8 [32]: code + 128."""
    return load(raw, at + Q8_0_QS, 32) ^ np.uint8(128)


@inlined
def fold(v: Lanes) -> Lanes:
    """Four sums of 8 lanes each: see avx2.fold."""
    v = HIGH_4(v) + LOW_4(v)
    v = LOW_2(v) + HIGH_2(v)
    return LOW_1(v) + HIGH_1(v)


@inlined
def load_nibbles(raw: Bytes, at: int) -> Lanes:
    """uint8 [32]: the low nibbles of 16 bytes, then the high ones."""
    q = load(raw, at, 16)
    return reinterpret(reinterpret(join(q, q), np.uint64) >> BY_HALVES(), np.uint8) & np.uint8(15)


@inlined
def codes_q4_0(raw: Bytes, at: int) -> Lanes:
    """uint8 [32]: code + 8."""
    return load_nibbles(raw, at + Q4_0_QS)


@inlined
def codes_q4_1(raw: Bytes, at: int) -> Lanes:
    """uint8 [32]."""
    return load_nibbles(raw, at + Q4_1_QS)


@inlined
def load_fifths(raw: Bytes, qh: int, qs: int) -> Lanes:
    """uint8 [32]: nibbles with a fifth bit; bit k of qh is that of code k."""
    fifth = select(mask_from(peek(raw, qh, np.uint32)), fill(np.uint8(16), 32), np.uint8(0))
    return load_nibbles(raw, qs) | fifth


@inlined
def codes_q5_0(raw: Bytes, at: int) -> Lanes:
    """uint8 [32]: code + 16."""
    return load_fifths(raw, at + Q5_0_QH, at + Q5_0_QS)


@inlined
def codes_q5_1(raw: Bytes, at: int) -> Lanes:
    """uint8 [32]."""
    return load_fifths(raw, at + Q5_1_QH, at + Q5_1_QS)


@inlined
def total_rows(add: Any, codes: Any, raw: Bytes, at: int, row: int, y: Lanes, start: Lanes) -> Lanes:
    """The integers of a block of 4 rows, int32 [4 x 8]; y [32] the activations, start [8] where the lanes start.

    add : add_small_fours; for codes above 127 add_fours
    """
    q = join(
        join(codes(raw, at), codes(raw, at + row)), join(codes(raw, at + 2 * row), codes(raw, at + 3 * row))
    )
    return add(FOUR_TIMES(start), q, join(join(y, y), join(y, y)))


@inlined
def load_steps(raw: Bytes, at: int, row: int) -> Lanes:
    """The fp16 at a byte of 4 rows, float32 [4]."""
    a, b = load(raw, at, 2), load(raw, at + row, 2)
    c, d = load(raw, at + 2 * row, 2), load(raw, at + 3 * row, 2)
    return decode_half(reinterpret(join(join(a, b), join(c, d)), np.uint16))


@inlined
def prefetch_share(raw: Bytes, at: int, size: int, b: int) -> None:
    """Ask for the b-th share of the 4 rows that begin at a byte: as much as 4 blocks are."""
    for k in range(0, 4 * size, 64):
        prefetch(raw, at + 4 * size * b + k)


@inlined
def put_steps(
    raw: Bytes, at: int, row: int, size: int, act_d: Floats, i: int, blocks: int, steps: Floats
) -> None:
    """The steps of 4 rows, each times the token's: float32 [blocks, 4]."""
    for b in range(blocks):
        store(steps, 4 * b, load_steps(raw, at + b * size, row) * fill(get(act_d, i + b), 4))


@inlined
def get_steps(steps: Floats, i: int) -> Lanes:
    """4 steps from i on, each for 8 lanes: from memory, which costs less than shuffles."""
    a, b = fill(get(steps, i), 8), fill(get(steps, i + 1), 8)
    c, d = fill(get(steps, i + 2), 8), fill(get(steps, i + 3), 8)
    return join(join(a, b), join(c, d))


@inlined
def multiply_avx2(
    add: Any,
    codes: Any,
    form: int,
    size: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    act_s: Floats,
    fours: Ints,
    out: Floats,
) -> None:
    """The order avx2: blocks of `size` bytes that begin with d, and m where the form is WITH_M; 4 rows or more."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row, steps = blocks * size, np.empty(4 * blocks, np.float32)
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            lanes, least = fill(ZERO, 32), fill(ZERO, 4)
            if not HAS_FOURS:
                put_steps(raw, r * row, row, size, act_d, t * blocks, blocks, steps)
            for b in range(blocks):
                at, i = r * row + b * size, t * blocks + b
                start_at = fill(np.int32(0), 8) if form == WITH_M else load(fours, 8 * i, 8)
                if HAS_FOURS:
                    for k in range(4):
                        prefetch(raw, at + (k + 4) * row)  # the same place of the next 4 rows
                    step = EACH_8(load_steps(raw, at, row) * fill(get(act_d, i), 4))
                else:
                    prefetch_share(raw, (r + 4) * row, size, b)
                    step = get_steps(steps, 4 * b)
                total = total_rows(add, codes, raw, at, row, load(acts, 32 * i, 32), start_at)
                lanes = fma(step, convert(total, np.float32), lanes)
                if form == WITH_M:
                    least = fma(load_steps(raw, at + 2, row), fill(get(act_s, i), 4), least)
            store(out, t * m + r, fold(lanes) + least if form == WITH_M else fold(lanes))


@inlined
def multiply_generic(
    add: Any,
    codes: Any,
    form: int,
    size: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    act_s: Floats,
    fours: Ints,
    fused: bool,
    out: Floats,
) -> None:
    """The order generic: blocks of `size` bytes that begin with d, and m where the form is WITH_M; 4 rows or more."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks * size
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            result = fill(ZERO, 4)
            for b in range(blocks):
                at, i = r * row + b * size, t * blocks + b
                for k in range(4):
                    prefetch(raw, at + (k + 4) * row)  # the same place of the next 4 rows
                lanes = total_rows(add, codes, raw, at, row, load(acts, 32 * i, 32), load(fours, 8 * i, 8))
                total, d = convert(fold(lanes), np.float32), load_steps(raw, at, row)
                act_step = fill(get(act_d, i), 4)
                if form == WITH_M:
                    low = load_steps(raw, at + 2, row) * fill(get(act_s, i), 4)
                    result = result + madd(fused, d * act_step, total, low)
                elif form == IN_TURN:
                    result = madd(fused, total * d, act_step, result)
                else:
                    result = madd(fused, d * act_step, total, result)
            store(out, t * m + r, result)


@jit
def avx2_q8_0(raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, out: Floats) -> None:
    multiply_avx2(add_fours, codes_q8_0, PLAIN, Q8_0_BYTES, raw, acts, act_d, act_s, fours, out)


@jit
def generic_q8_0(
    raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, fused: bool, out: Floats
) -> None:
    multiply_generic(add_fours, codes_q8_0, PLAIN, Q8_0_BYTES, raw, acts, act_d, act_s, fours, fused, out)


@jit
def avx2_q4_0(raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, out: Floats) -> None:
    multiply_avx2(add_small_fours, codes_q4_0, PLAIN, Q4_0_BYTES, raw, acts, act_d, act_s, fours, out)


@jit
def generic_q4_0(
    raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, fused: bool, out: Floats
) -> None:
    multiply_generic(
        add_small_fours, codes_q4_0, IN_TURN, Q4_0_BYTES, raw, acts, act_d, act_s, fours, fused, out
    )


@jit
def avx2_q4_1(raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, out: Floats) -> None:
    multiply_avx2(add_small_fours, codes_q4_1, WITH_M, Q4_1_BYTES, raw, acts, act_d, act_s, fours, out)


@jit
def generic_q4_1(
    raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, fused: bool, out: Floats
) -> None:
    multiply_generic(
        add_small_fours, codes_q4_1, WITH_M, Q4_1_BYTES, raw, acts, act_d, act_s, fours, fused, out
    )


@jit
def avx2_q5_0(raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, out: Floats) -> None:
    multiply_avx2(add_small_fours, codes_q5_0, PLAIN, Q5_0_BYTES, raw, acts, act_d, act_s, fours, out)


@jit
def generic_q5_0(
    raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, fused: bool, out: Floats
) -> None:
    multiply_generic(
        add_small_fours, codes_q5_0, PLAIN, Q5_0_BYTES, raw, acts, act_d, act_s, fours, fused, out
    )


@jit
def avx2_q5_1(raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, out: Floats) -> None:
    multiply_avx2(add_small_fours, codes_q5_1, WITH_M, Q5_1_BYTES, raw, acts, act_d, act_s, fours, out)


@jit
def generic_q5_1(
    raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, fours: Ints, fused: bool, out: Floats
) -> None:
    multiply_generic(
        add_small_fours, codes_q5_1, WITH_M, Q5_1_BYTES, raw, acts, act_d, act_s, fours, fused, out
    )
