"""A warm start of Numba without SciPy. How kernels compile is in jit.py, which is part of every kernel's cache key."""

import sys
from importlib import import_module


def load_numba() -> None:
    """Load the part of Numba that looks for BLAS, without the look: it would import scipy.linalg, 0.2 s for nothing.

    Numba's linear algebra, which no kernel of ours uses, looks again when it is called.
    """
    if "numba.np.arraymath" in sys.modules:
        return
    linalg = import_module("numba.np.linalg")
    look = linalg.ensure_blas
    linalg.ensure_blas = lambda: None  # type: ignore[attr-defined]
    try:
        import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = look  # type: ignore[attr-defined]
