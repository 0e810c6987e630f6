"""The orders `avx2` and `generic` of NVFP4 on vectors, 4 rows at a time: see levels_simd.py.

8 bytes hold 16 weights. Of the 16 bytes for 32 weights, the low nibbles are the weights 0 to 7 and 16 to 23, the high
ones the others; sort() lays activations out so. Lanes 0, 1, 4, 5 of a row are in one vector, 2, 3, 6, 7 in the other.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined, select
from refimpl.arith.simd_dot import add_small_fours, fma
from refimpl.arith.simd_lanes import convert, join, permutation, reinterpret
from refimpl.arith.simd_memory import get, load, store
from refimpl.dots.levels_simd import prefetch_rows, read_fp4, total_rows
from refimpl.dots.small_simd import HIGH_1, HIGH_2, LOW_1, LOW_2
from refimpl.dots.super_simd import madd
from refimpl.quants.formats import NVFP4

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

BYTES, QS = NVFP4.block.itemsize, NVFP4.offset("qs")
ZERO = np.float32(0)
TINY_STEP, BIAS = np.float32(2.0**-10), np.uint32(119 << 23)
# Of the steps of 4 rows, 4 each: those of two sub-blocks, each for two lanes; and those of one sub-block
FIRST, SECOND = (permutation([4 * r + 2 * h + k // 2 for r in range(4) for k in range(4)]) for h in (0, 1))
ONE, TWO, THREE, FOUR = (permutation([4 * r + g for r in range(4)]) for g in range(4))


def sort(acts: Codes) -> Codes:
    """Of each 32 activations 0 to 7 and 16 to 23, then the others. [t, n] int8"""
    return np.ascontiguousarray(acts.reshape(len(acts), -1, 2, 2, 8).swapaxes(2, 3)).reshape(acts.shape)


@inlined
def load_steps(raw: Bytes, at: Any, row: Any) -> Lanes:
    """The 4 steps of a block of 4 rows, float32 [4 x 4]: see bits.decode_ue4m3."""
    a, b = join(load(raw, at, 4), load(raw, at + row, 4)), load(raw, at + 2 * row, 4)
    code = convert(join(a, join(b, load(raw, at + 3 * row, 4))), np.uint32)
    normal = reinterpret(((code & np.uint32(127)) << np.uint32(20)) + BIAS, np.float32)
    tiny = convert(code & np.uint32(7), np.float32) * TINY_STEP
    value = select((code & np.uint32(0x78)) == np.uint32(0), tiny, normal)
    return select(code == np.uint32(0x7F), ZERO, value)


@jit
def avx2_nvfp4(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, out: Floats) -> None:
    """Rows of NVFP4 with tokens, 4 rows or more; acts and fours sorted. See avx2.add_halves."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks // 2 * BYTES
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            low, high = fill(ZERO, 16), fill(ZERO, 16)
            for b in range(blocks // 2):
                at, i = r * row + b * BYTES, t * blocks + 2 * b
                prefetch_rows(raw, at, row)
                steps = load_steps(raw, at, row)
                x, y = total_rows(add_small_fours, read_fp4, raw, at + QS, row, acts, fours, 32 * i)
                step = FIRST(steps) * fill(get(act_d, i), 16)
                low, high = fma(step, convert(x, np.float32), low), fma(step, convert(y, np.float32), high)
                x, y = total_rows(add_small_fours, read_fp4, raw, at + QS + 16, row, acts, fours, 32 * i + 32)
                step = SECOND(steps) * fill(get(act_d, i + 1), 16)
                low, high = fma(step, convert(x, np.float32), low), fma(step, convert(y, np.float32), high)
            v = (HIGH_2(low) + LOW_2(low)) + (HIGH_2(high) + LOW_2(high))
            store(out, t * m + r, LOW_1(v) + HIGH_1(v))


@inlined
def add_groups(fused: bool, x: Lanes, y: Lanes, first: Lanes, second: Lanes, result: Lanes) -> Lanes:
    """The result of 4 rows plus two sub-blocks of 16 weights under these steps, one after the other."""
    v = LOW_2(x) + LOW_2(y)
    result = madd(fused, first, convert(LOW_1(v) + HIGH_1(v), np.float32), result)
    v = HIGH_2(x) + HIGH_2(y)
    return madd(fused, second, convert(LOW_1(v) + HIGH_1(v), np.float32), result)


@jit
def generic_nvfp4(raw: Bytes, acts: Codes, act_d: Floats, fours: Ints, fused: bool, out: Floats) -> None:
    """Rows of NVFP4 with tokens, 4 rows or more; acts and fours sorted. See generic.add_groups."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    row = blocks // 2 * BYTES
    for start in range(0, m, 4):
        r = min(start, m - 4)
        for t in range(tokens):
            result = fill(ZERO, 4)
            for b in range(blocks // 2):
                at, i = r * row + b * BYTES, t * blocks + 2 * b
                prefetch_rows(raw, at, row)
                steps = load_steps(raw, at, row)
                x, y = total_rows(add_small_fours, read_fp4, raw, at + QS, row, acts, fours, 32 * i)
                near = steps * fill(get(act_d, i), 16)
                result = add_groups(fused, x, y, ONE(near), TWO(near), result)
                x, y = total_rows(add_small_fours, read_fp4, raw, at + QS + 16, row, acts, fours, 32 * i + 32)
                far = steps * fill(get(act_d, i + 1), 16)
                result = add_groups(fused, x, y, THREE(far), FOUR(far), result)
            store(out, t * m + r, result)
