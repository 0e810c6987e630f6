"""Q8_0: 32 weights in 34 bytes, one fp16 step and 32 signed bytes.

| d: fp16 | qs: 32 x int8 |          w[i] = d * qs[i]
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, round_half_away, truncate
from refimpl.quants.formats import Q8_0, Parts

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def dequantize(blocks: Records) -> Floats:
    """Decode Q8_0 blocks to weights.

    w[i] = d * qs[i]

    blocks : [N] Q8_0 records (formats.Q8_0.block)
    return : [N, 32] float32

    Rounds: the product, to float32.
    Source: ggml-quants.c dequantize_row_q8_0, llama.cpp 0c1e570.
    """
    d = decode_half(blocks["d"].view(np.uint16))
    return d[:, None] * blocks["qs"].astype(np.float32)


def round_codes(x: Floats) -> tuple[Floats, NDArray[np.int32]]:
    """Round each block under 1/d, before d becomes fp16.

    d = max|x| / 127,  q[i] = round(x[i] * (1/d)), ties away from zero; 1/d is 0 for d = 0

    x      : [N, 32] float32
    return : d [N] float32, codes [N, 32] int32 in -127..127; 0 where 1/d overflowed (INT_MIN's low byte)

    Rounds: every operation, to float32.
    """
    d = np.abs(x).max(1) / np.float32(127)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    codes = truncate(round_half_away(x * inverse[:, None])) & 255
    return d, np.where(codes > 127, codes - 256, codes)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q8_0 records."""
    return Parts(None, None, decode_half(blocks["d"].view(np.uint16))[:, None], None, blocks["qs"])


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Measure how many steps each stored code lies from the encoder's: there is one rule and no search.

    blocks : [N] Q8_0 records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    return np.abs(blocks["qs"].astype(np.int32) - round_codes(x)[1])


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to Q8_0 blocks; ggml's Q8_0 has no search and takes no notice of an imatrix.

    x       : [R, n] float32, finite
    imatrix : ignored
    return  : [R, n/32] Q8_0 records

    Rounds: every operation, to float32; d once more, to fp16.
    Source: ggml-quants.c quantize_row_q8_0_ref, llama.cpp 0c1e570.
    """
    d, codes = round_codes(x.reshape(-1, Q8_0.weights))
    blocks = np.zeros(len(d), Q8_0.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["qs"] = codes
    return blocks.reshape(len(x), -1)
