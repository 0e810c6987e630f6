"""Q4_0: 32 weights in 18 bytes, one fp16 step and 32 codes of 4 bits around 8.

| d: fp16 | qs: 16 bytes |          w[i] = d * (q[i] - 8)

byte j of qs holds weight j (low nibble) and weight j + 16 (high nibble).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, truncate
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import add_product
from refimpl.quants.formats import Q4_0, Parts
from refimpl.quants.q5_0 import weigh
from refimpl.quants.rounding import measure_trials
from refimpl.quants.search import find_peak, fit_scale

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int32]


def unpack_codes(qs: Bytes) -> Codes:
    """Unpack the codes. qs : [N, 16] uint8; return : [N, 32] int32 in 0..15."""
    return np.concatenate([qs & 15, qs >> 4], 1).astype(np.int32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q4_0 blocks to weights.

    w[i] = d * (q[i] - 8)

    blocks : [N] Q4_0 records (formats.Q4_0.block)
    return : [N, 32] float32

    Rounds: the product, to float32.
    Source: ggml-quants.c dequantize_row_q4_0, llama.cpp 0c1e570.
    """
    d = decode_half(blocks["d"].view(np.uint16))
    return d[:, None] * (unpack_codes(blocks["qs"]) - 8).astype(np.float32)


def round_codes(x: Floats, build: Build = STRICT) -> tuple[Floats, Codes]:
    """Round each block under 1/d, before d becomes fp16: the encoder without an imatrix.

    d = peak / -8,  q[i] = min(15, trunc(x[i] * (1/d) + 8.5)); 1/d is 0 for d = 0

    x      : [N, 32] float32
    return : d [N] float32, codes [N, 32] int32 in 0..15; 0 where 1/d overflowed (INT_MIN's low byte)

    Rounds: every operation, to float32.
    """
    d = find_peak(x) / np.float32(-8)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    shifted = add_product(build.REF_RND, np.float32(8.5), x, inverse[:, None])
    return d, np.minimum(truncate(shifted) & 255, 15).astype(np.int32)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q4_0 records."""
    step = decode_half(blocks["d"].view(np.uint16))[:, None]
    return Parts(None, None, step, None, unpack_codes(blocks["qs"]) - 8)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the encoder's: the plain rule's or a trial scale's.

    A block whose d is 0 decodes to zeros whatever its codes: none of them counts as off.

    blocks : [N] Q4_0 records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    far = measure_trials(unpack_codes(blocks["qs"]), x, 8, *round_codes(x))
    return np.where((blocks["d"] == 0)[:, None], 0, far)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q4_0 blocks.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/32] Q4_0 records

    Rounds: every operation, to float32, but what `build` fuses; d once more, to fp16. With an imatrix the
    codes are those of a trial scale, not the nearest under the d that is stored.
    Source: ggml-quants.c quantize_row_q4_0_ref, quantize_row_q4_0_impl, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, Q4_0.weights)
    if imatrix is None:
        d, codes = round_codes(groups, build)
    else:
        d, codes = fit_scale(groups, weigh(x, imatrix, build).reshape(groups.shape), 8, build)
    blocks = np.zeros(len(groups), Q4_0.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["qs"] = codes[:, :16] | codes[:, 16:] << 4
    return blocks.reshape(len(x), -1)
