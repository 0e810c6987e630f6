"""Q5_1 for kernels: the twin of q5_1.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.jit import jit
from refimpl.quants.formats import Q5_1
from refimpl.quants.lines_jit import check_lines
from refimpl.quants.q4_1_jit import round_plain
from refimpl.quants.q5_0_jit import pack_codes, unpack_codes, weigh_row
from refimpl.quants.search_jit import fit_scale_min

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES, TOP = Q5_1.weights, Q5_1.block.itemsize, 31
AS_Q5_0 = Q5_1.offset("m")  # from here on qh and qs lie as in a Q5_0 block
START, STEP, STEPS = np.float32(-0.9), np.float32(0.05), 36


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [24] uint8; codes : [32] uint8, scratch; y : [32] float32, written."""
    d = decode_half(int(block[0]) | int(block[1]) << 8)
    m = decode_half(int(block[2]) | int(block[3]) << 8)
    unpack_codes(block[AS_Q5_0:BYTES], codes)
    for i in range(WEIGHTS):
        y[i] = d * np.float32(codes[i]) + m


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/32*24] uint8; out : [R, n] float32, written."""
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
    out     : [R, n/32*24] uint8, written
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
            pack_codes(codes, block[AS_Q5_0:BYTES])


@jit
def check_block(block: Bytes, x: Floats, stored: Bytes, codes: Bytes) -> Any:
    """Check one block. block : [24] uint8; x : [32] float32; return : codes off, largest distance."""
    unpack_codes(block[AS_Q5_0:BYTES], stored)
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
