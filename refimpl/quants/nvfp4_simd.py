"""NVFP4 on explicit vectors: the bytes of nvfp4_jit for every input. A sub-block of 16 is one vector."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_ue4m3, encode_ue4m3
from refimpl.arith.jit import jit
from refimpl.arith.simd import absolute, fill
from refimpl.arith.simd_lanes import high_half, low_half, permutation
from refimpl.arith.simd_memory import fence, get, load, prefetch, put, store
from refimpl.quants.formats import NVFP4
from refimpl.quants.fp4_simd import decode, find_largest16, pack, round_codes, unpack
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES, QS = NVFP4.block.itemsize, NVFP4.offset("qs")
SIX = np.float32(6)
# Of 64 unpacked codes, all low nibbles first, those of each sub-block together.
SORT = permutation([i // 16 * 8 + i % 8 + 32 * (i % 16 // 8) for i in range(64)])


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows of weights: the bytes of nvfp4_jit.quantize, which ignores the imatrix, too.

    x   : [R, n] float32, finite
    out : [R, n/64*36] uint8, written
    """
    for block in range(out.size // BYTES):
        at = block * BYTES
        for s in range(4):
            i = block * 64 + 16 * s
            prefetch(x, i + 1024)
            v = load(x, i, 16)
            d = encode_ue4m3(find_largest16(absolute(v)) / SIX)
            put(out, at + s, np.uint8(d))
            codes = round_codes(v, fill(np.int32(0), 16), decode_ue4m3(d))
            store(out, at + QS + 8 * s, pack(codes))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/64*36] uint8 -> out [R, n] float32: w = FP4[code] * (d / 2)."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at, i = block * BYTES, block * 64
        prefetch(raw, at + 4096)
        levels = decode(SORT(unpack(load(raw, at + QS, 32))))
        first, second = low_half(levels), high_half(levels)
        put_weights(out, i, low_half(first) * decode_ue4m3(get(raw, at)), streamed)
        put_weights(out, i + 16, high_half(first) * decode_ue4m3(get(raw, at + 1)), streamed)
        put_weights(out, i + 32, low_half(second) * decode_ue4m3(get(raw, at + 2)), streamed)
        put_weights(out, i + 48, high_half(second) * decode_ue4m3(get(raw, at + 3)), streamed)
    fence()
