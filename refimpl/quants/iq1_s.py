"""IQ1_S: 256 weights in 50 bytes, 1.56 bits each: ternary points of a grid of 2048, scale and shift for 32.

| d: fp16 | qs: 32 bytes | qh: 8 times 16 bits: 4 * 3 upper bits of numbers, scale of 3 bits, shift of 1 bit |

w[i] = d * (2 * scale + 1) * (point[i] + shift)        point[i] is -1, 0 or 1; shift is +1/8, or -1/8 where set

A point is eight weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half
from refimpl.quants.grids import load_grid

Records = NDArray[Any]
Floats = NDArray[Any]  # float32

SHIFT = np.float32(0.125)


def dequantize(blocks: Records) -> Floats:
    """Decode IQ1_S blocks to weights.

    w[i] = d * (2 * scale[i // 32] + 1) * (point[i] + shift[i // 32])

    blocks : [N] IQ1_S records (formats.IQ1_S.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written; the sum is exact.
    Source: ggml-quants.c dequantize_row_iq1_s, llama.cpp 0c1e570.
    """
    qh = blocks["qh"].astype(np.int32)
    number = blocks["qs"] | (qh[..., None] >> np.arange(0, 12, 3) & 7).reshape(-1, 32) << 8
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (2 * (qh >> 12 & 7) + 1).astype(np.float32)
    shift = np.where(qh & 0x8000, -SHIFT, SHIFT)
    point = load_grid("iq1_s").points[number].astype(np.float32).reshape(-1, 8, 32)
    return (step[..., None] * (point + shift[..., None])).reshape(-1, 256)
