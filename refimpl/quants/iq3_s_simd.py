"""IQ3_S on explicit vectors: the bytes of iq3_s_jit for every input. See grid_search_simd.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_memory import fence, peek, prefetch, stack
from refimpl.quants.formats import IQ3_S
from refimpl.quants.grid_search_jit import Group, make_found
from refimpl.quants.grid_search_simd import Tables, load_tables, make_group, search_block
from refimpl.quants.grids import PLANS, load_grid, refuse
from refimpl.quants.grids_simd import put_four, read_d, sign_weights
from refimpl.quants.iq3_s_jit import pack
from refimpl.quants.search_simd import is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES, PLAN = IQ3_S.weights, IQ3_S.block.itemsize, PLANS["iq3_s"]
QS, QH, SIGNS, SCALES = IQ3_S.offset("qs"), IQ3_S.offset("qh"), IQ3_S.offset("signs"), IQ3_S.offset("scales")
POINTS = load_grid("iq3_s").points


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
    """Encode rows: iq3_s_jit.quantize."""
    refuse(encode(x, imatrix, rows_per_expert, load_tables("iq3_s"), make_group(), out))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: the bits of iq3_s_jit.dequantize. raw : [R, n/256*110] uint8; out : [R, n] float32, written."""
    points, streamed = stack(np.int8, 256), is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = read_d(raw, at)
        for k in range(64):
            ninth = np.int64(peek(raw, at + QH + k // 8, np.uint8)) >> k % 8 & 1
            put_four(POINTS, np.int64(peek(raw, at + QS + k, np.uint8)) | ninth << 8, points, k)
        for k in range(16):
            level = np.int64(peek(raw, at + SCALES + k // 4, np.uint8)) >> k // 2 % 2 * 4 & 15
            step = d * np.float32(1 + 2 * level)
            weights = sign_weights(points, peek(raw, at + SIGNS + 2 * k, np.uint16), k, step)
            put_weights(out, 256 * block + 16 * k, weights, streamed)
    fence()
