"""IQ2_XS for kernels: the twin of iq2_xs.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_XS
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import complete_signs, read_step, read_word, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ2_XS.weights, IQ2_XS.block.itemsize
QS, SCALES = IQ2_XS.offset("qs"), IQ2_XS.offset("scales")
POINTS = load_grid("iq2_xs").points
HALF, QUARTER = np.float32(0.5), np.float32(0.25)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [74] uint8; y : [256] float32, written."""
    d = read_step(block)
    for k in range(WEIGHTS // 8):
        scale = int(block[SCALES + k // 4]) >> k // 2 % 2 * 4 & 15
        step = d * (HALF + np.float32(scale)) * QUARTER
        word = read_word(block, QS + 2 * k)
        write_point(POINTS, word & 511, complete_signs(word >> 9), step, y[8 * k : 8 * k + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*74] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
