"""The scale searches that several formats share, for one group at a time: the twin of search.py.

Codes are Python integers here and bytes in the arrays. Comments in capitals name the places where a compiler
may fuse a product and a sum; see search.py.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import nearest_int
from refimpl.arith.jit import jit

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ZERO, ONE, TENTH, EPSILON = np.float32(0), np.float32(1), np.float32(0.1), np.float32(1e-15)


@jit
def round_code(v: Any, bottom: Any, top: Any) -> Any:
    """Round to the nearest code in bottom..top."""
    return max(bottom, min(top, nearest_int(v)))


@jit
def fit_scale_min(
    x: Floats, weights: Floats, top: int, start: Any, step: Any, steps: int, codes: Bytes, trial: Bytes
) -> Any:
    """Fit x = scale * q + min with q = 0..top and min <= 0.

    x, weights : [n] float32
    codes      : [n] uint8, written; trial : [n] uint8, scratch
    return     : scale, -min
    """
    low, high = x[0], x[0]
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for i in range(1, x.size):
        if x[i] < low:
            low = x[i]
        if x[i] > high:
            high = x[i]
        sum_w += weights[i]
        sum_x += weights[i] * x[i]  # QK_SUMX
    if low > ZERO:
        low = ZERO
    if high == low:
        for i in range(x.size):
            codes[i] = 0
        return ZERO, -low
    inverse = np.float32(top) / (high - low)
    scale = ONE / inverse
    for i in range(x.size):
        codes[i] = round_code(inverse * (x[i] - low), 0, top)  # QK_NI0
    best = measure_error(x, weights, scale, low, codes)  # QK_DIFF0, QK_ERR0
    for k in range(steps + 1):
        inverse = (start + step * np.float32(k) + np.float32(top)) / (high - low)  # QK_ISC
        sum_l, sum_l2, sum_xl = ZERO, ZERO, ZERO
        for i in range(x.size):
            code = round_code(inverse * (x[i] - low), 0, top)  # QK_NI1
            trial[i] = code
            q = np.float32(code)
            sum_l += weights[i] * q  # QK_SL
            sum_l2 += weights[i] * q * q  # QK_SL2
            sum_xl += weights[i] * q * x[i]  # QK_SXL
        determinant = sum_w * sum_l2 - sum_l * sum_l  # QK_D
        if not determinant > ZERO:
            continue
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant  # QK_TS
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant  # QK_TM
        if new_low > ZERO:
            new_scale, new_low = sum_xl / sum_l2, ZERO
        error = measure_error(x, weights, new_scale, new_low, trial)  # QK_DIFF1, QK_ERR1
        if error < best:
            for i in range(x.size):
                codes[i] = trial[i]
            best, scale, low = error, new_scale, new_low
    return scale, -low


@jit
def measure_error(x: Floats, weights: Floats, scale: Any, low: Any, codes: Bytes) -> Any:
    """Add up weights * (scale * q + low - x)^2."""
    error = ZERO
    for i in range(x.size):
        off = scale * np.float32(codes[i]) + low - x[i]
        error += weights[i] * (off * off)
    return error


@jit
def find_peak(x: Floats) -> Any:
    """Find the first of the largest in size, signed: [n] float32 -> float32; 0 where nothing exceeds 0."""
    peak, size = ZERO, ZERO
    for i in range(x.size):
        if abs(x[i]) > size:
            size = abs(x[i])
            peak = x[i]
    return peak


@jit
def sum_products(x: Floats, weights: Floats, top: int, inverse: Any) -> Any:
    """Round x under a trial scale; return sum of w * x * q and of w * q * q."""
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(x.size):
        q = np.float32(round_code(inverse * x[i], -top, top - 1))  # QX_NI0, QX_NI1
        sum_lx += weights[i] * x[i] * q  # QX_SLX0, QX_SLX1
        sum_l2 += weights[i] * q * q  # QX_SL20, QX_SL21
    return sum_lx, sum_l2


@jit
def fit_scale(x: Floats, weights: Floats, top: int, codes: Bytes) -> Any:
    """Fit x = scale * q with q = -top..top-1 over 19 trial scales.

    x, weights : [n] float32
    codes      : [n] uint8, written: q + top; all 0 where all |x| < 1e-15
    return     : scale
    """
    peak = find_peak(x)
    if abs(peak) < EPSILON:
        for i in range(x.size):
            codes[i] = 0
        return ZERO
    chosen = np.float32(-top) / peak
    sum_lx, sum_l2 = sum_products(x, weights, top, chosen)
    scale = ZERO
    if sum_l2 != ZERO:
        scale = sum_lx / sum_l2
    best = scale * sum_lx
    for k in range(-9, 10):
        if k == 0:
            continue
        inverse = -(np.float32(top) + TENTH * np.float32(k)) / peak  # QX_ISC
        sum_lx, sum_l2 = sum_products(x, weights, top, inverse)
        if sum_l2 > ZERO and sum_lx * sum_lx > best * sum_l2:
            chosen = inverse
            scale = sum_lx / sum_l2
            best = scale * sum_lx
    for i in range(x.size):
        codes[i] = round_code(chosen * x[i], -top, top - 1) + top  # QX_NI2
    return scale


@jit
def fit_positive(x: Floats, weights: Floats, top: int, codes: Bytes) -> Any:
    """Fit x = scale * q with q = 0..top to values meant to be positive; codes are bytes and wrap.

    x, weights : [n] float32
    codes      : [n] uint8, written
    return     : scale
    """
    peak = ZERO
    for i in range(x.size):
        if not peak > x[i]:
            peak = x[i]
    if peak < EPSILON:
        for i in range(x.size):
            codes[i] = 0
        return ZERO
    inverse = np.float32(top) / peak
    scale, best = ONE / inverse, ZERO
    for i in range(x.size):
        off = x[i] - scale * np.float32(nearest_int(inverse * x[i]) & 255)  # QP_NI0, QP_DIFF0
        best += weights[i] * off * off  # QP_ERR0
    for k in range(-4, 5):
        if k == 0:
            continue
        trial = (TENTH * np.float32(k) + np.float32(top)) / peak  # QP_ISC
        scale, error = ONE / trial, ZERO
        for i in range(x.size):
            off = x[i] - scale * np.float32(min(top, nearest_int(trial * x[i])))  # QP_NI1, QP_DIFF1
            error += weights[i] * off * off  # QP_ERR1
        if error < best:
            best, inverse = error, trial
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(x.size):
        code = min(top, nearest_int(inverse * x[i]))  # QP_NI2
        codes[i] = code & 255
        sum_lx += weights[i] * x[i] * np.float32(code)  # QP_SLX
        sum_l2 += weights[i] * np.float32(code) * np.float32(code)  # QP_SL2
    sum_lx, sum_l2 = move_codes(x, weights, top, codes, sum_lx, sum_l2)
    return sum_lx / sum_l2 if sum_l2 > ZERO else ZERO


@jit
def move_codes(x: Floats, weights: Floats, top: int, codes: Bytes, sum_lx: Any, sum_l2: Any) -> Any:
    """Move single codes to where the rest wants them, while that raises sum_lx^2 / sum_l2."""
    for _ in range(5):
        moved = False
        for i in range(x.size):
            v, w, q = x[i], weights[i], np.float32(codes[i])
            rest_lx = sum_lx - w * v * q  # QP_SLXSUB
            rest_l2 = sum_l2 - w * q * q  # QP_SL2SUB
            if not (rest_lx > ZERO and rest_l2 > ZERO):
                continue
            code = min(top, nearest_int(v * rest_l2 / rest_lx))
            if code == int(codes[i]):
                continue
            q = np.float32(code)
            new_lx = rest_lx + w * v * q  # QP_SLXADD
            new_l2 = rest_l2 + w * q * q  # QP_SL2ADD
            if new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2:
                codes[i] = code & 255
                sum_lx, sum_l2, moved = new_lx, new_l2, True
        if not moved:
            break
    return sum_lx, sum_l2
