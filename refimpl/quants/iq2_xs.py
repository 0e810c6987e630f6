"""IQ2_XS: 256 weights in 74 bytes, 2.31 bits each: points of a grid of 512 and a scale for 16 weights.

| d: fp16 | qs: 32 times 16 bits: 9 number of a point, 7 signs | scales: 16 of 4 bits |

w[i] = d * (0.5 + scale) / 4 * point[i] * sign[i]        point[i] is 8, 25 or 43

A point is eight weights. Seven of their signs are stored; the eighth makes the number of minus signs even.
The low half of scales[j] belongs to the first 16 weights of 32, the high half to the other 16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants import grid_rule, grid_search
from refimpl.quants.formats import IQ2_XS
from refimpl.quants.grids import Stored, complete_signs, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def unpack(blocks: Records) -> Stored:
    """Take the fields apart. blocks : [N] IQ2_XS records."""
    levels = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], -1).reshape(-1, 16)
    numbers = (blocks["qs"] & 511).astype(np.int32)
    return Stored(numbers, complete_signs(blocks["qs"] >> 9), levels.astype(np.int32))


def dequantize(blocks: Records) -> Floats:
    """Decode IQ2_XS blocks to weights.

    w[i] = d * (0.5 + scale[i // 16]) * 0.25 * point[i] * sign[i]

    blocks : [N] IQ2_XS records (formats.IQ2_XS.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq2_xs, llama.cpp 0c1e570.
    """
    numbers, signs, levels = unpack(blocks)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (np.float32(0.5) + levels.astype(np.float32)) * np.float32(0.25)
    point = load_grid("iq2_xs").points[numbers].astype(np.float32)
    return np.asarray((step.repeat(2, 1)[..., None] * point * unpack_signs(signs)).reshape(-1, 256))


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Count what no importances explain: see grid_rule.py. x : [N, 256] float32; return : [N, checks] int32."""
    return grid_rule.measure("iq2_xs", decode_half(blocks["d"].view(np.uint16)), unpack(blocks), x)


def quantize(x: Floats, imatrix: Floats) -> Records:
    """Encode rows of weights to IQ2_XS blocks.

    19 trial scales around peak / 5 for each 16 weights; points that had to move are searched once more under
    the best.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32
    return  : [R, n/256] IQ2_XS records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq2_xs_impl, llama.cpp 0c1e570.
    """
    found = grid_search.search("iq2_xs", x, imatrix)
    d, levels = grid_search.round_scales(found.scales, 16)
    words = found.numbers | found.signs.astype(np.int32) << 9
    blocks = np.zeros(len(d), IQ2_XS.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["qs"] = np.where((found.scales.max(1) != 0)[:, None], words, 0)
    blocks["scales"] = levels[:, ::2] | levels[:, 1::2] << 4
    return blocks.reshape(len(x), -1)
