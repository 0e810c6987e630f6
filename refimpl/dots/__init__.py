"""Dot products of quantized weights, in named orders: the same bits from the reference and from the kernels.

A format's weights are multiplied with activations quantized as ggml quantizes them (activation= names how, PARTNERS
says which a format takes), or with float32 activations: then blocks are decoded, and products are added in
refimpl's own order (arith.sums.dot_lanes). One token or many, a result has the same bits.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.engine import share, threads_worth
from refimpl.quants import allocate, dequantize
from refimpl.quants.formats import CODEBOOKS, Format, activations, find_codec

__all__ = ["ORDERS", "PARTNERS", "encode", "matmul", "matmul_each"]

Array = NDArray[Any]
Work = Callable[[slice, Array], Array]  # a range of rows and where their products go; gives that back

# The activations that ggml quantizes for each format's dot product.
PARTNERS = MappingProxyType(
    {
        **dict.fromkeys(("q8_0", "q4_0", "q5_0", "iq4_nl", "mxfp4", "nvfp4", "q1_0", "q2_0"), "q8_0"),
        **dict.fromkeys(("q4_1", "q5_1"), "q8_1"),
        **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0"), "q8_k"),
        **dict.fromkeys((fmt.name for fmt in CODEBOOKS), "q8_k"),
    }
)
ORDERS = ("generic", "generic-fma", "avx2", "tiled")
KERNELS = MappingProxyType({"generic": "_simd", "generic-fma": "_simd", "avx2": "_simd", "tiled": "_simd"})
LANES = 16
FEW = 4  # fewer tokens are multiplied in one call, where a format has such a kernel
TILE = 1 << 17  # decoded weights that are multiplied at a time: 512 KiB


def encode(x: Array, fmt: str, encoder: str = "reference", reference: bool = False) -> NDArray[np.uint8]:
    """Quantize activations, byte for byte as ggml does before a dot product.

    x       : [t, n] float32
    fmt     : "q8_0", "q8_1" or "q8_k"
    encoder : "reference": ggml's quantize_row_*_ref; "avx2": what ggml-cpu does on x86-64 with AVX2
    return  : [t, bytes] uint8
    """
    kind, x = activations[fmt], np.ascontiguousarray(x)
    name = f"encode_{fmt}" + ("_avx2" if encoder == "avx2" and fmt != "q8_k" else "")
    size = kind.row_bytes(x.shape[1])
    if reference:
        with np.errstate(all="ignore"):
            blocks = getattr(import_module("refimpl.dots.encoders"), name)(x)
        return np.ascontiguousarray(blocks).view(np.uint8).reshape(len(x), size)
    out = np.empty((len(x), size), np.uint8)
    _find("encoders_jit", name)(x, out)
    return out


@cache
def _find(module: str, name: str) -> Any:
    """A kernel, or a text's multiply: looked for once, because decoding asks dozens of times a token."""
    return getattr(import_module(f"refimpl.dots.{module}"), name)


def matmul(
    raw: Array,
    fmt: str | Format,
    x: Array,
    activation: str = "q8_k",
    order: str = "generic",
    reference: bool = False,
    jobs: int = 1,
) -> NDArray[np.float32]:
    """Multiply a matrix of weights with tokens: x W^T.

    y[t, r] = sum over i of x[t, i] * w[r, i], added in the named order

    raw        : W [m, bytes] uint8, rows of blocks
    x          : [t, n] float32
    activation : "q8_0", "q8_1" or "q8_k": x is quantized first, to what ggml multiplies this format with
                 (PARTNERS); "f32": blocks are decoded instead, and added in refimpl's own order
    order      : "generic": the text of ggml's *_generic functions, every operation rounded;
                 "generic-fma": the same, as gcc compiles it for CPUs with FMA;
                 "avx2": what ggml_vec_dot_* gives on x86-64, and so ggml's decode of up to 7 tokens;
                 "tiled": what ggml_mul_mat gives from 8 tokens on; where it has no tiled kernel, avx2.
                 avx2 and tiled quantize q8_0 and q8_1 activations as ggml-cpu does; "f32" knows "generic" alone
    reference  : True takes the NumPy text
    jobs       : threads
    return     : [t, m] float32

    Rounds: as dots/generic.py, avx2.py and tiled.py say, and arith.sums.dot_lanes.
    Raises: ValueError or TypeError for shapes, types and pairs that do not fit.
    Source: ggml-cpu: quants.c, arch/x86/quants.c, tiled/; llama.cpp 0c1e570.
    """
    fmt = find_codec(fmt)
    n = _check(raw, fmt, x)
    if activation != "f32" and activation != PARTNERS.get(fmt.name):
        partner = PARTNERS.get(fmt.name, "f32")
        raise ValueError(f"{fmt.name} weights are multiplied with {partner} activations, not {activation!r}")
    if order not in (ORDERS if activation != "f32" else ORDERS[:1]):
        raise ValueError(f"order {order!r} is not one of {', '.join(ORDERS)}, or not one of {activation}")
    raw, x = np.ascontiguousarray(raw), np.ascontiguousarray(x)
    out = np.empty((len(x), len(raw)), np.float32)
    if not n:
        out[:] = 0
        return out
    if not out.size:
        return out
    jobs = threads_worth(jobs, x.size * len(raw), _times(activation, len(x)))
    once = None if reference else _find_once(fmt, order, len(x), len(raw) // jobs)
    if once is not None and jobs == 1:
        once(raw, x, out)
        return out
    work: Work
    if once is not None:
        work = _prepare_once(once, raw, x)
    elif activation == "f32":
        work = _prepare_floats(raw, fmt, x, reference)
    else:
        work = _prepare_codes(raw, fmt, x, activation, order, reference)

    def put(rows: slice) -> None:
        part = out[:, rows]
        if part.flags.c_contiguous:
            work(rows, part)
        else:
            part[:] = work(rows, np.empty(part.shape, np.float32))

    share(put, len(raw), jobs)
    return out


def matmul_each(
    raw: Array, fmt: str | Format, x: Array, activation: str = "q8_k", order: str = "generic", jobs: int = 1
) -> NDArray[np.float32]:
    """Multiply several matrices, each with tokens of its own: one head's, say. A result has the bits of matmul.

    raw    : W [H, m, bytes] uint8
    x      : [H, t, n] float32
    return : [H, t, m] float32
    """
    fmt = find_codec(fmt)
    if raw.ndim != 3 or x.ndim != 3 or len(raw) != len(x):
        raise ValueError(f"matrices {raw.shape} and tokens {x.shape} do not fit each other")
    heads, m, t = len(raw), raw.shape[1], x.shape[1]
    n = _check(raw[0], fmt, x[0]) if heads else 0
    out = np.empty((heads, t, m), np.float32)
    if not out.size or not n:
        out[:] = 0
        return out
    if activation == "f32" or activation != PARTNERS.get(fmt.name) or order not in ORDERS:
        for h in range(heads):
            out[h] = matmul(raw[h], fmt, x[h], activation, order)
        return out
    jobs = threads_worth(jobs, x.size * m, _times(activation, t))
    once = _find_once(fmt, order, t, m)
    if once is not None:

        def work_once(some: slice) -> None:
            for h in range(some.start, some.stop):
                once(np.ascontiguousarray(raw[h]), np.ascontiguousarray(x[h]), out[h])

        share(work_once, heads, jobs)
        return out
    kind = activations[activation]
    encoder = "reference" if order.startswith("generic") else "avx2"
    codes = encode(x.reshape(heads * t, n), activation, encoder)
    multiply = _find(f"{order.removesuffix('-fma')}{KERNELS[order]}", "multiply")
    fused = [order == "generic-fma"] if order.startswith("generic") else []

    def work(some: slice) -> None:
        for h in range(some.start, some.stop):
            acts = _split(codes[h * t : (h + 1) * t], kind)
            multiply(fmt.id, np.ascontiguousarray(raw[h]), *acts, *fused, out[h])

    share(work, heads, jobs)
    return out


def _times(activation: str, tokens: int) -> int:
    """How much more work threads take to be worth it: each lays many encoded tokens out for itself."""
    return 1 if activation == "f32" or tokens < FEW else 4


def _find_once(fmt: Format, order: str, tokens: int, rows: int) -> Any:
    """The kernel that does all at once for a few tokens and so many rows, where there is one."""
    if order != "avx2" or not tokens < FEW <= rows:
        return None
    return _find("once_simd", "KERNELS").get(fmt.id)


def _prepare_once(once: Any, raw: Array, x: Array) -> Work:
    def work(rows: slice, out: Array) -> Array:
        once(raw[rows], x, out)
        return out

    return work


def _check(raw: Any, fmt: Format, x: Any) -> int:
    """The number of weights in a row. Raises TypeError or ValueError where raw and x do not fit."""
    for array, name, dtype in ((raw, "raw", np.uint8), (x, "x", np.float32)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"{name} must be an array of {np.dtype(dtype)}, not {kind}")
        if array.ndim != 2:
            raise ValueError(f"{name} needs 2 axes, but has the shape {array.shape}")
    size = fmt.row_bytes(x.shape[1])
    if raw.shape[1] != size:
        raise ValueError(
            f"{x.shape[1]} activations a token need rows of {size} bytes of {fmt.name}, not {raw.shape[1]}"
        )
    return int(x.shape[1])


def _split(raw: Array, kind: Format) -> tuple[Array, ...]:
    """Encoded tokens taken apart, as planes.split does it."""
    t, size = raw.shape
    blocks = size // kind.block.itemsize
    s, sums = (t, blocks if kind.name == "q8_1" else 0), (t, blocks * 16 if kind.name == "q8_k" else 0)
    acts = (
        np.empty((t, blocks * kind.weights), np.int8), np.empty((t, blocks), np.float32), np.empty(s, np.float32),
        np.empty(sums, np.int16),
    )  # fmt: skip
    _find("split_simd", f"split_{kind.name}")(raw, *acts)
    return acts


def _prepare_codes(raw: Array, fmt: Format, x: Array, activation: str, order: str, reference: bool) -> Work:
    """Quantize the tokens; return the work on a range of rows."""
    encoder = "reference" if order.startswith("generic") else "avx2"
    kind = activations[activation]
    codes = encode(x, activation, encoder, reference)
    multiply = _find(f"{order.removesuffix('-fma')}{'' if reference else KERNELS[order]}", "multiply")
    fused = [order == "generic-fma"] if order.startswith("generic") else []
    if not reference:
        acts = _split(codes, kind)

        def work(rows: slice, out: Array) -> Array:
            multiply(fmt.id, raw[rows], *acts, *fused, out)
            return out

        return work
    planes = import_module("refimpl.dots.planes")
    unpack = _find("codebooks", "unpack") if fmt in CODEBOOKS else planes.unpack

    def work_by_reference(rows: slice, out: Array) -> Array:
        with np.errstate(all="ignore"):
            multiply(unpack(raw[rows], fmt), planes.split(codes, kind), fmt.name, *fused, out)
        return out

    return work_by_reference


def _prepare_floats(raw: Array, fmt: Format, x: Array, reference: bool) -> Work:
    """Pad the tokens to whole lanes; return the work on a range of rows, decoded some at a time."""
    n = x.shape[1]
    whole = -(-n // LANES) * LANES
    if whole != n:
        x = np.concatenate([x, np.zeros((len(x), whole - n), np.float32)], 1)
    most = max(8, TILE // whole // 8 * 8)

    def work(rows: slice, out: Array) -> Array:
        if reference:
            floats = import_module("refimpl.dots.floats")
            with np.errstate(all="ignore"):
                floats.multiply(dequantize(raw[rows], fmt, reference=True), x[:, :n], out)
            return out
        multiply = _find("floats_simd", "multiply")
        if whole == n and fmt.name in ("f32", "bf16"):
            multiply(raw[rows].view(np.float32 if fmt.name == "f32" else np.uint16), x, out)
            return out
        tile = allocate((most, whole), np.float32)
        tile[:, n:] = 0
        for r in range(rows.start, rows.stop, most):
            some = raw[r : min(r + most, rows.stop)]
            dequantize(some, fmt, out=tile[: len(some), :n])
            part = np.empty((len(x), len(some)), np.float32)
            multiply(tile[: len(some)], x, part)
            out[:, r - rows.start : r - rows.start + len(some)] = part
        return out

    return work
