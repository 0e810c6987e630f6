"""Bits of small floats: fp16 and bf16 to and from float32, and C's conversions between float and integer.

NumPy's own casts are exact here (round to nearest, ties to even, subnormals kept); bits_jit.py says the same
with integers alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32

MAGIC = np.float32(12582912)  # 1.5 * 2^23: adding it leaves the nearest integer in the low 23 bits
INT_MIN = -(2**31)
NAN_HALF = 0xFE00  # what fp16 makes of the NaN that x86 arithmetic produces: its sign bit is set


def encode_half(x: Floats) -> NDArray[np.uint16]:
    """Round float32 to fp16 bits.

    x      : [...] float32
    return : [...] uint16; over 65504 + half a step is infinity, every NaN is 0xFE00

    Rounds: once, to nearest, ties to even, also among subnormals.
    Source: ggml-impl.h ggml_compute_fp32_to_fp16, llama.cpp 0c1e570.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        half = np.asarray(x).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(NAN_HALF), half)


def decode_half(half: NDArray[np.uint16]) -> Floats:
    """Widen fp16 bits to float32, exactly.

    half   : [...] uint16
    return : [...] float32
    """
    with np.errstate(invalid="ignore"):
        return half.view(np.float16).astype(np.float32)


def encode_bf16(x: Floats) -> NDArray[np.uint16]:
    """Round float32 to bf16 bits.

    x      : [...] float32, no NaN
    return : [...] uint16

    Rounds: once, to nearest, ties to even: add 0x7FFF and the lowest bit that stays, drop 16 bits.
    Source: ggml-impl.h ggml_compute_fp32_to_bf16, llama.cpp 0c1e570.
    """
    bits = np.asarray(x).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def decode_bf16(bits: NDArray[np.uint16]) -> Floats:
    """Widen bf16 bits to float32, exactly: they are its upper half.

    bits   : [...] uint16
    return : [...] float32
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode_e8m0_half(e: NDArray[np.uint8]) -> Floats:
    """Read e8m0 bytes, halved: the step of MXFP4's doubled values.

    2^(e - 128); e = 0 and 1 are subnormal, e = 255 is 2^127 (NaN in the OCP standard)

    e      : [...] uint8
    return : [...] float32

    Rounds: never.
    Source: ggml-impl.h ggml_e8m0_to_fp32_half, llama.cpp 0c1e570.
    """
    return np.ldexp(np.float32(1), e.astype(np.int32) - 128)


def floor_log2(x: Floats) -> NDArray[np.int32]:
    """Floor the float32 logarithm: floor(log2f(x)), so that what lies a hair below 2^k may give k.

    x      : [...] float32 > 0
    return : [...] int32

    Rounds: the logarithm, to float32, correctly (as glibc's log2f does near powers of two).
    """
    return np.floor(np.log2(x.astype(np.float64)).astype(np.float32)).astype(np.int32)


def decode_ue4m3(byte: NDArray[np.uint8]) -> Floats:
    """Read ue4m3 bytes (fp8 without its sign), halved: the step of NVFP4's doubled values.

    (1 + m/8) * 2^(e - 8), for e = 0 m * 2^-10; 0x7F is 0 (NaN in the standard); the upper bit is not looked at

    byte   : [...] uint8
    return : [...] float32

    Rounds: never.
    Source: ggml-impl.h ggml_ue4m3_to_fp32, llama.cpp 0c1e570.
    """
    e, m = (byte >> 3 & 15).astype(np.int32), (byte & 7).astype(np.float32)
    value = np.where(e > 0, np.ldexp(np.float32(1) + m / np.float32(8), e - 8), m * np.float32(2.0**-10))
    return np.where(byte == 0x7F, np.float32(0), value)


def encode_ue4m3(x: Floats) -> NDArray[np.int32]:
    """Round float32 to ue4m3, ties up; 0 for what is not above 0.

    From 256 on everything is 0x7E (448). Below 2^-6 the code is x * 512 + 0.5 cut off, at most 7: what would
    round up to the smallest normal number stays below it.

    x      : [...] float32
    return : [...] int32 in 0..0x7E

    Rounds: x * 512 + 0.5, to float32.
    Source: ggml-impl.h ggml_fp32_to_ue4m3, llama.cpp 0c1e570.
    """
    bits = np.minimum(x, np.float32(448)).view(np.int32)
    normal = (bits + (1 << 19) >> 20) - (120 << 3)  # a carry out of the fraction goes into the exponent
    tiny = np.minimum(truncate(x * np.float32(512) + np.float32(0.5)), 7)
    code = np.where(bits >> 23 < 121, tiny, np.minimum(normal, 0x7E))
    code = np.where(bits >> 23 >= 127 + 8, 0x7E, code)
    return np.where(x > 0, code, 0).astype(np.int32)


def nearest_int(x: Floats) -> NDArray[np.int32]:
    """Round to the nearest integer, ties to even, the way ggml does it.

    nearest_int(x) = low 23 bits of (x + 1.5 * 2^23), less 2^22

    x      : [...] float32
    return : [...] int32; right for |x| < 2^22, wraps beyond, 0 for NaN (x86's NaN has these low bits clear)

    Rounds: the sum, to float32.
    Source: ggml-quants.c nearest_int, llama.cpp 0c1e570.
    """
    bits = np.asarray(x + MAGIC, np.float32).view(np.int32)
    return (bits & 0x7FFFFF) - np.int32(0x400000)


def truncate(x: Floats) -> NDArray[np.int32]:
    """Convert float32 to int32 as x86's cvttss2si does; C leaves what does not fit undefined.

    x      : [...] float32
    return : [...] int32, towards zero; INT_MIN for NaN and for what does not fit
    """
    fits = (x >= np.float32(INT_MIN)) & (x < np.float32(-INT_MIN))
    return np.where(fits, np.trunc(np.where(fits, x, np.float32(0))), np.float32(INT_MIN)).astype(np.int32)


def round_half_away(x: Floats) -> Floats:
    """Round to the nearest integer, ties away from zero: C's roundf.

    x      : [...] float32
    return : [...] float32

    Rounds: never; x - trunc(x) is exact.
    """
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= np.float32(0.5), whole + np.copysign(np.float32(1), x), whole)


def find_not_finite(x: NDArray[Any]) -> int:
    """Find the first NaN or infinity.

    x      : [N] float32
    return : its index, or -1
    """
    at = np.flatnonzero(~np.isfinite(x))
    return int(at[0]) if at.size else -1


def widen_bf16s(bits: NDArray[np.uint16], out: Floats) -> int:
    """Widen bf16 bits, exactly, and find the first NaN or infinity among them.

    bits   : [N] uint16
    out    : [N] float32
    return : its index, or -1
    """
    out[:] = decode_bf16(bits)
    return find_not_finite(out)
