"""The functions that a ggml library may export, as far as refimpl defines what they must do.

kind      C signature                                                                       must give
decode    void (const void * blocks, float * y, int64_t n)                                  dequantize
encode    size_t (const float * x, void * blocks, int64_t rows, int64_t n, const float * imatrix)  quantize
row       void (const float * x, void * blocks, int64_t n)                                  quantize, plain; of
                                                                                            iq4_nl quantize_row
activation  as row: q8_0, q8_1, q8_K                                                        dots.encode
dot       void (int n, float * s, size_t, const void * blocks, size_t, const void * y, size_t, int one)  dots.matmul
product   as dot, both of one float type                                                    the exact sum

Source: ggml-quants.h, ggml-cpu/quants.h and ggml.h, llama.cpp 0c1e570.
"""

import re
from dataclasses import dataclass

from refimpl.quants.formats import Q8_K, Format, activations, formats

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


@dataclass(frozen=True)
class Symbol:
    """One exported function and what it is held against."""

    name: str
    kind: str
    format: Format
    partner: str = ""  # dot: the format of the activations


def spell(name: str) -> str:
    """A format's name as ggml writes it: q4_k is q4_K, all others are as here."""
    return re.sub(r"^(q\d)_k$", r"\1_K", name)


def partner_of(fmt: Format) -> str:
    """The activations that ggml multiplies a type with."""
    if fmt.weights == 256:
        return "q8_k"
    return "q8_1" if fmt.name in ("q4_1", "q5_1") else "q8_0"


def list_symbols() -> list[Symbol]:
    """Every function that refimpl can judge, format by format."""
    found = []
    for name, fmt in formats.items():
        own = spell(name)
        if fmt.weights > 1:
            found.append(Symbol(f"dequantize_row_{own}", "decode", fmt))
            found.append(Symbol(f"quantize_{own}", "encode", fmt))
            if not fmt.needy:  # ggml encodes no single row of a type that needs an imatrix
                found.append(Symbol(f"quantize_row_{own}_ref", "row", fmt))
                if name not in activations:
                    found.append(Symbol(f"quantize_row_{own}", "row", fmt))
            partner = partner_of(fmt)
            for ending in ("_generic", ""):
                found.append(Symbol(f"ggml_vec_dot_{own}_{spell(partner)}{ending}", "dot", fmt, partner))
        else:
            found += [Symbol(s, kind, fmt) for kind, names in FLOATS.items() for s in names.get(name, ())]
            found.append(Symbol(f"ggml_vec_dot_{name}", "product", fmt))
    found.append(Symbol("dequantize_row_q8_K", "decode", Q8_K))
    for name, fmt in activations.items():
        for ending in ("_ref", "_generic", ""):
            if (name, ending) != ("q8_0", "_ref"):  # that one writes tensors: a row encoder, above
                found.append(Symbol(f"quantize_row_{spell(name)}{ending}", "activation", fmt))
    return found
