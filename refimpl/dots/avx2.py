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
from refimpl.dots import generic
from refimpl.dots.factors import FACTORS
from refimpl.dots.generic import multiply_codes, multiply_mins
from refimpl.dots.planes import GROUP, Activations, Planes
from refimpl.quants.formats import formats

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


def add_around(bias: int) -> Callable[[Planes, Activations, int], Floats]:
    """q6_K, tq1_0 and tq2_0: codes are multiplied as they are stored, and the bias comes off each lane by group sums.

    total[k] = sum in lane k of scale * (code + bias) * code'  -  bias * (scale * bsum of the groups 2k and 2k + 1)
    """

    def add(w: Planes, a: Activations, t: int) -> Floats:
        blocks = w.d.shape
        scales = (
            w.scales.astype(np.int32) if w.scales.size else np.ones((len(w.d), a.bsums.shape[1]), np.int32)
        )
        too_many = (scales * a.bsums[t]).reshape(*blocks, LANES, 2).sum(3)
        stored = scales.repeat(GROUP, 1) * (w.codes.astype(np.int32) + bias) * a.codes[t]
        in_lanes = stored.reshape(*blocks, -1, LANES, RUN).sum((2, 4))
        return fold(add_lanes(w, a, t, (in_lanes - bias * too_many).astype(np.float32)))

    return add


def add_by_twos(w: Planes, a: Activations, t: int) -> Floats:
    """iq4_nl and mxfp4: even blocks and odd ones have lanes of their own, added before they are folded.

    A last block without a partner is added to the folded sum: sum = fma(d * d', total, sum).
    """
    total, blocks = total_lanes(w, a, t), w.d.shape[1]
    lanes = np.zeros((2, len(w.d), LANES), np.float32)
    for b in range(blocks // 2 * 2):
        lanes[b % 2] = fma((a.d[t, b] * w.d[:, b])[:, None], total[:, b], lanes[b % 2])
    result = fold(lanes[0] + lanes[1])
    if blocks % 2:
        whole = multiply_codes(w, a, t)[:, -1].sum(1).astype(np.float32)
        result = fma(a.d[t, -1] * w.d[:, -1], whole, result)
    return result


def add_halves(w: Planes, a: Activations, t: int) -> Floats:
    """nvfp4: of each 32 weights, the first 4 lanes have the first step, the others the second."""
    products = (w.codes.astype(np.int32) * a.codes[t]).reshape(len(w.d), -1, LANES, RUN)
    total = products.sum(3).astype(np.float32)
    lanes = np.zeros((len(w.d), LANES), np.float32)
    for b in range(total.shape[1]):
        step = (w.d[:, 2 * b : 2 * b + 2] * a.d[t, b]).repeat(4, 1)
        lanes = fma(step, total[:, b], lanes)
    return fold(lanes)


def add_blocks_of_blocks(w: Planes, a: Activations, t: int) -> Floats:
    """q1_0: part[k] = d' * total[k], then fma for 3 more activation blocks; lane[k] = fma(d, part[k], lane[k])."""
    products = (w.codes.astype(np.int32) * a.codes[t]).reshape(*w.d.shape, -1, LANES, RUN)
    total = products.sum(4).astype(np.float32)
    lanes = np.zeros((len(w.d), LANES), np.float32)
    for b in range(w.d.shape[1]):
        part = a.d[t, 4 * b] * total[:, b, 0]
        for k in range(1, 4):
            part = fma(a.d[t, 4 * b + k], total[:, b, k], part)
        lanes = fma(w.d[:, b, None], part, lanes)
    return fold(lanes)


def add_as_generic(w: Planes, a: Activations, t: int) -> Floats:
    """q2_0: ggml has no other text than the generic one, which its AVX2 build fuses."""
    return generic.add_blocks_of_blocks(w, a, t, fma)


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
        "q6_k": add_around(32),
        "iq4_nl": add_by_twos,
        "iq4_xs": add_plain,
        "mxfp4": add_by_twos,
        "nvfp4": add_halves,
        "tq1_0": add_around(1),
        "tq2_0": add_around(1),
        "q1_0": add_blocks_of_blocks,
        "q2_0": add_as_generic,
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
    if formats[fmt].id in FACTORS:
        from refimpl.dots.codebooks import multiply_avx2  # which is made of what is here

        multiply_avx2(w, a, formats[fmt].id, out)
        return
    for t in range(len(out)):
        out[t] = AVX2[fmt](w, a, t)
