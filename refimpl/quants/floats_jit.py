"""F16 and BF16 for kernels: the twin of floats.py (F32 is a copy and needs no kernel)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_bf16, decode_half, encode_bf16, encode_half
from refimpl.arith.jit import jit


@jit
def encode_halves(x: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round [R, n] float32 to fp16 bits [R, n]."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[r, i] = encode_half(x[r, i])


@jit
def encode_bf16s(x: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round [R, n] float32 to bf16 bits [R, n]."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[r, i] = encode_bf16(x[r, i])


@jit
def decode_halves(bits: NDArray[np.uint16], out: NDArray[Any]) -> None:
    """Widen fp16 bits [R, n] to float32 [R, n]."""
    for r in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            out[r, i] = decode_half(bits[r, i])


@jit
def decode_bf16s(bits: NDArray[np.uint16], out: NDArray[Any]) -> None:
    """Widen bf16 bits [R, n] to float32 [R, n]."""
    for r in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            out[r, i] = decode_bf16(bits[r, i])
