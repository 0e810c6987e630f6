"""The scale searches that several formats share, for one group at a time: the twin of search.py.

Codes are Python integers here and bytes in the arrays.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import nearest_int
from refimpl.arith.builds import Build, Form
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import add_product, nearest_product, subtract_product, subtract_products

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ZERO, ONE, TENTH, EPSILON = np.float32(0), np.float32(1), np.float32(0.1), np.float32(1e-15)


@jit
def round_code(v: Any, bottom: Any, top: Any) -> Any:
    """Round to the nearest code in bottom..top."""
    return clip(nearest_int(v), bottom, top)


@jit
def clip(code: Any, bottom: Any, top: Any) -> Any:
    """Bring a code into bottom..top."""
    return max(bottom, min(top, code))


@jit
def fit_scale_min(
    x: Floats,
    weights: Floats,
    top: int,
    start: Any,
    step: Any,
    steps: int,
    codes: Bytes,
    trial: Bytes,
    build: Build,
    linear: bool = False,
) -> Any:
    """Fit x = scale * q + min with q = 0..top and min <= 0.

    x, weights : [n] float32
    codes      : [n] uint8, written; trial : [n] uint8, scratch
    linear     : the error of a trial adds |scale * q + min - x| instead of its square
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
        sum_x = add_product(build.QK_SUMX, sum_x, weights[i], x[i])
    if low > ZERO:
        low = ZERO
    if high == low:
        for i in range(x.size):
            codes[i] = 0
        return ZERO, -low
    inverse = np.float32(top) / (high - low)
    scale = ONE / inverse
    for i in range(x.size):
        codes[i] = clip(nearest_product(build.QK_NI0, inverse, x[i] - low), 0, top)
    best = measure_error(x, weights, scale, low, codes, build.QK_DIFF0, build.QK_ERR0, linear)
    for k in range(steps + 1):
        levels = add_product(build.QK_ISC, start, step, np.float32(k)) + np.float32(top)
        inverse = levels / (high - low)
        sum_l, sum_l2, sum_xl = ZERO, ZERO, ZERO
        for i in range(x.size):
            code = clip(nearest_product(build.QK_NI1, inverse, x[i] - low), 0, top)
            trial[i] = code
            q = np.float32(code)
            sum_l = add_product(build.QK_SL, sum_l, weights[i], q)
            sum_l2 = add_product(build.QK_SL2, sum_l2, weights[i] * q, q)
            sum_xl = add_product(build.QK_SXL, sum_xl, weights[i] * q, x[i])
        determinant = subtract_products(build.QK_D, sum_w, sum_l2, sum_l, sum_l)
        if not determinant > ZERO:
            continue
        new_scale = subtract_products(build.QK_TS, sum_w, sum_xl, sum_x, sum_l) / determinant
        new_low = subtract_products(build.QK_TM, sum_l2, sum_x, sum_l, sum_xl) / determinant
        if new_low > ZERO:
            new_scale, new_low = sum_xl / sum_l2, ZERO
        error = measure_error(x, weights, new_scale, new_low, trial, build.QK_DIFF1, build.QK_ERR1, linear)
        if error < best:
            for i in range(x.size):
                codes[i] = trial[i]
            best, scale, low = error, new_scale, new_low
    return scale, -low


@jit
def measure_error(
    x: Floats,
    weights: Floats,
    scale: Any,
    low: Any,
    codes: Bytes,
    diff: Form,
    err: Form,
    linear: bool = False,
) -> Any:
    """Add up weights * (scale * q + low - x)^2, or weights * |scale * q + low - x|."""
    error = ZERO
    for i in range(x.size):
        off = add_product(diff, low, scale, np.float32(codes[i])) - x[i]
        error = add_product(err, error, weights[i], abs(off) if linear else off * off)
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
def sum_products(
    x: Floats, weights: Floats, top: int, inverse: Any, nearest: Form, slx: Form, sl2: Form
) -> Any:
    """Round x under a trial scale; return sum of w * x * q and of w * q * q."""
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(x.size):
        q = np.float32(clip(nearest_product(nearest, inverse, x[i]), -top, top - 1))
        sum_lx = add_product(slx, sum_lx, weights[i] * x[i], q)
        sum_l2 = add_product(sl2, sum_l2, weights[i] * q, q)
    return sum_lx, sum_l2


@jit
def fit_scale(x: Floats, weights: Floats, top: int, codes: Bytes, build: Build) -> Any:
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
    sum_lx, sum_l2 = sum_products(x, weights, top, chosen, build.QX_NI0, build.QX_SLX0, build.QX_SL20)
    scale = ZERO
    if sum_l2 != ZERO:
        scale = sum_lx / sum_l2
    best = scale * sum_lx
    for k in range(-9, 10):
        if k == 0:
            continue
        inverse = -add_product(build.QX_ISC, np.float32(top), TENTH, np.float32(k)) / peak
        sum_lx, sum_l2 = sum_products(x, weights, top, inverse, build.QX_NI1, build.QX_SLX1, build.QX_SL21)
        if sum_l2 > ZERO and sum_lx * sum_lx > best * sum_l2:
            chosen = inverse
            scale = sum_lx / sum_l2
            best = scale * sum_lx
    for i in range(x.size):
        codes[i] = clip(nearest_product(build.QX_NI2, chosen, x[i]), -top, top - 1) + top
    return scale


@jit
def fit_by_moves(x: Floats, top: int, codes: Bytes, build: Build) -> Any:
    """Fit x = scale * q with q = -top..top-1 where x^2 weighs: one trial scale, then moves of single codes.

    x      : [n] float32
    codes  : [n] uint8, written: q + top; all 0 where all |x| < 1e-15
    return : scale
    """
    peak = find_peak(x)
    if abs(peak) < EPSILON:
        for i in range(x.size):
            codes[i] = 0
        return ZERO
    inverse = np.float32(-top) / peak
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(x.size):
        code = clip(nearest_product(build.Q3_NI0, inverse, x[i]), -top, top - 1)
        codes[i] = code + top
        w, q = x[i] * x[i], np.float32(code)
        sum_lx = add_product(build.Q3_SLX, sum_lx, w * x[i], q)
        sum_l2 = add_product(build.Q3_SL2, sum_l2, w * q, q)
    for _ in range(5):
        moved = False
        for i in range(x.size):
            v, w, old = x[i], x[i] * x[i], int(codes[i]) - top
            q = np.float32(old)
            rest_lx = subtract_product(build.Q3_SLXSUB, sum_lx, w * v, q)
            rest_l2 = subtract_product(build.Q3_SL2SUB, sum_l2, w * q, q)
            if not rest_lx > ZERO:
                continue
            code = round_code(v * rest_l2 / rest_lx, -top, top - 1)
            if code == old:
                continue
            q = np.float32(code)
            new_lx = add_product(build.Q3_SLXADD, rest_lx, w * v, q)
            new_l2 = add_product(build.Q3_SL2ADD, rest_l2, w * q, q)
            if new_l2 > ZERO and new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2:
                codes[i] = code + top
                sum_lx, sum_l2, moved = new_lx, new_l2, True
        if not moved:
            break
    return sum_lx / sum_l2 if sum_l2 > ZERO else ZERO


@jit
def fit_positive(x: Floats, weights: Floats, top: int, codes: Bytes, build: Build) -> Any:
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
        q = np.float32(nearest_product(build.QP_NI0, inverse, x[i]) & 255)
        off = subtract_product(build.QP_DIFF0, x[i], scale, q)
        best = add_product(build.QP_ERR0, best, weights[i] * off, off)
    for k in range(-4, 5):
        if k == 0:
            continue
        trial = add_product(build.QP_ISC, np.float32(top), TENTH, np.float32(k)) / peak
        scale, error = ONE / trial, ZERO
        for i in range(x.size):
            q = np.float32(min(top, nearest_product(build.QP_NI1, trial, x[i])))
            off = subtract_product(build.QP_DIFF1, x[i], scale, q)
            error = add_product(build.QP_ERR1, error, weights[i] * off, off)
        if error < best:
            best, inverse = error, trial
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(x.size):
        code = min(top, nearest_product(build.QP_NI2, inverse, x[i]))
        codes[i] = code & 255
        q = np.float32(code)
        sum_lx = add_product(build.QP_SLX, sum_lx, weights[i] * x[i], q)
        sum_l2 = add_product(build.QP_SL2, sum_l2, weights[i] * q, q)
    sum_lx, sum_l2 = move_codes(x, weights, top, codes, sum_lx, sum_l2, build)
    return sum_lx / sum_l2 if sum_l2 > ZERO else ZERO


@jit
def move_codes(
    x: Floats, weights: Floats, top: int, codes: Bytes, sum_lx: Any, sum_l2: Any, build: Build
) -> Any:
    """Move single codes to where the rest wants them, while that raises sum_lx^2 / sum_l2."""
    for _ in range(5):
        moved = False
        for i in range(x.size):
            v, w, q = x[i], weights[i], np.float32(codes[i])
            rest_lx = subtract_product(build.QP_SLXSUB, sum_lx, w * v, q)
            rest_l2 = subtract_product(build.QP_SL2SUB, sum_l2, w * q, q)
            if not (rest_lx > ZERO and rest_l2 > ZERO):
                continue
            code = min(top, nearest_int(v * rest_l2 / rest_lx))
            if code == int(codes[i]):
                continue
            q = np.float32(code)
            new_lx = add_product(build.QP_SLXADD, rest_lx, w * v, q)
            new_l2 = add_product(build.QP_SL2ADD, rest_l2, w * q, q)
            if new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2:
                codes[i] = code & 255
                sum_lx, sum_l2, moved = new_lx, new_l2, True
        if not moved:
            break
    return sum_lx, sum_l2
