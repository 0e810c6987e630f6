"""Products of float matrices in refimpl's own order: F32, F16 and BF16 weights, and decoded blocks."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.sums import dot_lanes

Floats = NDArray[np.float32]


def multiply(w: Floats, x: Floats, out: Floats) -> None:
    """Multiply rows of weights with tokens.

    out[t, r] = dot_lanes(w[r], x[t])

    w   : [m, n] float32
    x   : [t, n] float32
    out : [t, m] float32, written

    Rounds: as arith.sums.dot_lanes does.
    """
    for t in range(len(x)):
        out[t] = dot_lanes(w, x[t])
