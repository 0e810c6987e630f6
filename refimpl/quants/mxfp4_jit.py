"""MXFP4 for kernels: the twin of mxfp4.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_e8m0_half, floor_log2
from refimpl.arith.jit import jit
from refimpl.quants.formats import MXFP4
from refimpl.quants.fp4_jit import count_apart, decode, round_and_pack

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = MXFP4.weights, MXFP4.block.itemsize
E, QS = MXFP4.offset("e"), MXFP4.offset("qs")
ZERO = np.float32(0)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [17] uint8; y : [32] float32, written."""
    decode(block[QS:], decode_e8m0_half(block[E]), y)


@jit
def quantize_block(x: Floats, block: Bytes) -> None:
    """Encode one block. x : [32] float32; block : [17] uint8, written."""
    peak = ZERO
    for i in range(WEIGHTS):
        peak = max(peak, abs(x[i]))
    e = floor_log2(peak) + 125 & 255 if peak > ZERO else 0
    block[E] = e
    round_and_pack(x, decode_e8m0_half(e), block[QS:])


@jit
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [17] uint8; x : [32] float32; return : codes off, largest distance."""
    return count_apart(block[QS:], x, decode_e8m0_half(block[E]))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/32*17] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows. x : [R, n] float32; the imatrix is ignored; out : [R, n/32*17] uint8, written."""
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
