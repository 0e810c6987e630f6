"""IQ2_XS for kernels: the twin of iq2_xs.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_XS
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

WEIGHTS, BYTES = IQ2_XS.weights, IQ2_XS.block.itemsize
QS, SCALES = IQ2_XS.offset("qs"), IQ2_XS.offset("scales")
POINTS, PLAN = load_grid("iq2_xs").points, PLANS["iq2_xs"]
ZERO, ONE, HALF, QUARTER = np.float32(0), np.float32(1), np.float32(0.5), np.float32(0.25)


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


@jit
def pack(found: Found, block: Bytes) -> None:
    """Write one block. block : [74] uint8."""
    block[:] = 0
    if found.scales.max() == ZERO:
        return
    step = find_step(found.scales, 16)
    write_half(encode_half(step), block)
    for k in range(WEIGHTS // 8):
        word = int(found.numbers[k]) | int(found.signs[k]) << 9
        block[QS + 2 * k], block[QS + 2 * k + 1] = word & 255, word >> 8
    for j in range(16):
        block[SCALES + j // 2] |= round_scale(found.scales[j], ONE / step, 16) << j % 2 * 4


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
    out     : [R, n/256*74] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, load_tables("iq2_xs"), out))
