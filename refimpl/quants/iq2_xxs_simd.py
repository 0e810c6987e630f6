"""IQ2_XXS on explicit vectors: the bytes of iq2_xxs_jit for every input. See grid_search_simd.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_memory import fence, peek, prefetch, stack
from refimpl.quants.formats import IQ2_XXS
from refimpl.quants.grid_search_jit import Group, make_found
from refimpl.quants.grid_search_simd import Tables, load_tables, make_group, search_block
from refimpl.quants.grids import PLANS, load_grid, refuse
from refimpl.quants.grids_simd import put_eight, put_signs, read_d, sign_weights
from refimpl.quants.iq2_xxs_jit import pack
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES, PLAN = IQ2_XXS.weights, IQ2_XXS.block.itemsize, PLANS["iq2_xxs"]
QS = IQ2_XXS.offset("qs")
HALF, QUARTER = np.float32(0.5), np.float32(0.25)
POINTS = load_grid("iq2_xxs").points


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
    """Encode rows: iq2_xxs_jit.quantize."""
    refuse(encode(x, imatrix, rows_per_expert, load_tables("iq2_xxs"), make_group(), out))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq2_xxs_jit.dequantize. raw : [R, n/256*66] uint8; out : [R, n] float32, written."""
    points, signs, streamed = stack(np.int8, 256), stack(np.uint8, 32), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = read_d(raw, at)
        for j in range(8):
            word = peek(raw, at + QS + 8 * j + 4, np.uint32)
            put_signs(word, signs, j)
            for k in range(4 * j, 4 * j + 4):
                put_eight(POINTS, peek(raw, at + QS + 4 * j + k, np.uint8), points, k)
        for k in range(16):
            word = peek(raw, at + QS + 8 * (k // 2) + 4, np.uint32)
            step = d * (HALF + np.float32(np.int64(word) >> 28)) * QUARTER
            weights = sign_weights(points, peek(signs, 2 * k, np.uint16), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
