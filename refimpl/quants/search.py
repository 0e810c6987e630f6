"""The scale searches that several formats share: ggml tries a few scales and keeps the one of least error.

Where a compiler may fuse a product and a sum into one rounding, `build` decides (arith/builds.py); what looks
fusable and is written with `*` and `+`, no known compiler fuses. All arithmetic is float32, in the order written,
vectorized over groups.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import nearest_int
from refimpl.arith.builds import Build, Form
from refimpl.arith.fused import (
    add_product,
    add_products,
    nearest_product,
    subtract_product,
    subtract_products,
)

Floats = NDArray[Any]  # float32; NumPy's stubs widen np.where and quotients, NumPy itself does not
Codes = NDArray[np.int32]

EPSILON = np.float32(1e-15)  # a group below this counts as zero
TENTH = np.float32(0.1)


def fit_scale_min(
    x: Floats,
    weights: Floats,
    top: int,
    start: float,
    step: float,
    steps: int,
    build: Build,
    linear: bool = False,
) -> tuple[Floats, Floats, Codes]:
    """Fit x = scale * q + min with q = 0..top and min <= 0, by weighted least squares.

    For each trial scale round x to codes, solve the two normal equations, keep the pair of least error. Codes
    are rounded under the min kept so far, from which the trial scale spans too: trials are not independent.

    x       : [N, n] float32
    weights : [N, n] float32
    linear  : the error of a trial adds |scale * q + min - x| instead of its square
    return  : scale [N], -min [N] float32, codes [N, n] int32

    Rounds: every operation, to float32.
    Source: ggml-quants.c make_qkx2_quants and make_qkx3_quants, llama.cpp 0c1e570: given weights and finite x
    the two compute the same. The library in xllamacpp 2026.10 clamps to 0..top before it rounds in the trials of
    make_qkx3_quants, and only there. That differs where nearest_int wraps, beyond 2^22: seen in sub-blocks of few
    weights beside zeros whose importances span tens of orders of magnitude, once their min has shrunk to noise.
    """
    low, high = x[:, 0], x[:, 0]
    sum_w, sum_x = weights[:, 0], weights[:, 0] * x[:, 0]
    for i in range(1, x.shape[1]):
        low, high = np.where(x[:, i] < low, x[:, i], low), np.where(x[:, i] > high, x[:, i], high)
        sum_w = sum_w + weights[:, i]
        sum_x = add_product(build.QK_SUMX, sum_x, weights[:, i], x[:, i])
    low = np.where(low > 0, np.float32(0), low)
    flat = high == low
    flat_low = low

    inverse = np.float32(top) / (high - low)
    scale = np.float32(1) / inverse
    codes = _round(build.QK_NI0, inverse, x, low, top)
    best = measure_error(x, weights, scale, low, codes, build.QK_DIFF0, build.QK_ERR0, linear)
    for k in range(steps + 1):
        levels = add_product(build.QK_ISC, np.float32(start), np.float32(step), np.float32(k)) + np.float32(
            top
        )
        inverse = levels / (high - low)
        trial = _round(build.QK_NI1, inverse, x, low, top)
        q = trial.astype(np.float32)
        sum_l = add_products(build.QK_SL, weights, q)
        sum_l2 = add_products(build.QK_SL2, weights * q, q)
        sum_xl = add_products(build.QK_SXL, weights * q, x)
        determinant = subtract_products(build.QK_D, sum_w, sum_l2, sum_l, sum_l)
        new_scale = subtract_products(build.QK_TS, sum_w, sum_xl, sum_x, sum_l) / determinant
        new_low = subtract_products(build.QK_TM, sum_l2, sum_x, sum_l, sum_xl) / determinant
        positive = new_low > 0
        new_scale = np.where(positive, sum_xl / sum_l2, new_scale)
        new_low = np.where(positive, np.float32(0), new_low)
        error = measure_error(x, weights, new_scale, new_low, trial, build.QK_DIFF1, build.QK_ERR1, linear)
        better = (determinant > 0) & (error < best)
        best = np.where(better, error, best)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
        codes = np.where(better[:, None], trial, codes)
    codes = np.where(flat[:, None], np.int32(0), codes)
    return np.where(flat, np.float32(0), scale), -np.where(flat, flat_low, low), codes


def _round(form: Form, inverse: Floats, x: Floats, low: Floats, top: int) -> Codes:
    return np.clip(nearest_product(form, inverse[:, None], x - low[:, None]), 0, top)


def measure_error(
    x: Floats,
    weights: Floats,
    scale: Floats,
    low: Floats,
    codes: Codes,
    diff: Form,
    err: Form,
    linear: bool = False,
) -> Floats:
    """Add up weights * (scale * q + low - x)^2, or weights * |...|. x, weights, codes : [N, n]; the rest : [N]."""
    off = add_product(diff, low[:, None], scale[:, None], codes.astype(np.float32)) - x
    return add_products(err, weights, np.abs(off) if linear else off * off)


def find_peak(x: Floats) -> Floats:
    """Find the first of the largest in size. x : [N, n] float32; return : [N], signed; +0 for zeros.

    A NaN counts as 0: no comparison finds it the largest.
    """
    size = np.where(np.isnan(x), np.float32(0), np.abs(x))
    peak = np.take_along_axis(x, size.argmax(1)[:, None], 1)[:, 0]
    return np.where(size.max(1) == 0, np.float32(0), peak)


def fit_scale(x: Floats, weights: Floats, top: int, build: Build) -> tuple[Floats, Codes]:
    """Fit x = scale * q with q = -top..top-1, by weighted least squares over 19 trial scales.

    x       : [N, n] float32
    weights : [N, n] float32
    return  : scale [N] float32, codes q + top [N, n] int32 in 0..2*top-1; 0 and 0 where all |x| < 1e-15

    Rounds: every operation, to float32.
    Source: ggml-quants.c make_qx_quants with rmse_type 1, llama.cpp 0c1e570.
    """
    peak = find_peak(x)

    def measure(inverse: Floats, nearest: Form, slx: Form, sl2: Form) -> tuple[Floats, Floats]:
        q = _round_signed(nearest, inverse, x, top).astype(np.float32)
        return add_products(slx, weights * x, q), add_products(sl2, weights * q, q)

    chosen = np.float32(-top) / peak
    sum_lx, sum_l2 = measure(chosen, build.QX_NI0, build.QX_SLX0, build.QX_SL20)
    scale = np.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
    best = scale * sum_lx
    for k in range(-9, 10):
        if k == 0:
            continue
        trial = -add_product(build.QX_ISC, np.float32(top), TENTH, np.float32(k)) / peak
        sum_lx, sum_l2 = measure(trial, build.QX_NI1, build.QX_SLX1, build.QX_SL21)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        chosen = np.where(better, trial, chosen)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
    codes = _round_signed(build.QX_NI2, chosen, x, top) + top
    zero = np.abs(peak) < EPSILON
    return np.where(zero, np.float32(0), scale), np.where(zero[:, None], np.int32(0), codes)


def _round_signed(form: Form, inverse: Floats, x: Floats, top: int) -> Codes:
    return np.clip(nearest_product(form, inverse[:, None], x), -top, top - 1)


def fit_by_moves(x: Floats, top: int, build: Build) -> tuple[Floats, Codes]:
    """Fit x = scale * q with q = -top..top-1 where x^2 weighs: one trial scale, then moves of single codes.

    Up to five rounds in which one code after the other moves to where the rest wants it, if that helps.

    x      : [N, n] float32
    return : scale [N] float32, codes q + top [N, n] int32 in 0..2*top-1; 0 and 0 where all |x| < 1e-15

    Rounds: every operation, to float32.
    Source: ggml-quants.c make_q3_quants with do_rmse, llama.cpp 0c1e570.
    """
    peak, weights = find_peak(x), x * x
    codes = _round_signed(build.Q3_NI0, np.float32(-top) / peak, x, top)
    q = codes.astype(np.float32)
    sum_lx = add_products(build.Q3_SLX, weights * x, q)
    sum_l2 = add_products(build.Q3_SL2, weights * q, q)
    settled = np.zeros(len(x), np.bool_)
    for _ in range(5):
        moved = np.zeros(len(x), np.bool_)
        for i in range(x.shape[1]):
            v, w, q = x[:, i], weights[:, i], codes[:, i].astype(np.float32)
            rest_lx = subtract_product(build.Q3_SLXSUB, sum_lx, w * v, q)
            rest_l2 = subtract_product(build.Q3_SL2SUB, sum_l2, w * q, q)
            code = np.clip(nearest_int(v * rest_l2 / rest_lx), -top, top - 1)
            q = code.astype(np.float32)
            new_lx = add_product(build.Q3_SLXADD, rest_lx, w * v, q)
            new_l2 = add_product(build.Q3_SL2ADD, rest_l2, w * q, q)
            better = ~settled & (rest_lx > 0) & (code != codes[:, i]) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            codes[:, i] = np.where(better, code, codes[:, i])
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
            moved |= better
        settled |= ~moved
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    zero = np.abs(peak) < EPSILON
    return np.where(zero, np.float32(0), scale), np.where(zero[:, None], np.int32(0), codes + top)


def fit_positive(x: Floats, weights: Floats, top: int, build: Build) -> tuple[Floats, Codes]:
    """Fit x = scale * q with q = 0..top to values meant to be positive: the sub-block scales of an imatrix.

    Nine trial scales, then up to five rounds in which one code after the other moves where that helps.
    Nothing clamps below: codes are bytes and wrap, as ggml's do.

    x       : [N, n] float32
    weights : [N, n] float32
    return  : scale [N] float32, codes [N, n] int32 in 0..255; 0 and 0 where max x < 1e-15

    Rounds: every operation, to float32.
    Source: ggml-quants.c make_qp_quants, llama.cpp 0c1e570.
    """
    peak = np.zeros(len(x), np.float32)
    for i in range(x.shape[1]):
        peak = np.where(peak > x[:, i], peak, x[:, i])

    def error(scale: Floats, codes: Codes, diff: Form, err: Form) -> Floats:
        off = subtract_product(diff, x, scale[:, None], codes.astype(np.float32))
        return add_products(err, weights * off, off)

    def nearest(form: Form, inverse: Floats) -> Codes:
        return nearest_product(form, inverse[:, None], x)

    inverse = np.float32(top) / peak
    unclipped = nearest(build.QP_NI0, inverse) & 255
    best = error(np.float32(1) / inverse, unclipped, build.QP_DIFF0, build.QP_ERR0)
    for k in range(-4, 5):
        if k == 0:
            continue
        trial = add_product(build.QP_ISC, np.float32(top), TENTH, np.float32(k)) / peak
        clipped = np.minimum(nearest(build.QP_NI1, trial), top)
        mse = error(np.float32(1) / trial, clipped, build.QP_DIFF1, build.QP_ERR1)
        inverse = np.where(mse < best, trial, inverse)
        best = np.where(mse < best, mse, best)
    codes = np.minimum(nearest(build.QP_NI2, inverse), top)
    q = codes.astype(np.float32)
    sum_lx = add_products(build.QP_SLX, weights * x, q)
    sum_l2 = add_products(build.QP_SL2, weights * q, q)
    codes, sum_lx, sum_l2 = _move_codes(x, weights, top, codes & 255, sum_lx, sum_l2, build)
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    zero = peak < EPSILON
    return np.where(zero, np.float32(0), scale), np.where(zero[:, None], np.int32(0), codes)


def _move_codes(
    x: Floats, weights: Floats, top: int, codes: Codes, sum_lx: Floats, sum_l2: Floats, build: Build
) -> tuple[Codes, Floats, Floats]:
    """Move single codes to where the rest wants them, while that raises sum_lx^2 / sum_l2."""
    settled = np.zeros(len(x), np.bool_)
    for _ in range(5):
        moved = np.zeros(len(x), np.bool_)
        for i in range(x.shape[1]):
            v, w, q = x[:, i], weights[:, i], codes[:, i].astype(np.float32)
            rest_lx = subtract_product(build.QP_SLXSUB, sum_lx, w * v, q)
            rest_l2 = subtract_product(build.QP_SL2SUB, sum_l2, w * q, q)
            code = np.minimum(nearest_int(v * rest_l2 / rest_lx), top)
            q = code.astype(np.float32)
            new_lx = add_product(build.QP_SLXADD, rest_lx, w * v, q)
            new_l2 = add_product(build.QP_SL2ADD, rest_l2, w * q, q)
            better = ~settled & (rest_lx > 0) & (rest_l2 > 0) & (code != codes[:, i])
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            codes[:, i] = np.where(better, code & 255, codes[:, i])
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
            moved |= better
        settled |= ~moved
    return codes, sum_lx, sum_l2
