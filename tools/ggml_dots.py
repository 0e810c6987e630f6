"""The native library's dot products: ggml_vec_dot_* symbols, and ggml_mul_mat through a graph of one operation."""

import ctypes as c
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.quants.formats import find_codec
from tools.ggml import LIBRARY

Array = NDArray[Any]
F32 = 0  # ggml's id of the type


def native_name(fmt: str) -> str:
    """q4_k is q4_K in ggml's symbols."""
    return fmt.replace("_k", "_K")


def vec_dot(fmt: str, partner: str, suffix: str = "") -> Any:
    """ggml_vec_dot_<fmt>_<partner><suffix>: (n, result, 0, weights, 0, activations, 0, 1), sizes and addresses."""
    function = getattr(LIBRARY, f"ggml_vec_dot_{native_name(fmt)}_{native_name(partner)}{suffix}")
    function.restype = None
    function.argtypes = [c.c_int, *(c.c_void_p, c.c_size_t) * 3, c.c_int]
    return function


def multiply(
    raw: Array, fmt: str, acts: Array, partner: str, n: int, suffix: str = ""
) -> NDArray[np.float32]:
    """Rows of blocks [m, bytes] with encoded tokens [t, bytes]: [t, m] float32, one vec_dot each."""
    out, function = np.full((len(acts), len(raw)), np.nan, np.float32), vec_dot(fmt, partner, suffix)
    size = out.itemsize
    for t in range(len(acts)):
        for r in range(len(raw)):
            at = out.ctypes.data + (t * len(raw) + r) * size
            function(n, at, 0, raw[r].ctypes.data, 0, acts[t].ctypes.data, 0, 1)
    return out


class _Parameters(c.Structure):
    _fields_ = (("size", c.c_size_t), ("buffer", c.c_void_p), ("no_alloc", c.c_bool))


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function


def prepare_mul_mat(raw: Array, fmt: str, x: Array, threads: int = 1) -> Callable[[], NDArray[np.float32]]:
    """ggml_mul_mat of blocks [m, bytes] and float32 tokens [t, n], as a function that computes it anew: [t, m].

    The result of a call is overwritten by the next.
    """
    p = c.c_void_p
    new = _declare("ggml_new_tensor_2d", p, p, c.c_int, c.c_int64, c.c_int64)
    data = _declare("ggml_get_data", p, p)
    (t, n), m = x.shape, len(raw)
    room = raw.nbytes + x.nbytes + 4 * t * m + 2 * x.nbytes + (64 << 20)
    context = _declare("ggml_init", p, _Parameters)(_Parameters(room, None, False))
    weights, tokens = new(context, find_codec(fmt).id, n, m), new(context, F32, n, t)
    result = _declare("ggml_mul_mat", p, p, p, p)(context, weights, tokens)
    graph = _declare("ggml_new_graph", p, p)(context)
    _declare("ggml_build_forward_expand", None, p, p)(graph, result)
    c.memmove(data(weights), raw.ctypes.data, raw.nbytes)
    c.memmove(data(tokens), np.ascontiguousarray(x).ctypes.data, x.nbytes)
    run = _declare("ggml_graph_compute_with_ctx", c.c_int, p, p, c.c_int)
    free = _declare("ggml_free", None, p)
    out = np.ctypeslib.as_array(c.cast(data(result), c.POINTER(c.c_float)), (t, m))

    def compute() -> NDArray[np.float32]:
        status = run(context, graph, threads)
        assert status == 0, f"ggml_graph_compute: {status}"
        return out

    compute.free = lambda: free(context)  # type: ignore[attr-defined]
    return compute


def mul_mat(raw: Array, fmt: str, x: Array) -> NDArray[np.float32]:
    """ggml_mul_mat of blocks [m, bytes] and float32 tokens [t, n]: [t, m] float32."""
    compute = prepare_mul_mat(raw, fmt, x)
    result = compute().copy()
    compute.free()  # type: ignore[attr-defined]
    return result
