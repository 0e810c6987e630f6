"""Bits of small floats, by integers alone: the twin of bits.py for kernels.

Integers are Python's (int64 when compiled), masked before they are stored, so that the interpreted kernels
compute the same.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit

MAGIC = np.float32(12582912)
INT_MIN = -(2**31)
LOW = np.float32(INT_MIN)
HIGH = np.float32(2**31)
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
SUBNORMAL_STEP = np.float32(2.0**-24)
SMALLEST, TWO_64 = np.float32(2.0**-126), np.float32(2.0**64)  # the smallest normal number
LAST = (0, 1, 2, 5, 11, 22, 44, 88)  # 2^j ln 2
TINY_STEP, TINY_SCALE = np.float32(2.0**-10), np.float32(512)


@jit
def encode_half(x: Any) -> Any:
    """Round a float32 to fp16 bits, ties to even; every NaN is 0xFE00."""
    bits = int(np.float32(x).view(np.uint32))
    sign, size = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if size > 0x7F800000:
        return 0xFE00
    if size >= 0x477FF000:  # 65520: half a step above the largest
        return sign | 0x7C00
    if size >= 0x38800000:  # 2^-14: the smallest normal; 13 bits fall away, the exponent's bias drops by 112
        size -= 112 << 23
        return sign | (size + 0xFFF + (size >> 13 & 1)) >> 13
    exponent = size >> 23
    if exponent < 102:  # below 2^-25: half a subnormal step
        return sign
    value = size & 0x7FFFFF | 0x800000
    shift = 126 - exponent  # 14 to 24 bits fall away
    kept, rest, tie = value >> shift, value & ((1 << shift) - 1), 1 << (shift - 1)
    if rest > tie or (rest == tie and kept & 1):
        kept += 1
    return sign | kept


@jit
def decode_half(half: Any) -> Any:
    """Widen fp16 bits to a float32, exactly."""
    bits = int(half)
    sign, exponent, fraction = bits >> 15 << 31, bits >> 10 & 31, bits & 0x3FF
    if exponent == 0:
        value = np.float32(fraction) * SUBNORMAL_STEP
        return -value if sign else value
    raised = 255 if exponent == 31 else exponent + 112
    return np.uint32(sign | raised << 23 | fraction << 13).view(np.float32)


@jit
def encode_bf16(x: Any) -> Any:
    """Round a float32 to bf16 bits, ties to even."""
    bits = int(np.float32(x).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


@jit
def decode_bf16(bits: Any) -> Any:
    """Widen bf16 bits to a float32, exactly."""
    return np.uint32(int(bits) << 16).view(np.float32)


@jit
def decode_e8m0_half(e: Any) -> Any:
    """Read an e8m0 byte, halved: 2^(e - 128)."""
    code = int(e)
    bits = 0x200000 << code if code < 2 else code - 1 << 23
    return np.uint32(bits).view(np.float32)


@jit
def floor_log2(x: Any) -> Any:
    """Floor the float32 logarithm of x > 0: floor(log2f(x)).

    A logarithm is rounded up to an integer `up` where x is up to LAST[j] units of its last place below 2^up:
    log2(2^up - gap) = up - gap/ln 2, and half a step of float32 there is 2^j.
    """
    tiny = x < SMALLEST
    bits = int(np.float32(x * TWO_64 if tiny else x).view(np.uint32))
    power = (bits >> 23) - (127 + 64 if tiny else 127)
    up, gap = power + 1, 0x800000 - (bits & 0x7FFFFF)
    if up == 0 or gap > 88:
        return power
    size, j = (up - 1 if up > 0 else -up), 0
    while size >= 2:
        size >>= 1
        j += 1
    return up if gap <= int(LAST[j]) else power


@jit
def decode_ue4m3(byte: Any) -> Any:
    """Read a ue4m3 byte, halved."""
    code = int(byte)
    if code == 0x7F:
        return ZERO
    e, m = code >> 3 & 15, code & 7
    if e == 0:
        return np.float32(m) * TINY_STEP
    return np.uint32((e + 119) << 23 | m << 20).view(np.float32)


@jit
def encode_ue4m3(x: Any) -> Any:
    """Round to ue4m3, ties up; 0 for what is not above 0."""
    if not x > ZERO:
        return 0
    bits = int(np.float32(x).view(np.uint32))
    if bits >> 23 >= 127 + 8:
        return 0x7E
    if bits >> 23 < 121:
        return min(7, truncate(x * TINY_SCALE + HALF))
    return min(0x7E, (bits + (1 << 19) >> 20) - (120 << 3))


@jit
def nearest_int(x: Any) -> Any:
    """Round to the nearest integer as ggml does: wraps beyond 2^22, 0 for NaN."""
    return (int(np.float32(x + MAGIC).view(np.int32)) & 0x7FFFFF) - 0x400000


@jit
def truncate(x: Any) -> Any:
    """Convert to int32 as x86's cvttss2si does: INT_MIN for NaN and for what does not fit."""
    if x >= LOW and x < HIGH:
        return int(x)
    return INT_MIN


@jit
def round_half_away(x: Any) -> Any:
    """Round to the nearest integer, ties away from zero; a float32."""
    whole = np.float32(np.trunc(x))
    if abs(x - whole) >= HALF:
        return whole + (ONE if x > ZERO else -ONE)
    return whole


@jit
def find_not_finite(x: NDArray[np.float32]) -> int:
    """Find the first NaN or infinity among [N] float32, or -1."""
    bits = x.view(np.uint32)
    for start in range(0, bits.size, 4096):  # a maximum vectorizes, a search would not
        end = min(start + 4096, bits.size)
        largest = np.uint32(0)
        for i in range(start, end):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        if largest >= np.uint32(0x7F800000):
            for i in range(start, end):
                if bits[i] & np.uint32(0x7FFFFFFF) >= np.uint32(0x7F800000):
                    return i
    return -1


@jit
def widen_bf16s(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> int:
    """Widen [N] bf16 bits to [N] float32; find the first NaN or infinity among them, or -1."""
    wide = out.view(np.uint32)
    first = -1
    for start in range(0, bits.size, 4096):
        end = min(start + 4096, bits.size)
        largest = np.uint16(0)
        for i in range(start, end):
            wide[i] = np.uint32(bits[i]) << np.uint32(16)
            largest = max(largest, np.uint16(bits[i] & np.uint16(0x7FFF)))
        if largest >= np.uint16(0x7F80) and first < 0:
            for i in range(start, end):
                if bits[i] & np.uint16(0x7FFF) >= np.uint16(0x7F80):
                    first = i
                    break
    return first
