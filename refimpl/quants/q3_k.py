"""Q3_K: 256 weights in 110 bytes, 16 sub-blocks of 16 with a 6-bit scale around 32 each, codes of 3 bits around 4.

| hmask: 32 bytes | qs: 64 bytes | scales: 12 bytes | d: fp16 |

w[i] = (d * (scale[i // 16] - 32)) * (q[i] - 4)

qs holds the low two bits of the codes as Q2_K does; bit k of byte l of hmask is the third bit of weight 32k + l.
scales packs 16 scales; the low four bits of sub-block j and of j + 8 share byte j, the upper two of four share
a byte (bits 7..0):

byte 0..7   s8 s8 s8 s8 | s0 s0 s0 s0        (byte j: low bits of scales j + 8 and j)
byte 8..11  s12 s12 | s8 s8 | s4 s4 | s0 s0  (byte 8 + j: high bits of scales j + 12, j + 8, j + 4 and j)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, nearest_int
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import nearest_product
from refimpl.arith.sums import add_up
from refimpl.quants.formats import Q3_K, Parts
from refimpl.quants.q2_k import pack_pairs, unpack_pairs
from refimpl.quants.q4_k import weigh_by_imatrix
from refimpl.quants.search import find_peak, fit_by_moves, fit_scale

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int32]

SUBS, SUB, TOP = 16, 16, 4
SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def unpack_scales(packed: Bytes) -> Codes:
    """Unpack the 6-bit scales. packed : [N, 12] uint8; return : [N, 16] int32 in -32..31."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = (packed[:, None, 8:] >> SHIFTS & 3).reshape(-1, SUBS)
    return (low | high << 4).astype(np.int32) - 32


def pack_scales(scales: Codes) -> Bytes:
    """Pack the scales, 6 bits each. scales : [N, 16] int32 in 0..63; return : [N, 12] uint8."""
    low = scales & 15
    high = (scales >> 4).reshape(-1, 4, 4) << SHIFTS
    both = [low[:, :8] | low[:, 8:] << 4, np.bitwise_or.reduce(high, 1)]
    return np.concatenate(both, 1).astype(np.uint8)


def unpack_codes(blocks: Records) -> Codes:
    """Unpack the codes. blocks : [N] Q3_K records; return : [N, 256] int32 in 0..7."""
    third = blocks["hmask"][:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return unpack_pairs(blocks["qs"]) | third.reshape(-1, Q3_K.weights).astype(np.int32) << 2


def scale_subs(blocks: Records) -> Floats:
    """Multiply out the step of each sub-block.

    blocks : [N] Q3_K records
    return : d * (scale - 32) [N, 16] float32

    Rounds: the product, to float32.
    """
    d = decode_half(blocks["d"].view(np.uint16))
    return d[:, None] * unpack_scales(blocks["scales"]).astype(np.float32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q3_K blocks to weights.

    w[i] = (d * (scale[i // 16] - 32)) * (q[i] - 4)

    blocks : [N] Q3_K records (formats.Q3_K.block)
    return : [N, 256] float32, weights in stored order

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_q3_K, llama.cpp 0c1e570.
    """
    q = (unpack_codes(blocks) - TOP).astype(np.float32).reshape(-1, SUBS, SUB)
    return (scale_subs(blocks)[..., None] * q).reshape(-1, Q3_K.weights)


def round_codes(x: Floats, step: Floats) -> Codes:
    """Round weights to the nearest codes under stored scales.

    q[i] = clip(round(x[i] / step), -4, 3) + 4

    x      : [N, 256] float32
    step   : [N, 16] float32
    return : [N, 16, 16] int32, meaningless where step = 0

    Rounds: the quotient, to float32; then to the nearest integer, ties to even.
    """
    subs = x.reshape(-1, SUBS, SUB)
    return np.clip(nearest_int(subs / step[..., None]), -TOP, TOP - 1) + TOP


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q3_K records."""
    codes = unpack_codes(blocks) - TOP
    return Parts(unpack_scales(blocks["scales"]), None, scale_subs(blocks), None, codes)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under the stored scales.

    The encoder ends by rounding to the nearest, whatever search found the scales. A sub-block whose step is 0
    decodes to zeros whatever its codes: none of them counts as off.

    blocks : [N] Q3_K records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    step = scale_subs(blocks)
    far = np.abs(unpack_codes(blocks).reshape(-1, SUBS, SUB) - round_codes(x, step))
    return np.where((step == 0)[..., None], 0, far).reshape(x.shape)


def share_scale(scales: Floats, build: Build) -> tuple[Floats, Codes]:
    """Express 16 scales as signed multiples of one: the largest in size becomes -32.

    scales : [N, 16] float32
    return : d [N] float32, codes [N, 16] int32 in 0..63: 32 + multiple; all 0 where every scale is 0
    """
    peak = find_peak(scales)
    inverse = np.float32(-32) / peak
    multiples = nearest_product(build.ROW_NISC, inverse[:, None], scales).astype(np.int8)
    codes = np.clip(multiples.astype(np.int32), -32, 31) + 32
    none = peak == 0
    return np.where(none, np.float32(0), np.float32(1) / inverse), np.where(none[:, None], np.int32(0), codes)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q3_K blocks.

    Fit the scale of each sub-block, express it as a signed multiple of one, then round every weight anew under
    the scales that are stored. With an imatrix the multiples are fitted like codes, weighed by the sub-blocks'
    sums of weights. A sub-block whose stored scale is 0 keeps the codes of its search.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/256] Q3_K records

    Rounds: every operation, to float32, but what `build` fuses; d once more, to fp16.
    Source: ggml-quants.c quantize_row_q3_K_ref, quantize_row_q3_K_impl, llama.cpp 0c1e570.
    """
    rows, subs = x.reshape(-1, Q3_K.weights), x.reshape(-1, SUB)
    if imatrix is None:
        scale, codes = fit_by_moves(subs, TOP, build)
        d, scales = share_scale(scale.reshape(-1, SUBS), build)
    else:
        weights = weigh_by_imatrix(rows, imatrix.reshape(rows.shape), build).reshape(subs.shape)
        scale, codes = fit_scale(subs, weights, TOP, build)
        d, scales = fit_scale(scale.reshape(-1, SUBS), add_up(weights).reshape(-1, SUBS), 32, build)
    blocks = np.zeros(len(rows), Q3_K.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["scales"] = pack_scales(scales)
    step = scale_subs(blocks)
    final = np.where((step != 0)[..., None], round_codes(rows, step), codes.reshape(-1, SUBS, SUB))
    final = final.reshape(-1, Q3_K.weights)
    blocks["qs"] = pack_pairs(final & 3)
    third = (final >> 2).reshape(-1, 8, 32).astype(np.uint8)
    blocks["hmask"] = np.packbits(third, axis=1, bitorder="little")[:, 0]
    return blocks.reshape(len(x), -1)
