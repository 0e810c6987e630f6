"""IQ1_M decoded on explicit vectors: the bits of iq1_m_jit for any bytes. See grids_simd.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import fill
from refimpl.arith.simd_lanes import decode_half, first
from refimpl.arith.simd_memory import fence, peek, prefetch, stack
from refimpl.quants.formats import IQ1_M
from refimpl.quants.grids_simd import load_eighths, put_eight, shift_weights
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES = IQ1_M.block.itemsize
QS, QH, SCALES = IQ1_M.offset("qs"), IQ1_M.offset("qh"), IQ1_M.offset("scales")
EIGHTHS = load_eighths()


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq1_m_jit.dequantize. raw : [R, n/256*56] uint8; out : [R, n] float32, written."""
    points, streamed = stack(np.int8, 256), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        half = np.int64(0)
        for k in range(4):
            half |= np.int64(peek(raw, at + SCALES + 2 * k, np.uint16)) >> 12 << 4 * k
        d = first(decode_half(fill(np.uint16(half), 2)))
        for k in range(32):
            upper = np.int64(peek(raw, at + QH + k // 2, np.uint8)) >> k % 2 * 4 & 7
            put_eight(EIGHTHS, np.int64(peek(raw, at + QS + k, np.uint8)) | upper << 8, points, k)
        for k in range(16):
            word = np.int64(peek(raw, at + SCALES + k // 4 * 2, np.uint16))
            step = d * np.float32(2 * (word >> k % 4 * 3 & 7) + 1)
            fours = np.int64(peek(raw, at + QH + k, np.uint8))
            down = (fours >> 3 & 1) * 0x00FF | (fours >> 7) * 0xFF00
            weights = shift_weights(points, np.uint16(down), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
