"""The order `tiled` for kernels: the twin of tiled.py. A row, taken apart, meets every token."""

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma_jit import fma
from refimpl.arith.jit import jit
from refimpl.dots.avx2_jit import multiply_rows
from refimpl.dots.factors import FACTORS
from refimpl.dots.planes_jit import unpack_row
from refimpl.quants.formats import IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

CHAINED = (Q2_K.id, Q3_K.id, Q4_K.id, Q5_K.id, Q6_K.id, IQ4_XS.id)
ONE_SET = (IQ4_NL.id,)  # of lanes
WITH_MINS = (Q2_K.id, Q4_K.id, Q5_K.id)
GROUP, GROUPS = 16, 16
ZERO = np.float32(0)


@jit
def chain_rows(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, bsums: Shorts, out: Floats) -> None:
    """As multiply(), of the formats in CHAINED."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, scratch = np.empty(n, np.int8), np.empty(256, np.uint8)
    scales, mins = np.empty(n // GROUP, np.int16), np.empty(n // GROUP, np.int16)
    d, dmin = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, mins, d, dmin, scratch)
        for t in range(acts.shape[0]):
            result = ZERO
            for b in range(blocks):
                total, least = 0, 0
                for g in range(b * GROUPS, (b + 1) * GROUPS):
                    part = 0
                    for i in range(g * GROUP, (g + 1) * GROUP):
                        part += int(codes[i]) * int(acts[t, i])
                    total += part * int(scales[g])
                    if fmt in WITH_MINS:
                        least += int(mins[g]) * int(bsums[t, g])
                value = d[b] * np.float32(total)
                if fmt in WITH_MINS:
                    value = fma(-dmin[b], np.float32(least), value)
                result = fma(value, act_d[t, b], result)
            out[t, r] = result


def multiply(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, out: Floats
) -> None:
    """Multiply rows of blocks with tokens.

    fmt                       : id of the weights' format
    raw                       : [m, bytes] uint8
    acts, act_d, act_s, bsums : the planes of t tokens
    out                       : [t, m] float32, written
    """
    if fmt in FACTORS:  # grids are loaded for who needs them
        import_module("refimpl.dots.codebooks_jit").multiply_tiled(fmt, raw, acts, act_d, out)
    elif fmt in CHAINED:
        chain_rows(fmt, raw, acts, act_d, bsums, out)
    else:
        multiply_rows(fmt, raw, acts, act_d, act_s, bsums, fmt not in ONE_SET, out)
