"""Ordered sums: where the order of additions is part of the meaning, it is written here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32


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
