"""The orders `generic` and `generic-fma` on vectors: which kernel multiplies each format, and what it takes."""

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import (
    generic_jit,
    levels_simd,
    nvfp4_simd,
    runs_simd,
    small_simd,
    super_simd,
    ternary_simd,
    within_simd,
)
from refimpl.dots.factors import FACTORS, SHIFTED
from refimpl.quants.formats import (
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    NVFP4,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
)

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

SMALL = {  # and the bias of the codes
    Q8_0.id: (small_simd.generic_q8_0, 128),
    Q4_0.id: (small_simd.generic_q4_0, 8),
    Q4_1.id: (small_simd.generic_q4_1, 0),
    Q5_0.id: (small_simd.generic_q5_0, 16),
    Q5_1.id: (small_simd.generic_q5_1, 0),
}

TURNED = {  # and the bias of codes that must lie around 0
    Q3_K.id: (runs_simd.generic_q3_k, 4),
    Q5_K.id: (runs_simd.generic_q5_k, 0),
}


LEVELS = {  # and the bias of the levels
    IQ4_NL.id: (levels_simd.generic_iq4_nl, levels_simd.IQ4_BIAS),
    MXFP4.id: (levels_simd.generic_mxfp4, levels_simd.FP4_BIAS),
    IQ4_XS.id: (levels_simd.generic_iq4_xs, levels_simd.IQ4_BIAS),
}


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
        super_simd.generic_q6_k(raw, turned, act_d, super_simd.sum_twos(turned, 32), fused, out)
    elif fmt in TURNED:
        run, bias = TURNED[fmt]
        turned = turn(acts)
        run(raw, turned, act_d, bsums, super_simd.sum_twos(turned, bias), fused, out)
    elif fmt == Q2_K.id:
        runs_simd.generic_q2_k(raw, acts, act_d, bsums, super_simd.sum_twos(acts, 0), fused, out)
    elif fmt in SMALL and len(raw) >= small_simd.ROWS:
        kernel, bias = SMALL[fmt]
        kernel(raw, acts, act_d, act_s, small_simd.sum_fours(acts, bias), fused, out)
    elif fmt in LEVELS and len(raw) >= small_simd.ROWS:
        level, bias = LEVELS[fmt]
        level(raw, acts, act_d, small_simd.sum_fours(acts, bias), fused, out)
    elif fmt == NVFP4.id and len(raw) >= small_simd.ROWS:
        acts = nvfp4_simd.sort(acts)
        fours = small_simd.sum_fours(acts, levels_simd.FP4_BIAS)
        nvfp4_simd.generic_nvfp4(raw, acts, act_d, fours, fused, out)
    elif fmt in ternary_simd.GENERIC:
        ternary_simd.GENERIC[fmt](raw, acts, act_d, bsums, fused, out)
    elif fmt in within_simd.FORMATS and len(raw) >= within_simd.ROWS:
        within_simd.multiply_generic(fmt, raw, acts, act_d, fused, out)
    elif fmt in SHIFTED:
        shifted = import_module("refimpl.dots.shifted_simd")
        shifted.GENERIC[fmt](raw, acts, act_d, bsums, fused, out)
    elif fmt in FACTORS:
        signed = import_module("refimpl.dots.signed_simd")  # grids are loaded for who needs them
        signed.GENERIC[fmt](raw, acts, act_d, fused, out)
        out *= FACTORS[fmt]
    else:
        generic_jit.multiply(fmt, raw, acts, act_d, act_s, bsums, fused, out)


def turn(acts: Codes) -> Codes:
    """The activations l, l + 8, l + 16, l + 24 of each 32 side by side."""
    turned = acts.reshape(len(acts), -1, 4, 8).swapaxes(2, 3)
    return np.ascontiguousarray(turned).reshape(acts.shape)
