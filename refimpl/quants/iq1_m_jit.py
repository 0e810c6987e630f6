"""IQ1_M for kernels: the twin of iq1_m.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ1_M
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import read_word, write_shifted

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ1_M.weights, IQ1_M.block.itemsize
QS, QH, SCALES = IQ1_M.offset("qs"), IQ1_M.offset("qh"), IQ1_M.offset("scales")
POINTS = load_grid("iq1_s").points
SHIFT = np.float32(0.125)


@jit
def unpack_step(block: Bytes) -> Any:
    """d, from the top bits of the four words. block : [56] uint8; return : float32."""
    half = 0
    for k in range(4):
        half |= (int(block[SCALES + 2 * k + 1]) >> 4) << 4 * k
    return decode_half(half)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [56] uint8; y : [256] float32, written."""
    d = unpack_step(block)
    for k in range(WEIGHTS // 8):
        scale = read_word(block, SCALES + k // 8 * 2) >> k // 2 % 4 * 3 & 7
        step = d * np.float32(2 * scale + 1)
        four = int(block[QH + k // 2]) >> k % 2 * 4
        shift = -SHIFT if four & 8 else SHIFT
        write_shifted(POINTS, int(block[QS + k]) | (four & 7) << 8, shift, step, y[8 * k : 8 * k + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*56] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
