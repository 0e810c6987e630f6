"""IQ2_S: 256 weights in 82 bytes, 2.56 bits each: points of a grid of 1024 and a scale for 16 weights.

| d: fp16 | qs: 32 bytes of numbers, 32 bytes of signs | qh: 8 bytes | scales: 16 of 4 bits |

w[i] = d * (0.5 + scale) / 4 * point[i] * sign[i]        point[i] is 8, 25 or 43

A point is eight weights; bits 2 l and 2 l + 1 of qh[j] are the upper bits of the number of point 4 j + l.
The low half of scales[j] belongs to the first 16 weights of 32, the high half to the other 16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants import grid_rule, grid_search
from refimpl.quants.formats import IQ2_S
from refimpl.quants.grids import Stored, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32

LOWERED = np.float32(0.9875)


def unpack(blocks: Records) -> Stored:
    """Take the fields apart. blocks : [N] IQ2_S records."""
    upper = blocks["qh"][..., None].astype(np.int32) >> np.arange(0, 8, 2) & 3
    levels = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], -1).reshape(-1, 16)
    numbers = blocks["qs"][:, :32] | upper.reshape(-1, 32) << 8
    return Stored(numbers.astype(np.int32), blocks["qs"][:, 32:], levels.astype(np.int32))


def dequantize(blocks: Records) -> Floats:
    """Decode IQ2_S blocks to weights.

    w[i] = d * (0.5 + scale[i // 16]) * 0.25 * point[i] * sign[i]

    blocks : [N] IQ2_S records (formats.IQ2_S.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq2_s, llama.cpp 0c1e570.
    """
    numbers, signs, levels = unpack(blocks)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (np.float32(0.5) + levels.astype(np.float32)) * np.float32(0.25)
    point = load_grid("iq2_s").points[numbers].astype(np.float32)
    return np.asarray((step.repeat(2, 1)[..., None] * point * unpack_signs(signs)).reshape(-1, 256))


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Count what no importances explain: see grid_rule.py. x : [N, 256] float32; return : [N, checks] int32."""
    return grid_rule.measure("iq2_s", decode_half(blocks["d"].view(np.uint16)), unpack(blocks), x)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to IQ2_S blocks.

    19 trial scales around peak / 5 for each 16 weights; points that had to move are searched once more under
    the best. The stored d is lowered by 0.9875.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None: each weight's error counts by mean / 4 + x^2
    return  : [R, n/256] IQ2_S records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq2_s_impl, llama.cpp 0c1e570.
    """
    found = grid_search.search("iq2_s", x, imatrix)
    d, levels = grid_search.round_scales(found.scales, 16)
    upper = (found.numbers >> 8).reshape(-1, 8, 4) << np.arange(0, 8, 2)
    blocks = np.zeros(len(d), IQ2_S.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d * LOWERED)
    blocks["qs"] = np.concatenate([found.numbers & 255, found.signs], 1)
    blocks["qh"] = np.bitwise_or.reduce(upper, 2)
    blocks["scales"] = levels[:, ::2] | levels[:, 1::2] << 4
    return blocks.reshape(len(x), -1)
