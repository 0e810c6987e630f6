"""Products of float matrices for kernels: the twin of floats.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.sums import DOT_LANES

Floats = NDArray[np.float32]

LANES, HALF = DOT_LANES, DOT_LANES // 2
ZERO = np.float32(0)


@jit
def dot(w: Floats, x: Floats, lanes: Floats) -> Any:
    """Multiply and add one row and one token: w, x [n] float32; lanes [16] is scratch."""
    lanes[:] = ZERO
    for i in range(w.size):
        lanes[i % LANES] += w[i] * x[i]
    half = HALF
    while half:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    return lanes[0]


@jit
def multiply(w: Floats, x: Floats, out: Floats) -> None:
    """Multiply rows of weights with tokens: w [m, n], x [t, n] float32 -> out [t, m] float32."""
    lanes = np.empty(LANES, np.float32)
    for t in range(x.shape[0]):
        for r in range(w.shape[0]):
            out[t, r] = dot(w[r], x[t], lanes)
