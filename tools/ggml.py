"""The ggml library inside the xllamacpp wheel, through ctypes: the oracle of the codecs."""

import ctypes as c
import glob
import importlib.metadata
import importlib.util
import os

import numpy as np
from numpy.typing import NDArray

from refimpl.quants.formats import find_codec

VERSION = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
_spec = importlib.util.find_spec("xllamacpp")
assert _spec and _spec.origin, "the native library comes with the extra `oracle`"
LIBRARY = c.CDLL(glob.glob(os.path.join(os.path.dirname(_spec.origin), "*.so"))[0])
LIBRARY.ggml_cpu_init()


def native_name(fmt: str) -> str:
    """What ggml's functions call a format: the k of k-quants is a capital."""
    return fmt[:-1] + "K" if fmt.endswith("_k") else fmt


def quantize(
    x: NDArray[np.float32], fmt: str, imatrix: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Encode [R, n] float32, with an imatrix row [n] or without, by quantize_<type>."""
    rows, n = x.shape
    out = np.full((rows, find_codec(fmt).row_bytes(n)), 0xAA, np.uint8)
    x = np.ascontiguousarray(x)
    if fmt in ("f16", "bf16"):
        convert = getattr(LIBRARY, {"f16": "ggml_fp32_to_fp16_row", "bf16": "ggml_fp32_to_bf16_row"}[fmt])
        convert.restype, convert.argtypes = None, [c.c_void_p, c.c_void_p, c.c_int64]
        convert(x.ctypes.data, out.ctypes.data, x.size)
        return out
    LIBRARY.ggml_quantize_init(find_codec(fmt).id)  # the codebooks' neighbours, once: it takes seconds
    encode = getattr(LIBRARY, f"quantize_{native_name(fmt)}")
    encode.restype, encode.argtypes = c.c_size_t, [c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_void_p]
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix)
        assert imatrix.shape == (n,) and imatrix.dtype == np.float32
    written = encode(
        x.ctypes.data, out.ctypes.data, rows, n, None if imatrix is None else imatrix.ctypes.data
    )
    assert written == out.size
    return out


def dequantize(raw: NDArray[np.uint8], fmt: str) -> NDArray[np.float32]:
    """Decode [R, bytes] uint8 by dequantize_row_<type>."""
    kind = find_codec(fmt)
    raw = np.ascontiguousarray(raw)
    out = np.full((len(raw), raw.shape[1] // kind.block.itemsize * kind.weights), np.nan, np.float32)
    decode = getattr(
        LIBRARY,
        {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}.get(fmt)
        or f"dequantize_row_{native_name(fmt)}",
    )
    decode.restype, decode.argtypes = None, [c.c_void_p, c.c_void_p, c.c_int64]
    decode(raw.ctypes.data, out.ctypes.data, out.size)
    return out
