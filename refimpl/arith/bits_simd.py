"""Passes over sources on explicit vectors: the results of bits_jit at the speed of memory."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import fill, maximum
from refimpl.arith.simd_lanes import as_float32, mask_bits, reinterpret
from refimpl.arith.simd_memory import get, load, prefetch, store

STRETCH = 4096  # elements between two looks at the largest so far
SIZE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
BF16_SIZE, BF16_INFINITY = np.uint16(0x7FFF), np.uint16(0x7F80)


@jit
def find_not_finite(x: NDArray[np.float32]) -> int:
    """Find the first NaN or infinity among [N] float32, or -1."""
    whole = x.size // 32 * 32
    for start in range(0, whole, STRETCH):
        largest = fill(np.uint32(0), 32)
        for i in range(start, min(start + STRETCH, whole), 32):
            largest = maximum(largest, reinterpret(load(x, i, 32), np.uint32) & SIZE)
        if mask_bits(largest >= INFINITY):
            whole = start
            break
    for i in range(whole, x.size):
        if not np.isfinite(get(x, i)):
            return i
    return -1


@jit
def widen_bf16s(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> int:
    """Widen [N] bf16 bits to [N] float32; find the first NaN or infinity among them, or -1."""
    whole = bits.size // 32 * 32
    largest = fill(np.uint16(0), 32)
    for i in range(0, whole, 32):
        prefetch(bits, i + 2048)
        v = load(bits, i, 32)
        store(out, i, as_float32(v))
        largest = maximum(largest, v & BF16_SIZE)
    last = fill(np.uint16(0), 1)
    for i in range(whole, bits.size):
        one = load(bits, i, 1)
        store(out, i, as_float32(one))
        last = maximum(last, one & BF16_SIZE)
    if mask_bits(largest >= BF16_INFINITY) | mask_bits(last >= BF16_INFINITY):
        return int(find_not_finite(out))
    return -1
