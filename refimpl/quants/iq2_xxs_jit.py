"""IQ2_XXS for kernels: the twin of iq2_xxs.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_XXS
from refimpl.quants.grid_search_jit import (
    Found,
    Tables,
    find_step,
    load_tables,
    make_found,
    make_group,
    round_scale,
    search_block,
    write_half,
)
from refimpl.quants.grids import PLANS, load_grid, refuse
from refimpl.quants.grids_jit import complete_signs, read_step, read_word, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ2_XXS.weights, IQ2_XXS.block.itemsize
QS = IQ2_XXS.offset("qs")
POINTS, PLAN = load_grid("iq2_xxs").points, PLANS["iq2_xxs"]
ZERO, ONE, HALF, QUARTER = np.float32(0), np.float32(1), np.float32(0.5), np.float32(0.25)


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


@jit
def pack(found: Found, block: Bytes) -> None:
    """Write one block. block : [66] uint8."""
    block[:] = 0
    if found.scales.max() == ZERO:
        return
    step = find_step(found.scales, 16)
    write_half(encode_half(step), block)
    for j in range(8):
        word = round_scale(found.scales[j], ONE / step, 16) << 28
        for k in range(4):
            word |= int(found.signs[4 * j + k]) << 7 * k
            block[QS + 8 * j + k] = found.numbers[4 * j + k]
        for k in range(4):
            block[QS + 8 * j + 4 + k] = word >> 8 * k & 255


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, t: Tables, out: Bytes) -> int:
    """Encode rows; return the first block, counted over all rows, that ggml aborts on, or -1."""
    group, found = make_group(PLAN), make_found(PLAN)
    blocks, refused, weights = x.shape[1] // WEIGHTS, -1, np.empty(0, np.float32)
    for r in range(x.shape[0]):
        for b in range(blocks):
            if imatrix.shape[0] > 0:
                weights = imatrix[r // rows_per_expert, b * WEIGHTS : (b + 1) * WEIGHTS]
            lost = search_block(PLAN, t, x[r, b * WEIGHTS : (b + 1) * WEIGHTS], weights, group, found)
            if lost and refused < 0:
                refused = r * blocks + b
            pack(found, out[r, b * BYTES : (b + 1) * BYTES])
    return refused


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]
    out     : [R, n/256*66] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, load_tables("iq2_xxs"), out))
