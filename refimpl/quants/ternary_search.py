"""The search that IQ1_S and IQ1_M share: weights become -1, 0 or 1, all shifted by an eighth up or down.

In ascending order a group falls into three parts, so every way to cut it is tried: 561 for 32 weights. Every
comment in capitals names a place where a compiler may fuse a product and a sum; the texts here round both.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.sums import add_up
from refimpl.quants.grid_search import find_nearest
from refimpl.quants.grids import LARGEST, find_neighbours, load_grid

Floats = NDArray[Any]  # float32
Codes = NDArray[Any]
Mask = NDArray[Any]  # bool

NAME = "iq1_s"
SHIFT = np.float32(0.125)
UP = SHIFT - np.float32(1), SHIFT, SHIFT + np.float32(1)  # what the codes 0, 1, 2 stand for
DOWN = -SHIFT - np.float32(1), -SHIFT, np.float32(1) - SHIFT
POWERS = 3 ** np.arange(8)


def sort_sums(x: Floats, terms: Floats) -> tuple[Codes, Floats]:
    """The order of the weights, and the sums of terms up to each cut. x, terms : [N, n]; return : [N, n], [N, n + 1].

    Equal weights stay in order: C leaves that to the library's qsort; glibc's merges.
    """
    order = x.argsort(1, kind="stable")
    sums = np.zeros((len(x), x.shape[1] + 1), np.float32)
    for j in range(x.shape[1]):
        sums[:, j + 1] = sums[:, j] + np.take_along_axis(terms, order[:, j, None], 1)[:, 0]  # CUT_SUM
    return order, sums


def cut(x: Floats, order: Codes, first: Codes, second: Codes) -> Codes:
    """Codes from cuts: 0 below `first` in ascending order, 1 from there, 2 from `second`. Return : [N, n] int32."""
    codes = np.empty(x.shape, np.int32)
    place = np.arange(x.shape[1])
    ranks = (place >= first[:, None]).astype(np.int32) + (place >= second[:, None])
    np.put_along_axis(codes, order, ranks, 1)
    return codes


def turn(scale: Floats, codes: Codes, up: Mask) -> tuple[Floats, Codes, Mask]:
    """Make scales positive: codes and shifts change sides. scale : [N]; codes : [N, n]; up : [N, points]."""
    minus = (scale < 0)[:, None]
    return np.abs(scale), np.where(minus, 2 - codes, codes), np.where(minus, ~up, up)


def snap(x: Floats, weights: Floats, scale: Floats, codes: Codes, up: Mask) -> tuple[Floats, Codes, Mask]:
    """Move codes that are no point to the best near point; where any moved, fit the scale again.

    x, weights, codes : [N, n]; scale : [N]; up : [N, n/8]: is the shift of these eight positive?
    return            : scale [N], numbers [N, n/8], lost [N]: all sums near some point overflow
    """
    grid, table = load_grid(NAME), find_neighbours(NAME)
    eights = codes.reshape(-1, 8)
    number = table.number[eights @ POWERS]
    moved = np.flatnonzero(number < 0)
    shift = np.where(up.reshape(-1), SHIFT, -SHIFT)
    number[moved] = find_nearest(
        NAME,
        (eights @ POWERS)[moved],
        x.reshape(-1, 8)[moved],
        weights.reshape(-1, 8)[moved],
        scale.repeat(up.shape[1])[moved],
        shift[moved] - np.float32(1),
        1,
    )
    q = (grid.codes[number].astype(np.float32) - np.float32(1) + shift[:, None]).reshape(x.shape)
    sum_qx, sum_q2 = add_up(weights * q * x), add_up(weights * q * q)  # TERN_SQX, TERN_SQ2
    some = np.isin(np.arange(len(number)), moved).reshape(up.shape).any(1)
    scale = np.asarray(np.where(some & (sum_qx > 0) & (sum_q2 > 0), sum_qx / sum_q2, scale))
    return scale, np.maximum(number, 0).reshape(up.shape), np.asarray((number < 0).reshape(up.shape).any(1))


def keep(best: Floats, scale: Floats, sum_qx: Floats, sum_q2: Floats) -> tuple[Mask, Floats, Floats]:
    """Is this cut better, and the best score and scale with it? All [N]; score = sum_qx^2 / sum_q2."""
    better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
    scale = np.where(better, sum_qx / sum_q2, scale)
    return better, np.where(better, scale * sum_qx, best), scale


def worst(x: Floats) -> Floats:
    """The score that any cut beats. Return : [N] float32."""
    return np.full(len(x), -LARGEST, np.float32)
