"""IQ2_XXS for kernels: the twin of iq2_xxs.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_XXS
from refimpl.quants.grid_rule_jit import RuleTables, check_block, load_rule, make_rule
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
from refimpl.quants.grids_jit import Stored, complete_signs, make_stored, read_step, read_word, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ2_XXS.weights, IQ2_XXS.block.itemsize
QS = IQ2_XXS.offset("qs")
POINTS, PLAN = load_grid("iq2_xxs").points, PLANS["iq2_xxs"]
ZERO, ONE, HALF, QUARTER = np.float32(0), np.float32(1), np.float32(0.5), np.float32(0.25)


@jit
def unpack_block(block: Bytes, s: Stored) -> None:
    """Take one block apart. block : [66] uint8."""
    for j in range(8):
        at = QS + 8 * j
        word = read_word(block, at + 4) | read_word(block, at + 6) << 16
        s.levels[j] = word >> 28
        for k in range(4):
            s.numbers[4 * j + k] = block[at + k]
            s.signs[4 * j + k] = complete_signs(word >> 7 * k & 127)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*66] uint8; out : [R, n] float32, written."""
    s = make_stored(PLAN)
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            block, y = raw[r, b * BYTES : (b + 1) * BYTES], out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_block(block, s)
            d = read_step(block)
            for k in range(s.numbers.size):
                step = d * (HALF + np.float32(s.levels[k // 4])) * QUARTER
                write_point(POINTS, s.numbers[k], s.signs[k], step, y[8 * k : 8 * (k + 1)])


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


@jit
def check(raw: Bytes, x: Floats, t: RuleTables, off: NDArray[np.uint16], far: Bytes) -> None:
    """Check rows: see check_codes."""
    rule = make_rule(t, PLAN)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_block(block, rule.stored)
            off[r, b] = check_block(PLAN, rule, read_step(block), group)
            far[r, b] = min(off[r, b], 1)


def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count what no importances explain, see grid_rule.py. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: 1 where there are any
    """
    check(raw, x, load_rule("iq2_xxs"), off, far)
