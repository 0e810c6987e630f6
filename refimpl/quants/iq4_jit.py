"""What IQ4_NL and IQ4_XS share, for kernels: the twin of iq4.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build, Form
from refimpl.arith.fused import add_product
from refimpl.arith.jit import jit
from refimpl.quants.levels import IQ4_MIDDLES, IQ4_VALUES
from refimpl.quants.rounding_jit import measure_between, spread_half
from refimpl.quants.search_jit import EPSILON, ZERO, find_peak

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TRIALS = 7
MIDDLES = np.array(IQ4_MIDDLES, np.float32)
ONE, TOP = np.float32(1), np.float32(127)


@jit
def round_code(v: Any) -> Any:
    """Find the nearest level, the upper of two that are as near; NaN gives the last."""
    code = 0
    for k in range(15):
        code += not v < MIDDLES[k]
    return code


@jit
def decode(qs: Bytes, step: Any, y: Floats) -> None:
    """Multiply out IQ4[code] * step. qs : [16] uint8; y : [32] float32, written."""
    for j in range(16):
        y[j] = step * IQ4_VALUES[int(qs[j]) & 15]
        y[16 + j] = step * IQ4_VALUES[int(qs[j]) >> 4]


@jit
def round_and_pack(x: Floats, inverse: Any, qs: Bytes) -> None:
    """Round 32 weights times inverse, pack their codes. x : [32] float32; qs : [16] uint8, written."""
    for j in range(16):
        qs[j] = round_code(inverse * x[j]) | round_code(inverse * x[16 + j]) << 4


@jit
def weigh_plain(x: Floats, weights: Floats) -> None:
    """Weigh by x^2. x, weights : [n] float32; weights written."""
    for i in range(x.size):
        weights[i] = x[i] * x[i]


@jit
def weigh_by_imatrix(x: Floats, imatrix: Floats, weights: Floats, build: Build) -> None:
    """Weigh one block: imatrix * sqrt(2 * mean x^2 + x^2). All [n] float32; weights written."""
    total = ZERO
    for i in range(x.size):
        total = add_product(build.ROW_SUMX2, total, x[i], x[i])
    sigma2 = total * np.float32(2 / x.size)
    for i in range(x.size):
        weights[i] = imatrix[i] * np.sqrt(add_product(build.ROW_W, sigma2, x[i], x[i]))


@jit
def sum_levels(x: Floats, weights: Floats, inverse: Any, form_x: Form, form_2: Form) -> Any:
    """Round x under a trial scale; return sum of w * level * x and of w * level^2."""
    sum_qx, sum_q2 = ZERO, ZERO
    for i in range(x.size):
        level = IQ4_VALUES[round_code(inverse * x[i])]
        sum_qx = add_product(form_x, sum_qx, weights[i] * level, x[i])
        sum_q2 = add_product(form_2, sum_q2, weights[i] * level, level)
    return sum_qx, sum_q2


@jit
def fit_scale(x: Floats, weights: Floats, build: Build) -> Any:
    """Fit x = scale * IQ4[q]. x, weights : [32] float32; return : scale, 0 where all |x| < 1e-15."""
    peak = find_peak(x)
    if abs(peak) < EPSILON:
        return ZERO
    sum_qx, sum_q2 = sum_levels(x, weights, ONE / (peak / TOP), build.NL_SQX0, build.NL_SQ20)
    scale = sum_qx / sum_q2 if sum_q2 > ZERO else ZERO
    best = scale * sum_qx
    for k in range(-TRIALS, TRIALS + 1):
        inverse = np.float32(k - 127) / peak
        sum_qx, sum_q2 = sum_levels(x, weights, inverse, build.NL_SQX1, build.NL_SQ21)
        if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
            scale = sum_qx / sum_q2
            best = scale * sum_qx
    return scale


@jit
def count_apart(qs: Bytes, x: Floats, d: Any, factor: Any) -> Any:
    """Compare 32 stored codes with the nearest levels under d * factor; return : codes off, largest distance."""
    off, far = 0, 0
    step = d * factor
    if not np.isfinite(step) or step == ZERO:
        return off, far
    low, high = spread_half(d)
    for j in range(32):
        stored = int(qs[j % 16]) >> j // 16 * 4 & 15
        first, second = round_code(x[j] / (low * factor)), round_code(x[j] / (high * factor))
        distance = measure_between(stored, first, second)
        off += distance > 0
        far = max(far, distance)
    return off, far
