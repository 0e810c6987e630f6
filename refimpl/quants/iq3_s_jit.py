"""IQ3_S for kernels: the twin of iq3_s.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ3_S
from refimpl.quants.grids import load_grid
from refimpl.quants.grids_jit import read_step, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ3_S.weights, IQ3_S.block.itemsize
QS, QH, SIGNS, SCALES = (IQ3_S.offset(field) for field in ("qs", "qh", "signs", "scales"))
POINTS = load_grid("iq3_s").points


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [110] uint8; y : [256] float32, written."""
    d = read_step(block)
    for k in range(WEIGHTS // 4):
        scale = int(block[SCALES + k // 16]) >> k // 8 % 2 * 4 & 15
        step = d * np.float32(1 + 2 * scale)
        number = int(block[QS + k]) | (int(block[QH + k // 8]) >> k % 8 & 1) << 8
        signs = int(block[SIGNS + k // 2]) >> k % 2 * 4
        write_point(POINTS, number, signs, step, y[4 * k : 4 * k + 4])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*110] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)
