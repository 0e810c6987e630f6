"""TQ2_0 decoded on explicit vectors: the bits of tq2_0_jit for any bytes."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_lanes import convert, decode_half, first, reinterpret
from refimpl.arith.simd_memory import fence, load, prefetch
from refimpl.quants.formats import TQ2_0
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES, D = TQ2_0.block.itemsize, TQ2_0.offset("d")


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*66] uint8 -> out [R, n] float32: w = (code - 1) * d."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at, i = block * BYTES, block * 256
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at + D, 2), np.uint16)))
        for half in range(2):
            q = load(raw, at + 32 * half, 32)
            for k in range(4):
                codes = reinterpret((q >> np.uint8(2 * k)) & np.uint8(3), np.int8) - np.int8(1)
                weights = convert(convert(codes, np.int32), np.float32) * d
                put_weights(out, i + 128 * half + 32 * k, weights, streamed)
    fence()
