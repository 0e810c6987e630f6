"""IQ1_S decoded on explicit vectors: the bits of iq1_s_jit for any bytes. See grids_simd.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_memory import fence, peek, prefetch, stack
from refimpl.quants.formats import IQ1_S
from refimpl.quants.grids_simd import load_eighths, put_eight, read_d, shift_weights
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = IQ1_S.block.itemsize
QS, QH = IQ1_S.offset("qs"), IQ1_S.offset("qh")
EIGHTHS = load_eighths()


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq1_s_jit.dequantize. raw : [R, n/256*50] uint8; out : [R, n] float32, written."""
    points, streamed = stack(np.int8, 256), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = read_d(raw, at)
        for j in range(8):
            word = np.int64(peek(raw, at + QH + 2 * j, np.uint16))
            for i in range(4):
                low = np.int64(peek(raw, at + QS + 4 * j + i, np.uint8))
                put_eight(EIGHTHS, low | (word >> 3 * i & 7) << 8, points, 4 * j + i)
        for k in range(16):
            word = np.int64(peek(raw, at + QH + 2 * (k // 2), np.uint16))
            step = d * np.float32(2 * (word >> 12 & 7) + 1)
            weights = shift_weights(points, np.uint16(0 - (word >> 15)), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
