"""IQ1_S for kernels: the twin of iq1_s.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ1_S
from refimpl.quants.grid_search_jit import find_step, mean_square, round_scale, write_half
from refimpl.quants.grids import load_grid, refuse
from refimpl.quants.grids_jit import read_step, read_word, write_shifted
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

WEIGHTS, BYTES = IQ1_S.weights, IQ1_S.block.itemsize
QS, QH = IQ1_S.offset("qs"), IQ1_S.offset("qh")
POINTS = load_grid("iq1_s").points
SUB = 32  # weights that share a scale and a shift
ZERO, ONE = np.float32(0), np.float32(1)
EPSILON, RAISED = np.float32(1e-12), np.float32(1.125)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [50] uint8; y : [256] float32, written."""
    d = read_step(block)
    for j in range(8):
        word = read_word(block, QH + 2 * j)
        step = d * np.float32(2 * (word >> 12 & 7) + 1)
        shift = -SHIFT if word >> 15 else SHIFT
        for k in range(4):
            number = int(block[QS + 4 * j + k]) | (word >> 3 * k & 7) << 8
            start = 32 * j + 8 * k
            write_shifted(POINTS, number, shift, step, y[start : start + 8])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*50] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def find_cuts(s: Search, scale: Any) -> Any:
    """Cut the group in three, under either shift, where the error is least: s.codes and s.up.

    return : scale, or -inf where no cut has a positive sum
    """
    sort(s)
    sum_x, sum_w = s.sums[0], s.sums[1]
    for j in range(SUB):
        i = s.order[j]
        sum_x[j + 1] = sum_x[j] + s.weights[i] * s.x[i]  # CUT_SUM
        sum_w[j + 1] = sum_w[j] + s.weights[i]
    best, first, second, up = LEAST, -1, -1, 0
    for i in range(SUB + 1):
        for j in range(i, SUB + 1):
            x0, x1, x2 = sum_x[i] - sum_x[0], sum_x[j] - sum_x[i], sum_x[SUB] - sum_x[j]
            w0, w1, w2 = sum_w[i] - sum_w[0], sum_w[j] - sum_w[i], sum_w[SUB] - sum_w[j]
            for k in range(2):
                shift = SHIFT if k == 0 else -SHIFT
                a, b, c = shift - ONE, shift, shift + ONE
                sum_qx = x0 * a + x1 * b + x2 * c  # CUT_SQX
                sum_q2 = w0 * a * a + w1 * b * b + w2 * c * c  # CUT_SQ2
                if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
                    scale = sum_qx / sum_q2
                    best = scale * sum_qx
                    first, second, up = i, j, 1 - k
    take_cuts(s, first, second, up)
    return scale, first >= 0


@jit
def take_cuts(s: Search, first: int, second: int, up: int) -> None:
    """The codes between the cuts, and the shift."""
    cut(s, first, second)
    s.up[:] = up


@jit
def fit_sub(s: Search, block: Bytes, j: int) -> Any:
    """Search 32 weights; write their numbers, and the shift as the top bit. return : scale >= 0, lost."""
    size = find_size(s)
    if size < EPSILON:
        return ZERO, False
    scale, some = find_cuts(s, size)
    if not some:
        return ZERO, False
    return write_sub(s, scale, block, j)


@jit
def write_sub(s: Search, scale: Any, block: Bytes, j: int) -> Any:
    """Write the numbers and the shift of codes that were cut under a scale. return : scale >= 0, lost."""
    if scale < ZERO:
        turn(s)
    scale, lost = snap(s, abs(scale))
    word = 0 if s.up[0] else 0x8000
    for k in range(4):
        block[QS + 4 * j + k] = s.numbers[k] & 255
        word |= int(s.numbers[k]) >> 8 << 3 * k
    block[QH + 2 * j], block[QH + 2 * j + 1] = word & 255, word >> 8
    return scale, lost or not scale >= ZERO


@jit
def quantize_block(x: Floats, imatrix: Floats, s: Search, scales: Floats, block: Bytes) -> bool:
    """Encode one block. x, imatrix : [256] float32; block : [50] uint8, written; return : lost?"""
    block[:] = 0
    mean, lost = mean_square(x, 2), False
    for j in range(WEIGHTS // SUB):
        weigh_sub(x, imatrix, mean, j, s)
        scales[j], gone = fit_sub(s, block, j)
        lost |= gone
    write_scales(scales, block)
    return lost


@jit
def weigh_sub(x: Floats, imatrix: Floats, mean: Any, j: int, s: Search) -> None:
    """Take 32 weights of a block and weigh them: imatrix * sqrt(mean + x^2)."""
    for i in range(SUB):
        s.x[i] = x[SUB * j + i]
        s.weights[i] = imatrix[SUB * j + i] * np.sqrt(mean + s.x[i] * s.x[i])  # BLOCK_W


@jit
def write_scales(scales: Floats, block: Bytes) -> None:
    """Write the scales and their d; no shifts where all scales are 0."""
    if scales.max() == ZERO:
        for j in range(WEIGHTS // SUB):
            block[QH + 2 * j + 1] &= 0x7F
        return
    step = find_step(scales, 8)
    write_half(encode_half(step * RAISED), block)
    for j in range(WEIGHTS // SUB):
        block[QH + 2 * j + 1] |= round_scale(scales[j], ONE / step, 8) << 4


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, s: Search, out: Bytes) -> int:
    """Encode rows; return the first block, counted over all rows, that ggml aborts on, or -1."""
    scales = np.empty(WEIGHTS // SUB, np.float32)
    blocks, refused = x.shape[1] // WEIGHTS, -1
    for r in range(x.shape[0]):
        for b in range(blocks):
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
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]
    out     : [R, n/256*50] uint8, written
    """
    refuse(encode(x, imatrix, rows_per_expert, make_search(SUB), out))


@jit
def unpack_block(block: Bytes, r: Rule) -> None:
    """The numbers and scales of one block. block : [50] uint8."""
    for k in range(32):
        word = read_word(block, QH + k // 4 * 2)
        r.numbers[k] = int(block[QS + k]) | (word >> k % 4 * 3 & 7) << 8
        r.levels[k // 4] = word >> 12 & 7


@jit
def check(raw: Bytes, x: Floats, rule: Rule, off: NDArray[np.uint16], far: Bytes) -> None:
    """Check rows: see check_codes."""
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_block(block, rule)
            off[r, b] = check_block(rule, read_step(block), group, EPSILON)
            far[r, b] = min(off[r, b], 1)


def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count what no importances explain, see ternary_rule.py. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: 1 where there are any
    """
    check(raw, x, make_rule(SUB), off, far)
