"""Q4_K: 256 weights in 144 bytes, 8 sub-blocks of 32 with a 6-bit scale and a 6-bit min each.

| d: fp16 | dmin: fp16 | scales: 12 bytes | qs: 128 bytes |

w[i] = (d * scale[i // 32]) * q[i] - dmin * min[i // 32]

scales packs 8 scales (s) and 8 mins (m); the upper two bits of 4..7 sit above 0..3 (bits 7..0):

byte  0    4455'5555 would lie: s4 s4 | s0 s0 s0 s0 s0 s0       byte  4    m4 m4 | m0 m0 m0 m0 m0 m0
...        byte 3 has the top of s7                              ...        byte 7 has the top of m7
byte  8    m4 m4 m4 m4 | s4 s4 s4 s4                             ...        byte 11 has the low bits of 7

32 bytes of qs hold 64 weights: low nibbles the first 32, high nibbles the next 32.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, nearest_int
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import add_product, add_products, nearest_product
from refimpl.arith.sums import add_up
from refimpl.quants.formats import Q4_K, Parts
from refimpl.quants.search import fit_positive, fit_scale_min

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int32]

SUBS, SUB = 8, 32
PLAIN_TRIALS = (-1.0, 0.1, 20)  # trial scales (15 + start + step * k) / spread, k = 0..steps
IMATRIX_TRIALS = (-0.9, 0.05, 36)


def unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Unpack the 6-bit scales and mins.

    packed : [N, 12] uint8
    return : scales [N, 8], mins [N, 8] uint8 in 0..63
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], 1)
    mins = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], 1)
    return scales, mins


def pack_scales(scales: Codes, mins: Codes) -> Bytes:
    """Pack scales and mins, 6 bits each; wider ones leak into their neighbours, as they do in ggml.

    scales, mins : [N, 8] int32 in 0..255
    return       : [N, 12] uint8
    """
    a = scales[:, :4] | scales[:, 4:] >> 4 << 6
    b = mins[:, :4] | mins[:, 4:] >> 4 << 6
    c = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return (np.concatenate([a, b, c], 1) & 255).astype(np.uint8)


def unpack_codes(qs: Bytes) -> Bytes:
    """Unpack the codes. qs : [N, 128] uint8; return : [N, 256] uint8 in 0..15."""
    pairs = qs.reshape(-1, 4, 1, SUB)
    return np.concatenate([pairs & 15, pairs >> 4], 2).reshape(-1, Q4_K.weights)


def scale_subs(blocks: Records) -> tuple[Floats, Floats]:
    """Multiply out the step and the offset of each sub-block.

    blocks : [N] Q4_K records
    return : d * scale [N, 8], dmin * min [N, 8] float32

    Rounds: each product, to float32.
    """
    scales, mins = unpack_scales(blocks["scales"])
    d = decode_half(blocks["d"].view(np.uint16))[:, None]
    dmin = decode_half(blocks["dmin"].view(np.uint16))[:, None]
    return d * scales.astype(np.float32), dmin * mins.astype(np.float32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q4_K blocks to weights.

    w[i] = (d * scale[i // 32]) * q[i] - dmin * min[i // 32]

    blocks : [N] Q4_K records (formats.Q4_K.block)
    return : [N, 256] float32, weights in stored order

    Rounds: each product and the difference, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_q4_K, llama.cpp 0c1e570.
    """
    step, offset = scale_subs(blocks)
    q = unpack_codes(blocks["qs"]).reshape(-1, SUBS, SUB).astype(np.float32)
    return (step[..., None] * q - offset[..., None]).reshape(-1, Q4_K.weights)


def round_codes(x: Floats, step: Floats, offset: Floats) -> Codes:
    """Round weights to the nearest codes under stored scales.

    q[i] = clip(round((x[i] + offset) / step), 0, 15)

    x            : [N, 256] float32
    step, offset : [N, 8] float32
    return       : [N, 8, 32] int32, meaningless where step = 0

    Rounds: the sum and the quotient, to float32; then to the nearest integer, ties to even.
    """
    subs = x.reshape(-1, SUBS, SUB)
    return np.clip(nearest_int((subs + offset[..., None]) / step[..., None]), 0, 15)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q4_K records."""
    return Parts(*unpack_scales(blocks["scales"]), *scale_subs(blocks), unpack_codes(blocks["qs"]))


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under the stored scales.

    The encoder ends by rounding to the nearest, whatever search found the scales. A sub-block whose step is 0
    decodes to one value whatever its codes: none of them counts as off.

    blocks : [N] Q4_K records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    step, offset = scale_subs(blocks)
    stored = unpack_codes(blocks["qs"]).reshape(-1, SUBS, SUB).astype(np.int32)
    far = np.abs(stored - round_codes(x, step, offset))
    return np.where((step == 0)[..., None], 0, far).reshape(x.shape)


def weigh_plain(subs: Floats, build: Build) -> Floats:
    """Weigh without an imatrix: root mean square of the sub-block + |x|. subs, return : [S, 32] float32."""
    mean = np.sqrt(add_products(build.ROW_SUMX2, subs, subs) / np.float32(SUB))
    return mean[:, None] + np.abs(subs)


def weigh_by_imatrix(blocks: Floats, imatrix: Floats, build: Build) -> Floats:
    """Weigh with an imatrix: imatrix * sqrt(2 * mean x^2 of the block + x^2). All [N, 256] float32."""
    sigma2 = np.float32(2) * add_products(build.ROW_SUMX2, blocks, blocks) / np.float32(Q4_K.weights)
    return imatrix * np.sqrt(add_product(build.ROW_W, sigma2[:, None], blocks, blocks))


def share_scale(scales: Floats, build: Build) -> tuple[Floats, Codes]:
    """Express 8 scales as multiples 0..63 of one: the largest becomes 63.

    scales : [N, 8] float32; a negative one wraps to a byte and becomes 63
    return : d [N] float32, codes [N, 8] int32 in 0..63
    """
    largest = scales.max(1)
    largest = np.where(largest > 0, largest, np.float32(0))  # +0, also for -0
    inverse = np.where(largest > 0, np.float32(63) / largest, np.float32(0))
    codes = nearest_product(build.ROW_NISC, inverse[:, None], scales) & 255
    return largest / np.float32(63), np.minimum(codes, 63)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q4_K blocks.

    Fit scale and min of each sub-block, express them in 6 bits, then round every weight anew under the scales
    that are stored. A sub-block whose stored scale is 0 keeps the codes of its search.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/256] Q4_K records

    Rounds: every operation, to float32, but what `build` fuses; d and dmin once more, to fp16.
    Source: ggml-quants.c quantize_row_q4_K_ref, quantize_row_q4_K_impl, llama.cpp 0c1e570.
    """
    rows = x.reshape(-1, Q4_K.weights)
    subs = x.reshape(-1, SUB)
    if imatrix is None:
        scale, low, codes = fit_scale_min(subs, weigh_plain(subs, build), 15, *PLAIN_TRIALS, build)
        d, scales = share_scale(scale.reshape(-1, SUBS), build)
        dmin, mins = share_scale(low.reshape(-1, SUBS), build)
    else:
        weights = weigh_by_imatrix(rows, imatrix.reshape(rows.shape), build).reshape(subs.shape)
        scale, low, codes = fit_scale_min(subs, weights, 15, *IMATRIX_TRIALS, build)
        sums = add_up(weights).reshape(-1, SUBS)
        d, scales = fit_positive(scale.reshape(-1, SUBS), sums, 63, build)
        dmin, mins = fit_positive(low.reshape(-1, SUBS), sums, 63, build)
    blocks = np.zeros(len(rows), Q4_K.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["dmin"].view(np.uint16)[:] = encode_half(dmin)
    blocks["scales"] = pack_scales(scales, mins)
    step, offset = scale_subs(blocks)
    final = np.where((step != 0)[..., None], round_codes(rows, step, offset), codes.reshape(-1, SUBS, SUB))
    pairs = final.reshape(-1, 4, 2, SUB)
    blocks["qs"] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return blocks.reshape(len(x), -1)
