"""IQ3_S: 256 weights in 110 bytes, 3.44 bits each: points of a grid of 512 and a scale for 32 weights.

| d: fp16 | qs: 64 bytes | qh: 8 bytes | signs: 32 bytes | scales: 8 of 4 bits |

w[i] = d * (1 + 2 * scale) * point[i] * sign[i]        point[i] is one of 1, 3, 5 ... 15

A point is four weights; bit l of qh[j] is the ninth bit of the number of point 8 j + l. The low half of
scales[j] belongs to the first 32 weights of 64, the high half to the other 32.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half
from refimpl.quants.grids import load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def dequantize(blocks: Records) -> Floats:
    """Decode IQ3_S blocks to weights.

    w[i] = d * (1 + 2 * scale[i // 32]) * point[i] * sign[i]

    blocks : [N] IQ3_S records (formats.IQ3_S.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq3_s, llama.cpp 0c1e570.
    """
    ninth = np.unpackbits(blocks["qh"], axis=1, bitorder="little").astype(np.int32)
    scales = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], -1).reshape(-1, 8)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (1 + 2 * scales).astype(np.float32)
    point = load_grid("iq3_s").points[blocks["qs"] | ninth << 8].astype(np.float32).reshape(-1, 8, 4, 8)
    signs = unpack_signs(blocks["signs"]).reshape(-1, 8, 4, 8)
    return (step[..., None, None] * point * signs).reshape(-1, 256)
