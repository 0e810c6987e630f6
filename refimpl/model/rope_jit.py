"""Rotary positions for kernels: the twin of rope.rotate for float32 and neighbouring channels."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit

Floats = NDArray[np.float32]


@jit
def rotate(x: Floats, cos: Floats, sin: Floats, out: Floats) -> None:
    """Turn the first 2R channels of each token's heads: x [T, H, n], cos, sin [T, R] -> out [T, H, n] float32."""
    turned = 2 * cos.shape[1]
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(cos.shape[1]):
                a, b = x[t, h, 2 * i], x[t, h, 2 * i + 1]
                out[t, h, 2 * i] = a * cos[t, i] - b * sin[t, i]
                out[t, h, 2 * i + 1] = a * sin[t, i] + b * cos[t, i]
            for i in range(turned, x.shape[2]):
                out[t, h, i] = x[t, h, i]
