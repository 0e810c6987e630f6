"""Rotary positions on vectors: the bits of rope.rotate for float32 and neighbouring channels."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_lanes import join, permutation
from refimpl.arith.simd_memory import get, load, put, store

Floats = NDArray[np.float32]

EVEN, ODD = permutation([*range(0, 32, 2)]), permutation([*range(1, 32, 2)])
TURNS = permutation([k // 2 + k % 2 * 16 for k in range(32)])  # first and second of 16 pairs, to pairs


@jit
def rotate(x: Floats, cos: Floats, sin: Floats, out: Floats) -> None:
    """Turn the first 2R channels of each token's heads: x [T, H, n], cos, sin [T, R] -> out [T, H, n] float32."""
    tokens, heads, n = x.shape
    half = cos.shape[1]
    for t in range(tokens):
        for start in range(t * heads * n, (t + 1) * heads * n, n):
            for i in range(0, half - half % 16, 16):
                pairs, c, s = (
                    load(x, start + 2 * i, 32),
                    load(cos, t * half + i, 16),
                    load(sin, t * half + i, 16),
                )
                a, b = EVEN(pairs), ODD(pairs)
                store(out, start + 2 * i, TURNS(join(a * c - b * s, a * s + b * c)))
            for i in range(half - half % 16, half):
                at = start + 2 * i
                a, b, c, s = get(x, at), get(x, at + 1), get(cos, t * half + i), get(sin, t * half + i)
                put(out, at, a * c - b * s)
                put(out, at + 1, a * s + b * c)
            for i in range(start + 2 * half, start + n):
                put(out, i, get(x, i))
