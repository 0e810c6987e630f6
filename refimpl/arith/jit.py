"""The one kernel decorator. Only this file and simd*.py beside it import numba or llvmlite.

Every kernel compiles with the same options: IEEE arithmetic as written (no fastmath, so LLVM never fuses
`a*b + c`), NumPy's division semantics, no GIL, and a disk cache. Numba keys its cache by the mtime of the
kernel's own file and so misses edits in the modules that the kernel calls; our cache directory is therefore
named by a hash of all sources of the package.
"""

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parent.parent


def source_key() -> str:
    """Hash of every source of the package and of what else changes compiled code."""
    h = hashlib.sha256(f"{numba.__version__} boundscheck={numba.config.BOUNDSCHECK}".encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        h.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:16]


def cache_dir() -> Path | None:
    """The first writable of: NUMBA_CACHE_DIR, the package's __pycache__, the user's cache, the temp dir.

    return : a directory of this source version alone, or None where nothing at all is writable
    """
    roots = [PACKAGE / "__pycache__", Path(os.path.expanduser("~/.cache/refimpl"))]
    roots.append(Path(tempfile.gettempdir()) / f"refimpl-{os.getuid() if hasattr(os, 'getuid') else 'user'}")
    if os.environ.get("NUMBA_CACHE_DIR"):
        roots.insert(0, Path(os.environ["NUMBA_CACHE_DIR"]))
    for root in roots:
        path = root / f"numba-{source_key()}"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
        except OSError:
            continue
    return None


CACHE_DIR = cache_dir()
_DECORATING = (
    threading.Lock()
)  # Numba takes the directory from a global, and threads import kernels when they need them


def jit(function: F) -> F:
    """Compile a kernel at its first call, with refimpl's options, cached on disk."""
    with _DECORATING:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = "" if CACHE_DIR is None else str(CACHE_DIR)
        try:
            kernel = numba.njit(
                function, fastmath=False, error_model="numpy", nogil=True, cache=CACHE_DIR is not None
            )
        finally:
            numba.config.CACHE_DIR = before
    return kernel


def announce_compiling() -> None:
    """Say on stderr that kernels are about to be compiled, and where they are kept; nothing when they are cached."""
    if CACHE_DIR is None:
        text = "compiling kernels for this CPU; no directory is writable, so the next run will compile again"
    elif any(CACHE_DIR.rglob("*.nbi")):
        return
    else:
        text = f"compiling kernels for this CPU, once; they are kept in {CACHE_DIR}"
    print(text, file=sys.stderr, flush=True)
