"""Q3_K for kernels: the twin of q3_k.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import nearest_product
from refimpl.quants.formats import Q3_K
from refimpl.quants.q2_k_jit import pack_pairs, unpack_pairs
from refimpl.quants.q4_k_jit import weigh_by_imatrix
from refimpl.quants.search_jit import find_peak, fit_by_moves, fit_scale, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q3_K.weights, Q3_K.block.itemsize
HMASK, QS = Q3_K.offset("hmask"), Q3_K.offset("qs")
SCALES, D = Q3_K.offset("scales"), Q3_K.offset("d")
SUBS, SUB, TOP = 16, 16, 4
ZERO, ONE, PEAK = np.float32(0), np.float32(1), np.float32(-32)


@jit
def unpack_codes(block: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. block : [110] uint8; codes : [256] uint8 in 0..7, written."""
    unpack_pairs(block[QS : QS + 64], codes)
    for k in range(8):
        for i in range(32):
            codes[32 * k + i] = int(codes[32 * k + i]) | (int(block[HMASK + i]) >> k & 1) << 2


@jit
def pack_codes(codes: Bytes, block: Bytes) -> None:
    """Pack one block's codes. codes : [256] uint8 in 0..7; hmask and qs of block written."""
    pack_pairs(codes, block[QS : QS + 64])
    for i in range(32):
        third = 0
        for k in range(8):
            third |= int(codes[32 * k + i]) >> 2 << k
        block[HMASK + i] = third


@jit
def pack_scales(scales: Bytes, block: Bytes) -> None:
    """Pack 16 scales, 6 bits each. scales : [16] uint8 in 0..63."""
    for j in range(8):
        block[SCALES + j] = int(scales[j]) & 15 | (int(scales[j + 8]) & 15) << 4
    for j in range(4):
        high = 0
        for k in range(4):
            high |= int(scales[4 * k + j]) >> 4 << 2 * k
        block[SCALES + 8 + j] = high


@jit
def scale_sub(block: Bytes, j: int) -> Any:
    """Multiply out d * (scale - 32) of sub-block j."""
    low = int(block[SCALES + j % 8]) >> j // 8 * 4 & 15
    high = int(block[SCALES + 8 + j % 4]) >> j // 4 * 2 & 3
    d = decode_half(int(block[D]) | int(block[D + 1]) << 8)
    return d * np.float32((low | high << 4) - 32)


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [110] uint8; codes : [256] uint8, scratch; y : [256] float32, written."""
    unpack_codes(block, codes)
    for j in range(SUBS):
        step = scale_sub(block, j)
        for i in range(j * SUB, (j + 1) * SUB):
            y[i] = step * np.float32(int(codes[i]) - TOP)


@jit
def share_scale(scales: Floats, codes: Bytes, build: Build) -> Any:
    """Express 16 scales as signed multiples of one, and return it; the largest in size becomes -32.

    codes : [16] uint8, written: 32 + multiple; all 0 where every scale is 0
    """
    peak = find_peak(scales)
    if peak == ZERO:
        for j in range(SUBS):
            codes[j] = 0
        return ZERO
    inverse = PEAK / peak
    for j in range(SUBS):
        byte = nearest_product(build.ROW_NISC, inverse, scales[j]) & 255
        codes[j] = max(-32, min(31, byte - (byte & 128) * 2)) + 32
    return ONE / inverse


@jit
def quantize_block(
    x: Floats, imatrix: Floats, block: Bytes, codes: Bytes, weights: Floats, build: Build
) -> None:
    """Encode one block. x : [256]; imatrix : [256] or [0]: none; codes and weights [256] are scratch."""
    fitted, sums, scales = np.empty(SUBS, np.float32), np.empty(SUBS, np.float32), np.empty(SUBS, np.uint8)
    if imatrix.size > 0:
        weigh_by_imatrix(x, imatrix, weights, build)
        for j in range(SUBS):
            at, end = j * SUB, (j + 1) * SUB
            sums[j] = ZERO
            for i in range(at, end):
                sums[j] += weights[i]
            fitted[j] = fit_scale(x[at:end], weights[at:end], TOP, codes[at:end], build)
        d = fit_scale(fitted, sums, 32, scales, build)
    else:
        for j in range(SUBS):
            at, end = j * SUB, (j + 1) * SUB
            fitted[j] = fit_by_moves(x[at:end], TOP, codes[at:end], build)
        d = share_scale(fitted, scales, build)
    half = encode_half(d)
    block[D], block[D + 1] = half & 255, half >> 8
    pack_scales(scales, block)
    for j in range(SUBS):
        step = scale_sub(block, j)
        if step != ZERO:
            for i in range(j * SUB, (j + 1) * SUB):
                codes[i] = round_code(x[i] / step, -TOP, TOP - 1) + TOP
    pack_codes(codes, block)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*110] uint8; out : [R, n] float32, written."""
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
    out     : [R, n/256*110] uint8, written
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
    """Check one block. block : [110] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far = 0, 0
    unpack_codes(block, codes)
    for j in range(SUBS):
        step = scale_sub(block, j)
        if step == ZERO:
            continue
        for i in range(j * SUB, (j + 1) * SUB):
            distance = abs(int(codes[i]) - round_code(x[i] / step, -TOP, TOP - 1) - TOP)
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
