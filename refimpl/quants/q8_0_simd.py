"""Q8_0 on explicit vectors: the bytes of q8_0_jit for every input. One block of 32 is one vector."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, absolute, inlined, select
from refimpl.arith.simd_lanes import convert, decode_half, encode_half, first, reinterpret
from refimpl.arith.simd_memory import fence, load, prefetch, store
from refimpl.quants.formats import Q8_0
from refimpl.quants.search_simd import ZERO, find_largest, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

INFINITY = np.float32(np.inf)
BYTES = Q8_0.block.itemsize
QS = Q8_0.offset("qs")


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows of weights: the bytes of q8_0_jit.quantize, which ignores the imatrix, too.

    x   : [R, n] float32, finite
    out : [R, n/32*34] uint8, written
    """
    for block in range(out.size // BYTES):
        prefetch(x, block * 32 + 1024)
        prefetch(x, block * 32 + 1040)
        v = load(x, block * 32, 32)
        d = find_largest(absolute(v)) / np.float32(127)
        inverse = np.float32(1) / d
        # infinite for zero, and for subnormal d, where C converts ±infinity or NaN: on x86 to a lowest byte of 0
        inverse = select(inverse < INFINITY, inverse, ZERO)
        code = truncate_away(v * first(inverse))
        store(out, block * BYTES, reinterpret(encode_half(d), np.uint8))
        store(out, block * BYTES + QS, convert(code, np.uint8))


@inlined
def truncate_away(v: Lanes) -> Lanes:
    """C's roundf as int32: to nearest, halves away from zero. |v| < 2^22

    Adding the float before 0.5 carries whatever is at least a half over the next integer, and nothing else.
    """
    sign = reinterpret(v, np.uint32) & np.uint32(0x80000000)
    nudge = reinterpret(sign | np.uint32(0x3EFFFFFF), np.float32)
    return convert(v + nudge, np.int32)


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*34] uint8 -> out [R, n] float32: w = code*d."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
        codes = reinterpret(load(raw, at + QS, 32), np.int8)
        put_weights(out, block * 32, convert(convert(codes, np.int32), np.float32) * d, streamed)
    fence()
