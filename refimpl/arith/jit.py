"""The one kernel decorator. Only this file and simd*.py beside it import numba or llvmlite.

Every kernel compiles with the same options: IEEE arithmetic as written (no fastmath, so LLVM never fuses
`a*b + c`), NumPy's division semantics, no GIL, and a disk cache. Numba keys its cache by the mtime of the
kernel's own file and so misses edits in the modules that the kernel calls; our cache directories are therefore
named by a hash of the kernel's module and of every module of the package that it imports, however far away.
"""

import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parent.parent


_IMPORT = re.compile(
    r"^\s*(?:from (refimpl[\w.]*) import (\([^)]*\)|[^\n]*)|import (refimpl[\w.]*))", re.MULTILINE
)


@cache
def imported(path: Path) -> frozenset[Path]:
    """The package's modules that a module imports; a package's own __init__ counts where a name is not a module's."""
    found = set()
    for package, names, whole in _IMPORT.findall(path.read_text(encoding="utf-8")):
        home = PACKAGE.parent.joinpath(*(package or whole).split("."))
        for name in re.findall(r"\w+", names) or [""]:
            places = (home / f"{name}.py", home.with_suffix(".py"), home / "__init__.py")
            found |= {next((place for place in places if place.exists()), path)}
    return frozenset(found)


@cache
def source_key(path: Path) -> str:
    """Hash of a module, of all that it imports in the package, and of what else changes compiled code."""
    seen, waiting = {path}, [path]
    while waiting:
        new = imported(waiting.pop()) - seen
        seen |= new
        waiting += new
    h = hashlib.sha256(f"{numba.__version__} boundscheck={numba.config.BOUNDSCHECK}".encode())
    for module in sorted(seen):
        h.update(module.name.encode() + b"\0" + module.read_bytes())
    return h.hexdigest()[:16]


def cache_root() -> Path | None:
    """The first writable of: NUMBA_CACHE_DIR, the package's __pycache__, the user's cache, the temp dir.

    Numba unpickles what it finds there, so a directory in the temp dir counts only where it is ours alone.
    """
    private = Path(tempfile.gettempdir()) / f"refimpl-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    roots = [PACKAGE / "__pycache__", Path(os.path.expanduser("~/.cache/refimpl")), private]
    if os.environ.get("NUMBA_CACHE_DIR"):
        roots.insert(0, Path(os.environ["NUMBA_CACHE_DIR"]))
    for root in roots:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root == private and hasattr(os, "getuid"):
                found = root.lstat()
                if found.st_uid != os.getuid() or found.st_mode & 0o022:
                    continue
            with tempfile.TemporaryFile(dir=root):
                return root
        except OSError:
            continue
    return None


CACHE_ROOT = cache_root()
_DECORATING = (
    threading.Lock()
)  # Numba takes the directory from a global, and threads import kernels when they need them


def cache_dir(path: Path) -> Path | None:
    """Where the kernels of one module are cached, as its sources are now; None where nothing is writable."""
    return None if CACHE_ROOT is None else CACHE_ROOT / f"numba-{source_key(path)}"


INTEGER = numba.int64


def rows(dtype: Any, axes: int = 2) -> Any:
    """The type of a contiguous array, for the `types` of jit."""
    return numba.types.Array(numba.from_dtype(np.dtype(dtype)), axes, "C")


def function(*types: Any) -> Any:
    """The type of a kernel that is handed to another kernel and returns nothing."""
    return numba.types.FunctionType(numba.void(*types))


def jit(function: F, types: tuple[Any, ...] | None = None) -> F:
    """Compile a kernel at its first call, with refimpl's options, cached on disk.

    types : of the arguments (see rows, function, INTEGER); the kernel is then compiled at once, for them alone.
            One that takes another kernel needs this: without, it would be compiled for each that it is given.
    """
    place = cache_dir(Path(function.__code__.co_filename))
    with _DECORATING:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = "" if place is None else str(place)
        try:
            decorate = numba.njit(
                types and numba.void(*types),
                fastmath=False,
                error_model="numpy",
                nogil=True,
                cache=place is not None,
            )
            kernel = decorate(function)
        finally:
            numba.config.CACHE_DIR = before
    return kernel


def announce_compiling() -> None:
    """Say on stderr that kernels are about to be compiled, and where they are kept; nothing when some are cached."""
    modules = [path for twin in ("jit", "simd") for path in PACKAGE.rglob(f"*_{twin}.py")]
    if CACHE_ROOT is None:
        text = "compiling kernels for this CPU; no directory is writable, so the next run will compile again"
    elif any(any(place.rglob("*.nbi")) for place in map(cache_dir, modules) if place is not None):
        return
    else:
        text = f"compiling kernels for this CPU, once; they are kept in {CACHE_ROOT}"
    print(text, file=sys.stderr, flush=True)
