"""IQ4_XS: 256 weights in 136 bytes, 8 sub-blocks of 32 with a 6-bit scale each, 4-bit codes for uneven levels.

| d: fp16 | scales_h: 8 x 2 bits | scales_l: 8 x 4 bits | qs: 8 x 16 bytes |

w[i] = (d * (scale[i // 32] - 32)) * IQ4[q[i]]

IQ4 = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113. Byte j of scales_l holds the low four bits of scales 2j
(low nibble) and 2j + 1; bits 2s and 2s + 1 of scales_h are the upper two of scale s. Byte j of a sub-block's 16
holds the codes of its weight j (low nibble) and of its weight j + 16 (high nibble).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import nearest_product
from refimpl.quants.formats import IQ4_XS, Parts
from refimpl.quants.iq4 import (
    fit_scale,
    measure_apart,
    pack_codes,
    round_codes,
    unpack_codes,
    weigh_by_imatrix,
)
from refimpl.quants.levels import IQ4_VALUES
from refimpl.quants.search import find_peak

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

SUBS, SUB = 8, 32


def unpack_scales(blocks: Records) -> Codes:
    """Unpack the scales. blocks : [N] IQ4_XS records; return : [N, 8] int32 in -32..31."""
    low = np.stack([blocks["scales_l"] & 15, blocks["scales_l"] >> 4], 2).reshape(-1, SUBS)
    high = blocks["scales_h"][:, None] >> 2 * np.arange(SUBS, dtype=np.uint16) & 3
    return (low.astype(np.int32) | high.astype(np.int32) << 4) - 32


def pack_scales(blocks: Records, scales: Codes) -> None:
    """Pack scales [N, 8] in -32..31 into blocks: the inverse of unpack_scales."""
    codes = scales + 32
    blocks["scales_l"] = codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4
    blocks["scales_h"] = (codes >> 4 << 2 * np.arange(SUBS)).sum(1)


def read_d(blocks: Records) -> Floats:
    """Read d. blocks : [N] IQ4_XS records; return : [N] float32."""
    return decode_half(blocks["d"].view(np.uint16))


def scale_subs(blocks: Records) -> Floats:
    """Multiply out the step of each sub-block, d * scale [N, 8] float32. Rounds: the product."""
    return read_d(blocks)[:, None] * unpack_scales(blocks).astype(np.float32)


def dequantize(blocks: Records) -> Floats:
    """Decode IQ4_XS blocks to weights.

    w[i] = (d * scale[i // 32]) * IQ4[q[i]]

    blocks : [N] IQ4_XS records (formats.IQ4_XS.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq4_xs, llama.cpp 0c1e570.
    """
    levels = IQ4_VALUES[unpack_codes(blocks["qs"])].reshape(-1, SUBS, SUB)
    return (scale_subs(blocks)[..., None] * levels).reshape(-1, IQ4_XS.weights)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] IQ4_XS records."""
    levels = IQ4_VALUES[unpack_codes(blocks["qs"])]
    return Parts(unpack_scales(blocks), None, scale_subs(blocks), None, levels)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many codes each stored code lies from the encoder's.

    The encoder ends by taking the nearest level under d * scale, before d becomes fp16: a code counts as off
    where no d that fp16 rounds to the stored one gives it.

    blocks : [N] IQ4_XS records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    d, scales = np.repeat(read_d(blocks), SUBS), unpack_scales(blocks).reshape(-1).astype(np.float32)
    stored = unpack_codes(blocks["qs"]).reshape(-1, SUB)
    return measure_apart(stored, x.reshape(-1, SUB), d, scales).reshape(x.shape)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to IQ4_XS blocks.

    d = scale / -32 of the first of the largest sub-block scales; scale[s] = round(scales[s] / d), then the codes

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/256] IQ4_XS records

    Rounds: every operation, to float32, but what `build` fuses; d once more, to fp16, after scales and
    codes are taken under 1/d.
    Source: ggml-quants.c quantize_iq4_xs, llama.cpp 0c1e570.
    """
    rows, subs = x.reshape(-1, IQ4_XS.weights), x.reshape(-1, SUB)
    if imatrix is None:
        weights = subs * subs
    else:
        weights = weigh_by_imatrix(rows, imatrix.reshape(rows.shape), build).reshape(subs.shape)
    found = fit_scale(subs, weights, build).reshape(-1, SUBS)
    d = find_peak(np.where(np.isnan(found), np.float32(0), found)) / np.float32(-32)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    scales = np.clip(nearest_product(build.NL_NI, inverse[:, None], found), -32, 31)
    step = d[:, None] * scales.astype(np.float32)
    inverse = np.where(step != 0, np.float32(1) / step, np.float32(0))
    codes = round_codes(inverse[..., None] * rows.reshape(-1, SUBS, SUB))
    blocks = np.zeros(len(rows), IQ4_XS.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    pack_scales(blocks, scales)
    blocks["qs"] = pack_codes(codes.reshape(rows.shape))
    return blocks.reshape(len(x), -1)
