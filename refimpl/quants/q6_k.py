"""Q6_K: 256 weights in 210 bytes, 16 sub-blocks of 16 with an int8 scale each, codes of 6 bits around 32.

| ql: 128 bytes | qh: 64 bytes | scales: 16 x int8 | d: fp16 |

w[i] = (d * scale[i // 16]) * (q[i] - 32)

Each half of 128 weights takes 64 bytes of ql and 32 of qh. With l = 0..31, the four weights
l, l + 32, l + 64, l + 96 of a half lie in

ql[l]  low nibble    ql[l + 32]  low nibble    ql[l]  high nibble    ql[l + 32]  high nibble
qh[l]  bits 1..0     qh[l]  bits 3..2          qh[l]  bits 5..4      qh[l]  bits 7..6
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, nearest_int
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import nearest_product
from refimpl.quants.formats import Q6_K, Parts
from refimpl.quants.search import EPSILON, fit_scale

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

SUBS, SUB = 16, 16


def unpack_codes(blocks: Records) -> Codes:
    """Unpack the codes. blocks : [N] Q6_K records; return : [N, 256] int32 in 0..63."""
    low = blocks["ql"].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    high = blocks["qh"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return np.asarray(low | high << 4, np.int32).reshape(-1, Q6_K.weights)


def pack_codes(blocks: Records, codes: Codes) -> None:
    """Pack the codes. codes : [N, 256] int32 in 0..63; blocks : [N] Q6_K records, ql and qh written."""
    q = codes.reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    blocks["ql"] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    both = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    blocks["qh"] = both.reshape(-1, 64)


def scale_subs(blocks: Records) -> Floats:
    """Multiply out the step of each sub-block.

    blocks : [N] Q6_K records
    return : d * scale [N, 16] float32

    Rounds: the product, to float32.
    """
    d = decode_half(blocks["d"].view(np.uint16))
    return d[:, None] * blocks["scales"].astype(np.float32)


def dequantize(blocks: Records) -> Floats:
    """Decode Q6_K blocks to weights.

    w[i] = (d * scale[i // 16]) * (q[i] - 32)

    blocks : [N] Q6_K records (formats.Q6_K.block)
    return : [N, 256] float32, weights in stored order

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_q6_K, llama.cpp 0c1e570.
    """
    q = (unpack_codes(blocks) - 32).astype(np.float32).reshape(-1, SUBS, SUB)
    return (scale_subs(blocks)[..., None] * q).reshape(-1, Q6_K.weights)


def round_codes(x: Floats, step: Floats) -> Codes:
    """Round weights to the nearest codes under stored scales.

    q[i] = clip(round(x[i] / step), -32, 31) + 32

    x      : [N, 256] float32
    step   : [N, 16] float32
    return : [N, 16, 16] int32, meaningless where step = 0

    Rounds: the quotient, to float32; then to the nearest integer, ties to even.
    """
    subs = x.reshape(-1, SUBS, SUB)
    return np.clip(nearest_int(subs / step[..., None]), -32, 31) + 32


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q6_K records."""
    return Parts(blocks["scales"], None, scale_subs(blocks), None, unpack_codes(blocks) - 32)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under the stored scales.

    The encoder ends by rounding to the nearest, whatever search found the scales. A sub-block whose step is 0
    decodes to zeros whatever its codes: none of them counts as off.

    blocks : [N] Q6_K records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    step = scale_subs(blocks)
    far = np.abs(unpack_codes(blocks).reshape(-1, SUBS, SUB) - round_codes(x, step))
    return np.where((step == 0)[..., None], 0, far).reshape(x.shape)


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q6_K blocks.

    Fit the scale of each sub-block, express it as a signed multiple of the largest, which becomes -128, then
    round every weight anew under the scales that are stored. A sub-block whose stored scale is 0 keeps the
    codes of its search; a block without any scale is all zero bytes.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None: then x^2 weighs
    return  : [R, n/256] Q6_K records

    Rounds: every operation, to float32, but what `build` fuses; d once more, to fp16.
    Source: ggml-quants.c quantize_row_q6_K_ref, quantize_row_q6_K_impl, llama.cpp 0c1e570.
    """
    rows, subs = x.reshape(-1, Q6_K.weights), x.reshape(-1, SUB)
    weights = subs * subs if imatrix is None else imatrix.reshape(subs.shape)
    scale, codes = fit_scale(subs, weights, 32, build)
    scale = scale.reshape(-1, SUBS)
    size = np.where(np.isnan(scale), np.float32(0), np.abs(scale))  # no comparison finds a NaN the largest
    peak = np.take_along_axis(scale, size.argmax(1)[:, None], 1)[:, 0]  # the first of the largest, signed
    zero = size.max(1) < EPSILON

    inverse = np.float32(-128) / peak
    blocks = np.zeros(len(rows), Q6_K.block)
    blocks["d"].view(np.uint16)[:] = encode_half(np.float32(1) / inverse)
    blocks["scales"] = np.minimum(nearest_product(build.ROW_NISC, inverse[:, None], scale), 127)
    step = scale_subs(blocks)
    final = np.where((step != 0)[..., None], round_codes(rows, step), codes.reshape(-1, SUBS, SUB))
    pack_codes(blocks, final.reshape(-1, Q6_K.weights))
    blocks[zero] = np.zeros((), Q6_K.block)
    return blocks.reshape(len(x), -1)
