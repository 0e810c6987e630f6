"""The orders `generic` and `generic-fma`: the text of ggml's *_generic functions, over the planes of planes.py.

Integers are multiplied and added exactly; which floats are added when is what an order says. In `generic` every
operation rounds; `generic-fma` is the same text as gcc compiles it where there is an FMA: a product that is only
added is fused.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma import fma
from refimpl.dots.factors import FACTORS
from refimpl.dots.planes import GROUP, Activations, Planes
from refimpl.quants.formats import formats

Floats = NDArray[Any]  # float32
Ints = NDArray[np.int32]
MultiplyAdd = Callable[[Any, Any, Any], Any]
LANES = 8


def add_product(a: Floats, b: Floats, c: Floats) -> Floats:
    """a*b + c, both operations rounded."""
    return np.asarray(a * b + c)


def multiply_codes(w: Planes, a: Activations, t: int) -> Ints:
    """Multiply codes, scales and token t's codes: [m, blocks, size] int32, exact."""
    products = w.codes.astype(np.int32) * a.codes[t]
    if w.scales.size:
        products = products * w.scales.repeat(GROUP, 1)
    return products.reshape(*w.d.shape, -1)


def multiply_mins(w: Planes, a: Activations, t: int) -> Ints:
    """Multiply mins and the sums of token t's codes: [m, blocks, groups] int32, exact."""
    return (w.mins.astype(np.int32) * a.bsums[t]).reshape(*w.d.shape, -1)


def add_blocks(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """Blocks one after the other: the order of generic q8_0, q5_0 and others with q8_0 activations.

    sum += (d * d') * total,  total the block's integers

    Rounds: d*d'; its product with the total and the sum, as madd does.
    """
    total = multiply_codes(w, a, t).sum(2).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        result = madd(w.d[:, b] * a.d[t, b], total[:, b], result)
    return result


def add_steps_in_turn(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """The order of generic q4_0: sum += (total * d) * d'. Rounds: total*d; its product with d' and the sum, as madd."""
    total = multiply_codes(w, a, t).sum(2).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        result = madd(total[:, b] * w.d[:, b], a.d[t, b], result)
    return result


def add_with_m(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """The order of generic q4_1 and q5_1: sum += (d * d') * total + m * s.

    Rounds: d*d' and m*s; the product with the total and their sum, as madd does; the last sum.
    """
    total = multiply_codes(w, a, t).sum(2).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        part = madd(w.d[:, b] * a.d[t, b], total[:, b], w.dmin[:, b] * a.s[t, b])
        result = result + part
    return result


def add_less_mins(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """The order of generic q2_K: sum += (d' * d) * total - (d' * dmin) * mins.

    Rounds: d'*d and d'*dmin; the mins' product; the total's and the difference, as madd does; the last sum.
    """
    total = multiply_codes(w, a, t).sum(2).astype(np.float32)
    mins = multiply_mins(w, a, t).sum(2).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        least = (a.d[t, b] * w.dmin[:, b]) * mins[:, b]
        result = result + madd(a.d[t, b] * w.d[:, b], total[:, b], -least)
    return result


def add_sub_blocks(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """The order of generic iq4_xs: of each sub-block of 32, sum += ((d * d') * scale) * total.

    Rounds: d*d'; that times the scale; its product with the total and the sum, as madd does.
    """
    total = (w.codes.astype(np.int32) * a.codes[t]).reshape(len(w.d), -1, 32).sum(2).astype(np.float32)
    scale = w.scales[:, ::2].astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for s in range(total.shape[1]):
        step = (w.d[:, s // 8] * a.d[t, s // 8]) * scale[:, s]
        result = madd(step, total[:, s], result)
    return result


def add_groups(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """The order of generic nvfp4: of each 16 weights, sum += (d' * d) * total. Rounds: as add_blocks."""
    total = multiply_codes(w, a, t).sum(2).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for g in range(w.d.shape[1]):
        result = madd(a.d[t, g // 2] * w.d[:, g], total[:, g], result)
    return result


def add_blocks_of_blocks(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """The order of generic q1_0 and q2_0, whose blocks meet several steps: part += d' * total, sum += d * part.

    Rounds: products and sums, as madd does.
    """
    blocks = w.d.shape[1]
    each = a.d.shape[1] // blocks
    products = (w.codes.astype(np.int32) * a.codes[t]).reshape(len(w.d), blocks, each, -1)
    total = products.sum(3).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(blocks):
        part = np.zeros(len(w.d), np.float32)
        for k in range(each):
            part = madd(a.d[t, b * each + k], total[:, b, k], part)
        result = madd(w.d[:, b], part, result)
    return result


def add_lanes(w: Planes, a: Activations, t: int, madd: MultiplyAdd) -> Floats:
    """Eight lanes, then the lanes one after the other: the order of generic q3_K, q4_K, q5_K and q6_K.

    lane[l] += (d * d') * total[l],  total[l] the integers of the weights l, l + 8, l + 16, ... of the block
    sum     -= (dmin * d') * total of the mins;  in the end sum += lane[0], lane[1], ... lane[7]

    Rounds: d*d' and dmin*d'; products and sums, as madd does; the last eight additions.
    """
    products = multiply_codes(w, a, t)
    total = products.reshape(*w.d.shape, -1, LANES).sum(2).astype(np.float32)
    lanes = np.zeros((len(w.d), LANES), np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        lanes = madd((w.d[:, b] * a.d[t, b])[:, None], total[:, b], lanes)
        if w.mins.size:
            least = multiply_mins(w, a, t)[:, b].sum(1).astype(np.float32)
            result = madd(-(w.dmin[:, b] * a.d[t, b]), least, result)
    for k in range(LANES):
        result = result + lanes[:, k]
    return result


GENERIC: MappingProxyType[str, Callable[[Planes, Activations, int, MultiplyAdd], Floats]] = MappingProxyType(
    {
        "q8_0": add_blocks,
        "q4_0": add_steps_in_turn,
        "q4_1": add_with_m,
        "q5_0": add_blocks,
        "q5_1": add_with_m,
        "q2_k": add_less_mins,
        "q3_k": add_lanes,
        "q4_k": add_lanes,
        "q5_k": add_lanes,
        "q6_k": add_lanes,
        "iq4_nl": add_blocks,
        "iq4_xs": add_sub_blocks,
        "mxfp4": add_blocks,
        "nvfp4": add_groups,
        "tq1_0": add_blocks,
        "tq2_0": add_blocks,
        "q1_0": add_blocks_of_blocks,
        "q2_0": add_blocks_of_blocks,
    }
)


def multiply(w: Planes, a: Activations, fmt: str, fused: bool, out: Floats) -> None:
    """Multiply rows of weights with tokens.

    w, a  : planes of m rows and t tokens
    fmt   : the weights' format, by name
    fused : generic-fma rather than generic
    out   : [t, m] float32, written
    """
    if formats[fmt].id in FACTORS:
        from refimpl.dots.codebooks import multiply_generic  # which is made of what is here

        multiply_generic(w, a, formats[fmt].id, fused, out)
        return
    madd = fma if fused else add_product
    for t in range(len(out)):
        out[t] = GENERIC[fmt](w, a, t, madd)
