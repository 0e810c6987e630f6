"""Rows of blocks taken apart, for kernels: the twin of planes.py, one row at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.quants import q4_k_jit as q4k
from refimpl.quants import q5_0_jit as q50
from refimpl.quants import q6_k_jit as q6k
from refimpl.quants.formats import Q4_K, Q5_0, Q6_K, Q8_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

Q8_0_ID, Q5_0_ID, Q4_K_ID, Q6_K_ID = Q8_0.id, Q5_0.id, Q4_K.id, Q6_K.id
Q8_0_QS, Q4_K_QS, Q6_K_SCALES, Q6_K_D = (
    Q8_0.offset("qs"),
    Q4_K.offset("qs"),
    Q6_K.offset("scales"),
    Q6_K.offset("d"),
)
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
def unpack_q8_0(block: Bytes, codes: Codes, d: Floats) -> None:
    d[0] = read_half(block, 0)
    for i in range(codes.size):
        codes[i] = sign(block[Q8_0_QS + i])


@jit
def unpack_q5_0(block: Bytes, scratch: Bytes, codes: Codes, d: Floats) -> None:
    d[0] = read_half(block, 0)
    q50.unpack_codes(block, scratch)
    for i in range(codes.size):
        codes[i] = int(scratch[i]) - 16


@jit
def unpack_q4_k(block: Bytes, codes: Codes, scales: Shorts, mins: Shorts, d: Floats, dmin: Floats) -> None:
    d[0], dmin[0] = read_half(block, 0), read_half(block, 2)
    for g in range(GROUPS):
        scales[g], mins[g] = q4k.unpack_scale(block, g // 2)
    for i in range(codes.size):
        codes[i] = int(block[Q4_K_QS + i // 64 * 32 + i % 32]) >> i // 32 % 2 * 4 & 15


@jit
def unpack_q6_k(block: Bytes, scratch: Bytes, codes: Codes, scales: Shorts, d: Floats) -> None:
    d[0] = read_half(block, Q6_K_D)
    for g in range(GROUPS):
        scales[g] = sign(block[Q6_K_SCALES + g])
    q6k.unpack_codes(block, scratch)
    for i in range(codes.size):
        codes[i] = int(scratch[i]) - 32


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
        if fmt == Q8_0_ID:
            unpack_q8_0(block, code, d[b : b + 1])
        elif fmt == Q5_0_ID:
            unpack_q5_0(block, scratch, code, d[b : b + 1])
        elif fmt == Q4_K_ID:
            unpack_q4_k(block, code, scale, low, d[b : b + 1], dmin[b : b + 1])
        elif fmt == Q6_K_ID:
            unpack_q6_k(block, scratch, code, scale, d[b : b + 1])
