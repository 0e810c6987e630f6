"""The texts of one thing: loads kernels compiled and interpreted, and names every module that is a twin."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numba

import refimpl
from refimpl.arith import jit

PACKAGE = Path(refimpl.__file__).parent

# Modules that end like a twin but hold parts of others: test_simd or the formats prove them. A _simd module
# without a reference of its name is such a part anyway.
PARTS = frozenset(
    {
        "quants.grid_search_simd",
        "quants.grids_simd",
        "quants.search_simd",
        "quants.rounding_simd",
        "quants.fp4_simd",
        "quants.iq4_simd",
        "arith.bits_simd",
    }
)


def find_twins() -> list[str]:
    """Every module that must equal a reference text, as "quants.q4_k_jit"."""
    found = [
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for suffix in ("_jit", "_simd")
        for path in PACKAGE.rglob(f"*{suffix}.py")
        if suffix == "_jit" or path.with_name(path.name.replace("_simd", "")).exists()
    ]
    return sorted(name for name in found if name not in PARTS)


@cache
def load_interpreted() -> dict[str, ModuleType]:
    """Import every portable kernel module anew with the JIT off: plain Python functions, all the way down."""
    names = [f"refimpl.{name}" for name in find_twins() if name.endswith("_jit")]
    with _unloaded([*names, jit.__name__]):
        before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, True
        try:
            return {name.removeprefix("refimpl."): importlib.import_module(name) for name in names}
        finally:
            numba.config.DISABLE_JIT = before


def load_compiled(name: str) -> ModuleType:
    return importlib.import_module(f"refimpl.{name}")


@contextmanager
def _unloaded(names: list[str]) -> Iterator[None]:
    """Hide modules from the import system, and put them back after."""
    saved = {name: sys.modules.pop(name, None) for name in names}
    parents = {name: sys.modules[name.rpartition(".")[0]] for name in names}
    for name, parent in parents.items():
        vars(parent).pop(name.rpartition(".")[2], None)
    try:
        yield
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            vars(parents[name]).pop(name.rpartition(".")[2], None)
            if module is not None:
                sys.modules[name] = module
                setattr(parents[name], name.rpartition(".")[2], module)
