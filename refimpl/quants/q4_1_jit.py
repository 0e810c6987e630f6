"""Q4_1 for kernels: the twin of q4_1.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half, truncate
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import add_product
from refimpl.quants.formats import Q4_1
from refimpl.quants.lines_jit import check_lines
from refimpl.quants.q4_0_jit import pack_nibbles, unpack_nibbles
from refimpl.quants.q5_0_jit import weigh_row
from refimpl.quants.search_jit import fit_scale_min

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES, QS, TOP = Q4_1.weights, Q4_1.block.itemsize, Q4_1.offset("qs"), 15
START, STEP, STEPS = np.float32(-0.9), np.float32(0.05), 36
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [20] uint8; codes : [32] uint8, scratch; y : [32] float32, written."""
    d = decode_half(int(block[0]) | int(block[1]) << 8)
    m = decode_half(int(block[2]) | int(block[3]) << 8)
    unpack_nibbles(block[QS:BYTES], codes)
    for i in range(WEIGHTS):
        y[i] = d * np.float32(codes[i]) + m


@jit
def round_plain(x: Floats, top: int, codes: Bytes, build: Build) -> Any:
    """Round one block under 1/d, as the encoder without an imatrix does; return d and m."""
    low, high = x[0], x[0]
    for i in range(1, WEIGHTS):
        if x[i] < low:
            low = x[i]
        if x[i] > high:
            high = x[i]
    d = (high - low) / np.float32(top)
    inverse = ONE / d if d != ZERO else ZERO
    for i in range(WEIGHTS):
        codes[i] = truncate(add_product(build.REF_RND, HALF, x[i] - low, inverse)) & 255
    return d, low


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/32*20] uint8; out : [R, n] float32, written."""
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
    out     : [R, n/32*20] uint8, written
    """
    codes, trial = np.empty(WEIGHTS, np.uint8), np.empty(WEIGHTS, np.uint8)
    weights = np.empty(x.shape[1], np.float32)
    for r in range(x.shape[0]):
        if imatrix.shape[0] > 0:
            weigh_row(x[r], imatrix[r // rows_per_expert], weights, build)
        for b in range(x.shape[1] // WEIGHTS):
            at, end = b * WEIGHTS, (b + 1) * WEIGHTS
            if imatrix.shape[0] > 0:
                d, low = fit_scale_min(
                    x[r, at:end], weights[at:end], TOP, START, STEP, STEPS, codes, trial, build
                )
                m = -low
            else:
                d, m = round_plain(x[r, at:end], TOP, codes, build)
            block = out[r, b * BYTES : (b + 1) * BYTES]
            half = encode_half(d)
            block[0], block[1] = half & 255, half >> 8
            half = encode_half(m)
            block[2], block[3] = half & 255, half >> 8
            pack_nibbles(codes, block[QS:BYTES])


@jit
def check_block(block: Bytes, x: Floats, stored: Bytes, codes: Bytes) -> Any:
    """Check one block. block : [20] uint8; x : [32] float32; return : codes off, largest distance."""
    unpack_nibbles(block[QS:BYTES], stored)
    d, m = round_plain(x, TOP, codes, STRICT)
    return check_lines(block, stored, x, TOP, d, m, codes)


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in code steps
    """
    stored, codes = np.empty(WEIGHTS, np.uint8), np.empty(WEIGHTS, np.uint8)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group, stored, codes)
