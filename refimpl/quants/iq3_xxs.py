"""IQ3_XXS: 256 weights in 98 bytes, 3.06 bits each: points of a grid of 256 and a scale for 32 weights.

| d: fp16 | qs: 64 bytes: numbers of points | 8 times 32 bits: 4 * 7 signs, scale of 4 bits |

w[i] = d * (0.5 + scale) / 2 * point[i] * sign[i]        point[i] is one of 4, 12, 20, 28, 36, 44, 52, 62

A point is four weights. Signs come eight together: seven are stored, the eighth makes the number of minus
signs even.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants import grid_rule, grid_search
from refimpl.quants.formats import IQ3_XXS
from refimpl.quants.grids import Stored, complete_signs, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32

RAISED = np.float32(1.0125)


def unpack(blocks: Records) -> Stored:
    """Take the fields apart. blocks : [N] IQ3_XXS records."""
    words = np.ascontiguousarray(blocks["qs"][:, 64:]).view(np.uint32)
    signs = complete_signs(words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127)
    numbers = blocks["qs"][:, :64].astype(np.int32)
    return Stored(numbers, signs.reshape(-1, 32), (words >> 28).astype(np.int32))


def dequantize(blocks: Records) -> Floats:
    """Decode IQ3_XXS blocks to weights.

    w[i] = d * (0.5 + scale[i // 32]) * 0.5 * point[i] * sign[i]

    blocks : [N] IQ3_XXS records (formats.IQ3_XXS.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq3_xxs, llama.cpp 0c1e570.
    """
    numbers, signs, levels = unpack(blocks)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (np.float32(0.5) + levels.astype(np.float32)) * np.float32(0.5)
    point = load_grid("iq3_xxs").points[numbers].astype(np.float32).reshape(-1, 32, 8)
    return np.asarray((step.repeat(4, 1)[..., None] * point * unpack_signs(signs)).reshape(-1, 256))


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Count what no importances explain: see grid_rule.py. x : [N, 256] float32; return : [N, checks] int32."""
    return grid_rule.measure("iq3_xxs", decode_half(blocks["d"].view(np.uint16)), unpack(blocks), x)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to IQ3_XXS blocks.

    31 trial scales around peak / 15 for each 32 weights; points that had to move are searched once more under
    the best. The stored d is raised by 1.0125.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None: each weight's error counts by its square
    return  : [R, n/256] IQ3_XXS records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq3_xxs_impl, llama.cpp 0c1e570.
    """
    found = grid_search.search("iq3_xxs", x, imatrix)
    d, levels = grid_search.round_scales(found.scales, 16)
    words = found.signs.reshape(-1, 8, 4).astype(np.uint32) << np.arange(0, 28, 7, dtype=np.uint32)
    words = np.bitwise_or.reduce(words, 2) | levels.astype(np.uint32) << 28
    alive = (found.scales.max(1) != 0)[:, None]
    blocks = np.zeros(len(d), IQ3_XXS.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d * RAISED)
    blocks["qs"][:, :64] = np.where(alive, found.numbers, 0)
    blocks["qs"][:, 64:] = np.where(alive, words, 0).astype("<u4").view(np.uint8)
    return blocks.reshape(len(x), -1)
