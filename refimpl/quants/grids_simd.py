"""What the vector decoders of the codebook formats share: points gathered in scratch, 16 weights made of them."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.simd import Lanes, Scratch, fill, inlined, select
from refimpl.arith.simd_lanes import convert, decode_half, first, mask_from, reinterpret
from refimpl.arith.simd_memory import load, peek, poke
from refimpl.quants.grids import complete_signs, load_grid

Bytes = NDArray[np.uint8]
Points = NDArray[np.int8]

SIGNS = complete_signs(np.arange(128))  # seven signs -> eight


@cache
def load_eighths() -> Points:
    """The points of IQ1 in eighths, so that a shift is one of them. [2048, 8] int8."""
    return np.asarray(8 * load_grid("iq1_s").points, np.int8)


@inlined
def read_d(raw: Bytes, at: Any) -> Any:
    """The fp16 at a byte."""
    return first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))


@inlined
def put_eight(points: Points, number: Any, scratch: Scratch, k: Any) -> None:
    """Copy a point of eight weights to place k of the scratch, int8 [256]."""
    poke(scratch, 8 * k, peek(points, 8 * np.int64(number), np.uint64))


@inlined
def put_four(points: Points, number: Any, scratch: Scratch, k: Any) -> None:
    """Copy a point of four weights to place k of the scratch, int8 [256]."""
    poke(scratch, 4 * k, peek(points, 4 * np.int64(number), np.uint32))


@inlined
def put_signs(word: Any, signs: Scratch, k: Any) -> None:
    """Complete four times seven signs: the lowest 28 bits of a word; to bytes 4 k.. of the scratch."""
    for i in range(4):
        poke(signs, 4 * k + i, SIGNS[np.int64(word) >> 7 * i & 127])


@inlined
def sign_weights(scratch: Scratch, bits: Any, k: Any, step: Any) -> Lanes:
    """Weights 16 k.. of a block: step * point, minus where a bit (uint16) is set. Points are never 0."""
    points = load(scratch, 16 * k, 16)
    signed = select(mask_from(bits), fill(np.int8(0), 16) - points, points)
    return convert(convert(signed, np.int32), np.float32) * step


@inlined
def shift_weights(scratch: Scratch, bits: Any, k: Any, step: Any) -> Lanes:
    """Weights 16 k.. of a block: step * (point + 1/8), minus 1/8 where a bit (uint16) is set; points in eighths."""
    points = load(scratch, 16 * k, 16)
    shifted = select(mask_from(bits), points - np.int8(1), points + np.int8(1))
    return convert(convert(shifted, np.int32), np.float32) * (step * np.float32(0.125))
