"""IQ3_XXS: 256 weights in 98 bytes, 3.06 bits each: points of a grid of 256 and a scale for 32 weights.

| d: fp16 | qs: 64 bytes: numbers of points | 8 times 32 bits: 4 * 7 signs, scale of 4 bits |

w[i] = d * (0.5 + scale) / 2 * point[i] * sign[i]        point[i] is one of 4, 12, 20, 28, 36, 44, 52, 62

A point is four weights. Signs come eight together: seven are stored, the eighth makes the number of minus
signs even.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half
from refimpl.quants.grids import complete_signs, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def dequantize(blocks: Records) -> Floats:
    """Decode IQ3_XXS blocks to weights.

    w[i] = d * (0.5 + scale[i // 32]) * 0.5 * point[i] * sign[i]

    blocks : [N] IQ3_XXS records (formats.IQ3_XXS.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq3_xxs, llama.cpp 0c1e570.
    """
    words = np.ascontiguousarray(blocks["qs"][:, 64:]).view(np.uint32)
    signs = complete_signs(words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    point = load_grid("iq3_xxs").points[blocks["qs"][:, :64]].astype(np.float32).reshape(-1, 8, 4, 8)
    return (step[..., None, None] * point * unpack_signs(signs)).reshape(-1, 256)
