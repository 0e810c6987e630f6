"""Q5_K: 256 weights in 176 bytes, 8 sub-blocks of 32 with a 6-bit scale and a 6-bit min each.

| d: fp16 | dmin: fp16 | scales: 12 bytes | qh: 32 bytes | qs: 128 bytes |

w[i] = (d * scale[i // 32]) * q[i] - dmin * min[i // 32]

scales and the low four bits of the codes lie as in Q4_K: 32 bytes of qs hold 64 weights, low nibbles the first
32, high nibbles the next 32. Bit j of byte l of qh is the fifth bit of weight l of sub-block j.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import encode_half, nearest_int
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.sums import add_up
from refimpl.quants import q4_k
from refimpl.quants.formats import Q5_K, Parts
from refimpl.quants.q4_k import (
    pack_scales,
    scale_subs,
    share_scale,
    unpack_scales,
    weigh_by_imatrix,
    weigh_plain,
)
from refimpl.quants.search import fit_positive, fit_scale_min

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

SUBS, SUB, TOP = 8, 32, 31
PLAIN_TRIALS = (-0.5, 0.1, 15)  # trial scales (31 + start + step * k) / spread, k = 0..steps
IMATRIX_TRIALS = (-0.9, 0.05, 36)


def unpack_codes(blocks: Records) -> Codes:
    """Unpack the codes. blocks : [N] Q5_K records; return : [N, 256] int32 in 0..31."""
    fifth = blocks["qh"][:, None] >> np.arange(SUBS, dtype=np.uint8)[:, None] & 1
    return (q4_k.unpack_codes(blocks["qs"]) | fifth.reshape(-1, Q5_K.weights) << 4).astype(np.int32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q5_K blocks to weights.

    w[i] = (d * scale[i // 32]) * q[i] - dmin * min[i // 32]

    blocks : [N] Q5_K records (formats.Q5_K.block)
    return : [N, 256] float32, weights in stored order

    Rounds: each product and the difference, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_q5_K, llama.cpp 0c1e570.
    """
    step, offset = scale_subs(blocks)
    q = unpack_codes(blocks).reshape(-1, SUBS, SUB).astype(np.float32)
    return (step[..., None] * q - offset[..., None]).reshape(-1, Q5_K.weights)


def round_codes(x: Floats, step: Floats, offset: Floats) -> Codes:
    """Round weights to the nearest codes under stored scales.

    q[i] = clip(round((x[i] + offset) / step), 0, 31)

    x            : [N, 256] float32
    step, offset : [N, 8] float32
    return       : [N, 8, 32] int32, meaningless where step = 0

    Rounds: the sum and the quotient, to float32; then to the nearest integer, ties to even.
    """
    subs = x.reshape(-1, SUBS, SUB)
    return np.clip(nearest_int((subs + offset[..., None]) / step[..., None]), 0, TOP)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q5_K records."""
    return Parts(*unpack_scales(blocks["scales"]), *scale_subs(blocks), unpack_codes(blocks))


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under the stored scales.

    The encoder ends by rounding to the nearest, whatever search found the scales. A sub-block whose step is 0
    decodes to one value whatever its codes: none of them counts as off.

    blocks : [N] Q5_K records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    step, offset = scale_subs(blocks)
    stored = unpack_codes(blocks).reshape(-1, SUBS, SUB)
    far = np.abs(stored - round_codes(x, step, offset))
    return np.where((step == 0)[..., None], 0, far).reshape(x.shape)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q5_K blocks.

    Fit scale and min of each sub-block, express them in 6 bits, then round every weight anew under the scales
    that are stored. A sub-block whose stored scale is 0 keeps the codes of its search.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/256] Q5_K records

    Rounds: every operation, to float32, but what `build` fuses; d and dmin once more, to fp16.
    Source: ggml-quants.c quantize_row_q5_K_ref, quantize_row_q5_K_impl, llama.cpp 0c1e570.
    """
    rows = x.reshape(-1, Q5_K.weights)
    subs = x.reshape(-1, SUB)
    if imatrix is None:
        scale, low, codes = fit_scale_min(subs, weigh_plain(subs, build), TOP, *PLAIN_TRIALS, build)
        d, scales = share_scale(scale.reshape(-1, SUBS), build)
        dmin, mins = share_scale(low.reshape(-1, SUBS), build)
    else:
        weights = weigh_by_imatrix(rows, imatrix.reshape(rows.shape), build).reshape(subs.shape)
        scale, low, codes = fit_scale_min(subs, weights, TOP, *IMATRIX_TRIALS, build)
        sums = add_up(weights).reshape(-1, SUBS)
        d, scales = fit_positive(scale.reshape(-1, SUBS), sums, 63, build)
        dmin, mins = fit_positive(low.reshape(-1, SUBS), sums, 63, build)
    blocks = np.zeros(len(rows), Q5_K.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["dmin"].view(np.uint16)[:] = encode_half(dmin)
    blocks["scales"] = pack_scales(np.minimum(scales, 63), np.minimum(mins, 63))
    step, offset = scale_subs(blocks)
    final = np.where((step != 0)[..., None], round_codes(rows, step, offset), codes.reshape(-1, SUBS, SUB))
    pairs = (final & 15).reshape(-1, 4, 2, SUB)
    blocks["qs"] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    blocks["qh"] = np.packbits((final >> 4).astype(np.uint8), axis=1, bitorder="little")[:, 0]
    return blocks.reshape(len(x), -1)
