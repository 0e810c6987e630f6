"""The functions that a ggml library may export, as far as refimpl defines what they must do.

kind      C signature                                                                       must give
decode    void (const void * blocks, float * y, int64_t n)                                  dequantize
encode    size_t (const float * x, void * blocks, int64_t rows, int64_t n, const float * imatrix)  quantize
row       void (const float * x, void * blocks, int64_t n)                                  quantize, plain

Source: ggml-quants.h, ggml-cpu/quants.h and ggml.h, llama.cpp 0c1e570.
"""

import re
from dataclasses import dataclass

from refimpl.quants.formats import Format, formats

FLOATS: dict[str, dict[str, tuple[str, ...]]] = {
    "decode": {
        "f16": ("ggml_fp16_to_fp32_row", "ggml_cpu_fp16_to_fp32"),
        "bf16": ("ggml_bf16_to_fp32_row", "ggml_cpu_bf16_to_fp32"),
    },
    "row": {
        "f16": ("ggml_fp32_to_fp16_row", "ggml_cpu_fp32_to_fp16"),
        "bf16": ("ggml_fp32_to_bf16_row", "ggml_fp32_to_bf16_row_ref", "ggml_cpu_fp32_to_bf16"),
    },
}
ACTIVATIONS = ("quantize_row_q8_0",)  # vectorised encoders of activations round otherwise than quantize_q8_0


@dataclass(frozen=True)
class Symbol:
    """One exported function and what it is held against."""

    name: str
    kind: str
    format: Format


def spell(name: str) -> str:
    """A format's name as ggml writes it: q4_k is q4_K, all others are as here."""
    return re.sub(r"^(q\d)_k$", r"\1_K", name)


def list_symbols() -> list[Symbol]:
    """Every function that refimpl can judge, format by format."""
    found = []
    for name, fmt in formats.items():
        for kind, pattern in (
            ("decode", "dequantize_row_{}"),
            ("encode", "quantize_{}"),
            ("row", "quantize_row_{}_ref"),
            ("row", "quantize_row_{}"),
        ):
            symbol = pattern.format(spell(name))
            if fmt.weights > 1 and symbol not in ACTIVATIONS:
                found.append(Symbol(symbol, kind, fmt))
        for kind, names in FLOATS.items():
            found += [Symbol(symbol, kind, fmt) for symbol in names.get(name, ())]
    return found
