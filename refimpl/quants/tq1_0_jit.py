"""TQ1_0 for kernels: the twin of tq1_0.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.jit import jit
from refimpl.quants.formats import TQ1_0
from refimpl.quants.ternary_jit import count_apart, round_codes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = TQ1_0.weights, TQ1_0.block.itemsize
QH, D = TQ1_0.offset("qh"), TQ1_0.offset("d")


@jit
def unpack_digit(byte: Any, power: int) -> Any:
    """Read the digit that 3^k, power, brings to the top of a byte."""
    return (int(byte) * power & 255) * 3 >> 8


@jit
def unpack_codes(block: Bytes, codes: Bytes) -> None:
    """Unpack one block's codes. block : [54] uint8; codes : [256] uint8, written."""
    power = 1
    for k in range(5):
        for j in range(32):
            codes[32 * k + j] = unpack_digit(block[j], power)
        for j in range(16):
            codes[160 + 16 * k + j] = unpack_digit(block[32 + j], power)
        if k < 4:
            for j in range(4):
                codes[240 + 4 * k + j] = unpack_digit(block[QH + j], power)
        power *= 3


@jit
def pack_digits(codes: Bytes, first: int, stride: int, digits: int) -> Any:
    """Pack five digits, the last of which may be missing, into a byte."""
    number = 0
    for k in range(5):
        number = number * 3 + (int(codes[first + k * stride]) if k < digits else 0)
    return (number * 256 + 242) // 243


@jit
def pack_codes(codes: Bytes, block: Bytes) -> None:
    """Pack one block's codes. codes : [256] uint8 in 0..2; qs and qh of block written."""
    for j in range(32):
        block[j] = pack_digits(codes, j, 32, 5)
    for j in range(16):
        block[32 + j] = pack_digits(codes, 160 + j, 16, 5)
    for j in range(4):
        block[QH + j] = pack_digits(codes, 240 + j, 4, 4)


@jit
def read_d(block: Bytes) -> Any:
    """Read d of one block."""
    return decode_half(int(block[D]) | int(block[D + 1]) << 8)


@jit
def dequantize_block(block: Bytes, codes: Bytes, y: Floats) -> None:
    """Decode one block. block : [54] uint8; codes : [256] uint8, scratch; y : [256] float32, written."""
    unpack_codes(block, codes)
    d = read_d(block)
    for i in range(WEIGHTS):
        y[i] = np.float32(int(codes[i]) - 1) * d


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*54] uint8; out : [R, n] float32, written."""
    codes = np.empty(WEIGHTS, np.uint8)
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], codes, y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows. x : [R, n] float32; the imatrix is ignored; out : [R, n/256*54] uint8, written."""
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
            off[r, b], far[r, b] = count_apart(codes, group, read_d(block), 2)
