"""IQ2_XS on explicit vectors: the bytes of iq2_xs_jit for every input. See grid_search_simd.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_memory import fence, peek, poke, prefetch, stack
from refimpl.quants.formats import IQ2_XS
from refimpl.quants.grid_search_jit import Group, make_found
from refimpl.quants.grid_search_simd import Tables, load_tables, make_group, search_block
from refimpl.quants.grids import PLANS, load_grid, refuse
from refimpl.quants.grids_simd import SIGNS, put_eight, read_d, sign_weights
from refimpl.quants.iq2_xs_jit import pack
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES, PLAN = IQ2_XS.weights, IQ2_XS.block.itemsize, PLANS["iq2_xs"]
QS, SCALES = IQ2_XS.offset("qs"), IQ2_XS.offset("scales")
HALF, QUARTER = np.float32(0.5), np.float32(0.25)
POINTS = load_grid("iq2_xs").points


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, t: Tables, g: Group, out: Bytes) -> int:
    """Encode rows; return the first block, counted over all rows, that ggml aborts on, or -1."""
    found = make_found(PLAN)
    blocks, refused, weights = x.shape[1] // WEIGHTS, -1, np.empty(0, np.float32)
    for r in range(x.shape[0]):
        for b in range(blocks):
            if imatrix.shape[0] > 0:
                weights = imatrix[r // rows_per_expert, b * WEIGHTS : (b + 1) * WEIGHTS]
            lost = search_block(PLAN, t, x[r, b * WEIGHTS : (b + 1) * WEIGHTS], weights, g, found)
            if lost and refused < 0:
                refused = r * blocks + b
            pack(found, out[r, b * BYTES : (b + 1) * BYTES])
    return refused


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows: iq2_xs_jit.quantize."""
    refuse(encode(x, imatrix, rows_per_expert, load_tables("iq2_xs"), make_group(), out))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq2_xs_jit.dequantize. raw : [R, n/256*74] uint8; out : [R, n] float32, written."""
    points, signs, streamed = stack(np.int8, 256), stack(np.uint8, 32), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = read_d(raw, at)
        for k in range(32):
            word = np.int64(peek(raw, at + QS + 2 * k, np.uint16))
            put_eight(POINTS, word & 511, points, k)
            poke(signs, k, SIGNS[word >> 9])
        for k in range(16):
            level = np.int64(peek(raw, at + SCALES + k // 2, np.uint8)) >> k % 2 * 4 & 15
            step = d * (HALF + np.float32(level)) * QUARTER
            weights = sign_weights(points, peek(signs, 2 * k, np.uint16), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
