"""Q8_0 for kernels: the twin of q8_0.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half, round_half_away, truncate
from refimpl.arith.jit import jit
from refimpl.quants.formats import Q8_0

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = Q8_0.weights, Q8_0.block.itemsize
QS = Q8_0.offset("qs")
ZERO, ONE, LARGEST = np.float32(0), np.float32(1), np.float32(127)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [34] uint8; y : [32] float32, written."""
    d = decode_half(int(block[0]) | int(block[1]) << 8)
    for i in range(WEIGHTS):
        code = int(block[QS + i])
        y[i] = d * np.float32(code - (code & 128) * 2)


@jit
def choose_step(x: Floats) -> Any:
    """Take max|x| / 127 of one block, and its inverse; 0 has the inverse 0."""
    largest = ZERO
    for i in range(WEIGHTS):
        largest = max(largest, abs(x[i]))
    d = largest / LARGEST
    return d, (ONE / d if d != ZERO else ZERO)


@jit
def round_code(v: Any, inverse: Any) -> Any:
    """Round to a code in -127..127, as the byte 0..255 that holds it."""
    return truncate(round_half_away(v * inverse)) & 255


@jit
def quantize_block(x: Floats, block: Bytes) -> None:
    """Encode one block. x : [32] float32; block : [34] uint8, written."""
    d, inverse = choose_step(x)
    half = encode_half(d)
    block[0], block[1] = half & 255, half >> 8
    for i in range(WEIGHTS):
        block[QS + i] = round_code(x[i], inverse)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/32*34] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows. x : [R, n] float32; the imatrix is ignored; out : [R, n/32*34] uint8, written."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            quantize_block(x[r, b * WEIGHTS : (b + 1) * WEIGHTS], out[r, b * BYTES : (b + 1) * BYTES])


@jit
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [34] uint8; x : [32] float32; return : codes off, largest distance."""
    off, far = 0, 0
    _, inverse = choose_step(x)
    for i in range(x.size):
        stored, code = int(block[QS + i]), round_code(x[i], inverse)
        distance = abs(stored - (stored & 128) * 2 - (code - (code & 128) * 2))
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
