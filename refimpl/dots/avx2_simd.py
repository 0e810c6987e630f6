"""The order `avx2` on vectors: which kernel multiplies each format, and what it takes of the activations."""

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import avx2_jit, small_simd, super_simd
from refimpl.quants.formats import Q4_K, Q5_0, Q6_K, Q8_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

SMALL = {
    Q8_0.id: (small_simd.avx2_q8_0, 128),
    Q5_0.id: (small_simd.avx2_q5_0, 16),
}  # and the bias of the codes
SUPER = {Q4_K.id: super_simd.avx2_q4_k, Q6_K.id: super_simd.avx2_q6_k}


def multiply(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, out: Floats
) -> None:
    """Multiply rows of blocks with tokens, as avx2_jit.multiply does."""
    if fmt in SUPER:
        SUPER[fmt](raw, acts, act_d, bsums, out)
    elif fmt in SMALL and len(raw) >= small_simd.ROWS:
        kernel, bias = SMALL[fmt]
        kernel(raw, acts, act_d, small_simd.sum_fours(acts, bias), out)
    else:
        avx2_jit.multiply(fmt, raw, acts, act_d, act_s, bsums, out)
