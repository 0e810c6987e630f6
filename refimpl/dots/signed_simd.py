"""The products of IQ2 and IQ3 in the orders `avx2` and `generic` on vectors, row by row: the bits of codebooks_jit.

Factors (factors.py) are left to the callers.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import fill, inlined
from refimpl.arith.simd_dot import fma
from refimpl.arith.simd_lanes import convert, first, high_half, low_half
from refimpl.arith.simd_memory import get, prefetch, put
from refimpl.dots.points_simd import (
    S3_BYTES,
    S_BYTES,
    XS_BYTES,
    XXS3_BYTES,
    XXS_BYTES,
    total_iq2_s,
    total_iq2_xs,
    total_iq2_xxs,
    total_iq3_s,
    total_iq3_xxs,
)
from refimpl.dots.runs_simd import add_all
from refimpl.dots.super_simd import fold8, madd
from refimpl.dots.unpack_simd import read_half
from refimpl.quants.formats import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Floats = NDArray[np.float32]

AHEAD = 4096  # bytes that are asked for before they are read
ZERO = np.float32(0)


@inlined
def multiply_avx2(total: Any, size: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """avx2.add_plain, row by row."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            lanes = fill(ZERO, 8)
            for b in range(blocks):
                at, i = (r * blocks + b) * size, t * blocks + b
                for k in range(0, size, 64):
                    prefetch(raw, at + AHEAD + k)
                v = total(raw, at, acts, 256 * i)
                step, integers = get(act_d, i) * read_half(raw, at), low_half(v) + high_half(v)
                lanes = fma(fill(step, 8), convert(integers, np.float32), lanes)
            put(out, t * m + r, fold8(lanes))


@inlined
def multiply_generic(
    total: Any, size: int, raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats
) -> None:
    """generic.add_blocks, row by row."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    for r in range(m):
        for t in range(tokens):
            result = fill(ZERO, 1)
            for b in range(blocks):
                at, i = (r * blocks + b) * size, t * blocks + b
                for k in range(0, size, 64):
                    prefetch(raw, at + AHEAD + k)
                v = total(raw, at, acts, 256 * i)
                step, integers = (
                    get(act_d, i) * read_half(raw, at),
                    np.float32(add_all(low_half(v) + high_half(v))),
                )
                result = madd(fused, fill(step, 1), fill(integers, 1), result)
            put(out, t * m + r, first(result))


@jit
def avx2_iq2_xxs(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_avx2(total_iq2_xxs, XXS_BYTES, raw, acts, act_d, out)


@jit
def avx2_iq2_xs(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_avx2(total_iq2_xs, XS_BYTES, raw, acts, act_d, out)


@jit
def avx2_iq2_s(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_avx2(total_iq2_s, S_BYTES, raw, acts, act_d, out)


@jit
def avx2_iq3_xxs(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_avx2(total_iq3_xxs, XXS3_BYTES, raw, acts, act_d, out)


@jit
def avx2_iq3_s(raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    multiply_avx2(total_iq3_s, S3_BYTES, raw, acts, act_d, out)


@jit
def generic_iq2_xxs(raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    multiply_generic(total_iq2_xxs, XXS_BYTES, raw, acts, act_d, fused, out)


@jit
def generic_iq2_xs(raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    multiply_generic(total_iq2_xs, XS_BYTES, raw, acts, act_d, fused, out)


@jit
def generic_iq2_s(raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    multiply_generic(total_iq2_s, S_BYTES, raw, acts, act_d, fused, out)


@jit
def generic_iq3_xxs(raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    multiply_generic(total_iq3_xxs, XXS3_BYTES, raw, acts, act_d, fused, out)


@jit
def generic_iq3_s(raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    multiply_generic(total_iq3_s, S3_BYTES, raw, acts, act_d, fused, out)


AVX2 = {
    IQ2_XXS.id: avx2_iq2_xxs,
    IQ2_XS.id: avx2_iq2_xs,
    IQ2_S.id: avx2_iq2_s,
    IQ3_XXS.id: avx2_iq3_xxs,
    IQ3_S.id: avx2_iq3_s,
}
GENERIC = {
    IQ2_XXS.id: generic_iq2_xxs,
    IQ2_XS.id: generic_iq2_xs,
    IQ2_S.id: generic_iq2_s,
    IQ3_XXS.id: generic_iq3_xxs,
    IQ3_S.id: generic_iq3_s,
}
