"""A few tokens with rows of blocks in the order `avx2`, in one call: encode, take apart, multiply.

The same functions as dots.matmul calls one after the other, and the same bits. For one token of a small model these
calls cost more time than the work.
"""

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.dots.encoders_jit import encode_q8_0_avx2, encode_q8_k
from refimpl.dots.small_simd import avx2_q5_0, avx2_q8_0, sum_fours
from refimpl.dots.split_simd import SIZE_0, SIZE_K, split_q8_0, split_q8_k
from refimpl.dots.super_simd import avx2_q4_k, avx2_q6_k
from refimpl.quants.formats import Q4_K, Q5_0, Q6_K, Q8_0

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]


@jit
def encode_by_32(x: Floats, acts: Codes, d: Floats) -> None:
    """q8_0, taken apart: [t, n] -> int8 [t, n] and steps [t, n/32]."""
    raw = np.empty((x.shape[0], d.shape[1] * SIZE_0), np.uint8)
    encode_q8_0_avx2(x, raw)
    split_q8_0(raw, acts, d, np.empty((x.shape[0], 0), np.float32), np.empty((x.shape[0], 0), np.int16))


@jit
def encode_by_256(x: Floats, acts: Codes, d: Floats, bsums: Shorts) -> None:
    """q8_k, taken apart: [t, n] -> int8 [t, n], steps [t, n/256] and group sums [t, n/16]."""
    raw = np.empty((x.shape[0], d.shape[1] * SIZE_K), np.uint8)
    encode_q8_k(x, raw)
    split_q8_k(raw, acts, d, np.empty((x.shape[0], 0), np.float32), bsums)


@jit
def once_q8_0(raw: Bytes, x: Floats, out: Floats) -> None:
    t, n = x.shape
    acts, d, none = (
        np.empty((t, n), np.int8),
        np.empty((t, n // 32), np.float32),
        np.empty((t, 0), np.float32),
    )
    encode_by_32(x, acts, d)
    avx2_q8_0(raw, acts, d, none, sum_fours(acts, 128), out)


@jit
def once_q5_0(raw: Bytes, x: Floats, out: Floats) -> None:
    t, n = x.shape
    acts, d, none = (
        np.empty((t, n), np.int8),
        np.empty((t, n // 32), np.float32),
        np.empty((t, 0), np.float32),
    )
    encode_by_32(x, acts, d)
    avx2_q5_0(raw, acts, d, none, sum_fours(acts, 16), out)


@jit
def once_q4_k(raw: Bytes, x: Floats, out: Floats) -> None:
    t, n = x.shape
    acts, d, bsums = (
        np.empty((t, n), np.int8),
        np.empty((t, n // 256), np.float32),
        np.empty((t, n // 16), np.int16),
    )
    encode_by_256(x, acts, d, bsums)
    avx2_q4_k(raw, acts, d, bsums, out)


@jit
def once_q6_k(raw: Bytes, x: Floats, out: Floats) -> None:
    t, n = x.shape
    acts, d, bsums = (
        np.empty((t, n), np.int8),
        np.empty((t, n // 256), np.float32),
        np.empty((t, n // 16), np.int16),
    )
    encode_by_256(x, acts, d, bsums)
    avx2_q6_k(raw, acts, d, bsums, out)


KERNELS = MappingProxyType({Q8_0.id: once_q8_0, Q5_0.id: once_q5_0, Q4_K.id: once_q4_k, Q6_K.id: once_q6_k})
