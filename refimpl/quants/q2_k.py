"""Q2_K: 256 weights in 84 bytes, 16 sub-blocks of 16 with a 4-bit scale and a 4-bit min each.

| scales: 16 bytes | qs: 64 bytes | d: fp16 | dmin: fp16 |

w[i] = (d * scale[i // 16]) * q[i] - dmin * min[i // 16]

byte j of scales holds the scale of sub-block j (low nibble) and its min (high nibble). Each half of 128 weights
takes 32 bytes of qs: byte l holds the weights l, l + 32, l + 64 and l + 96 of the half, from the lowest bits up.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, nearest_int
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import add_product, add_products, nearest_product
from refimpl.arith.sums import add_up
from refimpl.quants.formats import Q2_K, Parts
from refimpl.quants.search import fit_positive, fit_scale_min

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int32]

SUBS, SUB, TOP = 16, 16, 3
PLAIN_TRIALS = (-0.5, 0.1, 15)  # trial scales (3 + start + step * k) / spread, k = 0..steps
IMATRIX_TRIALS = (-0.9, 0.05, 36)
SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def unpack_pairs(qs: Bytes) -> Codes:
    """Unpack 2 bits of each weight. qs : [N, 64] uint8; return : [N, 256] int32 in 0..3."""
    return (qs.reshape(-1, 2, 1, 32) >> SHIFTS & 3).reshape(-1, Q2_K.weights).astype(np.int32)


def pack_pairs(codes: Codes) -> Bytes:
    """Pack 2 bits of each weight. codes : [N, 256] int32 in 0..3; return : [N, 64] uint8."""
    quarters = codes.reshape(-1, 2, 4, 32) << SHIFTS
    return np.bitwise_or.reduce(quarters, 2).reshape(-1, 64).astype(np.uint8)


def scale_subs(blocks: Records) -> tuple[Floats, Floats]:
    """Multiply out the step and the offset of each sub-block.

    blocks : [N] Q2_K records
    return : d * scale [N, 16], dmin * min [N, 16] float32

    Rounds: each product, to float32.
    """
    d = decode_half(blocks["d"].view(np.uint16))[:, None]
    dmin = decode_half(blocks["dmin"].view(np.uint16))[:, None]
    scales = blocks["scales"]
    return d * (scales & 15).astype(np.float32), dmin * (scales >> 4).astype(np.float32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q2_K blocks to weights.

    w[i] = (d * scale[i // 16]) * q[i] - dmin * min[i // 16]

    blocks : [N] Q2_K records (formats.Q2_K.block)
    return : [N, 256] float32, weights in stored order

    Rounds: each product and the difference, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_q2_K, llama.cpp 0c1e570.
    """
    step, offset = scale_subs(blocks)
    q = unpack_pairs(blocks["qs"]).reshape(-1, SUBS, SUB).astype(np.float32)
    return (step[..., None] * q - offset[..., None]).reshape(-1, Q2_K.weights)


def round_codes(x: Floats, step: Floats, offset: Floats) -> Codes:
    """Round weights to the nearest codes under stored scales.

    q[i] = clip(round((x[i] + offset) / step), 0, 3)

    x            : [N, 256] float32
    step, offset : [N, 16] float32
    return       : [N, 16, 16] int32, meaningless where step = 0

    Rounds: the sum and the quotient, to float32; then to the nearest integer, ties to even.
    """
    subs = x.reshape(-1, SUBS, SUB)
    return np.clip(nearest_int((subs + offset[..., None]) / step[..., None]), 0, TOP)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q2_K records."""
    scales = blocks["scales"]
    return Parts(scales & 15, scales >> 4, *scale_subs(blocks), unpack_pairs(blocks["qs"]))


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under the stored scales.

    The encoder ends by rounding to the nearest, whatever search found the scales. A sub-block whose step is 0
    decodes to one value whatever its codes: none of them counts as off.

    blocks : [N] Q2_K records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    step, offset = scale_subs(blocks)
    stored = unpack_pairs(blocks["qs"]).reshape(-1, SUBS, SUB)
    far = np.abs(stored - round_codes(x, step, offset))
    return np.where((step == 0)[..., None], 0, far).reshape(x.shape)


def weigh_by_imatrix(blocks: Floats, imatrix: Floats, build: Build) -> Floats:
    """Weigh with an imatrix: imatrix * sqrt(mean x^2 of the block + x^2). All [N, 256] float32."""
    sigma2 = add_products(build.ROW_SUMX2, blocks, blocks) / np.float32(Q2_K.weights)
    return imatrix * np.sqrt(add_product(build.ROW_W, sigma2[:, None], blocks, blocks))


def share_scale(scales: Floats, build: Build) -> tuple[Floats, Codes]:
    """Express 16 scales as multiples 0..15 of one: the largest becomes 15.

    scales : [N, 16] float32; a negative one wraps, and in ggml's byte leaks into the other nibble
    return : d [N] float32, codes [N, 16] int32
    """
    largest = scales.max(1)
    largest = np.where(largest > 0, largest, np.float32(0))  # +0, also for -0
    inverse = np.where(largest > 0, np.float32(15) / largest, np.float32(0))
    return largest / np.float32(15), nearest_product(build.ROW_NISC, inverse[:, None], scales)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q2_K blocks.

    Fit scale and min of each sub-block, express them in 4 bits, then round every weight anew under the scales
    that are stored. Without an imatrix |x| weighs, and the search adds |error|, not its square. A sub-block
    whose stored scale is 0 keeps the codes of its search.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/256] Q2_K records

    Rounds: every operation, to float32, but what `build` fuses; d and dmin once more, to fp16.
    Source: ggml-quants.c quantize_row_q2_K_ref, quantize_row_q2_K_impl, llama.cpp 0c1e570.
    """
    rows = x.reshape(-1, Q2_K.weights)
    subs = x.reshape(-1, SUB)
    if imatrix is None:
        scale, low, codes = fit_scale_min(subs, np.abs(subs), TOP, *PLAIN_TRIALS, build, linear=True)
        d, scales = share_scale(scale.reshape(-1, SUBS), build)
        dmin, mins = share_scale(low.reshape(-1, SUBS), build)
    else:
        weights = weigh_by_imatrix(rows, imatrix.reshape(rows.shape), build).reshape(subs.shape)
        scale, low, codes = fit_scale_min(subs, weights, TOP, *IMATRIX_TRIALS, build)
        sums = add_up(weights).reshape(-1, SUBS)
        d, scales = fit_positive(scale.reshape(-1, SUBS), sums, 15, build)
        dmin, mins = fit_positive(low.reshape(-1, SUBS), sums, 15, build)
    blocks = np.zeros(len(rows), Q2_K.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["dmin"].view(np.uint16)[:] = encode_half(dmin)
    blocks["scales"] = (scales | mins << 4) & 255
    step, offset = scale_subs(blocks)
    final = np.where((step != 0)[..., None], round_codes(rows, step, offset), codes.reshape(-1, SUBS, SUB))
    blocks["qs"] = pack_pairs(final)
    return blocks.reshape(len(x), -1)
