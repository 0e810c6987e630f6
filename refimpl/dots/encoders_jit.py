"""Activations for kernels: the twin of encoders.py. Each encoder takes x [t, n] and writes out [t, bytes] uint8."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import encode_half, nearest_int, truncate
from refimpl.arith.jit import jit
from refimpl.quants.formats import Q8_0, Q8_1, Q8_K
from refimpl.quants.q8_0_jit import choose_step, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUB, BLOCK, GROUP = Q8_0.weights, Q8_K.weights, 16
SIZE_0, SIZE_1, SIZE_K = Q8_0.block.itemsize, Q8_1.block.itemsize, Q8_K.block.itemsize
QS_0, QS_1, QS_K = Q8_0.offset("qs"), Q8_1.offset("qs"), Q8_K.offset("qs")
S, BSUMS = Q8_1.offset("s"), Q8_K.offset("bsums")
ZERO, ONE, LARGEST = np.float32(0), np.float32(1), np.float32(127)


@jit
def put_half(block: Bytes, at: int, v: Any) -> None:
    """Round to fp16 and store."""
    half = encode_half(v)
    block[at], block[at + 1] = half & 255, half >> 8


@jit
def wrap(v: Any) -> Any:
    """The int32 that the low 32 bits of an integer are."""
    v &= 0xFFFFFFFF
    return v - (v >> 31 << 32)


@jit
def encode_block(x: Floats, avx2: bool, block: Bytes, qs: int) -> Any:
    """Write the codes of 32 activations at block[qs]. Returns d and the sum of the codes."""
    total = 0
    if avx2:
        largest = ZERO
        for i in range(SUB):
            largest = max(largest, abs(x[i]))
        d = largest / LARGEST
        inverse = LARGEST / largest if largest != ZERO else ZERO
        for i in range(SUB):
            code = truncate(np.rint(x[i] * inverse))
            total += code
            block[qs + i] = max(-128, min(127, code)) & 255
    else:
        d, inverse = choose_step(x)
        for i in range(SUB):
            code = round_code(x[i], inverse)
            total += code - (code & 128) * 2
            block[qs + i] = code
    return d, wrap(total)


@jit
def encode_small(x: Floats, size: int, qs: int, avx2: bool, out: Bytes) -> None:
    """Encode to Q8_0, or to Q8_1 where there is room for s before the codes."""
    for t in range(x.shape[0]):
        for b in range(x.shape[1] // SUB):
            block = out[t, b * size : (b + 1) * size]
            d, total = encode_block(x[t, b * SUB : (b + 1) * SUB], avx2, block, qs)
            put_half(block, 0, d)
            if qs > S:
                put_half(block, S, np.float32(total) * d)


@jit
def encode_q8_0(x: Floats, out: Bytes) -> None:
    encode_small(x, SIZE_0, QS_0, False, out)


@jit
def encode_q8_1(x: Floats, out: Bytes) -> None:
    encode_small(x, SIZE_1, QS_1, False, out)


@jit
def encode_q8_0_avx2(x: Floats, out: Bytes) -> None:
    encode_small(x, SIZE_0, QS_0, True, out)


@jit
def encode_q8_1_avx2(x: Floats, out: Bytes) -> None:
    encode_small(x, SIZE_1, QS_1, True, out)


@jit
def encode_q8_k(x: Floats, out: Bytes) -> None:
    for t in range(x.shape[0]):
        for b in range(x.shape[1] // BLOCK):
            encode_q8_k_block(x[t, b * BLOCK : (b + 1) * BLOCK], out[t, b * SIZE_K : (b + 1) * SIZE_K])


@jit
def encode_q8_k_block(x: Floats, block: Bytes) -> None:
    """Encode 256 activations. block : [292] uint8, written."""
    most, signed = ZERO, ZERO
    for i in range(BLOCK):
        if abs(x[i]) > most:
            most, signed = abs(x[i]), x[i]
    if most == ZERO:
        block[:] = 0
        return
    scale = -LARGEST / signed
    put_float(block, 0, ONE / scale)
    for g in range(BLOCK // GROUP):
        total = 0
        for i in range(g * GROUP, (g + 1) * GROUP):
            code = min(127, nearest_int(scale * x[i])) & 255
            block[QS_K + i] = code
            total += code - (code & 128) * 2
        block[BSUMS + 2 * g], block[BSUMS + 2 * g + 1] = total & 255, total >> 8 & 255


@jit
def put_float(block: Bytes, at: int, v: Any) -> None:
    """Store a float32."""
    bits = int(np.float32(v).view(np.uint32))
    for k in range(4):
        block[at + k] = bits >> 8 * k & 255
