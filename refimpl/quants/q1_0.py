"""Q1_0: 128 weights in 18 bytes, one fp16 step and one bit each.

| d: fp16 | qs: 16 bytes |          w[i] = d or -d

Bit i of qs, counted from the lowest bit of its first byte, is set where weight i is not negative.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.arith.sums import add_up
from refimpl.quants.formats import Q1_0, Parts

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def unpack_codes(blocks: Records) -> NDArray[np.uint8]:
    """Unpack the bits. blocks : [N] Q1_0 records; return : [N, 128] uint8, 0 or 1."""
    return np.unpackbits(blocks["qs"], axis=1, bitorder="little")


def dequantize(blocks: Records) -> Floats:
    """Decode Q1_0 blocks to weights.

    w[i] = d where the bit is set, -d elsewhere

    blocks : [N] Q1_0 records (formats.Q1_0.block)
    return : [N, 128] float32

    Rounds: never.
    Source: ggml-quants.c dequantize_row_q1_0, llama.cpp 0c1e570.
    """
    d = decode_half(blocks["d"].view(np.uint16))[:, None]
    return np.where(unpack_codes(blocks) == 1, d, -d)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q1_0 records."""
    step = decode_half(blocks["d"].view(np.uint16))[:, None]
    return Parts(None, None, step, None, unpack_codes(blocks).astype(np.int32) * 2 - 1)


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Measure which stored bits are not the signs of the source, whatever d is.

    blocks : [N] Q1_0 records
    x      : [N, 128] float32, finite: the source
    return : [N, 128] int32, 0 or 1
    """
    return (unpack_codes(blocks) != (x >= 0)).astype(np.int32)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to Q1_0 blocks. An imatrix changes nothing.

    d = mean |x|; the bit is set for x >= 0, -0 included

    x       : [R, n] float32, finite
    imatrix : ignored
    return  : [R, n/128] Q1_0 records

    Rounds: every addition, in ascending order, to float32, and the quotient; d once more, to fp16.
    Source: ggml-quants.c quantize_row_q1_0_ref, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, Q1_0.weights)
    blocks = np.zeros(len(groups), Q1_0.block)
    blocks["d"].view(np.uint16)[:] = encode_half(add_up(np.abs(groups)) / np.float32(Q1_0.weights))
    blocks["qs"] = np.packbits(groups >= 0, axis=1, bitorder="little")
    return blocks.reshape(len(x), -1)
