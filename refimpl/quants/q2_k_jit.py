"""Q2_K for kernels: the twin of q2_k.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import add_product, nearest_product
from refimpl.quants.formats import Q2_K
from refimpl.quants.search_jit import fit_positive, fit_scale_min, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int64]

WEIGHTS, BYTES = Q2_K.weights, Q2_K.block.itemsize
SCALES, QS, D, DMIN = Q2_K.offset("scales"), Q2_K.offset("qs"), Q2_K.offset("d"), Q2_K.offset("dmin")
SUBS, SUB, TOP = 16, 16, 3
ZERO, LARGEST, BLOCK_SIZE = np.float32(0), np.float32(15), np.float32(WEIGHTS)
PLAIN_START, PLAIN_STEP, PLAIN_STEPS = np.float32(-0.5), np.float32(0.1), 15
IMATRIX_START, IMATRIX_STEP, IMATRIX_STEPS = np.float32(-0.9), np.float32(0.05), 36


@jit
def unpack_pairs(qs: Bytes, codes: Bytes) -> None:
    """Unpack 2 bits of each weight. qs : [64] uint8; codes : [256] uint8 in 0..3, written."""
    for half in range(2):
        for k in range(4):
            for i in range(32):
                codes[128 * half + 32 * k + i] = int(qs[32 * half + i]) >> 2 * k & 3


@jit
def pack_pairs(codes: Bytes, qs: Bytes) -> None:
    """Pack the low 2 bits of each weight. codes : [256] uint8; qs : [64] uint8, written."""
    for half in range(2):
        for i in range(32):
            byte = 0
            for k in range(4):
                byte |= (int(codes[128 * half + 32 * k + i]) & 3) << 2 * k
            qs[32 * half + i] = byte


@jit
def unpack_codes(block: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. block : [84] uint8; codes : [256] uint8 in 0..3, written."""
    unpack_pairs(block[QS : QS + 64], codes)


@jit
def scale_sub(block: Bytes, j: int) -> Any:
    """Multiply out d * scale and dmin * min of sub-block j."""
    d = decode_half(int(block[D]) | int(block[D + 1]) << 8)
    dmin = decode_half(int(block[DMIN]) | int(block[DMIN + 1]) << 8)
    code = int(block[SCALES + j])
    return d * np.float32(code & 15), dmin * np.float32(code >> 4)


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [84] uint8; codes : [256] uint8, scratch; y : [256] float32, written."""
    unpack_codes(block, codes)
    for j in range(SUBS):
        step, offset = scale_sub(block, j)
        for i in range(j * SUB, (j + 1) * SUB):
            y[i] = step * np.float32(codes[i]) - offset


@jit
def weigh_by_imatrix(x: Floats, imatrix: Floats, weights: Floats, build: Build) -> None:
    """Weigh a block with an imatrix: imatrix * sqrt(mean x^2 + x^2). All [256] float32."""
    total = ZERO
    for i in range(WEIGHTS):
        total = add_product(build.ROW_SUMX2, total, x[i], x[i])
    sigma2 = total / BLOCK_SIZE
    for i in range(WEIGHTS):
        weights[i] = imatrix[i] * np.sqrt(add_product(build.ROW_W, sigma2, x[i], x[i]))


@jit
def share_scale(scales: Floats, codes: Codes, build: Build) -> Any:
    """Express 16 scales as multiples 0..15 of one, and return it. A negative scale becomes a negative code."""
    largest = ZERO
    for j in range(SUBS):
        if scales[j] > largest:
            largest = scales[j]
    inverse = LARGEST / largest if largest > ZERO else ZERO
    for j in range(SUBS):
        codes[j] = nearest_product(build.ROW_NISC, inverse, scales[j])
    return largest / LARGEST


@jit
def fit_scales(scales: Floats, sums: Floats, codes: Codes, build: Build) -> Any:
    """Fit codes 0..15 to 16 scales, and return their scale."""
    fitted = np.empty(SUBS, np.uint8)
    scale = fit_positive(scales, sums, 15, fitted, build)
    for j in range(SUBS):
        codes[j] = int(fitted[j])
    return scale


@jit
def quantize_block(
    x: Floats, imatrix: Floats, block: Bytes, codes: Bytes, weights: Floats, build: Build
) -> None:
    """Encode one block. x : [256]; imatrix : [256] or [0]: none; codes and weights [256] are scratch."""
    trial, scales, mins = np.empty(SUB, np.uint8), np.empty(SUBS, np.int64), np.empty(SUBS, np.int64)
    fitted, lows, sums = np.empty(SUBS, np.float32), np.empty(SUBS, np.float32), np.empty(SUBS, np.float32)
    weighted = imatrix.size > 0
    if weighted:
        weigh_by_imatrix(x, imatrix, weights, build)
        start, step, steps = IMATRIX_START, IMATRIX_STEP, IMATRIX_STEPS
    else:
        for i in range(WEIGHTS):
            weights[i] = abs(x[i])
        start, step, steps = PLAIN_START, PLAIN_STEP, PLAIN_STEPS
    for j in range(SUBS):
        at, end = j * SUB, (j + 1) * SUB
        sums[j] = ZERO
        for i in range(at, end):
            sums[j] += weights[i]
        fitted[j], lows[j] = fit_scale_min(
            x[at:end], weights[at:end], TOP, start, step, steps, codes[at:end], trial, build, not weighted
        )
    if weighted:
        d, dmin = fit_scales(fitted, sums, scales, build), fit_scales(lows, sums, mins, build)
    else:
        d, dmin = share_scale(fitted, scales, build), share_scale(lows, mins, build)
    half = encode_half(d)
    block[D], block[D + 1] = half & 255, half >> 8
    half = encode_half(dmin)
    block[DMIN], block[DMIN + 1] = half & 255, half >> 8
    for j in range(SUBS):
        block[SCALES + j] = (int(scales[j]) | int(mins[j]) << 4) & 255
    for j in range(SUBS):
        size, offset = scale_sub(block, j)
        if size != ZERO:
            for i in range(j * SUB, (j + 1) * SUB):
                codes[i] = round_code((x[i] + offset) / size, 0, TOP)
    pack_pairs(codes, block[QS : QS + 64])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*84] uint8; out : [R, n] float32, written."""
    codes = np.empty(WEIGHTS, np.uint8)
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], codes, y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*84] uint8, written
    """
    codes, weights = np.empty(WEIGHTS, np.uint8), np.empty(WEIGHTS, np.float32)
    importance = np.empty(0, np.float32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            at, end = b * WEIGHTS, (b + 1) * WEIGHTS
            if imatrix.shape[0] > 0:
                importance = imatrix[r // rows_per_expert, at:end]
            block = out[r, b * BYTES : (b + 1) * BYTES]
            quantize_block(x[r, at:end], importance, block, codes, weights, build)


@jit
def check_block(block: Bytes, x: Floats, codes: Bytes) -> Any:
    """Check one block. block : [84] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far = 0, 0
    unpack_codes(block, codes)
    for j in range(SUBS):
        step, offset = scale_sub(block, j)
        if step == ZERO:
            continue
        for i in range(j * SUB, (j + 1) * SUB):
            distance = abs(int(codes[i]) - round_code((x[i] + offset) / step, 0, TOP))
            off += distance != 0
            far = max(far, distance)
    return off, far


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in code steps
    """
    codes = np.empty(WEIGHTS, np.uint8)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group, codes)
