"""Products that may be fused with a sum: one text for every build. See builds.py for the forms.

These functions take float32 arrays, or scalars where a kernel is interpreted; in compiled kernels simd_fused.py
gives the same functions code, for scalars and for vectors, chosen while compiling.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import MAGIC
from refimpl.arith.builds import FUSED, ROUNDED, Form
from refimpl.arith.fma import fma

Floats = NDArray[Any]  # float32


def add_product(form: Form, total: Any, a: Any, b: Any) -> Any:
    """total + a*b

    Rounds: the product and the sum to float32 where the form is ROUNDED, else once.
    """
    return total + a * b if form is ROUNDED else fma(a, b, total)


def subtract_product(form: Form, total: Any, a: Any, b: Any) -> Any:
    """total - a*b

    Rounds: the product and the difference to float32 where the form is ROUNDED, else once.
    """
    return total - a * b if form is ROUNDED else fma(-a, b, total)


def subtract_products(form: Form, a: Any, b: Any, c: Any, d: Any) -> Any:
    """a*b - c*d

    Rounds: ROUNDED: both products and the difference, to float32. FUSED: c*d, then once. SECOND: a*b, then once.
    """
    if form is ROUNDED:
        return a * b - c * d
    return fma(a, b, -(c * d)) if form is FUSED else fma(-c, d, a * b)


def nearest_product(form: Form, a: Any, b: Any) -> Any:
    """nearest_int(a*b): int32 to the nearest, ties to even; wraps beyond 2^22, 0 for NaN. See bits.nearest_int.

    Rounds: the product where the form is ROUNDED, and the sum with 1.5 * 2^23 or the whole, to float32.
    """
    bits = np.asarray(add_product(form, MAGIC, a, b), np.float32).view(np.int32)
    return (bits & 0x7FFFFF) - np.int32(0x400000)


def add_products(form: Form, a: Floats, b: Floats) -> Floats:
    """Add up a*b along the last axis, one product after the other. a, b : [..., n] float32; return : [...]."""
    total = np.zeros(a.shape[:-1], np.float32)
    for i in range(a.shape[-1]):
        total = add_product(form, total, a[..., i], b[..., i])
    return total
