"""Q1_0 for kernels: the twin of q1_0.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import Q1_0

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q1_0.weights, Q1_0.block.itemsize
QS = Q1_0.offset("qs")
ZERO = np.float32(0)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [18] uint8; y : [128] float32, written."""
    d = decode_half(int(block[0]) | int(block[1]) << 8)
    for i in range(WEIGHTS):
        y[i] = d if int(block[QS + i // 8]) >> i % 8 & 1 else -d


@jit
def quantize_block(x: Floats, block: Bytes) -> None:
    """Encode one block. x : [128] float32; block : [18] uint8, written."""
    total = ZERO
    for i in range(WEIGHTS):
        total += abs(x[i])
    half = encode_half(total / np.float32(WEIGHTS))
    block[0], block[1] = half & 255, half >> 8
    for j in range(WEIGHTS // 8):
        bits = 0
        for k in range(8):
            bits |= int(x[8 * j + k] >= ZERO) << k
        block[QS + j] = bits


@jit
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [18] uint8; x : [128] float32; return : bits off, 1 where there are any."""
    off = 0
    for i in range(WEIGHTS):
        off += (int(block[QS + i // 8]) >> i % 8 & 1) != int(x[i] >= ZERO)
    return off, min(off, 1)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/128*18] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows. x : [R, n] float32; the imatrix is ignored; out : [R, n/128*18] uint8, written."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            quantize_block(x[r, b * WEIGHTS : (b + 1) * WEIGHTS], out[r, b * BYTES : (b + 1) * BYTES])


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in codes
    """
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group)
