"""IQ2_XXS for kernels: the twin of iq2_xxs.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_XXS
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import complete_signs, read_step, read_word, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ2_XXS.weights, IQ2_XXS.block.itemsize
QS = IQ2_XXS.offset("qs")
POINTS = load_grid("iq2_xxs").points
HALF, QUARTER = np.float32(0.5), np.float32(0.25)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [66] uint8; y : [256] float32, written."""
    d = read_step(block)
    for j in range(8):
        at = QS + 8 * j
        word = read_word(block, at + 4) | read_word(block, at + 6) << 16
        step = d * (HALF + np.float32(word >> 28)) * QUARTER
        for k in range(4):
            signs = complete_signs(word >> 7 * k & 127)
            start = 32 * j + 8 * k
            write_point(POINTS, int(block[at + k]), signs, step, y[start : start + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*66] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
