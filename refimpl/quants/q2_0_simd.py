"""Q2_0 decoded on explicit vectors: the bits of q2_0_jit for any bytes."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_lanes import constants, convert, decode_half, first, permutation, reinterpret
from refimpl.arith.simd_memory import fence, load, prefetch
from refimpl.quants.formats import Q2_0
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES, QS = Q2_0.block.itemsize, Q2_0.offset("qs")
REPEAT = permutation([i // 4 for i in range(64)])
SHIFTS = constants("int32", [i % 4 * 2 for i in range(64)])


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/64*18] uint8 -> out [R, n] float32: w = (code - 1) * d."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
        bytes4 = convert(REPEAT(load(raw, at + QS, 16)), np.int32)
        codes = ((bytes4 >> SHIFTS()) & np.int32(3)) - np.int32(1)
        put_weights(out, block * 64, convert(codes, np.float32) * d, streamed)
    fence()
