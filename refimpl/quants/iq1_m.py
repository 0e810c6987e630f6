"""IQ1_M: 256 weights in 56 bytes, 1.75 bits each: ternary points of a grid of 2048, a scale for 16, a shift for 8.

| qs: 32 bytes | qh: 32 times 4 bits: 3 upper bits of a number, shift | scales: 4 times (4 * 3 bits, 4 bits of d) |

w[i] = d * (2 * scale + 1) * (point[i] + shift)        point[i] is -1, 0 or 1; shift is +1/8, or -1/8 where set

A point is eight weights. d is an fp16 whose bits are the top four of the four 16-bit words `scales`, lowest
first; the other bits of a word are the scales of four times 16 weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.arith.sums import add_up
from refimpl.quants import grid_search, ternary_rule, ternary_search
from refimpl.quants.formats import IQ1_M
from refimpl.quants.grids import Stored, load_grid

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[Any]  # integers
Mask = NDArray[Any]  # bool

SUB = 16  # weights that share a scale; each 8 of them have a shift
EPSILON = np.float32(1e-7)  # a group below this counts as zero
RAISED = np.float32(1.1125)


def unpack_step(blocks: Records) -> NDArray[np.uint16]:
    """The bits of d. blocks : [N] IQ1_M records; return : [N] uint16, an fp16's."""
    tops = blocks["scales"] >> 12
    return np.asarray(tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12)


def unpack(blocks: Records) -> Stored:
    """Take the fields apart, but for d and the shifts. blocks : [N] IQ1_M records."""
    fours = np.stack([blocks["qh"] & 15, blocks["qh"] >> 4], -1).reshape(-1, 32).astype(np.int32)
    levels = (blocks["scales"][..., None] >> np.arange(0, 12, 3) & 7).reshape(-1, 16)
    return Stored(blocks["qs"] | (fours & 7) << 8, np.zeros(fours.shape, np.uint8), levels.astype(np.int32))


def read_scales(blocks: Records) -> Floats:
    """d. blocks : [N] IQ1_M records; return : [N, 1] float32."""
    return decode_half(unpack_step(blocks))[:, None]


def dequantize(blocks: Records) -> Floats:
    """Decode IQ1_M blocks to weights.

    w[i] = d * (2 * scale[i // 16] + 1) * (point[i] + shift[i // 8])

    blocks : [N] IQ1_M records (formats.IQ1_M.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written; the sum is exact.
    Source: ggml-quants.c dequantize_row_iq1_m, llama.cpp 0c1e570.
    """
    numbers, _, levels = unpack(blocks)
    signs = np.stack([blocks["qh"] & 8, blocks["qh"] & 128], -1).reshape(-1, 32)
    shift = np.where(signs, -ternary_search.SHIFT, ternary_search.SHIFT)
    step = decode_half(unpack_step(blocks))[:, None] * (2 * levels + 1).astype(np.float32)
    point = load_grid("iq1_s").points[numbers].astype(np.float32)
    return (step.repeat(2, 1)[..., None] * (point + shift[..., None])).reshape(-1, 256)


def find_cuts(x: Floats, weights: Floats) -> tuple[Floats, Codes, Mask, Mask]:
    """Cut each group in three, under either shift of either half, where the error is least: the first of the best.

    With h a half of the group, T its sum and S(i) its part below the cut i, all of w x (of w for q^2):
    sum w q x = sum over h of T top - S(i) - S(j),  sum w q^2 = T top^2 + S(i) (a^2 - b^2) + S(j) (b^2 - top^2)

    x, weights : [N, 16] float32
    return     : scale [N], codes [N, 16], up [N, 2]: is the shift positive, none [N]: no cut has a positive sum
    """
    halves = np.arange(SUB) // 8
    sums = []
    for terms in (weights * x, weights):
        for h in range(2):
            order, part = ternary_search.sort_sums(x, np.where(halves == h, terms, np.float32(0)))
            sums.append(part)
    best, scale = ternary_search.worst(x), np.abs(x).max(1)
    first, second = np.full(len(x), -1), np.full(len(x), -1)
    up = np.zeros((len(x), 2), np.bool_)
    for i in range(SUB + 1):
        for j in range(i, SUB + 1):
            qx, q2 = [], []  # of half 0 up, down, of half 1 up, down
            for h in range(2):
                sum_x, sum_w = sums[h], sums[2 + h]
                for a, b, top in (ternary_search.UP, ternary_search.DOWN):
                    qx.append(sum_x[:, SUB] * top - (sum_x[:, i] + sum_x[:, j]))  # CUT_SQX
                    total = sum_w[:, SUB] * top * top + sum_w[:, i] * (a * a - b * b)  # CUT_SQ2
                    q2.append(total + sum_w[:, j] * (b * b - top * top))  # CUT_SQ2
            for k in range(4):
                one, two = k // 2, 2 + k % 2
                better, best, scale = ternary_search.keep(best, scale, qx[one] + qx[two], q2[one] + q2[two])
                first, second = np.where(better, i, first), np.where(better, j, second)
                up = np.where(better[:, None], [k < 2, k % 2 == 0], up)
    return scale, ternary_search.cut(x, order, first, second), up, first < 0


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Count what no importances explain, see ternary_rule.py. x : [N, 256] float32; return : [N, checks] int32."""
    return ternary_rule.measure(decode_half(unpack_step(blocks)), unpack(blocks), x, SUB, EPSILON)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to IQ1_M blocks.

    The best of 612 ways to cut and shift each 16 weights; codes that are no point move to the best near one.
    d is fitted to the whole block under the codes and scales that are stored, and raised by 1.1125.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None: each weight's error counts by its square
    return  : [R, n/256] IQ1_M records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq1_m_impl, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, SUB)
    weights = groups * groups
    if imatrix is not None:
        weights = grid_search.weigh(x, imatrix, grid_search.mean_squares(x, 2)).reshape(-1, SUB)
    scale, codes, up, none = find_cuts(groups, weights)
    scale, codes, up = ternary_search.turn(scale, codes, up)
    scale, number, lost = ternary_search.snap(groups, weights, scale, codes, up)
    dead = (np.abs(groups).max(1) < EPSILON) | none
    number, up, scale = np.where(dead[:, None], 0, number), up | dead[:, None], np.where(dead, 0, scale)
    scale = scale.reshape(-1, 16)
    grid_search.refuse((lost & ~dead).reshape(-1, 16), scale)

    d, levels = grid_search.round_scales(scale, 8)
    d = fit_step(x, weights, number, up, levels, d)
    alive = (scale.max(1) != 0)[:, None]
    half = np.where(alive[:, 0], encode_half(d * RAISED), 0)
    fours = (number >> 8 | np.where(up, 0, 8) * alive.repeat(16, 0)).reshape(-1, 32)
    words = np.bitwise_or.reduce(levels.reshape(-1, 4, 4) << np.arange(0, 12, 3), 2)
    blocks = np.zeros(len(d), IQ1_M.block)
    blocks["qs"] = number.reshape(-1, 32) & 255
    blocks["qh"] = fours[:, ::2] | fours[:, 1::2] << 4
    blocks["scales"] = words | (half[:, None] >> np.arange(0, 16, 4) & 15) << 12
    return blocks.reshape(len(x), -1)


def fit_step(x: Floats, weights: Floats, number: Codes, up: Mask, levels: Codes, d: Floats) -> Floats:
    """Fit d to each block: sum w q x / sum w q^2 with q = (point + shift) (2 scale + 1); d where that has no sense.

    x : [R, n]; weights : [N * 16, 16]; number, up : [N * 16, 2]; levels : [N, 16]; d, return : [N]
    """
    shift = np.where(up, ternary_search.SHIFT, -ternary_search.SHIFT)
    q = load_grid("iq1_s").points[number].astype(np.float32) + shift[..., None]
    q = (q.reshape(-1, 16, 16) * (2 * levels + 1).astype(np.float32)[..., None]).reshape(-1, 256)
    w = weights.reshape(-1, 256)
    sum_qx, sum_q2 = add_up(w * q * x.reshape(-1, 256)), add_up(w * q * q)  # STEP_SQX, STEP_SQ2
    return np.where(sum_q2 > 0, sum_qx / sum_q2, d)
