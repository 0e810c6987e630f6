"""IQ2_XXS on explicit vectors: the bytes of iq2_xxs_jit for every input. See grid_search_simd.py."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ2_XXS
from refimpl.quants.grid_search_jit import Group, make_found
from refimpl.quants.grid_search_simd import Tables, load_tables, make_group, search_block
from refimpl.quants.grids import PLANS, refuse
from refimpl.quants.iq2_xxs_jit import pack

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES, PLAN = IQ2_XXS.weights, IQ2_XXS.block.itemsize, PLANS["iq2_xxs"]


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
