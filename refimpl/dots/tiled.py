"""The order `tiled`: what ggml_mul_mat gives from 8 tokens on.

For most weights with q8_k activations that is ggml-cpu/tiled: of each block of 256 the integers are added exactly, and
one fma chain adds up the blocks. Other types have no kernel of that kind, and keep the order avx2.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma import fma
from refimpl.dots import avx2
from refimpl.dots.factors import FACTORS
from refimpl.dots.generic import multiply_codes, multiply_mins
from refimpl.dots.planes import Activations, Planes
from refimpl.quants.formats import formats

Floats = NDArray[Any]  # float32


CHAINED = frozenset(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"))  # what ggml has a tiled kernel for


def add_chain(w: Planes, a: Activations, t: int) -> Floats:
    """One fma chain over the blocks, whose integers are added exactly.

    part = d * total;  part = fma(-dmin, mins, part) where the format has mins;  sum = fma(part, d', sum)
    """
    total = multiply_codes(w, a, t).sum(2).astype(np.float32)
    result = np.zeros(len(w.d), np.float32)
    for b in range(w.d.shape[1]):
        part = w.d[:, b] * total[:, b]
        if w.mins.size:
            mins = multiply_mins(w, a, t)[:, b].sum(1).astype(np.float32)
            part = fma(-w.dmin[:, b], mins, part)
        result = fma(part, a.d[t, b], result)
    return result


def multiply(w: Planes, a: Activations, fmt: str, out: Floats) -> None:
    """Multiply rows of weights with tokens.

    w, a : planes of m rows and t tokens
    fmt  : the weights' format, by name
    out  : [t, m] float32, written

    Rounds: d * total; each fma once; or as avx2 does.
    Source: ggml-cpu/tiled/tiled-kernel.cpp tiled_run_microtile_avx2, llamafile/sgemm.cpp, llama.cpp 0c1e570.
    """
    if formats[fmt].id in FACTORS:
        from refimpl.dots.codebooks import multiply_tiled  # which is made of what is here

        multiply_tiled(w, a, formats[fmt].id, out)
        return
    for t in range(len(out)):
        if fmt in CHAINED:
            out[t] = add_chain(w, a, t)
        elif fmt == "iq4_nl":  # a kernel of its own (tinyBLAS) from 2 tokens on, which has one set of lanes
            out[t] = avx2.add_plain(w, a, t)
        else:
            out[t] = avx2.AVX2[fmt](w, a, t)
