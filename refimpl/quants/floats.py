"""F32, F16 and BF16: one weight per block, no scales."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_bf16, decode_half, encode_bf16, encode_half
from refimpl.quants.formats import BF16, F16, F32, Format

Floats = NDArray[np.float32]


def quantize(x: Floats, fmt: Format) -> NDArray[Any]:
    """Encode weights as floats of the given format.

    x      : [R, n] float32, finite
    return : [R, n] of fmt.block: float32 as it is, fp16 or bf16 rounded to nearest, ties to even

    Rounds: once.
    Source: ggml.c ggml_fp32_to_fp16_row, ggml_fp32_to_bf16_row, llama.cpp 0c1e570.
    """
    if fmt == F32:
        return x
    return encode_half(x).view(np.float16) if fmt == F16 else encode_bf16(x)


def dequantize(values: NDArray[Any], fmt: Format) -> Floats:
    """Widen floats of the given format to float32, exactly.

    values : [...] of fmt.block
    return : [...] float32
    """
    if fmt == F32:
        return values
    assert fmt in (F16, BF16), fmt
    return decode_half(values.view(np.uint16)) if fmt == F16 else decode_bf16(values)
