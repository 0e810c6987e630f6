"""IQ2_S for kernels: the twin of iq2_s.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_S
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import read_step, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ2_S.weights, IQ2_S.block.itemsize
QS, QH, SCALES = (IQ2_S.offset(field) for field in ("qs", "qh", "scales"))
SIGNS = QS + WEIGHTS // 8
POINTS = load_grid("iq2_s").points
HALF, QUARTER = np.float32(0.5), np.float32(0.25)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [82] uint8; y : [256] float32, written."""
    d = read_step(block)
    for k in range(WEIGHTS // 8):
        scale = int(block[SCALES + k // 4]) >> k // 2 % 2 * 4 & 15
        step = d * (HALF + np.float32(scale)) * QUARTER
        number = int(block[QS + k]) | (int(block[QH + k // 4]) >> 2 * (k % 4) & 3) << 8
        write_point(POINTS, number, int(block[SIGNS + k]), step, y[8 * k : 8 * k + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*82] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
