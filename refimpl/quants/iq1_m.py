"""IQ1_M: 256 weights in 56 bytes, 1.75 bits each: ternary points of a grid of 2048, a scale for 16, a shift for 8.

| qs: 32 bytes | qh: 32 times 4 bits: 3 upper bits of a number, shift | scales: 4 times (4 * 3 bits, 4 bits of d) |

w[i] = d * (2 * scale + 1) * (point[i] + shift)        point[i] is -1, 0 or 1; shift is +1/8, or -1/8 where set

A point is eight weights. d is an fp16 whose bits are the top four of the four 16-bit words `scales`, lowest
first; the other bits of a word are the scales of four times 16 weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half
from refimpl.quants.grids import load_grid

Records = NDArray[Any]
Floats = NDArray[Any]  # float32

SHIFT = np.float32(0.125)


def unpack_step(blocks: Records) -> NDArray[np.uint16]:
    """The bits of d. blocks : [N] IQ1_M records; return : [N] uint16, an fp16's."""
    tops = blocks["scales"] >> 12
    return np.asarray(tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12)


def dequantize(blocks: Records) -> Floats:
    """Decode IQ1_M blocks to weights.

    w[i] = d * (2 * scale[i // 16] + 1) * (point[i] + shift[i // 8])

    blocks : [N] IQ1_M records (formats.IQ1_M.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written; the sum is exact.
    Source: ggml-quants.c dequantize_row_iq1_m, llama.cpp 0c1e570.
    """
    fours = np.stack([blocks["qh"] & 15, blocks["qh"] >> 4], -1).reshape(-1, 32).astype(np.int32)
    number = blocks["qs"] | (fours & 7) << 8
    shift = np.where(fours & 8, -SHIFT, SHIFT)
    scales = (blocks["scales"][..., None] >> np.arange(0, 12, 3) & 7).reshape(-1, 16)
    step = decode_half(unpack_step(blocks))[:, None] * (2 * scales + 1).astype(np.float32)
    point = load_grid("iq1_s").points[number].astype(np.float32)
    return (step.repeat(2, 1)[..., None] * (point + shift[..., None])).reshape(-1, 256)
