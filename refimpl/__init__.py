"""refimpl: the reference for GGUF k-quants and GLM-5.1, and the verifier that stands on it.

    >>> import refimpl
    >>> raw = refimpl.quantize(x, "q4_k")            # float32 [..., n] -> uint8 [..., bytes]
    >>> refimpl.verify("model.gguf", source="bf16/").verdict

Names resolve at first use, so that importing refimpl costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "dequantize", "formats", "load", "matmul", "open", "quantize", "verify"]

if TYPE_CHECKING:
    from refimpl.dots import matmul
    from refimpl.files.source import open
    from refimpl.model.glm import load
    from refimpl.quants import dequantize, quantize
    from refimpl.quants.formats import formats
    from refimpl.verifier.run import verify

_HOME = {
    "dequantize": "refimpl.quants",
    "formats": "refimpl.quants.formats",
    "load": "refimpl.model.glm",
    "matmul": "refimpl.dots",
    "open": "refimpl.files.source",
    "quantize": "refimpl.quants",
    "verify": "refimpl.verifier.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
