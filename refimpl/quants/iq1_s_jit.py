"""IQ1_S for kernels: the twin of iq1_s.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ1_S
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import read_step, read_word, write_shifted

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ1_S.weights, IQ1_S.block.itemsize
QS, QH = IQ1_S.offset("qs"), IQ1_S.offset("qh")
POINTS = load_grid("iq1_s").points
SHIFT = np.float32(0.125)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [50] uint8; y : [256] float32, written."""
    d = read_step(block)
    for j in range(8):
        word = read_word(block, QH + 2 * j)
        step = d * np.float32(2 * (word >> 12 & 7) + 1)
        shift = -SHIFT if word >> 15 else SHIFT
        for k in range(4):
            number = int(block[QS + 4 * j + k]) | (word >> 3 * k & 7) << 8
            start = 32 * j + 8 * k
            write_shifted(POINTS, number, shift, step, y[start : start + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*50] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
