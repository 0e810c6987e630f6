"""NVFP4 as ggml stores it: 64 weights in 36 bytes, 4 sub-blocks of 16 with an fp8 step each.

| d: 4 x ue4m3 | qs: 4 x 8 bytes |          w[i] = FP4[q[i]] * d[i // 16] / 2

ue4m3 is fp8 (e4m3) without the sign; FP4 = 0 1 2 3 4 6 8 12 and their negatives: e2m1's values doubled, hence / 2.
Byte j of a sub-block's 8 holds the codes of its weight j (low nibble) and of its weight j + 8 (high nibble).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_ue4m3, encode_ue4m3
from refimpl.quants.formats import NVFP4, Parts
from refimpl.quants.fp4 import decode, measure_apart, pack_codes, round_codes, unpack_codes
from refimpl.quants.levels import FP4_VALUES

Records = NDArray[Any]
Floats = NDArray[Any]  # float32

SUBS, SUB = 4, 16


def unpack(blocks: Records) -> NDArray[np.uint8]:
    """Unpack the codes. blocks : [N] NVFP4 records; return : [4N, 16] uint8 in 0..15."""
    return unpack_codes(blocks["qs"].reshape(-1, SUB // 2))


def dequantize(blocks: Records) -> Floats:
    """Decode NVFP4 blocks to weights.

    w[i] = FP4[q[i]] * (d[i // 16] / 2)

    blocks : [N] NVFP4 records (formats.NVFP4.block)
    return : [N, 64] float32

    Rounds: never.
    Source: ggml-quants.c dequantize_row_nvfp4, llama.cpp 0c1e570.
    """
    return decode(unpack(blocks), decode_ue4m3(blocks["d"]).reshape(-1)).reshape(-1, NVFP4.weights)


def read_scales(blocks: Records) -> Floats:
    """Read the steps of the sub-blocks. blocks : [N]; return : [N, 4] float32."""
    return decode_ue4m3(blocks["d"])


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] NVFP4 records."""
    return Parts(None, None, read_scales(blocks), None, FP4_VALUES[unpack(blocks)].reshape(-1, NVFP4.weights))


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Measure how many codes each stored code lies from the nearest under the stored step.

    The encoder takes the nearest under the step that it stores, exactly: there is no search, and no imatrix. A
    sub-block whose step is 0 decodes to zeros whatever its codes: none of them counts as off.

    blocks : [N] NVFP4 records
    x      : [N, 64] float32, finite: the source
    return : [N, 64] int32 >= 0
    """
    return measure_apart(unpack(blocks), x.reshape(-1, SUB), read_scales(blocks).reshape(-1)).reshape(x.shape)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to NVFP4 blocks; the largest weight of a sub-block gets 12. An imatrix changes nothing.

    d = ue4m3(max|x| / 6)

    x       : [R, n] float32, finite
    imatrix : ignored
    return  : [R, n/64] NVFP4 records

    Rounds: the quotient, to float32; then as in bits.encode_ue4m3 and fp4.round_codes.
    Source: ggml-quants.c quantize_row_nvfp4_ref, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, SUB)
    d = encode_ue4m3(np.abs(groups).max(1) / np.float32(6)).astype(np.uint8)
    blocks = np.zeros(len(groups) // SUBS, NVFP4.block)
    blocks["d"] = d.reshape(-1, SUBS)
    blocks["qs"] = pack_codes(round_codes(groups, decode_ue4m3(d))).reshape(-1, NVFP4.weights // 2)
    return blocks.reshape(len(x), -1)
