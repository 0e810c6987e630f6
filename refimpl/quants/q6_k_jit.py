"""Q6_K for kernels: the twin of q6_k.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import nearest_product
from refimpl.quants.formats import Q6_K
from refimpl.quants.search_jit import fit_scale, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q6_K.weights, Q6_K.block.itemsize
QL, QH = Q6_K.offset("ql"), Q6_K.offset("qh")
SCALES, D = Q6_K.offset("scales"), Q6_K.offset("d")
SUBS, SUB = 16, 16
ZERO, ONE, EPSILON, PEAK = np.float32(0), np.float32(1), np.float32(1e-15), np.float32(-128)


@jit
def unpack_codes(block: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. block : [210] uint8; codes : [256] uint8 in 0..63, written."""
    for half in range(2):
        for k in range(4):
            low = block[QL + 64 * half + 32 * (k % 2) : QL + 64 * half + 32 * (k % 2) + 32]
            high = block[QH + 32 * half : QH + 32 * half + 32]
            to = codes[128 * half + 32 * k : 128 * half + 32 * k + 32]
            for i in range(32):
                to[i] = int(low[i]) >> k // 2 * 4 & 15 | (int(high[i]) >> 2 * k & 3) << 4


@jit
def pack_codes(codes: Bytes, block: Bytes) -> None:
    """Pack one block's codes. codes : [256] uint8 in 0..63; ql and qh of block written."""
    for half in range(2):
        for i in range(32):
            at = 128 * half + i
            a, b, c, d = int(codes[at]), int(codes[at + 32]), int(codes[at + 64]), int(codes[at + 96])
            block[QL + 64 * half + i] = a & 15 | (c & 15) << 4
            block[QL + 64 * half + 32 + i] = b & 15 | (d & 15) << 4
            block[QH + 32 * half + i] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6


@jit
def scale_sub(block: Bytes, j: int) -> Any:
    """Multiply out d * scale of sub-block j."""
    code = int(block[SCALES + j])
    d = decode_half(int(block[D]) | int(block[D + 1]) << 8)
    return d * np.float32(code - (code & 128) * 2)


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [210] uint8; codes : [256] uint8, scratch; y : [256] float32, written."""
    unpack_codes(block, codes)
    for j in range(SUBS):
        step = scale_sub(block, j)
        for i in range(j * SUB, (j + 1) * SUB):
            y[i] = step * np.float32(int(codes[i]) - 32)


@jit
def fit_subs(x: Floats, imatrix: Floats, scales: Floats, codes: Bytes, build: Build) -> None:
    """Fit the scale of each sub-block.

    x       : [256] float32
    imatrix : [256] float32, or [0]: then x^2 weighs
    scales  : [16] float32, codes : [256] uint8, both written
    """
    squares = np.empty(SUB, np.float32)
    for j in range(SUBS):
        at, end = j * SUB, (j + 1) * SUB
        for i in range(SUB):
            squares[i] = imatrix[at + i] if imatrix.size > 0 else x[at + i] * x[at + i]
        scales[j] = fit_scale(x[at:end], squares, 32, codes[at:end], build)


@jit
def quantize_block(
    x: Floats, imatrix: Floats, block: Bytes, codes: Bytes, scales: Floats, build: Build
) -> None:
    """Encode one block. x : [256]; imatrix : [256] or [0]; codes [256] and scales [16] are scratch."""
    fit_subs(x, imatrix, scales, codes, build)
    peak, size = ZERO, ZERO
    for j in range(SUBS):
        if abs(scales[j]) > size:
            size = abs(scales[j])
            peak = scales[j]
    if size < EPSILON:
        for i in range(BYTES):
            block[i] = 0
        return
    inverse = PEAK / peak
    half = encode_half(ONE / inverse)
    block[D], block[D + 1] = half & 255, half >> 8
    for j in range(SUBS):
        block[SCALES + j] = min(127, nearest_product(build.ROW_NISC, inverse, scales[j])) & 255
    for j in range(SUBS):
        step = scale_sub(block, j)
        if step != ZERO:
            for i in range(j * SUB, (j + 1) * SUB):
                codes[i] = round_code(x[i] / step, -32, 31) + 32
    pack_codes(codes, block)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*210] uint8; out : [R, n] float32, written."""
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
    out     : [R, n/256*210] uint8, written
    """
    codes, scales = np.empty(WEIGHTS, np.uint8), np.empty(SUBS, np.float32)
    importance = np.empty(0, np.float32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            at, end = b * WEIGHTS, (b + 1) * WEIGHTS
            if imatrix.shape[0] > 0:
                importance = imatrix[r // rows_per_expert, at:end]
            block = out[r, b * BYTES : (b + 1) * BYTES]
            quantize_block(x[r, at:end], importance, block, codes, scales, build)


@jit
def check_block(block: Bytes, x: Floats, codes: Bytes) -> Any:
    """Check one block. block : [210] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far = 0, 0
    unpack_codes(block, codes)
    for j in range(SUBS):
        step = scale_sub(block, j)
        if step == ZERO:
            continue
        for i in range(j * SUB, (j + 1) * SUB):
            distance = abs(int(codes[i]) - round_code(x[i] / step, -32, 31) - 32)
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
