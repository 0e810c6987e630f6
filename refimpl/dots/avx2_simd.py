"""The order `avx2` on vectors: which kernel multiplies each format, and what it takes of the activations."""

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import (
    avx2_jit,
    iq4_xs_simd,
    levels_simd,
    many_simd,
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
    Q8_0.id: (small_simd.avx2_q8_0, 128),
    Q4_0.id: (small_simd.avx2_q4_0, 8),
    Q4_1.id: (small_simd.avx2_q4_1, 0),
    Q5_0.id: (small_simd.avx2_q5_0, 16),
    Q5_1.id: (small_simd.avx2_q5_1, 0),
}
SUPER = {Q4_K.id: super_simd.avx2_q4_k, Q6_K.id: super_simd.avx2_q6_k}

RUNS = {  # and the bias of codes that must lie around 0
    Q2_K.id: (runs_simd.avx2_q2_k, 0),
    Q3_K.id: (runs_simd.avx2_q3_k, 4),
    Q5_K.id: (runs_simd.avx2_q5_k, 0),
}


LEVELS = {  # and the bias of the levels
    IQ4_NL.id: (levels_simd.avx2_iq4_nl, levels_simd.IQ4_BIAS),
    MXFP4.id: (levels_simd.avx2_mxfp4, levels_simd.FP4_BIAS),
}


def multiply(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, out: Floats
) -> None:
    """Multiply rows of blocks with tokens, as avx2_jit.multiply does."""
    if fmt in SUPER:
        SUPER[fmt](raw, acts, act_d, bsums, out)
    elif fmt in RUNS:
        run, bias = RUNS[fmt]
        run(raw, acts, act_d, bsums, super_simd.sum_twos(acts, bias), out)
    elif fmt in many_simd.KERNELS and len(raw) >= many_simd.ROWS and len(acts) >= many_simd.TOKENS:
        many_simd.multiply(fmt, raw, acts, act_d, out)
    elif fmt in SMALL and len(raw) >= small_simd.ROWS:
        kernel, bias = SMALL[fmt]
        kernel(raw, acts, act_d, act_s, small_simd.sum_fours(acts, bias), out)
    elif fmt in LEVELS and len(raw) >= small_simd.ROWS:
        level, bias = LEVELS[fmt]
        level(raw, acts, act_d, small_simd.sum_fours(acts, bias), out)
    elif fmt == NVFP4.id and len(raw) >= small_simd.ROWS:
        acts = nvfp4_simd.sort(acts)
        nvfp4_simd.avx2_nvfp4(raw, acts, act_d, small_simd.sum_fours(acts, levels_simd.FP4_BIAS), out)
    elif fmt in ternary_simd.AVX2:
        ternary_simd.AVX2[fmt](raw, acts, act_d, bsums, out)
    elif fmt in within_simd.FORMATS and len(raw) >= within_simd.ROWS:
        within_simd.multiply_avx2(fmt, raw, acts, act_d, out)
    elif fmt in SHIFTED:
        shifted = import_module("refimpl.dots.shifted_simd")
        shifted.AVX2[fmt](raw, acts, act_d, bsums, out)
    elif fmt in FACTORS:
        signed = import_module("refimpl.dots.signed_simd")  # grids are loaded for who needs them
        signed.AVX2[fmt](raw, acts, act_d, out)
        out *= FACTORS[fmt]
    elif fmt == IQ4_XS.id:
        iq4_xs_simd.avx2_iq4_xs(raw, iq4_xs_simd.sort(acts), act_d, out)
    else:
        avx2_jit.multiply(fmt, raw, acts, act_d, act_s, bsums, out)
