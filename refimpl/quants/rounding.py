"""Is every stored code the one that the encoder gives under the stored scales?

Q4_K and Q6_K end by rounding each weight to its nearest code under the scales that they store, whatever
search found those; so the codes can be checked without knowing the search. Q5_0 rounds before it stores: with
an imatrix under one of 19 trial scales, without one under 1/d; it multiplies by them, and whether a compiler
fuses that decides ties, so a code is the encoder's where the value lies within TIE of it or of its tie.
Q8_0 has one rule and no search.
A sub-block whose step is 0 decodes to one value whatever its codes: none of them counts as off.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import nearest_int
from refimpl.quants import q4_k, q5_0, q6_k, q8_0
from refimpl.quants.formats import Format
from refimpl.quants.search import TENTH, find_peak

Array = NDArray[Any]

TIE = np.float32(0.5 + 2**-18)  # half a code step and four times the last bit of 16


def measure_codes(blocks: Array, fmt: Format, x: Array) -> Array:
    """Measure how many code steps each stored code lies from the encoder's.

    blocks : [N] records of fmt
    x      : [N, weights] float32, finite: the source
    return : [N, weights] int32 >= 0
    """
    match fmt.name:
        case "q4_k":
            step, offset = q4_k.scale_subs(blocks)
            stored = q4_k.unpack_codes(blocks["qs"]).reshape(-1, q4_k.SUBS, q4_k.SUB).astype(np.int32)
            far = np.abs(stored - q4_k.round_codes(x, step, offset))
            return np.where((step == 0)[..., None], 0, far).reshape(x.shape)
        case "q6_k":
            step = q6_k.scale_subs(blocks)
            stored = q6_k.unpack_codes(blocks).reshape(-1, q6_k.SUBS, q6_k.SUB)
            far = np.abs(stored - q6_k.round_codes(x, step))
            return np.where((step == 0)[..., None], 0, far).reshape(x.shape)
        case "q8_0":
            return np.abs(blocks["qs"].astype(np.int32) - q8_0.round_codes(x)[1])
        case "q5_0":
            far = _measure_trials(q5_0.unpack_codes(blocks), x)
            return np.where((blocks["d"] == 0)[:, None], 0, far)
    raise ValueError(f"{fmt.name} has no codes")


def _measure_trials(stored: Array, x: Array) -> Array:
    """Measure the distance to the best of the plain rule and the 19 trials: fewest off, then least far."""
    d, codes = q5_0.round_codes(x)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    best = _measure_apart(stored, codes, inverse[:, None] * x)
    peak = find_peak(x)
    for k in range(-9, 10):
        inverse = -(np.float32(16) + TENTH * np.float32(k)) / peak
        values = inverse[:, None] * x
        far = _measure_apart(stored, np.clip(nearest_int(values), -16, 15) + 16, values)
        better = _rank(far) < _rank(best)
        best = np.where(better[:, None], far, best)
    return best


def _measure_apart(stored: Array, codes: Array, values: Array) -> Array:
    """Steps between stored codes and those of a rule; none where the value, in steps, is a tie between them."""
    tie = np.abs(values - (stored - 16).astype(np.float32)) <= TIE
    return np.where(tie, 0, np.abs(stored - codes))


def _rank(far: Array) -> Array:
    return np.count_nonzero(far, 1) * 256 + far.max(1)
