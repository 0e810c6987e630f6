"""Q5_0: 32 weights in 22 bytes, one fp16 step and 32 codes of 5 bits around 16.

| d: fp16 | qh: 32 bits | qs: 16 bytes |          w[i] = d * (q[i] - 16)

byte j of qs holds the low four bits of weight j (low nibble) and of weight j + 16 (high nibble);
bit i of qh, counted from the lowest bit of its first byte, is the fifth bit of weight i.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, truncate
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import add_product, add_products
from refimpl.quants.formats import Q5_0, Parts
from refimpl.quants.rounding import measure_trials
from refimpl.quants.search import find_peak, fit_scale

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]


def unpack_codes(blocks: Records) -> Codes:
    """Unpack the codes. blocks : [N] Q5_0 records; return : [N, 32] int32 in 0..31."""
    low = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], 1)
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    return np.asarray(low | high << 4, np.int32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q5_0 blocks to weights.

    w[i] = d * (q[i] - 16)

    blocks : [N] Q5_0 records (formats.Q5_0.block)
    return : [N, 32] float32

    Rounds: the product, to float32.
    Source: ggml-quants.c dequantize_row_q5_0, llama.cpp 0c1e570.
    """
    d = decode_half(blocks["d"].view(np.uint16))
    return d[:, None] * (unpack_codes(blocks) - 16).astype(np.float32)


def round_codes(x: Floats, build: Build = STRICT) -> tuple[Floats, Codes]:
    """Round each block under 1/d, before d becomes fp16: the encoder without an imatrix.

    d = peak / -16,  q[i] = min(31, trunc(x[i] * (1/d) + 16.5)); 1/d is 0 for d = 0

    x      : [N, 32] float32
    return : d [N] float32, codes [N, 32] int32 in 0..31; 0 where 1/d overflowed (INT_MIN's low byte)

    Rounds: every operation, to float32.
    """
    d = find_peak(x) / np.float32(-16)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    shifted = add_product(build.REF_RND, np.float32(16.5), x, inverse[:, None])
    byte = truncate(shifted) & 255  # as int8, so that 128 and above are negative and stay under 31
    return d, np.where(byte < 128, np.minimum(byte, 31), byte).astype(np.int32) & 31


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q5_0 records."""
    step = decode_half(blocks["d"].view(np.uint16))[:, None]
    return Parts(None, None, step, None, unpack_codes(blocks) - 16)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the encoder's: the plain rule's or a trial scale's.

    A block whose d is 0 decodes to zeros whatever its codes: none of them counts as off.

    blocks : [N] Q5_0 records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    far = measure_trials(unpack_codes(blocks), x, 16, *round_codes(x))
    return np.where((blocks["d"] == 0)[:, None], 0, far)


def weigh(x: Floats, imatrix: Floats, build: Build) -> Floats:
    """Weigh each weight for the search: imatrix * sqrt(mean x^2 of the row + x^2).

    x, imatrix : [R, n] float32
    return     : [R, n] float32

    Rounds: every operation, to float32, the sum over the row in ascending order.
    """
    sigma2 = add_products(build.ROW_SUMX2, x, x) / np.float32(x.shape[1])
    return imatrix * np.sqrt(add_product(build.ROW_W, sigma2[:, None], x, x))


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q5_0 blocks.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/32] Q5_0 records

    Rounds: every operation, to float32, but what `build` fuses; d once more, to fp16. With an imatrix the codes
    are those of a trial scale, not the nearest under the d that is stored.
    Source: ggml-quants.c quantize_row_q5_0_ref, quantize_row_q5_0_impl, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, Q5_0.weights)
    if imatrix is None:
        d, codes = round_codes(groups, build)
    else:
        d, codes = fit_scale(groups, weigh(x, imatrix, build).reshape(groups.shape), 16, build)
    blocks = np.zeros(len(groups), Q5_0.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["qs"] = codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4
    blocks["qh"] = np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")
    return blocks.reshape(len(x), -1)
