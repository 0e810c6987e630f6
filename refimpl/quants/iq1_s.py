"""IQ1_S: 256 weights in 50 bytes, 1.56 bits each: ternary points of a grid of 2048, scale and shift for 32.

| d: fp16 | qs: 32 bytes | qh: 8 times 16 bits: 4 * 3 upper bits of numbers, scale of 3 bits, shift of 1 bit |

w[i] = d * (2 * scale + 1) * (point[i] + shift)        point[i] is -1, 0 or 1; shift is +1/8, or -1/8 where set

A point is eight weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants import grid_search, ternary_rule, ternary_search
from refimpl.quants.formats import IQ1_S
from refimpl.quants.grids import Stored, load_grid

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[Any]  # integers
Mask = NDArray[Any]  # bool

SUB = 32  # weights that share a scale and a shift
EPSILON = np.float32(1e-12)  # a group below this counts as zero
RAISED = np.float32(1.125)


def unpack(blocks: Records) -> Stored:
    """Take the fields apart, but for the shifts. blocks : [N] IQ1_S records."""
    qh = blocks["qh"].astype(np.int32)
    numbers = blocks["qs"] | (qh[..., None] >> np.arange(0, 12, 3) & 7).reshape(-1, 32) << 8
    return Stored(numbers, np.zeros(numbers.shape, np.uint8), qh >> 12 & 7)


def dequantize(blocks: Records) -> Floats:
    """Decode IQ1_S blocks to weights.

    w[i] = d * (2 * scale[i // 32] + 1) * (point[i] + shift[i // 32])

    blocks : [N] IQ1_S records (formats.IQ1_S.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written; the sum is exact.
    Source: ggml-quants.c dequantize_row_iq1_s, llama.cpp 0c1e570.
    """
    numbers, _, levels = unpack(blocks)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (2 * levels + 1).astype(np.float32)
    shift = np.where(blocks["qh"] & 0x8000, -ternary_search.SHIFT, ternary_search.SHIFT)
    point = load_grid("iq1_s").points[numbers].astype(np.float32).reshape(-1, 8, 32)
    return (step[..., None] * (point + shift[..., None])).reshape(-1, 256)


def find_cuts(x: Floats, weights: Floats) -> tuple[Floats, Codes, Mask, Mask]:
    """Cut each group in three, under either shift, where the error is least: the first of the best.

    x, weights : [N, 32] float32
    return     : scale [N], codes [N, 32], up [N, 4]: is the shift positive, none [N]: no cut has a positive sum
    """
    order, sum_x = ternary_search.sort_sums(x, weights * x)
    _, sum_w = ternary_search.sort_sums(x, weights)
    best, scale = ternary_search.worst(x), np.abs(x).max(1)
    first, second = np.full(len(x), -1), np.full(len(x), -1)
    up = np.zeros(len(x), np.bool_)
    for i in range(SUB + 1):
        for j in range(i, SUB + 1):
            parts_x = sum_x[:, i] - sum_x[:, 0], sum_x[:, j] - sum_x[:, i], sum_x[:, SUB] - sum_x[:, j]
            parts_w = sum_w[:, i] - sum_w[:, 0], sum_w[:, j] - sum_w[:, i], sum_w[:, SUB] - sum_w[:, j]
            for level in (ternary_search.UP, ternary_search.DOWN):
                a, b, c = level
                sum_qx = parts_x[0] * a + parts_x[1] * b + parts_x[2] * c  # CUT_SQX
                sum_q2 = parts_w[0] * a * a + parts_w[1] * b * b + parts_w[2] * c * c  # CUT_SQ2
                better, best, scale = ternary_search.keep(best, scale, sum_qx, sum_q2)
                first, second = np.where(better, i, first), np.where(better, j, second)
                up = np.where(better, level is ternary_search.UP, up)
    codes = ternary_search.cut(x, order, first, second)
    return scale, codes, up[:, None].repeat(4, 1), first < 0


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Count what no importances explain, see ternary_rule.py. x : [N, 256] float32; return : [N, checks] int32."""
    d = decode_half(blocks["d"].view(np.uint16))
    return ternary_rule.measure(d, unpack(blocks), x, SUB, EPSILON)


def quantize(x: Floats, imatrix: Floats) -> Records:
    """Encode rows of weights to IQ1_S blocks.

    The best of 1122 ways to cut and shift each 32 weights; codes that are no point move to the best near one.
    The stored d is raised by 1.125.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32
    return  : [R, n/256] IQ1_S records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq1_s_impl, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, SUB)
    weights = grid_search.weigh(x, imatrix, grid_search.mean_squares(x, 2)).reshape(-1, SUB)
    scale, codes, up, none = find_cuts(groups, weights)
    scale, codes, up = ternary_search.turn(scale, codes, up)
    scale, number, lost = ternary_search.snap(groups, weights, scale, codes, up)
    dead = (np.abs(groups).max(1) < EPSILON) | none
    number, up, scale = np.where(dead[:, None], 0, number), up[:, 0] | dead, np.where(dead, 0, scale)
    scale = scale.reshape(-1, 8)
    grid_search.refuse((lost & ~dead).reshape(-1, 8), scale)

    d, levels = grid_search.round_scales(scale, 8)
    down = ~up.reshape(-1, 8) & (scale.max(1) != 0)[:, None]
    upper = np.bitwise_or.reduce(number >> 8 << np.arange(0, 12, 3), 1).reshape(-1, 8)
    blocks = np.zeros(len(d), IQ1_S.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d * RAISED)
    blocks["qs"] = number.reshape(-1, 32) & 255
    blocks["qh"] = upper | levels << 12 | down.astype(np.int32) << 15
    return blocks.reshape(len(x), -1)
