"""The fused multiply-add for kernels: the twin of fma.py."""

from typing import Any

import numpy as np

from refimpl.arith.jit import jit

ZERO = np.float64(0)


@jit
def fma(a: Any, b: Any, c: Any) -> Any:
    """Multiply and add float32 with one rounding: a*b + c."""
    product, addend = np.float64(a) * np.float64(b), np.float64(c)
    total = product + addend
    t = total - product
    error = (product - (total - t)) + (addend - t)
    if error != ZERO and np.isfinite(total):
        bits = int(np.float64(total).view(np.int64))
        if not bits & 1:
            bits += 1 if (error > ZERO) == (total > ZERO) else -1
            return np.float32(np.int64(bits).view(np.float64))
    return np.float32(total)
