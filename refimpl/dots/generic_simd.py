"""The orders `generic` and `generic-fma` on vectors: which kernel multiplies each format, and what it takes."""

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import generic_jit, small_simd, super_simd
from refimpl.quants.formats import Q4_K, Q5_0, Q6_K, Q8_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

SMALL = {
    Q8_0.id: (small_simd.generic_q8_0, 128),
    Q5_0.id: (small_simd.generic_q5_0, 16),
}  # and the codes' bias


def multiply(
    fmt: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    act_s: Floats,
    bsums: Shorts,
    fused: bool,
    out: Floats,
) -> None:
    """Multiply rows of blocks with tokens, as generic_jit.multiply does."""
    if fmt == Q4_K.id:
        super_simd.generic_q4_k(raw, turn(acts), act_d, bsums, fused, out)
    elif fmt == Q6_K.id:
        turned = turn(acts)
        twos = turned.reshape(len(acts), -1, 2).sum(2, dtype=np.int16) * np.int16(32)
        super_simd.generic_q6_k(raw, turned, act_d, twos, fused, out)
    elif fmt in SMALL and len(raw) >= small_simd.ROWS:
        kernel, bias = SMALL[fmt]
        kernel(raw, acts, act_d, small_simd.sum_fours(acts, bias), fused, out)
    else:
        generic_jit.multiply(fmt, raw, acts, act_d, act_s, bsums, fused, out)


def turn(acts: Codes) -> Codes:
    """The activations l, l + 8, l + 16, l + 24 of each 32 side by side."""
    turned = acts.reshape(len(acts), -1, 4, 8).swapaxes(2, 3)
    return np.ascontiguousarray(turned).reshape(acts.shape)
