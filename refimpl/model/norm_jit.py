"""RMSNorm for kernels: the twin of norm.rms_norm for float32."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.sums import LANES as SUM_LANES

Floats = NDArray[np.float32]
LANES, HALF = SUM_LANES, SUM_LANES // 2


@jit
def rms_norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """Scale each token to root mean square 1, then each channel: x [T, n], weight [n] -> out [T, n] float32."""
    n = x.shape[1]
    lanes = np.empty(LANES, np.float64)
    for t in range(x.shape[0]):
        lanes[:] = 0.0
        for start in range(0, n - n % LANES, LANES):
            for k in range(LANES):
                wide = np.float64(x[t, start + k])
                lanes[k] += wide * wide
        for k in range(n % LANES):
            wide = np.float64(x[t, n - n % LANES + k])
            lanes[k] += wide * wide
        half = HALF
        while half:
            for k in range(half):
                lanes[k] += lanes[k + half]
            half //= 2
        scale = np.float32(1.0 / np.sqrt(lanes[0] / np.float64(n) + eps))
        for i in range(n):
            out[t, i] = x[t, i] * scale * weight[i]
