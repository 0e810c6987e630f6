"""Ordered sums: where the order of additions is part of the meaning, it is written here."""

import numpy as np
from numpy.typing import NDArray

LANES = 32


def add_up(terms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add along the last axis, one term after the other, as a C loop does.

    sum = ((0 + t[0]) + t[1]) + ...

    terms  : [..., n] float32
    return : [...] float32

    Rounds: every addition, to float32.
    """
    total = np.zeros(terms.shape[:-1], np.float32)
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def add_lanes(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add along the last axis in 32 lanes, then fold the lanes by halves: our own order for statistics.

    lane[l] = 0 + t[l] + t[l + 32] + ...      then lane[l] += lane[l + 16], += lane[l + 8], ... 4, 2, 1

    terms  : [..., n] float64
    return : [...] float64

    Rounds: every addition, to float64.
    """
    lanes = np.zeros((*terms.shape[:-1], LANES))
    for i in range(terms.shape[-1]):
        lanes[..., i % LANES] += terms[..., i]
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return np.asarray(lanes[..., 0])
