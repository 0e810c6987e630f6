"""Rotary positions: pairs of channels are turned by an angle that grows with the position.

GLM-5.1 turns neighbours, (0, 1), (2, 3), …, in attention and in the indexer alike. DeepSeek-V3.2's indexer turns
(0, n/2), (1, n/2 + 1), …: the classic mistake, visible only where the indexer really selects.
"""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def angles(
    positions: Array, n: int, theta: float, rule: str = "f64"
) -> tuple[Array, Array]:  # [T] -> 2 x [T, n/2]
    """Cosine and sine of every position's angles.

    angle[t, i] = positions[t] * theta^(-2i / n)

    rule   : "f64"; "f32": frequencies and product rounded to float32; "f32-steps": each angle is the one
             before times theta^(-2 / n), all float32
    return : cosines and sines, float64
    """
    angle: Array
    if rule == "f32-steps":
        factors = np.full((len(positions), n // 2), np.float32(theta) ** np.float32(-2 / n), np.float32)
        factors[:, 0] = positions
        angle = np.multiply.accumulate(factors, axis=1)
    elif rule == "f32":
        power = np.float32(theta) ** (np.arange(0, n, 2, dtype=np.float32) / np.float32(n))
        angle = positions.astype(np.float32)[:, None] * (np.float32(1) / power)
    else:
        angle = positions.astype(np.float64)[:, None] * theta ** (-np.arange(0, n, 2) / n)
    return np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))


def rotate(
    x: Array, turn: tuple[Array, Array], halves: bool = False, reference: bool = False
) -> Array:  # [T, ..., n] -> [T, ..., n]
    """Turn the first 2R channels of each token, pair by pair; what is behind them stays.

    y[2i]     = x[2i] * cos - x[2i + 1] * sin
    y[2i + 1] = x[2i] * sin + x[2i + 1] * cos

    turn      : cosines and sines [T, R]
    halves    : pair i with i + R instead: wrong for GLM-5.1, kept as a control
    reference : True takes the NumPy text for float32 too

    Rounds: cosine and sine once, each product and sum, to the type of x.
    """
    cos, sin = (part.astype(x.dtype) for part in turn)
    if x.dtype == np.float32 and not halves and not reference:
        out, heads = np.empty(x.shape, x.dtype), (len(x), -1, x.shape[-1])
        kernel = import_module("refimpl.model.rope_simd").rotate
        kernel(np.ascontiguousarray(x).reshape(heads), cos, sin, out.reshape(heads))
        return out
    cos, sin = (part.reshape(len(x), *[1] * (x.ndim - 2), -1) for part in (cos, sin))
    half = cos.shape[-1]
    first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    if halves:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    y = x.copy()
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y
