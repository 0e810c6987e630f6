"""Activations as ggml quantizes them before a dot product: q8_0, q8_1, q8_K blocks of signed bytes.

q8_0 | d: fp16 | qs: 32 x int8 |                            x[i] = d * qs[i]
q8_1 | d: fp16 | s: fp16 | qs: 32 x int8 |                  s = d * sum(qs): what a weight's min is multiplied with
q8_K | d: float32 | qs: 256 x int8 | bsums: 16 x int16 |    bsums[g] = sum of the 16 qs of group g, for mins too

The encoders of the C reference are quantize_row_*_ref. ggml-cpu's AVX2 encoders of q8_0 and q8_1 are others:
they multiply by 127/max instead of 1/d, and round halves to even. Its q8_K is the reference.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import encode_half, nearest_int, truncate
from refimpl.quants.formats import Q8_0, Q8_1, Q8_K
from refimpl.quants.q8_0 import round_codes

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

GROUP = 16  # codes that one of q8_K's bsums adds up
INT_MIN = np.int32(-(2**31))


def encode_q8_0(x: Floats) -> Records:
    """Encode activations to Q8_0 blocks, as quantize_row_q8_0_ref does.

    d = max|x| / 127,  qs[i] = round(x[i] * (1/d)), ties away from zero

    x      : [t, n] float32
    return : [t, n/32] Q8_0 records

    Rounds: every operation, to float32; d once more, to fp16.
    Source: ggml-quants.c quantize_row_q8_0_ref, llama.cpp 0c1e570.
    """
    d, codes = round_codes(x.reshape(-1, Q8_0.weights))
    return _pack(Q8_0.block, x, d, codes)


def encode_q8_1(x: Floats) -> Records:
    """Encode activations to Q8_1 blocks, as quantize_row_q8_1_ref does: Q8_0's codes, and s.

    s = sum(qs) * d, with the d that is not yet rounded to fp16

    x      : [t, n] float32
    return : [t, n/32] Q8_1 records

    Rounds: every operation, to float32; d and s once more, to fp16.
    Source: ggml-quants.c quantize_row_q8_1_ref, llama.cpp 0c1e570.
    """
    d, codes = round_codes(x.reshape(-1, Q8_1.weights))
    return _pack(Q8_1.block, x, d, codes, codes.sum(1))


def round_codes_avx2(x: Floats) -> tuple[Floats, Codes]:
    """Round each block as ggml's AVX2 encoders do.

    d = max|x| / 127,  q[i] = rint(x[i] * (127/max|x|)), ties to even

    x      : [N, 32] float32
    return : d [N] float32, q [N, 32] int32; INT_MIN where 127/max overflowed

    Rounds: every operation, to float32.
    """
    largest = np.abs(x).max(1)
    inverse = np.where(largest != 0, np.float32(127) / largest, np.float32(0))
    return largest / np.float32(127), truncate(np.rint(x * inverse[:, None]))


def encode_q8_0_avx2(x: Floats) -> Records:
    """Encode activations to Q8_0 blocks, as ggml-cpu does on CPUs with AVX2: round_codes_avx2, saturated.

    x      : [t, n] float32
    return : [t, n/32] Q8_0 records

    Source: ggml-cpu/arch/x86/quants.c quantize_row_q8_0, llama.cpp 0c1e570.
    """
    d, codes = round_codes_avx2(x.reshape(-1, Q8_0.weights))
    return _pack(Q8_0.block, x, d, codes.clip(-128, 127))


def encode_q8_1_avx2(x: Floats) -> Records:
    """Encode activations to Q8_1 blocks, as ggml-cpu does on CPUs with AVX2; s adds the codes before they saturate.

    x      : [t, n] float32
    return : [t, n/32] Q8_1 records

    Source: ggml-cpu/arch/x86/quants.c quantize_row_q8_1, llama.cpp 0c1e570.
    """
    d, codes = round_codes_avx2(x.reshape(-1, Q8_1.weights))
    return _pack(Q8_1.block, x, d, codes.clip(-128, 127), codes.sum(1, dtype=np.int32))


def encode_q8_k(x: Floats) -> Records:
    """Encode activations to Q8_K blocks; ggml-cpu does the same on x86.

    scale = -127 / m, with m the first of the largest magnitude; qs[i] = min(127, nearest(scale * x[i])); d = 1/scale

    x      : [t, n] float32
    return : [t, n/256] Q8_K records; of zeros all is 0 (C leaves their bsums unwritten)

    Rounds: every operation, to float32.
    Source: ggml-quants.c quantize_row_q8_K_ref, llama.cpp 0c1e570.
    """
    rows = x.reshape(-1, Q8_K.weights)
    at = np.abs(rows).argmax(1)
    largest = rows[np.arange(len(rows)), at]
    flat = largest == 0
    scale = np.float32(-127) / largest
    codes = np.minimum(nearest_int(scale[:, None] * rows), 127)
    blocks = np.zeros(len(rows), Q8_K.block)
    blocks["d"] = np.where(flat, np.float32(0), np.float32(1) / scale)
    blocks["qs"] = np.where(flat[:, None], 0, codes & 255).astype(np.uint8).view(np.int8)
    blocks["bsums"] = blocks["qs"].reshape(len(rows), -1, GROUP).sum(2, dtype=np.int16)
    return blocks.reshape(len(x), -1)


def _pack(block: np.dtype, x: Floats, d: Floats, codes: Codes, total: Codes | None = None) -> Records:
    blocks = np.zeros(len(d), block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["qs"] = codes
    if total is not None:
        blocks["s"].view(np.uint16)[:] = encode_half(total.astype(np.float32) * d)
    return blocks.reshape(len(x), -1)
