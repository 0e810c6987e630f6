"""Q4_K for kernels: the twin of q4_k.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import add_product, nearest_product
from refimpl.quants.formats import Q4_K
from refimpl.quants.search_jit import fit_positive, fit_scale_min, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q4_K.weights, Q4_K.block.itemsize
SCALES, QS = Q4_K.offset("scales"), Q4_K.offset("qs")
SUBS, SUB = 8, 32
ZERO, TWO = np.float32(0), np.float32(2)
SUB_SIZE, BLOCK_SIZE, LARGEST = np.float32(SUB), np.float32(WEIGHTS), np.float32(63)
PLAIN_START, PLAIN_STEP, PLAIN_STEPS = np.float32(-1), np.float32(0.1), 20
IMATRIX_START, IMATRIX_STEP, IMATRIX_STEPS = np.float32(-0.9), np.float32(0.05), 36


@jit
def unpack_scale(block: Bytes, j: int) -> Any:
    """Unpack the 6-bit scale and min of sub-block j."""
    s = block[SCALES : SCALES + 12]
    if j < 4:
        return int(s[j]) & 63, int(s[j + 4]) & 63
    return int(s[j + 4]) & 15 | int(s[j - 4]) >> 6 << 4, int(s[j + 4]) >> 4 | int(s[j]) >> 6 << 4


@jit
def pack_scales(scales: Bytes, mins: Bytes, block: Bytes) -> None:
    """Pack 8 scales and 8 mins, 6 bits each; wider ones leak into their neighbours, as they do in ggml."""
    s = block[SCALES : SCALES + 12]
    for j in range(4):
        scale, low = int(scales[j + 4]), int(mins[j + 4])
        s[j] = (int(scales[j]) | scale >> 4 << 6) & 255
        s[j + 4] = (int(mins[j]) | low >> 4 << 6) & 255
        s[j + 8] = scale & 15 | (low & 15) << 4


@jit
def scale_sub(block: Bytes, j: int) -> Any:
    """Multiply out d * scale and dmin * min of sub-block j."""
    scale, low = unpack_scale(block, j)
    d = decode_half(int(block[0]) | int(block[1]) << 8)
    dmin = decode_half(int(block[2]) | int(block[3]) << 8)
    return d * np.float32(scale), dmin * np.float32(low)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [144] uint8; y : [256] float32, written."""
    for j in range(SUBS):
        step, offset = scale_sub(block, j)
        pairs = block[QS + j // 2 * SUB : QS + j // 2 * SUB + SUB]
        shift = j % 2 * 4
        for i in range(SUB):
            y[j * SUB + i] = step * np.float32(int(pairs[i]) >> shift & 15) - offset


@jit
def weigh_plain(x: Floats, weights: Floats, build: Build) -> None:
    """Weigh a block without an imatrix: root mean square of the sub-block + |x|. Both [256] float32."""
    for at in range(0, WEIGHTS, SUB):
        total = ZERO
        for i in range(at, at + SUB):
            total = add_product(build.ROW_SUMX2, total, x[i], x[i])
        mean = np.sqrt(total / SUB_SIZE)
        for i in range(at, at + SUB):
            weights[i] = mean + abs(x[i])


@jit
def weigh_by_imatrix(x: Floats, imatrix: Floats, weights: Floats, build: Build) -> None:
    """Weigh a block with an imatrix: imatrix * sqrt(2 * mean x^2 + x^2). All [256] float32."""
    total = ZERO
    for i in range(WEIGHTS):
        total = add_product(build.ROW_SUMX2, total, x[i], x[i])
    sigma2 = TWO * total / BLOCK_SIZE
    for i in range(WEIGHTS):
        weights[i] = imatrix[i] * np.sqrt(add_product(build.ROW_W, sigma2, x[i], x[i]))


@jit
def share_scale(scales: Floats, codes: Bytes, build: Build) -> Any:
    """Express 8 scales as multiples 0..63 of one, and return it. A negative scale wraps and becomes 63."""
    largest = ZERO
    for j in range(SUBS):
        if scales[j] > largest:
            largest = scales[j]
    inverse = LARGEST / largest if largest > ZERO else ZERO
    for j in range(SUBS):
        codes[j] = min(63, nearest_product(build.ROW_NISC, inverse, scales[j]) & 255)
    return largest / LARGEST


@jit
def store_scales(d: Any, dmin: Any, scales: Bytes, mins: Bytes, block: Bytes) -> None:
    """Write the first 16 bytes of a block."""
    half = encode_half(d)
    block[0], block[1] = half & 255, half >> 8
    half = encode_half(dmin)
    block[2], block[3] = half & 255, half >> 8
    pack_scales(scales, mins, block)


@jit
def round_and_pack(x: Floats, codes: Bytes, block: Bytes) -> None:
    """Round each weight anew under the stored scales and pack; a scale of 0 keeps the codes of the search."""
    for j in range(SUBS):
        step, offset = scale_sub(block, j)
        if step != ZERO:
            for i in range(j * SUB, (j + 1) * SUB):
                codes[i] = round_code((x[i] + offset) / step, 0, 15)
    for k in range(4):
        for i in range(SUB):
            block[QS + k * SUB + i] = int(codes[k * 2 * SUB + i]) | int(codes[(k * 2 + 1) * SUB + i]) << 4


@jit
def quantize_block(
    x: Floats, imatrix: Floats, block: Bytes, codes: Bytes, weights: Floats, build: Build
) -> None:
    """Encode one block. x : [256]; imatrix : [256] or [0]: none; codes and weights [256] are scratch."""
    trial = np.empty(SUB, np.uint8)
    fitted, lows, sums = np.empty(SUBS, np.float32), np.empty(SUBS, np.float32), np.empty(SUBS, np.float32)
    scales, mins = np.empty(SUBS, np.uint8), np.empty(SUBS, np.uint8)
    weighted = imatrix.size > 0
    if weighted:
        weigh_by_imatrix(x, imatrix, weights, build)
        start, step, steps = IMATRIX_START, IMATRIX_STEP, IMATRIX_STEPS
    else:
        weigh_plain(x, weights, build)
        start, step, steps = PLAIN_START, PLAIN_STEP, PLAIN_STEPS
    for j in range(SUBS):
        at, end = j * SUB, (j + 1) * SUB
        sums[j] = ZERO
        for i in range(at, end):
            sums[j] += weights[i]
        fitted[j], lows[j] = fit_scale_min(
            x[at:end], weights[at:end], 15, start, step, steps, codes[at:end], trial, build
        )
    if weighted:
        d = fit_positive(fitted, sums, 63, scales, build)
        dmin = fit_positive(lows, sums, 63, mins, build)
    else:
        d, dmin = share_scale(fitted, scales, build), share_scale(lows, mins, build)
    store_scales(d, dmin, scales, mins, block)
    round_and_pack(x, codes, block)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*144] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*144] uint8, written
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
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [144] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far = 0, 0
    for j in range(SUBS):
        step, offset = scale_sub(block, j)
        if step == ZERO:
            continue
        for i in range(SUB):
            code = round_code((x[j * SUB + i] + offset) / step, 0, 15)
            stored = int(block[QS + j // 2 * SUB + i]) >> j % 2 * 4 & 15
            distance = abs(stored - code)
            off += distance != 0
            far = max(far, distance)
    return off, far


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in code steps
    """
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group)
