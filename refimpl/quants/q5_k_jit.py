"""Q5_K for kernels: the twin of q5_k.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.quants.formats import Q5_K
from refimpl.quants.q4_k_jit import scale_sub, share_scale, store_scales, weigh_by_imatrix, weigh_plain
from refimpl.quants.search_jit import fit_positive, fit_scale_min, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q5_K.weights, Q5_K.block.itemsize
QH, QS = Q5_K.offset("qh"), Q5_K.offset("qs")
SUBS, SUB, TOP = 8, 32, 31
ZERO = np.float32(0)
PLAIN_START, PLAIN_STEP, PLAIN_STEPS = np.float32(-0.5), np.float32(0.1), 15
IMATRIX_START, IMATRIX_STEP, IMATRIX_STEPS = np.float32(-0.9), np.float32(0.05), 36


@jit
def unpack_codes(block: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. block : [176] uint8; codes : [256] uint8 in 0..31, written."""
    for j in range(SUBS):
        pairs = block[QS + j // 2 * SUB : QS + j // 2 * SUB + SUB]
        for i in range(SUB):
            codes[j * SUB + i] = int(pairs[i]) >> j % 2 * 4 & 15 | (int(block[QH + i]) >> j & 1) << 4


@jit
def pack_codes(codes: Bytes, block: Bytes) -> None:
    """Pack one block's codes. codes : [256] uint8 in 0..31; qh and qs of block written."""
    for i in range(SUB):
        fifth = 0
        for j in range(SUBS):
            fifth |= int(codes[j * SUB + i]) >> 4 << j
        block[QH + i] = fifth
        for k in range(4):
            low, high = int(codes[2 * k * SUB + i]) & 15, int(codes[(2 * k + 1) * SUB + i]) & 15
            block[QS + k * SUB + i] = low | high << 4


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [176] uint8; codes : [256] uint8, scratch; y : [256] float32, written."""
    unpack_codes(block, codes)
    for j in range(SUBS):
        step, offset = scale_sub(block, j)
        for i in range(j * SUB, (j + 1) * SUB):
            y[i] = step * np.float32(codes[i]) - offset


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
            x[at:end], weights[at:end], TOP, start, step, steps, codes[at:end], trial, build
        )
    if weighted:
        d = fit_positive(fitted, sums, 63, scales, build)
        dmin = fit_positive(lows, sums, 63, mins, build)
        for j in range(SUBS):
            scales[j], mins[j] = min(63, int(scales[j])), min(63, int(mins[j]))
    else:
        d, dmin = share_scale(fitted, scales, build), share_scale(lows, mins, build)
    store_scales(d, dmin, scales, mins, block)
    for j in range(SUBS):
        size, offset = scale_sub(block, j)
        if size != ZERO:
            for i in range(j * SUB, (j + 1) * SUB):
                codes[i] = round_code((x[i] + offset) / size, 0, TOP)
    pack_codes(codes, block)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*176] uint8; out : [R, n] float32, written."""
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
    out     : [R, n/256*176] uint8, written
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
    """Check one block. block : [176] uint8; x : [256] float32; return : codes off, largest distance."""
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
