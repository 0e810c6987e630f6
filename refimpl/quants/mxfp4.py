"""MXFP4: 32 weights in 17 bytes, a power of two and 32 codes of 4-bit floats.

| e: 1 byte | qs: 16 bytes |          w[i] = FP4[q[i]] * 2^(e - 128)

e is the exponent (e8m0), FP4 = 0 1 2 3 4 6 8 12 and their negatives: e2m1's values doubled, hence 128 and not 127.
Byte j of qs holds the codes of weight j (low nibble) and of weight j + 16 (high nibble).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_e8m0_half, floor_log2
from refimpl.quants.formats import MXFP4, Parts
from refimpl.quants.fp4 import decode, measure_apart, pack_codes, round_codes, unpack_codes
from refimpl.quants.levels import FP4_VALUES

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def dequantize(blocks: Records) -> Floats:
    """Decode MXFP4 blocks to weights.

    w[i] = FP4[q[i]] * 2^(e - 128)

    blocks : [N] MXFP4 records (formats.MXFP4.block)
    return : [N, 32] float32

    Rounds: the product, to float32 (where it overflows or is subnormal).
    Source: ggml-quants.c dequantize_row_mxfp4, llama.cpp 0c1e570.
    """
    return decode(unpack_codes(blocks["qs"]), decode_e8m0_half(blocks["e"]))


def read_scales(blocks: Records) -> Floats:
    """Read the step; NaN for e = 255, as the standard has it. blocks : [N]; return : [N, 1] float32."""
    return np.where(blocks["e"] == 255, np.float32(np.nan), decode_e8m0_half(blocks["e"]))[:, None]


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] MXFP4 records."""
    step = decode_e8m0_half(blocks["e"])[:, None]
    return Parts(None, None, step, None, FP4_VALUES[unpack_codes(blocks["qs"])])


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Measure how many codes each stored code lies from the nearest under the stored e.

    The encoder takes the nearest under the e that it stores, exactly: there is no search, and no imatrix.

    blocks : [N] MXFP4 records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    return measure_apart(unpack_codes(blocks["qs"]), x, decode_e8m0_half(blocks["e"]))


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to MXFP4 blocks; the largest weight gets 4, 6, 8 or 12. An imatrix changes nothing.

    e = floor(log2(max|x|)) + 125, as a byte; 0 for zeros

    x       : [R, n] float32, finite
    imatrix : ignored
    return  : [R, n/32] MXFP4 records

    Rounds: the logarithm, to float32; then as in fp4.round_codes. Below 2^-125 e wraps to 255 and less: all
    codes are 0 then, so that the block still decodes to zeros.
    Source: ggml-quants.c quantize_row_mxfp4_ref, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, MXFP4.weights)
    peak = np.abs(groups).max(1)
    blocks = np.zeros(len(groups), MXFP4.block)
    blocks["e"] = np.where(peak > 0, floor_log2(np.where(peak > 0, peak, np.float32(1))) + 125, 0) & 255
    blocks["qs"] = pack_codes(round_codes(groups, decode_e8m0_half(blocks["e"])))
    return blocks.reshape(len(x), -1)
