"""Q4_0 for kernels: the twin of q4_0.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half, truncate
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.jit import jit
from refimpl.arith.simd_fused import add_product
from refimpl.quants.formats import Q4_0
from refimpl.quants.q5_0_jit import weigh_row
from refimpl.quants.rounding_jit import check_trials
from refimpl.quants.search_jit import find_peak, fit_scale

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q4_0.weights, Q4_0.block.itemsize
QS, HALF = Q4_0.offset("qs"), WEIGHTS // 2
ZERO, ONE, TOP, MIDDLE = np.float32(0), np.float32(1), np.float32(-8), np.float32(8.5)


@jit
def unpack_nibbles(qs: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. qs : [16] uint8; codes : [32] uint8, written."""
    for j in range(HALF):
        codes[j] = int(qs[j]) & 15
        codes[HALF + j] = int(qs[j]) >> 4


@jit
def pack_nibbles(codes: Bytes, qs: Bytes) -> None:
    """Pack one block's codes. codes : [32] uint8 in 0..15; qs : [16] uint8, written."""
    for j in range(HALF):
        qs[j] = int(codes[j]) | int(codes[HALF + j]) << 4


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [18] uint8; codes : [32] uint8, scratch; y : [32] float32, written."""
    d = decode_half(int(block[0]) | int(block[1]) << 8)
    unpack_nibbles(block[QS:BYTES], codes)
    for i in range(WEIGHTS):
        y[i] = d * np.float32(int(codes[i]) - 8)


@jit
def round_plain(x: Floats, codes: Bytes, build: Build) -> Any:
    """Round one block under 1/d, as the encoder without an imatrix does; return d."""
    d = find_peak(x) / TOP
    inverse = ONE / d if d != ZERO else ZERO
    for i in range(WEIGHTS):
        codes[i] = min(truncate(add_product(build.REF_RND, MIDDLE, x[i], inverse)) & 255, 15)
    return d


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/32*18] uint8; out : [R, n] float32, written."""
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
    out     : [R, n/32*18] uint8, written
    """
    codes, weights = np.empty(WEIGHTS, np.uint8), np.empty(x.shape[1], np.float32)
    for r in range(x.shape[0]):
        if imatrix.shape[0] > 0:
            weigh_row(x[r], imatrix[r // rows_per_expert], weights, build)
        for b in range(x.shape[1] // WEIGHTS):
            group = x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            if imatrix.shape[0] > 0:
                d = fit_scale(group, weights[b * WEIGHTS : (b + 1) * WEIGHTS], 8, codes, build)
            else:
                d = round_plain(group, codes, build)
            block = out[r, b * BYTES : (b + 1) * BYTES]
            half = encode_half(d)
            block[0], block[1] = half & 255, half >> 8
            pack_nibbles(codes, block[QS:BYTES])


@jit
def check_block(block: Bytes, x: Floats, stored: Bytes, codes: Bytes) -> Any:
    """Check one block. block : [18] uint8; x : [32] float32; return : codes off, largest distance."""
    if decode_half(int(block[0]) | int(block[1]) << 8) == ZERO:
        return 0, 0
    unpack_nibbles(block[QS:BYTES], stored)
    d = round_plain(x, codes, STRICT)
    return check_trials(stored, x, 8, d, codes)


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
