"""IQ2_XXS: 256 weights in 66 bytes, 2.06 bits each: points of a grid of 256 and a scale for 32 weights.

| d: fp16 | qs: 8 times (4 bytes: numbers of 4 points | 32 bits: 4 * 7 signs, scale of 4 bits) |

w[i] = d * (0.5 + scale) / 4 * point[i] * sign[i]        point[i] is 8, 25 or 43

A point is eight weights. Seven of their signs are stored; the eighth makes the number of minus signs even.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants import grid_rule, grid_search
from refimpl.quants.formats import IQ2_XXS
from refimpl.quants.grids import Stored, complete_signs, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def unpack(blocks: Records) -> Stored:
    """Take the fields apart. blocks : [N] IQ2_XXS records."""
    words = np.ascontiguousarray(blocks["qs"]).view(np.uint32).reshape(-1, 8, 2)
    numbers = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(-1, 32).astype(np.int32)
    signs = complete_signs(words[..., 1:] >> np.arange(0, 28, 7, dtype=np.uint32) & 127)
    return Stored(numbers, signs.reshape(-1, 32), (words[..., 1] >> 28).astype(np.int32))


def dequantize(blocks: Records) -> Floats:
    """Decode IQ2_XXS blocks to weights.

    w[i] = d * (0.5 + scale[i // 32]) * 0.25 * point[i] * sign[i]

    blocks : [N] IQ2_XXS records (formats.IQ2_XXS.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq2_xxs, llama.cpp 0c1e570.
    """
    numbers, signs, levels = unpack(blocks)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (np.float32(0.5) + levels.astype(np.float32)) * np.float32(0.25)
    point = load_grid("iq2_xxs").points[numbers].astype(np.float32)
    return np.asarray((step.repeat(4, 1)[..., None] * point * unpack_signs(signs)).reshape(-1, 256))


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Count what no importances explain: see grid_rule.py. x : [N, 256] float32; return : [N, checks] int32."""
    return grid_rule.measure("iq2_xxs", decode_half(blocks["d"].view(np.uint16)), unpack(blocks), x)


def quantize(x: Floats, imatrix: Floats) -> Records:
    """Encode rows of weights to IQ2_XXS blocks.

    A search without the grid finds a first scale for each 32 weights; 13 trial scales around it snap to points,
    and all points are searched once more under the best.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32
    return  : [R, n/256] IQ2_XXS records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq2_xxs_impl, llama.cpp 0c1e570.
    """
    found = grid_search.search("iq2_xxs", x, imatrix)
    d, levels = grid_search.round_scales(found.scales, 16)
    words = found.signs.reshape(-1, 8, 4).astype(np.uint32) << np.arange(0, 28, 7, dtype=np.uint32)
    words = np.bitwise_or.reduce(words, 2) | levels.astype(np.uint32) << 28
    numbers = found.numbers.astype(np.uint8).view("<u4")
    fours = np.stack([numbers, words], -1).reshape(-1, 16)
    blocks = np.zeros(len(d), IQ2_XXS.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["qs"] = np.where((found.scales.max(1) != 0)[:, None], fours, 0).astype("<u4").view("<u2")
    return blocks.reshape(len(x), -1)
