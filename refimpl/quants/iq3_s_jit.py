"""IQ3_S for kernels: the twin of iq3_s.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ3_S
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
from refimpl.quants.grids_jit import Stored, make_stored, read_step, write_point

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ3_S.weights, IQ3_S.block.itemsize
QS, QH, SIGNS, SCALES = (IQ3_S.offset(field) for field in ("qs", "qh", "signs", "scales"))
POINTS, PLAN = load_grid("iq3_s").points, PLANS["iq3_s"]
ZERO, ONE = np.float32(0), np.float32(1)
RAISED = np.float32(1.033)


@jit
def unpack_block(block: Bytes, s: Stored) -> None:
    """Take one block apart. block : [110] uint8."""
    for k in range(WEIGHTS // 4):
        s.numbers[k] = int(block[QS + k]) | (int(block[QH + k // 8]) >> k % 8 & 1) << 8
    for j in range(8):
        s.levels[j] = int(block[SCALES + j // 2]) >> j % 2 * 4 & 15
    for k in range(32):
        s.signs[k] = block[SIGNS + k]


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*110] uint8; out : [R, n] float32, written."""
    s = make_stored(PLAN)
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            block, y = raw[r, b * BYTES : (b + 1) * BYTES], out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_block(block, s)
            d = read_step(block)
            for k in range(s.numbers.size):
                step = d * np.float32(1 + 2 * int(s.levels[k // 8]))
                write_point(
                    POINTS, s.numbers[k], int(s.signs[k // 2]) >> k % 2 * 4, step, y[4 * k : 4 * (k + 1)]
                )


@jit
def pack(found: Found, block: Bytes) -> None:
    """Write one block. block : [110] uint8."""
    block[:] = 0
    living = 0  # ggml does not step over groups of zeros: see iq3_s.py
    for j in range(8):
        if found.living[j] == 0:
            continue
        for k in range(8):
            number = int(found.numbers[8 * j + k])
            block[QS + 8 * living + k] = number & 255
            block[QH + j] |= number >> 8 << k
        for k in range(4):
            block[SIGNS + 4 * living + k] = found.signs[4 * j + k]
        living += 1
    if found.scales.max() == ZERO:
        return
    step = find_step(found.scales, 16)
    write_half(encode_half(step * RAISED), block)
    for j in range(8):
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
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*110] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, load_tables("iq3_s"), out))


@jit
def move_back(s: Stored, x: Floats) -> None:
    """Move the low bits of numbers and the signs back behind the groups of zeros that the encoder skipped."""
    low, signs = s.numbers & 255, s.signs.copy()
    first, last = 0, 0
    for j in range(8):
        last += 1 if x[32 * j : 32 * (j + 1)].any() else 0
    for j in range(8):
        if x[32 * j : 32 * (j + 1)].any():
            at, first = first, first + 1
        else:
            at, last = last, last + 1
        for k in range(8):
            s.numbers[8 * j + k] = s.numbers[8 * j + k] & 256 | low[8 * at + k]
        for k in range(4):
            s.signs[4 * j + k] = signs[4 * at + k]


@jit
def check(raw: Bytes, x: Floats, t: RuleTables, off: NDArray[np.uint16], far: Bytes) -> None:
    """Check rows: see check_codes."""
    rule = make_rule(t, PLAN)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_block(block, rule.stored)
            move_back(rule.stored, group)
            off[r, b] = check_block(PLAN, rule, read_step(block), group)
            far[r, b] = min(off[r, b], 1)


def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count what no importances explain, see grid_rule.py. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: 1 where there are any
    """
    check(raw, x, load_rule("iq3_s"), off, far)
