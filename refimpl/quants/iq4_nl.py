"""IQ4_NL: 32 weights in 18 bytes, one fp16 step and 32 codes of 4 bits for uneven levels.

| d: fp16 | qs: 16 bytes |          w[i] = d * IQ4[q[i]]

IQ4 = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113. Byte j of qs holds the codes of weight j (low nibble)
and of weight j + 16 (high nibble).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.arith.builds import STRICT, Build
from refimpl.quants.formats import IQ4_NL, Parts
from refimpl.quants.iq4 import (
    fit_scale,
    measure_apart,
    pack_codes,
    round_codes,
    sum_levels,
    unpack_codes,
    weigh_by_imatrix,
)
from refimpl.quants.levels import IQ4_VALUES
from refimpl.quants.search import EPSILON, find_peak

Records = NDArray[Any]
Floats = NDArray[Any]  # float32


def read_step(blocks: Records) -> Floats:
    """Read d. blocks : [N] IQ4_NL records; return : [N] float32."""
    return decode_half(blocks["d"].view(np.uint16))


def dequantize(blocks: Records) -> Floats:
    """Decode IQ4_NL blocks to weights.

    w[i] = d * IQ4[q[i]]

    blocks : [N] IQ4_NL records (formats.IQ4_NL.block)
    return : [N, 32] float32

    Rounds: the product, to float32.
    Source: ggml-quants.c dequantize_row_iq4_nl, llama.cpp 0c1e570.
    """
    return read_step(blocks)[:, None] * IQ4_VALUES[unpack_codes(blocks["qs"])]


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] IQ4_NL records."""
    return Parts(None, None, read_step(blocks)[:, None], None, IQ4_VALUES[unpack_codes(blocks["qs"])])


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Measure how many codes each stored code lies from the encoder's.

    The encoder ends by taking the nearest level under the scale that its search found, before that becomes fp16:
    a code counts as off where no scale that fp16 rounds to d gives it.

    blocks : [N] IQ4_NL records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    d = read_step(blocks)
    return measure_apart(unpack_codes(blocks["qs"]), x, d, np.ones_like(d))


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to IQ4_NL blocks.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/32] IQ4_NL records

    Rounds: every operation, to float32, but what `build` fuses; d once more, to fp16, after the codes are
    taken under 1/d.
    Source: ggml-quants.c quantize_iq4_nl, llama.cpp 0c1e570. (quantize_row_iq4_nl_ref is another encoder:
    quantize_row.)
    """
    groups = x.reshape(-1, IQ4_NL.weights)
    weights = (
        groups * groups if imatrix is None else weigh_by_imatrix(groups, imatrix.reshape(groups.shape), build)
    )
    scale = fit_scale(groups, weights, build)
    inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
    blocks = np.zeros(len(groups), IQ4_NL.block)
    blocks["d"].view(np.uint16)[:] = encode_half(scale)
    blocks["qs"] = pack_codes(round_codes(inverse[:, None] * groups))
    return blocks.reshape(len(x), -1)


def quantize_row(x: Floats) -> Records:
    """Encode rows as ggml's functions of single rows do, which search no scale and make no file: build strict alone.

    q[i] = nearest level to x[i] / (peak / -127);  d = sum(x^3 * IQ4[q]) / sum(x^2 * IQ4[q]^2)

    x      : [R, n] float32, finite
    return : [R, n/32] IQ4_NL records; of blocks with all |x| < 1e-15, d = 0, C leaves the codes as they were:
             here they are 0

    Rounds: every operation, to float32; d once more, to fp16.
    Source: ggml-quants.c quantize_row_iq4_nl_ref, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, IQ4_NL.weights)
    peak = find_peak(groups)
    inverse = np.float32(1) / (peak / np.float32(-127))
    sum_qx, sum_q2 = sum_levels(groups, groups * groups, inverse, STRICT.NL_SQX0, STRICT.NL_SQ20)
    flat = np.abs(peak) < EPSILON
    blocks = np.zeros(len(groups), IQ4_NL.block)
    scale = np.where(~flat & (sum_q2 > 0), sum_qx / sum_q2, np.float32(0))
    blocks["d"].view(np.uint16)[:] = encode_half(scale)
    blocks["qs"] = pack_codes(np.where(flat[:, None], 0, round_codes(inverse[:, None] * groups)))
    return blocks.reshape(len(x), -1)
