"""IQ3_XXS for kernels: the twin of iq3_xxs.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ3_XXS
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import complete_signs, read_step, read_word, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ3_XXS.weights, IQ3_XXS.block.itemsize
QS = IQ3_XXS.offset("qs")
WORDS = QS + WEIGHTS // 4
POINTS = load_grid("iq3_xxs").points
HALF = np.float32(0.5)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [98] uint8; y : [256] float32, written."""
    d = read_step(block)
    for j in range(8):
        word = read_word(block, WORDS + 4 * j) | read_word(block, WORDS + 4 * j + 2) << 16
        step = d * (HALF + np.float32(word >> 28)) * HALF
        for k in range(8):
            signs = complete_signs(word >> k // 2 * 7 & 127) >> k % 2 * 4
            start = 32 * j + 4 * k
            write_point(POINTS, int(block[QS + 8 * j + k]), signs, step, y[start : start + 4])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*98] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
