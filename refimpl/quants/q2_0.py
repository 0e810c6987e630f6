"""Q2_0: 64 weights of -1, 0, 1 (or 2) times d in 18 bytes, 2 bits each.

| d: fp16 | qs: 16 bytes |          w[i] = d * (q[i] - 1)

Bits 2k and 2k + 1 of byte j of qs are the code of weight 4*j + k. Code 3 stands for 2d; the encoder, whose d is the
largest weight, has no use for it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants.formats import Q2_0, Parts
from refimpl.quants.ternary import measure_apart, round_codes

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

SHIFTS = 2 * np.arange(4, dtype=np.uint8)


def unpack_codes(blocks: Records) -> Codes:
    """Unpack the codes. blocks : [N] Q2_0 records; return : [N, 64] int32 in 0..3."""
    return (blocks["qs"][..., None] >> SHIFTS & 3).reshape(-1, Q2_0.weights).astype(np.int32)


def pack_codes(blocks: Records, codes: Codes) -> None:
    """Pack codes [N, 64] in 0..3 into blocks: the inverse of unpack_codes."""
    blocks["qs"] = (codes.reshape(-1, 16, 4) << SHIFTS).sum(2)


def read_d(blocks: Records) -> Floats:
    """Read d. blocks : [N] Q2_0 records; return : [N] float32."""
    return decode_half(blocks["d"].view(np.uint16))


def dequantize(blocks: Records) -> Floats:
    """Decode Q2_0 blocks to weights.

    w[i] = d * (q[i] - 1)

    blocks : [N] Q2_0 records (formats.Q2_0.block)
    return : [N, 64] float32

    Rounds: never.
    Source: ggml-quants.c dequantize_row_q2_0, llama.cpp 0c1e570.
    """
    return (unpack_codes(blocks) - 1).astype(np.float32) * read_d(blocks)[:, None]


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q2_0 records."""
    return Parts(None, None, read_d(blocks)[:, None], None, unpack_codes(blocks) - 1)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under d, as it was before it became fp16.

    blocks : [N] Q2_0 records
    x      : [N, 64] float32, finite: the source
    return : [N, 64] int32 >= 0
    """
    return measure_apart(unpack_codes(blocks), x, read_d(blocks), 3)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to Q2_0 blocks. An imatrix changes nothing.

    d = max|x|,  q[i] = round(x[i] / d) + 1: exact where all weights are -s, 0 or s, as in models trained so

    x       : [R, n] float32, finite
    imatrix : ignored
    return  : [R, n/64] Q2_0 records

    Rounds: every operation, to float32; d once more, to fp16, after the codes are taken under 1/d.
    Source: ggml-quants.c quantize_row_q2_0_ref, llama.cpp 0c1e570.
    """
    d, codes = round_codes(x.reshape(-1, Q2_0.weights), 0)
    blocks = np.zeros(len(d), Q2_0.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    pack_codes(blocks, codes)
    return blocks.reshape(len(x), -1)
