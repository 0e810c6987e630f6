"""Q8_0 on explicit vectors: the bytes of q8_0_jit for every input. One block of 32 is one vector."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import absolute, round_away, select
from refimpl.arith.simd_lanes import convert, decode_half, encode_half, first, reinterpret
from refimpl.arith.simd_memory import load, prefetch, store
from refimpl.quants.formats import Q8_0
from refimpl.quants.search_simd import ZERO, find_largest

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

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
        inverse = select(d != ZERO, np.float32(1) / d, ZERO)
        code = round_away(v * first(inverse))
        # 1/d is infinite for subnormal d: C then converts ±infinity or NaN, on x86 to 0 in the lowest byte
        code = select(absolute(code) <= np.float32(128), code, ZERO)
        store(out, block * BYTES, reinterpret(encode_half(d), np.uint8))
        store(out, block * BYTES + QS, convert(convert(code, np.int32), np.uint8))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*34] uint8 -> out [R, n] float32: w = code*d."""
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
        codes = reinterpret(load(raw, at + QS, 32), np.int8)
        store(out, block * 32, convert(convert(codes, np.int32), np.float32) * d)
