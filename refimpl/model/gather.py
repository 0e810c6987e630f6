"""Products with chosen rows of a matrix, other rows for every query: what sparse attention multiplies."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.sums import dot_lanes

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def multiply_rows(q: Floats, keys: Floats, rows: Numbers, out: Floats) -> None:
    """Every head's query times the keys of its token.

    out[t, h, k] = dot_lanes(q[t, h], keys[rows[t, k]])

    q    : [T, H, n] float32
    keys : [S, n] float32
    rows : [T, K] int64
    out  : [T, H, K] float32, written

    Rounds: as arith.sums.dot_lanes does.
    """
    for t, chosen in enumerate(rows):
        out[t] = dot_lanes(q[t][:, None], keys[chosen])


def mix_rows(p: Floats, values: Floats, rows: Numbers, out: Floats) -> None:
    """Every head's weighted sum of the values of its token.

    out[t, h, i] = dot_lanes(p[t, h], values[rows[t], i])

    p      : [T, H, K] float32
    values : [S, m] float32
    rows   : [T, K] int64
    out    : [T, H, m] float32, written

    Rounds: as arith.sums.dot_lanes does.
    """
    for t, chosen in enumerate(rows):
        out[t] = dot_lanes(p[t][:, None], np.ascontiguousarray(values[chosen].T))
