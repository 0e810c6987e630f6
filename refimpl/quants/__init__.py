"""Block formats: one module each, with its twins (X.py defines, X_jit.py runs anywhere, X_simd.py is fast).

Arrays are rows of weights, [..., n] float32, and rows of blocks, [..., bytes] uint8. `reference=True` takes
the NumPy text; otherwise the tuned kernel does the work, or the portable one (formats.find_kernel).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import BUILDS, SITED, Build, find_build
from refimpl.quants.checks import NEAREST, ROW_ERRORS, compare, nearest, read_scales, scale_defects
from refimpl.quants.formats import Format, find_codec, find_kernel, find_reference
from refimpl.quants.grids import Refused

__all__ = [
    "BUILDS",
    "NEAREST",
    "ROW_ERRORS",
    "NotFinite",
    "TooLarge",
    "compare",
    "dequantize",
    "nearest",
    "quantize",
    "read_scales",
    "scale_defects",
]

Array = NDArray[Any]

CHUNK = 1 << 18  # weights: 1 MiB of float32
FLOATS = MappingProxyType({"f16": "halves", "bf16": "bf16s"})


class NotFinite(ValueError):
    """A weight to quantize is NaN or infinite: row is counted over all leading axes."""

    def __init__(self, row: int, column: int, value: float) -> None:
        self.row, self.column = row, column
        super().__init__(f"weight at row {row}, column {column} is {value}")


class TooLarge(NotFinite):
    """Weights, times their importance, so large that the sums of a codebook's search overflow: ggml aborts on them.

    row and column are those of the block's first weight.
    """

    def __init__(self, row: int, column: int) -> None:
        self.row, self.column = row, column
        ValueError.__init__(
            self, f"weights from row {row}, column {column} on are so large that ggml aborts on their block"
        )


def quantize(
    x: Array,
    fmt: str | Format,
    imatrix: Array | None = None,
    build: str = "strict",
    reference: bool = False,
    out: Array | None = None,
) -> NDArray[np.uint8]:
    """Encode weights to the blocks of a format, byte for byte as ggml does.

    x       : [..., n] float32, or uint16: bf16 bits
    imatrix : [n] float32, or [E, n] for x [E, m, n]
    build   : whose compiler: "strict" rounds every operation, "gcc-fma" and "clang-arm64" fuse some (arith/builds.py)
    out     : [..., bytes] uint8, or None: a new array
    return  : [..., bytes] uint8

    Raises: NotFinite for NaN or infinity in x; TooLarge where ggml aborts; ValueError where the format needs an
    imatrix; ValueError or TypeError for shapes and types that do not fit, and for a build that is not known.
    """
    fmt = find_codec(fmt)
    choices = find_build(build, fmt.name)
    if fmt.needy and imatrix is None:
        raise ValueError(f"{fmt.name} needs an imatrix: ggml does not encode it without one")
    _check(x, "x", (np.float32, np.uint16), 1)
    size = fmt.row_bytes(x.shape[-1])
    rows = np.ascontiguousarray(x).reshape(prod(x.shape[:-1]), x.shape[-1])
    importance = _importance(x.shape, imatrix)
    out, flat = _output(out, (*x.shape[:-1], size), np.uint8)
    if rows.size:
        (_quantize_by_reference if reference else _quantize_by_kernel)(rows, fmt, importance, flat, choices)
    if not np.may_share_memory(flat, out):
        out[...] = flat.reshape(out.shape)
    return out


def _quantize_by_reference(rows: Array, fmt: Format, importance: Array, out: Array, build: Build) -> None:
    rows = _widen(rows, 0, None, "refimpl.arith.bits")
    per_expert = len(rows) // max(1, len(importance))
    if fmt.weights == 1:
        from refimpl.quants import floats

        out[:] = np.ascontiguousarray(floats.quantize(rows, fmt)).view(np.uint8)
        return
    weights = importance[np.arange(len(rows)) // per_expert] if len(importance) else None
    with np.errstate(all="ignore"), _placing(fmt, rows, 0):
        blocks = find_reference(fmt).quantize(rows, weights, *_pass(build, fmt))
    out[:] = blocks.view(np.uint8)


@contextmanager
def _placing(fmt: Format, rows: Array, start: int) -> Iterator[None]:
    """Say at which row and column a block lies that the encoder refuses; `start` is the first row's index."""
    try:
        yield
    except Refused as error:
        row, block = divmod(error.block, rows.shape[1] // fmt.weights)
        raise TooLarge(start + row, block * fmt.weights) from error


def _quantize_by_kernel(rows: Array, fmt: Format, importance: Array, out: Array, build: Build) -> None:
    """Widen, check and encode some rows at a time, so that they stay in the second-level cache meanwhile."""
    n, experts = rows.shape[1], max(1, len(importance))
    per_expert, most = len(rows) // experts, max(1, CHUNK // n)
    room = allocate((min(most, len(rows)), n), np.float32) if rows.dtype == np.uint16 else None
    for part, some in _cut(per_expert, experts, most):
        x = _widen(rows[part], part.start, room, "refimpl.arith.bits_simd")
        with _placing(fmt, x, part.start):
            _encode(x, fmt, importance[some], per_expert, out[part], build)


def _cut(per_expert: int, experts: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of at most `most` rows: whole experts, or rows of one expert. Yields rows and experts."""
    together = most // per_expert
    if together:
        for e in range(0, experts, together):
            end = min(e + together, experts)
            yield slice(e * per_expert, end * per_expert), slice(e, end)
    else:
        for e in range(experts):
            for row in range(e * per_expert, (e + 1) * per_expert, most):
                yield slice(row, min(row + most, (e + 1) * per_expert)), slice(e, e + 1)


def _pass(build: Build, fmt: Format) -> tuple[Build, ...]:
    """The argument that the encoder of a format with sites takes, and others do not."""
    return (build,) if fmt.name in SITED else ()


def _encode(x: Array, fmt: Format, importance: Array, per_expert: int, out: Array, build: Build) -> None:
    if fmt.name == "f32":
        out[:] = x.view(np.uint8)
    elif fmt.weights == 1:
        kernel = getattr(import_module("refimpl.quants.floats_jit"), f"encode_{FLOATS[fmt.name]}")
        bits = np.empty(x.shape, np.uint16)
        kernel(x, bits)
        out[:] = bits.view(np.uint8)
    else:
        find_kernel(fmt, "quantize")(x, importance, per_expert, out, *_pass(build, fmt))


def dequantize(
    raw: Array, fmt: str | Format, reference: bool = False, out: Array | None = None
) -> NDArray[np.float32]:
    """Decode blocks to weights, bit for bit as ggml does.

    raw    : [..., bytes] uint8
    out    : [..., n] float32, or None: a new array
    return : [..., n] float32

    Raises: ValueError or TypeError for shapes and types that do not fit.
    """
    fmt = find_codec(fmt)
    _check(raw, "raw", np.uint8, 1)
    if raw.shape[-1] % fmt.block.itemsize:
        raise ValueError(
            f"{fmt.name} rows need a multiple of {fmt.block.itemsize} bytes, not {raw.shape[-1]}"
        )
    rows = np.ascontiguousarray(raw).reshape(prod(raw.shape[:-1]), raw.shape[-1])
    n = raw.shape[-1] // fmt.block.itemsize * fmt.weights
    out, flat = _output(out, (*raw.shape[:-1], n), np.float32)
    if rows.size:
        (_dequantize_by_reference if reference else _dequantize_by_kernel)(rows, fmt, flat)
    if not np.may_share_memory(flat, out):
        out[...] = flat.reshape(out.shape)
    return out


def _dequantize_by_reference(rows: Array, fmt: Format, out: Array) -> None:
    blocks = rows.view(fmt.block)
    with np.errstate(all="ignore"):
        if fmt.weights == 1:
            from refimpl.quants import floats

            out[:] = floats.dequantize(blocks, fmt)
        else:
            out[:] = find_reference(fmt).dequantize(blocks.reshape(-1)).reshape(out.shape)


def _dequantize_by_kernel(rows: Array, fmt: Format, out: Array) -> None:
    if fmt.name == "f32":
        out[:] = rows.view(np.float32)
    elif fmt.weights == 1:
        kernel = getattr(import_module("refimpl.quants.floats_jit"), f"decode_{FLOATS[fmt.name]}")
        kernel(rows.view(np.uint16), out)
    else:
        find_kernel(fmt, "dequantize")(rows, out)


def _check(array: Any, name: str, dtypes: Any, axes: int) -> None:
    known = [np.dtype(d) for d in (dtypes if isinstance(dtypes, tuple) else (dtypes,))]
    if not isinstance(array, np.ndarray) or array.dtype not in known:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be an array of {' or '.join(map(str, known))}, not {kind}")
    if array.ndim < axes:
        raise ValueError(f"{name} needs at least {axes} axes, but has the shape {array.shape}")


def _importance(shape: tuple[int, ...], imatrix: Array | None) -> NDArray[np.float32]:
    """Bring the imatrix to [E, n]; E = 0 stands for none."""
    n = shape[-1]
    if imatrix is None:
        return np.empty((0, n), np.float32)
    _check(imatrix, "imatrix", np.float32, 1)
    stacked = len(shape) == 3 and imatrix.shape == (shape[0], n)
    if imatrix.shape != (n,) and not stacked:
        raise ValueError(f"imatrix of shape {imatrix.shape} does not fit weights of shape {shape}")
    if not np.isfinite(imatrix).all():
        raise ValueError("imatrix holds NaN or infinity")
    return np.ascontiguousarray(imatrix).reshape(shape[0] if stacked else 1, n)


def _widen(rows: Array, start: int, room: Array | None, bits: str) -> NDArray[np.float32]:
    """Rows as float32; bf16 bits go to the first rows of `room`. Raises NotFinite; `start` is the first row's index."""
    module = import_module(bits)
    if rows.dtype == np.uint16:
        narrow, rows = rows, allocate(rows.shape, np.float32) if room is None else room[: len(rows)]
        at = int(module.widen_bf16s(narrow.reshape(-1), rows.reshape(-1)))
    else:
        at = int(module.find_not_finite(rows.reshape(-1)))
    if at >= 0:
        row, column = divmod(at, rows.shape[1])
        raise NotFinite(start + row, column, float(rows[row, column]))
    return rows


def _output(out: Array | None, shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """Take the caller's array or a new one, and a contiguous [rows, last] array to fill for it."""
    if out is None:
        out = allocate(shape, dtype)
    _check(out, "out", dtype, 1)
    if out.shape != shape:
        raise ValueError(f"out has the shape {out.shape}, but the result has {shape}")
    flat = (prod(shape[:-1]), shape[-1])
    return out, out.reshape(flat) if out.flags.c_contiguous else np.empty(flat, dtype)


def allocate(shape: tuple[int, ...], dtype: Any) -> Array:
    """Make an uninitialized array that starts at a multiple of 64 bytes: vector stores then split no line."""
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return np.asarray(memory[start : start + size].view(dtype).reshape(shape))
