"""TQ2_0 for kernels: the twin of tq2_0.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import TQ2_0
from refimpl.quants.ternary_jit import count_apart, round_codes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = TQ2_0.weights, TQ2_0.block.itemsize
D = TQ2_0.offset("d")


@jit
def unpack_codes(block: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. block : [66] uint8; codes : [256] uint8, written."""
    for i in range(WEIGHTS):
        codes[i] = int(block[i // 128 * 32 + i % 32]) >> i // 32 % 4 * 2 & 3


@jit
def pack_codes(codes: Bytes, block: Bytes) -> None:
    """Pack one block's codes. codes : [256] uint8; qs of block written."""
    for j in range(64):
        i = j // 32 * 128 + j % 32
        low, high = int(codes[i]) | int(codes[i + 32]) << 2, int(codes[i + 64]) | int(codes[i + 96]) << 2
        block[j] = low | high << 4


@jit
def read_d(block: Bytes) -> Any:
    """Read d of one block."""
    return decode_half(int(block[D]) | int(block[D + 1]) << 8)


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [66] uint8; codes : [256] uint8, scratch; y : [256] float32, written."""
    unpack_codes(block, codes)
    d = read_d(block)
    for i in range(WEIGHTS):
        y[i] = np.float32(int(codes[i]) - 1) * d


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*66] uint8; out : [R, n] float32, written."""
    codes = np.empty(WEIGHTS, np.uint8)
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], codes, y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows. x : [R, n] float32; the imatrix is ignored; out : [R, n/256*66] uint8, written."""
    codes = np.empty(WEIGHTS, np.uint8)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            block = out[r, b * BYTES : (b + 1) * BYTES]
            half = encode_half(round_codes(x[r, b * WEIGHTS : (b + 1) * WEIGHTS], 1, codes))
            block[D], block[D + 1] = half & 255, half >> 8
            pack_codes(codes, block)


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in code steps
    """
    codes = np.empty(WEIGHTS, np.uint8)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            unpack_codes(block, codes)
            off[r, b], far[r, b] = count_apart(codes, group, read_d(block), 3)
