"""The order `tiled`: what ggml_mul_mat gives from 8 tokens on for weights with q8_k activations (ggml-cpu/tiled).

Of each block of 256 the integers are added exactly, and one fma chain adds up the blocks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma import fma
from refimpl.dots.generic import multiply_codes, multiply_mins
from refimpl.dots.planes import Activations, Planes

Floats = NDArray[Any]  # float32


def multiply(w: Planes, a: Activations, out: Floats) -> None:
    """Multiply rows of weights with tokens.

    part = d * total;  part = fma(-dmin, mins, part) where the format has mins;  sum = fma(part, d', sum)

    w, a : planes of m rows and t tokens
    out  : [t, m] float32, written

    Rounds: d * total; each fma once.
    Source: ggml-cpu/tiled/tiled-kernel.cpp tiled_run_microtile_avx2, llama.cpp 0c1e570.
    """
    for t in range(len(out)):
        total = multiply_codes(w, a, t).sum(2).astype(np.float32)
        result = np.zeros(len(w.d), np.float32)
        for b in range(w.d.shape[1]):
            part = w.d[:, b] * total[:, b]
            if w.mins.size:
                mins = multiply_mins(w, a, t)[:, b].sum(1).astype(np.float32)
                part = fma(-w.dmin[:, b], mins, part)
            result = fma(part, a.d[t, b], result)
        out[t] = result
