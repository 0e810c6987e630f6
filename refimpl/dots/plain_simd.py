"""The order `tiled` of the codebook formats on vectors: tiled_simd.py multiplies plain blocks that are made of theirs.

| 256 codes + 64, one byte each | 16 scales: int16 | d times the factor: float32 |
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import inlined
from refimpl.arith.simd_dot import add_small_fours
from refimpl.arith.simd_lanes import first, reinterpret
from refimpl.arith.simd_memory import load, store
from refimpl.dots.codebooks_jit import unpack_row
from refimpl.dots.factors import FACTORS
from refimpl.dots.tiled_simd import lay_out, multiply_tiles

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

BIAS, SHIFT, ZERO = 64, np.int16(6), np.float32(0)
SCALES, D, BYTES = 256, 288, 292
ROWS = 64  # taken apart at a time


@inlined
def unpack_plain(raw: Bytes, at: Any, q: Bytes, i: Any) -> Any:
    """As unpack_simd.unpack_X."""
    for k in range(0, 256, 64):
        store(q, i + k, load(raw, at + k, 64))
    scales = reinterpret(load(raw, at + SCALES, 32), np.int16)
    return scales, scales << SHIFT, first(reinterpret(load(raw, at + D, 4), np.float32)), ZERO


@jit
def make_plain(
    fmt: int, factor: Any, raw: Bytes, codes: Codes, scales: Shorts, d: Floats, plain: Bytes
) -> None:
    """Rows as plain blocks: raw [m, bytes] -> plain [m, blocks, 292]; codes, scales and d, of one row, are scratch."""
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, d)
        for b in range(d.size):
            block = plain[r, b]
            for i in range(256):
                block[i] = int(codes[256 * b + i]) + BIAS
            block[SCALES:D].view(np.int16)[:] = scales[16 * b : 16 * b + 16]
            block[D:].view(np.float32)[0] = d[b] * factor


@jit
def tiled_plain(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_plain, add_small_fours, 4, False, BYTES, raw, acts, sums, act_d, out)


def multiply(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    """Multiply rows of blocks of a codebook format with tokens, as codebooks_jit.multiply_tiled does."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, scales, d = np.empty(n, np.int8), np.empty(n // 16, np.int16), np.empty(blocks, np.float32)
    laid = lay_out(acts, act_d, bsums, 1)
    for r in range(0, len(raw), ROWS):
        some = raw[r : r + ROWS]
        plain, part = (
            np.empty((len(some), blocks, BYTES), np.uint8),
            np.empty((len(acts), len(some)), np.float32),
        )
        make_plain(fmt, FACTORS[fmt], some, codes, scales, d, plain)
        tiled_plain(plain.reshape(len(some), -1), *laid, part)
        out[:, r : r + len(some)] = part
