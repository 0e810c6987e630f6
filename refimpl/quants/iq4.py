"""What IQ4_NL and IQ4_XS share: codes that stand for 16 uneven levels, and the search for their scale.

IQ4 = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113: dense where a bell curve is, and none is 0.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build, Form
from refimpl.arith.fused import add_product, add_products
from refimpl.quants.levels import IQ4_MIDDLES, IQ4_VALUES
from refimpl.quants.rounding import measure_between, spread_half
from refimpl.quants.search import EPSILON, find_peak

Floats = NDArray[Any]  # float32
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int32]

TRIALS = 7  # to each side
MIDDLES = np.array(IQ4_MIDDLES, np.float32)


def unpack_codes(qs: Bytes) -> Bytes:
    """Unpack codes: of every 16 bytes first the low nibbles, then the high ones. qs : [N, n]; return : [N, 2n]."""
    groups = qs.reshape(len(qs), -1, 16)
    return np.concatenate([groups & 15, groups >> 4], 2).reshape(len(qs), -1)


def pack_codes(codes: Codes) -> Bytes:
    """Pack codes: the inverse of unpack_codes. codes : [N, 2n]; return : [N, n] uint8."""
    pairs = codes.reshape(len(codes), -1, 2, 16)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1).astype(np.uint8)


def round_codes(values: Floats) -> Codes:
    """Find the nearest level of each value, the upper of two that are as near; NaN gives the last.

    q = how many of the middles between levels are at most the value

    values : [...] float32
    return : [...] int32 in 0..15

    Rounds: never. ggml compares x - below < above - x, both rounded: the same, because near a middle both are
    exact, and rounding keeps the order elsewhere.
    Source: ggml-quants.c best_index_int8, llama.cpp 0c1e570.
    """
    return np.searchsorted(MIDDLES, values, side="right").astype(np.int32)


def weigh_by_imatrix(blocks: Floats, imatrix: Floats, build: Build) -> Floats:
    """Weigh each weight: imatrix * sqrt(2 * mean x^2 of its block + x^2).

    blocks, imatrix, return : [N, n] float32

    Rounds: every operation, to float32, but what `build` fuses, the sum over the block in
    ascending order; times 2/n, a power of two.
    """
    sigma2 = add_products(build.ROW_SUMX2, blocks, blocks) * np.float32(2 / blocks.shape[1])
    return imatrix * np.sqrt(add_product(build.ROW_W, sigma2[:, None], blocks, blocks))


def sum_levels(
    x: Floats, weights: Floats, inverse: Floats, form_x: Form, form_2: Form
) -> tuple[Floats, Floats]:
    """Round x under a trial scale; return the sums of w * level * x and of w * level^2, [N] float32 each."""
    level = IQ4_VALUES[round_codes(inverse[:, None] * x)]
    return add_products(form_x, weights * level, x), add_products(form_2, weights * level, level)


def fit_scale(x: Floats, weights: Floats, build: Build) -> Floats:
    """Fit x = scale * IQ4[q] by weighted least squares over 15 trial scales, and the first that puts the peak at -127.

    x       : [N, 32] float32
    weights : [N, 32] float32
    return  : [N] float32; 0 where all |x| < 1e-15

    Rounds: every operation, to float32, but what `build` fuses.
    Source: ggml-quants.c quantize_row_iq4_nl_impl with ntry = 7, llama.cpp 0c1e570.
    """
    peak = find_peak(x)
    first = np.float32(1) / (peak / np.float32(127))
    sum_qx, sum_q2 = sum_levels(x, weights, first, build.NL_SQX0, build.NL_SQ20)
    scale = np.where(sum_q2 > 0, sum_qx / sum_q2, np.float32(0))
    best = scale * sum_qx
    for k in range(-TRIALS, TRIALS + 1):
        inverse = np.float32(k - 127) / peak
        sum_qx, sum_q2 = sum_levels(x, weights, inverse, build.NL_SQX1, build.NL_SQ21)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = np.where(better, sum_qx / sum_q2, scale)
        best = np.where(better, scale * sum_qx, best)
    return np.where(np.abs(peak) < EPSILON, np.float32(0), scale)


def measure_apart(stored: Bytes, x: Floats, d: Floats, factor: Floats) -> Codes:
    """Measure how many codes lie between the stored ones and the nearest levels under d * factor.

    The encoder rounds before d becomes fp16: any d that rounds to the stored one counts. Where the step is 0 or
    not finite no code counts as off.

    stored  : [N, n] codes; x : [N, n] float32
    d       : [N] float32 as stored; factor : [N] float32 integers
    return  : [N, n] int32 >= 0
    """
    low, high = spread_half(d)
    first = round_codes(x / (low * factor)[:, None])
    far = measure_between(stored, first, round_codes(x / (high * factor)[:, None]))
    step = d * factor
    return np.where((np.isfinite(step) & (step != 0))[:, None], far, np.int32(0))
