"""The orders `avx2` and `generic` on vectors for sub-blocks of 32 levels: IQ4_NL, MXFP4, and IQ4_XS in generic.

4 rows at a time. The low nibbles of their 16 bytes make one vector, weights 0 to 15 of each row, the high ones
another; so lanes 0 to 3 of a row are in one, lanes 4 to 7 in the other, and nothing is shuffled. Levels are taken as
unsigned, `bias` too large; `fours` starts the lanes at what that is too much.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import add_fours, add_small_fours, fma, table
from refimpl.arith.simd_lanes import constants, convert, join, permutation, reinterpret
from refimpl.arith.simd_memory import get, load, peek, prefetch, stack, store
from refimpl.dots.small_simd import HIGH_1, HIGH_2, LOW_1, LOW_2, load_steps
from refimpl.dots.super_simd import madd
from refimpl.dots.unpack_simd import read_half
from refimpl.quants.formats import IQ4_NL, IQ4_XS, MXFP4
from refimpl.quants.levels import FP4_VALUES, IQ4_VALUES

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

ZERO = np.float32(0)
IQ4_BIAS, FP4_BIAS = 128, 12
IQ4_NL_BYTES, IQ4_NL_QS = IQ4_NL.block.itemsize, IQ4_NL.offset("qs")
MXFP4_BYTES, MXFP4_QS = MXFP4.block.itemsize, MXFP4.offset("qs")
IQ4_XS_BYTES, IQ4_XS_QS = IQ4_XS.block.itemsize, IQ4_XS.offset("qs")
IQ4_XS_HIGH, IQ4_XS_LOW = IQ4_XS.offset("scales_h"), IQ4_XS.offset("scales_l")

read_iq4 = table([int(v) + IQ4_BIAS for v in IQ4_VALUES])
read_fp4 = table([int(v) + FP4_BIAS for v in FP4_VALUES])
EACH_4 = permutation([k for k in range(4) for _ in range(4)])
EACH_8 = permutation([k for k in range(4) for _ in range(8)])
TWICE_4 = permutation([k // 2 for k in range(8)])
TWICE_8 = permutation([k // 2 for k in range(16)])
# 32 bytes of two sub-blocks twice, each 16 for the low nibbles and again for the high ones
IN_TURN_LOW, IN_TURN_HIGH = (permutation([h + k // 32 * 16 + k % 16 for k in range(64)]) for h in (0, 32))
IS_LOW = constants("uint8", [k // 16 % 2 for k in range(64)])
NIBBLES, PAIRS = constants("uint8", [0, 4] * 4), constants("uint16", [2 * k for k in range(8)])
BY_SUB_BLOCK = permutation([8 * (k % 4) + k // 4 for k in range(32)])  # [4 rows, 8] -> [8, 4 rows]


@inlined
def load_rows(raw: Bytes, at: Any, row: Any) -> Lanes:
    """16 bytes of each of 4 rows: uint8 [64]."""
    a, b = join(load(raw, at, 16), load(raw, at + row, 16)), load(raw, at + 2 * row, 16)
    return join(a, join(b, load(raw, at + 3 * row, 16)))


@inlined
def four_times(v: Lanes) -> Lanes:
    return join(join(v, v), join(v, v))


@inlined
def total_half(add: Any, codes: Lanes, acts: Codes, fours: Ints, i: Any) -> Lanes:
    """The integers of half a sub-block of 4 rows, int32 [4 x 4]; activations from i on."""
    start = four_times(load(fours, i // 4, 4))
    return add(start, reinterpret(codes, np.uint8), four_times(load(acts, i, 16)))


@inlined
def total_rows(add: Any, read: Any, raw: Bytes, at: Any, row: Any, acts: Codes, fours: Ints, i: Any) -> Any:
    """The integers of a sub-block of 4 rows whose codes lie at a byte: lanes 0 to 3, and 4 to 7, int32 [4 x 4] each."""
    q = load_rows(raw, at, row)
    low = total_half(add, read(q & np.uint8(15)), acts, fours, i)
    return low, total_half(add, read(q >> np.uint8(4)), acts, fours, i + 16)


@inlined
def fold(low: Lanes, high: Lanes) -> Lanes:
    """Four sums of 8 lanes each: see avx2.fold. Of integers, too."""
    v = high + low
    v = LOW_2(v) + HIGH_2(v)
    return LOW_1(v) + HIGH_1(v)


@inlined
def steps_of_powers(raw: Bytes, at: Any, row: Any) -> Lanes:
    """The halved power of two that a byte of 4 rows stands for, float32 [4]: see bits.decode_e8m0_half."""
    a, b = load(raw, at, 1), load(raw, at + row, 1)
    c, d = load(raw, at + 2 * row, 1), load(raw, at + 3 * row, 1)
    e = convert(join(join(a, b), join(c, d)), np.uint32)
    small = fill(np.uint32(0x200000), 4) << (e & np.uint32(1))
    return reinterpret(select(e < np.uint32(2), small, (e - np.uint32(1)) << np.uint32(23)), np.float32)


@inlined
def prefetch_rows(raw: Bytes, at: Any, row: Any) -> None:
    """Ask for the same place of the next 4 rows: of these rows, a place ahead is one that another has read."""
    for k in range(4):
        prefetch(raw, at + (k + 4) * row)


@inlined
def add_block(
    add: Any, read: Any, steps: Any, raw: Bytes, at: Any, qs: int, row: Any, acts: Codes, act_d: Floats, fours: Ints,
    i: Any, low: Lanes, high: Lanes,
) -> Any:  # fmt: skip
    """Lanes 0 to 3 and 4 to 7 of 4 rows, plus a block and the token's block i."""
    a, b = total_rows(add, read, raw, at + qs, row, acts, fours, 32 * i)
    step = EACH_4(steps(raw, at, row) * fill(get(act_d, i), 4))
    return fma(step, convert(a, np.float32), low), fma(step, convert(b, np.float32), high)


@inlined
def multiply_by_twos(
    add: Any, read: Any, steps: Any, size: int, qs: int, raw: Bytes, acts: Codes, act_d: Floats, fours: Ints,
    out: Floats,
) -> None:  # fmt: skip
    """avx2.add_by_twos of blocks of `size` bytes, whose codes lie at byte qs; 4 rows or more."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks * size
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            low, high, low_2, high_2 = fill(ZERO, 16), fill(ZERO, 16), fill(ZERO, 16), fill(ZERO, 16)
            i = t * blocks
            for b in range(0, blocks - 1, 2):
                at = r * row + b * size
                prefetch_rows(raw, at, row)
                low, high = add_block(
                    add, read, steps, raw, at, qs, row, acts, act_d, fours, i + b, low, high
                )
                low_2, high_2 = add_block(
                    add, read, steps, raw, at + size, qs, row, acts, act_d, fours, i + b + 1, low_2, high_2
                )
            result = fold(low + low_2, high + high_2)
            if blocks % 2:
                at = r * row + (blocks - 1) * size
                a, c = total_rows(add, read, raw, at + qs, row, acts, fours, 32 * (i + blocks - 1))
                step = steps(raw, at, row) * fill(get(act_d, i + blocks - 1), 4)
                result = fma(step, convert(fold(a, c), np.float32), result)
            store(out, t * m + r, result)


@inlined
def multiply_generic(
    add: Any, read: Any, steps: Any, size: int, qs: int, raw: Bytes, acts: Codes, act_d: Floats, fours: Ints,
    fused: bool, out: Floats,
) -> None:  # fmt: skip
    """generic.add_blocks; 4 rows or more."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks * size
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            result = fill(ZERO, 4)
            for b in range(blocks):
                at, i = r * row + b * size, t * blocks + b
                prefetch_rows(raw, at, row)
                low, high = total_rows(add, read, raw, at + qs, row, acts, fours, 32 * i)
                step = steps(raw, at, row) * fill(get(act_d, i), 4)
                result = madd(fused, step, convert(fold(low, high), np.float32), result)
            store(out, t * m + r, result)


@inlined
def unpack_scales(raw: Bytes, at: Any) -> Lanes:
    """The 8 scales of a block of IQ4_XS: int16 [8]."""
    low = (TWICE_4(load(raw, at + IQ4_XS_LOW, 4)) >> NIBBLES()) & np.uint8(15)
    high = (fill(peek(raw, at + IQ4_XS_HIGH, np.uint16), 8) >> PAIRS()) & np.uint16(3)
    scales = convert(low, np.uint16) | (high << np.uint16(4))
    return reinterpret(scales, np.int16) - np.int16(32)


@inlined
def unpack_iq4_xs(raw: Bytes, at: Any, q: Bytes, i: Any) -> Any:
    """As unpack_simd.unpack_X: levels + 128."""
    for k in range(2):
        v = load(raw, at + IQ4_XS_QS + 64 * k, 64)
        low, high = IN_TURN_LOW(v), IN_TURN_HIGH(v)
        store(
            q,
            i + 128 * k,
            reinterpret(
                read_iq4(select(IS_LOW() == np.uint8(0), low & np.uint8(15), low >> np.uint8(4))), np.uint8
            ),
        )
        store(
            q,
            i + 128 * k + 64,
            reinterpret(
                read_iq4(select(IS_LOW() == np.uint8(0), high & np.uint8(15), high >> np.uint8(4))), np.uint8
            ),
        )
    scales = TWICE_8(unpack_scales(raw, at))
    return scales, scales << np.int16(7), read_half(raw, at), ZERO


@jit
def avx2_iq4_nl(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, out: Floats) -> None:
    multiply_by_twos(add_fours, read_iq4, load_steps, IQ4_NL_BYTES, IQ4_NL_QS, raw, acts, act_d, fours, out)


@jit
def generic_iq4_nl(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, fused: bool, out: Floats) -> None:
    multiply_generic(
        add_fours, read_iq4, load_steps, IQ4_NL_BYTES, IQ4_NL_QS, raw, acts, act_d, fours, fused, out
    )


@jit
def avx2_mxfp4(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, out: Floats) -> None:
    multiply_by_twos(
        add_small_fours, read_fp4, steps_of_powers, MXFP4_BYTES, MXFP4_QS, raw, acts, act_d, fours, out
    )


@jit
def generic_mxfp4(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, fused: bool, out: Floats) -> None:
    multiply_generic(
        add_small_fours, read_fp4, steps_of_powers, MXFP4_BYTES, MXFP4_QS, raw, acts, act_d, fours, fused, out
    )


@jit
def generic_iq4_xs(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, fused: bool, out: Floats) -> None:
    """Rows of IQ4_XS with tokens, 4 rows or more: see generic.add_sub_blocks."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row, steps = blocks * IQ4_XS_BYTES, stack(np.float32, 32)
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            result = fill(ZERO, 4)
            for b in range(blocks):
                at, i = r * row + b * IQ4_XS_BYTES, t * blocks + b
                prefetch_rows(raw, at, row)
                prefetch_rows(raw, at + 64, row)
                one, two = unpack_scales(raw, at), unpack_scales(raw, at + row)
                three, four = unpack_scales(raw, at + 2 * row), unpack_scales(raw, at + 3 * row)
                scales = convert(convert(join(join(one, two), join(three, four)), np.int32), np.float32)
                step = load_steps(raw, at, row) * fill(get(act_d, i), 4)
                store(steps, 0, BY_SUB_BLOCK(EACH_8(step) * scales))
                for s in range(8):
                    qs = at + IQ4_XS_QS + 16 * s
                    low, high = total_rows(add_fours, read_iq4, raw, qs, row, acts, fours, 256 * i + 32 * s)
                    total = convert(fold(low, high), np.float32)
                    result = madd(fused, load(steps, 4 * s, 4), total, result)
            store(out, t * m + r, result)
