"""MXFP4 on explicit vectors: the bytes of mxfp4_jit for every input. One block of 32 is one vector."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_e8m0_half, floor_log2
from refimpl.arith.jit import jit
from refimpl.arith.simd import absolute, fill
from refimpl.arith.simd_lanes import first
from refimpl.arith.simd_memory import fence, get, load, prefetch, put, store
from refimpl.quants.formats import MXFP4
from refimpl.quants.fp4_simd import decode, pack, round_codes, unpack
from refimpl.quants.search_simd import ZERO, find_largest, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES, QS = MXFP4.block.itemsize, MXFP4.offset("qs")


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows of weights: the bytes of mxfp4_jit.quantize, which ignores the imatrix, too.

    x   : [R, n] float32, finite
    out : [R, n/32*17] uint8, written
    """
    for block in range(out.size // BYTES):
        prefetch(x, block * 32 + 1024)
        prefetch(x, block * 32 + 1040)
        v = load(x, block * 32, 32)
        peak = first(find_largest(absolute(v)))
        e = (floor_log2(peak) + 125) & 255 if peak > ZERO else 0
        put(out, block * BYTES, np.uint8(e))
        codes = round_codes(v, fill(np.int32(0), 32), decode_e8m0_half(e))
        store(out, block * BYTES + QS, pack(codes))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*17] uint8 -> out [R, n] float32: w = FP4[code] * 2^(e - 128)."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        step = decode_e8m0_half(get(raw, at))
        put_weights(out, block * 32, decode(unpack(load(raw, at + QS, 16))) * step, streamed)
    fence()
