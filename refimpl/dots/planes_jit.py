"""Rows of blocks taken apart, for kernels: the twin of planes.py, one row at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_e8m0_half, decode_half, decode_ue4m3
from refimpl.arith.jit import jit
from refimpl.quants import q2_k_jit as q2k
from refimpl.quants import q3_k_jit as q3k
from refimpl.quants import q4_0_jit as q40
from refimpl.quants import q4_k_jit as q4k
from refimpl.quants import q5_0_jit as q50
from refimpl.quants import q5_k_jit as q5k
from refimpl.quants import q6_k_jit as q6k
from refimpl.quants import tq1_0_jit as tq1
from refimpl.quants import tq2_0_jit as tq2
from refimpl.quants.formats import (
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    NVFP4,
    Q1_0,
    Q2_0,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TQ1_0,
    TQ2_0,
)
from refimpl.quants.levels import FP4_VALUES, IQ4_VALUES

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

Q8_0_ID, Q4_0_ID, Q4_1_ID, Q5_0_ID, Q5_1_ID = Q8_0.id, Q4_0.id, Q4_1.id, Q5_0.id, Q5_1.id
Q2_K_ID, Q3_K_ID, Q4_K_ID, Q5_K_ID, Q6_K_ID = Q2_K.id, Q3_K.id, Q4_K.id, Q5_K.id, Q6_K.id
Q8_0_QS, Q4_0_QS, Q4_1_QS, Q4_K_QS = (
    Q8_0.offset("qs"),
    Q4_0.offset("qs"),
    Q4_1.offset("qs"),
    Q4_K.offset("qs"),
)
Q5_1_CODES = Q5_1.offset("qh") - Q5_0.offset("qh")  # from there on a block is like one of Q5_0
Q2_K_SCALES, Q2_K_D = Q2_K.offset("scales"), Q2_K.offset("d")
Q3_K_SCALES, Q3_K_D = Q3_K.offset("scales"), Q3_K.offset("d")
Q6_K_SCALES, Q6_K_D = Q6_K.offset("scales"), Q6_K.offset("d")
IQ4_NL_ID, MXFP4_ID, NVFP4_ID, Q1_0_ID, Q2_0_ID = IQ4_NL.id, MXFP4.id, NVFP4.id, Q1_0.id, Q2_0.id
IQ4_XS_ID, TQ1_0_ID, TQ2_0_ID, TQ1_0_D, TQ2_0_D = (
    IQ4_XS.id,
    TQ1_0.id,
    TQ2_0.id,
    TQ1_0.offset("d"),
    TQ2_0.offset("d"),
)
IQ4_NL_QS, MXFP4_QS, NVFP4_QS, Q1_0_QS = (
    IQ4_NL.offset("qs"),
    MXFP4.offset("qs"),
    NVFP4.offset("qs"),
    Q1_0.offset("qs"),
)
Q2_0_QS, IQ4_XS_QS = Q2_0.offset("qs"), IQ4_XS.offset("qs")
IQ4_XS_HIGH, IQ4_XS_LOW = IQ4_XS.offset("scales_h"), IQ4_XS.offset("scales_l")
IQ4_LEVELS, FP4_LEVELS = IQ4_VALUES.astype(np.int8), FP4_VALUES.astype(np.int8)
UNEVEN = (IQ4_NL_ID, MXFP4_ID, NVFP4_ID, Q1_0_ID, Q2_0_ID)
GROUPS = 16


@jit
def count_steps(fmt: int, n: int, blocks: int) -> int:
    """How many steps n weights have; blocks: those of their activations."""
    if fmt == NVFP4_ID:
        return n // 16
    if fmt == Q1_0_ID:
        return n // 128
    return n // 64 if fmt == Q2_0_ID else blocks


@jit
def read_half(block: Bytes, at: int) -> Any:
    """The float32 of the fp16 at a byte of a block."""
    return decode_half(int(block[at]) | int(block[at + 1]) << 8)


@jit
def sign(byte: Any) -> Any:
    """The int8 that a byte is."""
    return int(byte) - (int(byte) & 128) * 2


@jit
def shift(scratch: Bytes, by: int, codes: Codes) -> None:
    """Codes as signed ones around 0."""
    for i in range(codes.size):
        codes[i] = int(scratch[i]) - by


@jit
def unpack_small(fmt: int, block: Bytes, scratch: Bytes, codes: Codes, d: Floats, dmin: Floats) -> None:
    """Take a block of 32 apart."""
    d[0] = read_half(block, 0)
    if fmt == Q8_0_ID:
        for i in range(codes.size):
            codes[i] = sign(block[Q8_0_QS + i])
    elif fmt == Q4_0_ID:
        q40.unpack_nibbles(block[Q4_0_QS:], scratch)
        shift(scratch, 8, codes)
    elif fmt == Q4_1_ID:
        dmin[0] = read_half(block, 2)
        q40.unpack_nibbles(block[Q4_1_QS:], scratch)
        shift(scratch, 0, codes)
    elif fmt == Q5_0_ID:
        q50.unpack_codes(block, scratch)
        shift(scratch, 16, codes)
    elif fmt == Q5_1_ID:
        dmin[0] = read_half(block, 2)
        q50.unpack_codes(block[Q5_1_CODES:], scratch)
        shift(scratch, 0, codes)


@jit
def unpack_levels(qs: Bytes, levels: Codes, half: int, codes: Codes) -> None:
    """The levels that nibbles stand for: of every `half` bytes first the low ones, then the high ones."""
    for i in range(codes.size):
        byte = int(qs[i // (2 * half) * half + i % half])
        codes[i] = levels[byte >> i // half % 2 * 4 & 15]


@jit
def unpack_uneven(fmt: int, block: Bytes, codes: Codes, d: Floats) -> None:
    """Take a block with one level for each nibble, or with one or two bits to a code, apart."""
    if fmt == MXFP4_ID:
        d[0] = decode_e8m0_half(block[0])
        unpack_levels(block[MXFP4_QS:], FP4_LEVELS, 16, codes)
    elif fmt == NVFP4_ID:
        for g in range(d.size):
            d[g] = decode_ue4m3(block[g])
        unpack_levels(block[NVFP4_QS:], FP4_LEVELS, 8, codes)
    else:
        d[0] = read_half(block, 0)
        if fmt == IQ4_NL_ID:
            unpack_levels(block[IQ4_NL_QS:], IQ4_LEVELS, 16, codes)
        elif fmt == Q1_0_ID:
            for i in range(codes.size):
                codes[i] = (int(block[Q1_0_QS + i // 8]) >> i % 8 & 1) * 2 - 1
        elif fmt == Q2_0_ID:
            for i in range(codes.size):
                codes[i] = (int(block[Q2_0_QS + i // 4]) >> i % 4 * 2 & 3) - 1


@jit
def unpack_iq4_xs(block: Bytes, codes: Codes, scales: Shorts, d: Floats) -> None:
    d[0] = read_half(block, 0)
    for g in range(GROUPS):
        s = g // 2
        low = int(block[IQ4_XS_LOW + s // 2]) >> s % 2 * 4 & 15
        scales[g] = (low | (int(block[IQ4_XS_HIGH + s // 4]) >> s % 4 * 2 & 3) << 4) - 32
    unpack_levels(block[IQ4_XS_QS:], IQ4_LEVELS, 16, codes)


@jit
def unpack_q2_k(
    block: Bytes, scratch: Bytes, codes: Codes, scales: Shorts, mins: Shorts, d: Floats, dmin: Floats
) -> None:
    d[0], dmin[0] = read_half(block, Q2_K_D), read_half(block, Q2_K_D + 2)
    for g in range(GROUPS):
        scales[g], mins[g] = int(block[Q2_K_SCALES + g]) & 15, int(block[Q2_K_SCALES + g]) >> 4
    q2k.unpack_codes(block, scratch)
    shift(scratch, 0, codes)


@jit
def unpack_q3_k(block: Bytes, scratch: Bytes, codes: Codes, scales: Shorts, d: Floats) -> None:
    d[0] = read_half(block, Q3_K_D)
    for g in range(GROUPS):
        low = int(block[Q3_K_SCALES + g % 8]) >> g // 8 * 4 & 15
        scales[g] = (low | (int(block[Q3_K_SCALES + 8 + g % 4]) >> g // 4 * 2 & 3) << 4) - 32
    q3k.unpack_codes(block, scratch)
    shift(scratch, 4, codes)


@jit
def unpack_six_bits(block: Bytes, scales: Shorts, mins: Shorts, d: Floats, dmin: Floats) -> None:
    """What Q4_K and Q5_K begin with."""
    d[0], dmin[0] = read_half(block, 0), read_half(block, 2)
    for g in range(GROUPS):
        scales[g], mins[g] = q4k.unpack_scale(block, g // 2)


@jit
def unpack_q4_k(block: Bytes, codes: Codes) -> None:
    for i in range(codes.size):
        codes[i] = int(block[Q4_K_QS + i // 64 * 32 + i % 32]) >> i // 32 % 2 * 4 & 15


@jit
def unpack_q6_k(block: Bytes, scratch: Bytes, codes: Codes, scales: Shorts, d: Floats) -> None:
    d[0] = read_half(block, Q6_K_D)
    for g in range(GROUPS):
        scales[g] = sign(block[Q6_K_SCALES + g])
    q6k.unpack_codes(block, scratch)
    shift(scratch, 32, codes)


@jit
def unpack_row(
    fmt: int,
    raw: Bytes,
    codes: Codes,
    scales: Shorts,
    mins: Shorts,
    d: Floats,
    dmin: Floats,
    scratch: Bytes,
) -> None:
    """Take one row apart.

    fmt     : id of the format
    raw     : [bytes] uint8
    codes, scales, mins, d, dmin : one row of each plane, written; those that the format lacks are not looked at
    scratch : [256] uint8
    """
    blocks = d.size // 4 if fmt == NVFP4_ID else d.size
    size, weights, steps = raw.size // blocks, codes.size // blocks, d.size // blocks
    for b in range(blocks):
        block, code = raw[b * size : (b + 1) * size], codes[b * weights : (b + 1) * weights]
        scale, low = scales[b * GROUPS : (b + 1) * GROUPS], mins[b * GROUPS : (b + 1) * GROUPS]
        step, least = d[b * steps : (b + 1) * steps], dmin[b : b + 1]
        if fmt == Q4_K_ID:
            unpack_six_bits(block, scale, low, step, least)
            unpack_q4_k(block, code)
        elif fmt == Q6_K_ID:
            unpack_q6_k(block, scratch, code, scale, step)
        elif fmt == Q5_K_ID:
            unpack_six_bits(block, scale, low, step, least)
            q5k.unpack_codes(block, scratch)
            shift(scratch, 0, code)
        elif fmt == Q2_K_ID:
            unpack_q2_k(block, scratch, code, scale, low, step, least)
        elif fmt == Q3_K_ID:
            unpack_q3_k(block, scratch, code, scale, step)
        elif fmt == IQ4_XS_ID:
            unpack_iq4_xs(block, code, scale, step)
        elif fmt == TQ1_0_ID:
            step[0] = read_half(block, TQ1_0_D)
            tq1.unpack_codes(block, scratch)
            shift(scratch, 1, code)
        elif fmt == TQ2_0_ID:
            step[0] = read_half(block, TQ2_0_D)
            tq2.unpack_codes(block, scratch)
            shift(scratch, 1, code)
        elif fmt in UNEVEN:
            unpack_uneven(fmt, block, code, step)
        else:
            unpack_small(fmt, block, scratch, code, step, least)
