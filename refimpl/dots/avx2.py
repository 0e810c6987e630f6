"""The order `avx2`: what ggml_vec_dot_* gives on CPUs with AVX2 and FMA, over the planes of planes.py.

Eight float lanes, one fma per block; lane k adds up the weights 4k to 4k + 3 of every 32. The lanes are then folded as
_mm256 code does it. What a format takes off its sums (mins, an offset) enters in lanes of its own.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma import fma
from refimpl.dots.generic import multiply_codes, multiply_mins
from refimpl.dots.planes import GROUP, Activations, Planes

Floats = NDArray[Any]  # float32
LANES, RUN = 8, 4  # a lane holds runs of 4 weights


def fold(lanes: Floats) -> Floats:
    """Add 8 lanes, or 4: [m, 8] float32 -> [m].

    h[i] = lane[i + 4] + lane[i];  (h0 + h2) + (h1 + h3)
    """
    h = lanes[:, 4:] + lanes[:, :4] if lanes.shape[1] == LANES else lanes
    return np.asarray((h[:, 0] + h[:, 2]) + (h[:, 1] + h[:, 3]))


def total_lanes(w: Planes, a: Activations, t: int) -> Floats:
    """The integers of each lane: [m, blocks, 8] float32."""
    products = multiply_codes(w, a, t).reshape(*w.d.shape, -1, LANES, RUN)
    return products.sum((2, 4)).astype(np.float32)


def add_lanes(w: Planes, a: Activations, t: int, total: Floats) -> Floats:
    """lane[k] = fma(d * d', total[k], lane[k]) over the blocks: [m, 8] float32."""
    lanes = np.zeros((len(w.d), LANES), np.float32)
    for b in range(w.d.shape[1]):
        lanes = fma((w.d[:, b] * a.d[t, b])[:, None], total[:, b], lanes)
    return lanes


def add_plain(w: Planes, a: Activations, t: int) -> Floats:
    """q8_0, q5_0 and others with q8_0 activations."""
    return fold(add_lanes(w, a, t, total_lanes(w, a, t)))


def add_with_mins(w: Planes, a: Activations, t: int) -> Floats:
    """q4_K: the mins of two sub-blocks of 32 make one of four lanes, folded and added in the end.

    least[j] = fma(-d' * dmin, mins of the groups 4j to 4j + 3, least[j])
    """
    mins = multiply_mins(w, a, t).reshape(*w.d.shape, 4, 4).sum(3).astype(np.float32)
    least = np.zeros((len(w.d), 4), np.float32)
    for b in range(w.d.shape[1]):
        least = fma((-a.d[t, b] * w.dmin[:, b])[:, None], mins[:, b], least)
    return np.asarray(add_plain(w, a, t) + fold(least))


def add_with_m(w: Planes, a: Activations, t: int) -> Floats:
    """q4_1 and q5_1: least = fma(m, s, least) beside the lanes, added in the end."""
    least = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        least = fma(w.dmin[:, b], a.s[t, b], least)
    return np.asarray(add_plain(w, a, t) + least)


def add_with_one_min(w: Planes, a: Activations, t: int) -> Floats:
    """q5_K: least = fma(-d' * dmin, mins of the block, least) beside the lanes, added in the end."""
    mins = multiply_mins(w, a, t).sum(2).astype(np.float32)
    least = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        least = fma(-a.d[t, b] * w.dmin[:, b], mins[:, b], least)
    return np.asarray(add_plain(w, a, t) + least)


def add_mins_first(w: Planes, a: Activations, t: int) -> Floats:
    """q2_K: lane[k] = fma(-d' * dmin, mins of the groups 2k and 2k + 1, lane[k]), then the codes as in add_lanes."""
    mins = multiply_mins(w, a, t).reshape(*w.d.shape, LANES, 2).sum(3).astype(np.float32)
    total, lanes = total_lanes(w, a, t), np.zeros((len(w.d), LANES), np.float32)
    for b in range(w.d.shape[1]):
        lanes = fma((-a.d[t, b] * w.dmin[:, b])[:, None], mins[:, b], lanes)
        lanes = fma((w.d[:, b] * a.d[t, b])[:, None], total[:, b], lanes)
    return fold(lanes)


def add_around_32(w: Planes, a: Activations, t: int) -> Floats:
    """q6_K: its codes are multiplied as 0..63, and the 32 too many come off each lane by group sums.

    total[k] = sum in lane k of scale * (code + 32) * code'  -  32 * (scale * bsum of the groups 2k and 2k + 1)
    """
    blocks = (*w.d.shape, -1)
    sums = w.scales.astype(np.int32) * a.bsums[t]
    too_many = sums.reshape(*w.d.shape, LANES, 2).sum(3)
    shifted = w.scales.repeat(GROUP, 1).astype(np.int32) * (w.codes.astype(np.int32) + 32) * a.codes[t]
    in_lanes = shifted.reshape(*blocks, LANES, RUN).sum((2, 4))
    return fold(add_lanes(w, a, t, (in_lanes - 32 * too_many).astype(np.float32)))


AVX2: MappingProxyType[str, Callable[[Planes, Activations, int], Floats]] = MappingProxyType(
    {
        "q8_0": add_plain,
        "q4_0": add_plain,
        "q4_1": add_with_m,
        "q5_0": add_plain,
        "q5_1": add_with_m,
        "q2_k": add_mins_first,
        "q3_k": add_plain,
        "q4_k": add_with_mins,
        "q5_k": add_with_one_min,
        "q6_k": add_around_32,
    }
)


def multiply(w: Planes, a: Activations, fmt: str, out: Floats) -> None:
    """Multiply rows of weights with tokens.

    w, a : planes of m rows and t tokens
    fmt  : the weights' format, by name
    out  : [t, m] float32, written

    Rounds: d * d'; each fma once; the additions of fold().
    Source: ggml-cpu/arch/x86/quants.c ggml_vec_dot_*, llama.cpp 0c1e570.
    """
    for t in range(len(out)):
        out[t] = AVX2[fmt](w, a, t)
