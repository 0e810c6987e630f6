"""IQ2_XXS: 256 weights in 66 bytes, 2.06 bits each: points of a grid of 256 and a scale for 32 weights.

| d: fp16 | qs: 8 times (4 bytes: numbers of 4 points | 32 bits: 4 * 7 signs, scale of 4 bits) |

w[i] = d * (0.5 + scale) / 4 * point[i] * sign[i]        point[i] is 8, 25 or 43

A point is eight weights. Seven of their signs are stored; the eighth makes the number of minus signs even.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half
from refimpl.quants.grids import complete_signs, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def dequantize(blocks: Records) -> Floats:
    """Decode IQ2_XXS blocks to weights.

    w[i] = d * (0.5 + scale[i // 32]) * 0.25 * point[i] * sign[i]

    blocks : [N] IQ2_XXS records (formats.IQ2_XXS.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq2_xxs, llama.cpp 0c1e570.
    """
    words = np.ascontiguousarray(blocks["qs"]).view(np.uint32).reshape(-1, 8, 2)
    number = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(-1, 8, 4)
    signs = complete_signs(words[..., 1:] >> np.arange(0, 28, 7, dtype=np.uint32) & 127)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    point = load_grid("iq2_xxs").points[number].astype(np.float32)
    return (step[..., None, None] * point * unpack_signs(signs)).reshape(-1, 256)
