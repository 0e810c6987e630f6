"""IQ1_M for kernels: the twin of iq1_m.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ1_M
from refimpl.quants.grid_search_jit import find_step, mean_square, round_scale
from refimpl.quants.grids import load_grid, refuse
from refimpl.quants.grids_jit import read_word, write_shifted
from refimpl.quants.ternary_rule_jit import Rule, check_block, make_rule
from refimpl.quants.ternary_search_jit import (
    LEAST,
    SHIFT,
    Search,
    cut,
    find_size,
    make_search,
    snap,
    sort,
    turn,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ1_M.weights, IQ1_M.block.itemsize
QS, QH, SCALES = IQ1_M.offset("qs"), IQ1_M.offset("qh"), IQ1_M.offset("scales")
POINTS = load_grid("iq1_s").points
SUB = 16  # weights that share a scale; each 8 of them have a shift
ZERO, ONE = np.float32(0), np.float32(1)
EPSILON, RAISED = np.float32(1e-7), np.float32(1.1125)


@jit
def unpack_step(block: Bytes) -> Any:
    """d, from the top bits of the four words. block : [56] uint8; return : float32."""
    half = 0
    for k in range(4):
        half |= (int(block[SCALES + 2 * k + 1]) >> 4) << 4 * k
    return decode_half(half)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [56] uint8; y : [256] float32, written."""
    d = unpack_step(block)
    for k in range(WEIGHTS // 8):
        scale = read_word(block, SCALES + k // 8 * 2) >> k // 2 % 4 * 3 & 7
        step = d * np.float32(2 * scale + 1)
        four = int(block[QH + k // 2]) >> k % 2 * 4
        shift = -SHIFT if four & 8 else SHIFT
        write_shifted(POINTS, int(block[QS + k]) | (four & 7) << 8, shift, step, y[8 * k : 8 * k + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*56] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def add_half(sums: Floats, j: int, i: int, h: int, term: Any) -> None:
    """Carry the sums of half h past place j of the order, whose weight is i. sums : [17]."""
    sums[j + 1] = sums[j] + (term if i // 8 == h else ZERO)  # CUT_SUM


@jit
def sum_half(s: Search, h: int, i: int, j: int, shift: Any) -> Any:
    """Half h under one shift: sums of w q x and w q^2."""
    a, b, top = shift - ONE, shift, shift + ONE
    sum_x, sum_w = s.sums[h], s.sums[2 + h]
    sum_qx = sum_x[SUB] * top - (sum_x[i] + sum_x[j])  # CUT_SQX
    sum_q2 = sum_w[SUB] * top * top + sum_w[i] * (a * a - b * b) + sum_w[j] * (b * b - top * top)  # CUT_SQ2
    return sum_qx, sum_q2


@jit
def find_cuts(s: Search, scale: Any) -> Any:
    """Cut the group in three, under either shift of either half, where the error is least: s.codes and s.up.

    return : scale, and whether any cut has a positive sum
    """
    sort(s)
    for j in range(SUB):
        i = s.order[j]
        for h in range(2):
            add_half(s.sums[h], j, i, h, s.weights[i] * s.x[i])
            add_half(s.sums[2 + h], j, i, h, s.weights[i])
    best, first, second, found = LEAST, -1, -1, 0
    for i in range(SUB + 1):
        for j in range(i, SUB + 1):
            up0, up0_q2 = sum_half(s, 0, i, j, SHIFT)
            down0, down0_q2 = sum_half(s, 0, i, j, -SHIFT)
            up1, up1_q2 = sum_half(s, 1, i, j, SHIFT)
            down1, down1_q2 = sum_half(s, 1, i, j, -SHIFT)
            for k in range(4):
                sum_qx = (up0 if k < 2 else down0) + (up1 if k % 2 == 0 else down1)
                sum_q2 = (up0_q2 if k < 2 else down0_q2) + (up1_q2 if k % 2 == 0 else down1_q2)
                if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
                    scale = sum_qx / sum_q2
                    best = scale * sum_qx
                    first, second, found = i, j, k
    take_cuts(s, first, second, found)
    return scale, first >= 0


@jit
def take_cuts(s: Search, first: int, second: int, found: int) -> None:
    """The codes between the cuts, and the shifts: found 0 to 3 is up up, up down, down up, down down."""
    cut(s, first, second)
    s.up[0], s.up[1] = 1 if found < 2 else 0, 1 - found % 2


@jit
def fit_sub(s: Search, block: Bytes, j: int) -> Any:
    """Search 16 weights; write their numbers and shifts. return : scale >= 0, lost."""
    size = find_size(s)
    if size < EPSILON:
        return ZERO, False
    scale, some = find_cuts(s, size)
    if not some:
        return ZERO, False
    return write_sub(s, scale, block, j)


@jit
def write_sub(s: Search, scale: Any, block: Bytes, j: int) -> Any:
    """Write the numbers and shifts of codes that were cut under a scale. return : scale >= 0, lost."""
    if scale < ZERO:
        turn(s)
    scale, lost = snap(s, abs(scale))
    for k in range(2):
        block[QS + 2 * j + k] = s.numbers[k] & 255
        block[QH + j] |= (int(s.numbers[k]) >> 8 | (0 if s.up[k] else 8)) << 4 * k
    return scale, lost or not scale >= ZERO


@jit
def weigh_sub(x: Floats, imatrix: Floats, mean: Any, j: int, s: Search) -> None:
    """Take 16 weights of a block and weigh them: imatrix * sqrt(mean + x^2), or x^2."""
    for i in range(SUB):
        v = x[SUB * j + i]
        s.x[i] = v
        s.weights[i] = imatrix[SUB * j + i] * np.sqrt(mean + v * v) if imatrix.size > 0 else v * v  # BLOCK_W


@jit
def quantize_block(x: Floats, imatrix: Floats, s: Search, scales: Floats, block: Bytes) -> bool:
    """Encode one block. x : [256] float32; imatrix : [256] or [0]; block : [56] uint8, written; return : lost?"""
    block[:] = 0
    mean, lost = mean_square(x, 2), False
    for j in range(WEIGHTS // SUB):
        weigh_sub(x, imatrix, mean, j, s)
        scales[j], gone = fit_sub(s, block, j)
        lost |= gone
    write_scales(x, imatrix, mean, s, scales, block)
    return lost


@jit
def write_scales(x: Floats, imatrix: Floats, mean: Any, s: Search, scales: Floats, block: Bytes) -> None:
    """Write the scales, and the d that fits the block best under them; no shifts where all scales are 0."""
    if scales.max() == ZERO:
        for j in range(WEIGHTS // SUB):
            block[QH + j] &= 0x77
        return
    step = find_step(scales, 8)
    inverse = ONE / step
    sum_qx, sum_q2 = ZERO, ZERO
    for j in range(WEIGHTS // SUB):
        code = round_scale(scales[j], inverse, 8)
        word = code << j % 4 * 3
        block[SCALES + j // 4 * 2] |= word & 255
        block[SCALES + j // 4 * 2 + 1] |= word >> 8
        weigh_sub(x, imatrix, mean, j, s)
        for i in range(SUB):
            four = int(block[QH + j]) >> i // 8 * 4
            number = int(block[QS + 2 * j + i // 8]) | (four & 7) << 8
            shift = -SHIFT if four & 8 else SHIFT
            q = (np.float32(POINTS[number, i % 8]) + shift) * np.float32(2 * code + 1)
            w = s.weights[i]
            sum_qx += w * q * s.x[i]  # STEP_SQX
            sum_q2 += w * q * q  # STEP_SQ2
    if sum_q2 > ZERO:
        step = sum_qx / sum_q2
    half = encode_half(step * RAISED)
    for k in range(4):
        block[SCALES + 2 * k + 1] |= (half >> 4 * k & 15) << 4


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, s: Search, out: Bytes) -> int:
    """Encode rows; return the first block, counted over all rows, that ggml aborts on, or -1."""
    scales = np.empty(WEIGHTS // SUB, np.float32)
    blocks, refused = x.shape[1] // WEIGHTS, -1
    none = np.empty(0, np.float32)
    for r in range(x.shape[0]):
        for b in range(blocks):
            weights = none
            if imatrix.shape[0] > 0:
                weights = imatrix[r // rows_per_expert, b * WEIGHTS : (b + 1) * WEIGHTS]
            block = out[r, b * BYTES : (b + 1) * BYTES]
            if (
                quantize_block(x[r, b * WEIGHTS : (b + 1) * WEIGHTS], weights, s, scales, block)
                and refused < 0
            ):
                refused = r * blocks + b
    return refused


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*56] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, make_search(SUB), out))


@jit
def unpack_block(block: Bytes, r: Rule) -> None:
    """The numbers and scales of one block. block : [56] uint8."""
    for k in range(32):
        r.numbers[k] = int(block[QS + k]) | (int(block[QH + k // 2]) >> k % 2 * 4 & 7) << 8
        r.levels[k // 2] = read_word(block, SCALES + k // 8 * 2) >> k // 2 % 4 * 3 & 7


@jit
def check(raw: Bytes, x: Floats, rule: Rule, off: NDArray[np.uint16], far: Bytes) -> None:
    """Check rows: see check_codes."""
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_block(block, rule)
            off[r, b] = check_block(rule, unpack_step(block), group, EPSILON)
            far[r, b] = min(off[r, b], 1)


def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count what no importances explain, see ternary_rule.py. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: 1 where there are any
    """
    check(raw, x, make_rule(SUB), off, far)
