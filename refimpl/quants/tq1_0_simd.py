"""TQ1_0 decoded on explicit vectors: the bits of tq1_0_jit for any bytes."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, inlined
from refimpl.arith.simd_lanes import constants, convert, decode_half, first, permutation, reinterpret
from refimpl.arith.simd_memory import fence, load, prefetch
from refimpl.quants.formats import TQ1_0
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES, QH, D = TQ1_0.block.itemsize, TQ1_0.offset("qh"), TQ1_0.offset("d")
REPEAT = permutation([i % 4 for i in range(16)])
POWERS = constants("uint8", [3 ** (i // 4) for i in range(16)])


@inlined
def read_digits(raised: Lanes, d: np.float32) -> Lanes:
    """(digit - 1) * d of bytes that a power of 3 has raised: what carries over when they are multiplied by 3."""
    carried = (convert(raised, np.int32) * np.int32(3)) >> np.int32(8)
    return convert(carried - np.int32(1), np.float32) * d


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/256*54] uint8 -> out [R, n] float32: w = (code - 1) * d."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at, i = block * BYTES, block * 256
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at + D, 2), np.uint16)))
        many, some = load(raw, at, 32), load(raw, at + 32, 16)
        for k in range(5):
            put_weights(out, i + 32 * k, read_digits(many, d), streamed)
            put_weights(out, i + 160 + 16 * k, read_digits(some, d), streamed)
            many, some = many * np.uint8(3), some * np.uint8(3)
        last = REPEAT(load(raw, at + QH, 4)) * POWERS()
        put_weights(out, i + 240, read_digits(last, d), streamed)
    fence()
