"""Rows of blocks taken apart, for kernels: the twin of planes.py, one row at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.quants import q2_k_jit as q2k
from refimpl.quants import q3_k_jit as q3k
from refimpl.quants import q4_0_jit as q40
from refimpl.quants import q4_k_jit as q4k
from refimpl.quants import q5_0_jit as q50
from refimpl.quants import q5_k_jit as q5k
from refimpl.quants import q6_k_jit as q6k
from refimpl.quants.formats import Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0

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
GROUPS = 16


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
    blocks = d.size
    size, weights = raw.size // blocks, codes.size // blocks
    for b in range(blocks):
        block, code = raw[b * size : (b + 1) * size], codes[b * weights : (b + 1) * weights]
        scale, low = scales[b * GROUPS : (b + 1) * GROUPS], mins[b * GROUPS : (b + 1) * GROUPS]
        step, least = d[b : b + 1], dmin[b : b + 1]
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
        else:
            unpack_small(fmt, block, scratch, code, step, least)
