"""Ordered sums: where the order of additions is part of the meaning, it is written here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32
DOT_LANES = 16


def add_up(terms: NDArray[Any]) -> NDArray[Any]:
    """Add along the last axis, one term after the other, as a C loop does.

    sum = ((0 + t[0]) + t[1]) + ...

    terms  : [..., n] float32 or float64
    return : [...], of the same type

    Rounds: every addition, to the type of the terms.
    """
    total = np.zeros(terms.shape[:-1], terms.dtype)
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def add_lanes(terms: NDArray[Any]) -> NDArray[Any]:
    """Add along the last axis in 32 lanes, then fold the lanes by halves: our own order.

    lane[l] = 0 + t[l] + t[l + 32] + ...      then lane[l] += lane[l + 16], += lane[l + 8], ... 4, 2, 1

    terms  : [..., n] float32 or float64
    return : [...], of the same type

    Rounds: every addition, to the type of the terms.
    """
    lanes = np.zeros((*terms.shape[:-1], LANES), terms.dtype)
    for i in range(0, terms.shape[-1], LANES):
        part = terms[..., i : i + LANES]
        lanes[..., : part.shape[-1]] += part
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return np.asarray(lanes[..., 0])


def dot_lanes(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply and add along the last axis in 16 lanes, then fold the lanes by halves: our own order for floats.

    lane[l] = 0 + x[l]*y[l] + x[l + 16]*y[l + 16] + ...      then lane[l] += lane[l + 8], += lane[l + 4], ... 2, 1

    One token or many, decode or prefill: the order is the same, and so are the bits.

    x, y   : [..., n] float32, broadcast against each other; any n (a lane without a term adds nothing)
    return : [...] float32

    Rounds: every product and every addition, to float32; nothing is fused.
    """
    shape = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    lanes = np.zeros((*shape, DOT_LANES), np.float32)
    n = x.shape[-1]
    for i in range(0, n, DOT_LANES):
        width = min(DOT_LANES, n - i)
        lanes[..., :width] += x[..., i : i + width] * y[..., i : i + width]
    half = DOT_LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return np.asarray(lanes[..., 0])
