"""The fused multiply-add of float32, exactly: one rounding, with or without the CPU's instruction."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32


def fma(a: Any, b: Any, c: Any) -> Floats:
    """Multiply and add with one rounding: C's fmaf.

    fma(a, b, c) = a*b + c

    The product of two float32 is exact in float64. Its sum with c is rounded to odd: where float64 cannot hold it,
    the last bit is made 1. So rounded once more, to float32, it comes out as if it had been rounded only then.

    a, b, c : [...] float32, broadcast against each other
    return  : [...] float32

    Rounds: once, to nearest, ties to even, also among subnormals.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    t = total - product
    error = (product - (total - t)) + (c - t)
    bits = total.view(np.int64)
    odd = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    away = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(odd, away, 0)).view(np.float64).astype(np.float32)
