"""IQ4_NL for kernels: the twin of iq4_nl.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ4_NL
from refimpl.quants.iq4_jit import (
    count_apart,
    decode,
    fit_scale,
    round_and_pack,
    weigh_by_imatrix,
    weigh_plain,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ4_NL.weights, IQ4_NL.block.itemsize
QS = IQ4_NL.offset("qs")
ZERO, ONE = np.float32(0), np.float32(1)


@jit
def read_step(block: Bytes) -> Any:
    """Read d of one block."""
    return decode_half(int(block[0]) | int(block[1]) << 8)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [18] uint8; y : [32] float32, written."""
    decode(block[QS:], read_step(block), y)


@jit
def quantize_block(x: Floats, weights: Floats, block: Bytes, build: Build) -> None:
    """Encode one block. x, weights : [32] float32; block : [18] uint8, written."""
    scale = fit_scale(x, weights, build)
    half = encode_half(scale)
    block[0], block[1] = half & 255, half >> 8
    round_and_pack(x, ONE / scale if scale != ZERO else ZERO, block[QS:])


@jit
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [18] uint8; x : [32] float32; return : codes off, largest distance."""
    return count_apart(block[QS:], x, read_step(block), ONE)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/32*18] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/32*18] uint8, written
    """
    weights = np.empty(WEIGHTS, np.float32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            part = slice(b * WEIGHTS, (b + 1) * WEIGHTS)
            if imatrix.shape[0] > 0:
                weigh_by_imatrix(x[r, part], imatrix[r // rows_per_expert, part], weights, build)
            else:
                weigh_plain(x[r, part], weights)
            quantize_block(x[r, part], weights, out[r, b * BYTES : (b + 1) * BYTES], build)


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in codes
    """
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group)
