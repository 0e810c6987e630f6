"""The search that IQ1_S and IQ1_M share, for one group of weights at a time: the twin of ternary_search.py."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.grids import LARGEST, find_neighbours, load_grid

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

NAME = "iq1_s"
ZERO, ONE, SHIFT = np.float32(0), np.float32(1), np.float32(0.125)
LEAST = -LARGEST


class Search(NamedTuple):
    """One group of n weights, and what is known of its codes. Numba passes the arrays by reference."""

    points: Bytes  # [2048, 8] uint8: the grid's codes
    number: Integers  # see grids.Neighbours
    start: Integers
    near: Integers
    x: Floats  # [n]
    weights: Floats  # [n]
    order: Integers  # [n]: ascending
    sums: Floats  # [4, n + 1]: sums up to each cut; IQ1_S: of w x, of w; IQ1_M: of w x, of w, of either half
    codes: Bytes  # [n]
    numbers: Integers  # [n/8]: of the points
    up: Bytes  # [n/8]: 1 where the shift of these eight is positive


def make_search(n: int) -> Search:
    """Scratch for groups of n weights."""
    near = find_neighbours(NAME)
    x, weights = np.zeros((2, n), np.float32)
    sums, codes, up = np.zeros((4, n + 1), np.float32), np.zeros(n, np.uint8), np.zeros(n // 8, np.uint8)
    order, numbers = np.zeros(n, np.int32), np.zeros(n // 8, np.int32)
    return Search(load_grid(NAME).codes, *near, x, weights, order, sums, codes, numbers, up)


@jit
def find_size(s: Search) -> Any:
    """The largest of |x|."""
    size = abs(s.x[0])
    for i in range(1, s.x.size):
        size = max(size, abs(s.x[i]))
    return size


@jit
def sort(s: Search) -> None:
    """s.order: the weights in ascending order, equal ones in order."""
    for i in range(s.x.size):
        j = i
        while j > 0 and s.x[s.order[j - 1]] > s.x[i]:
            s.order[j] = s.order[j - 1]
            j -= 1
        s.order[j] = i


@jit
def cut(s: Search, first: int, second: int) -> None:
    """s.codes: 0 below `first` in ascending order, 1 from there, 2 from `second`."""
    for j in range(s.x.size):
        s.codes[s.order[j]] = 0 if j < first else 1 if j < second else 2


@jit
def turn(s: Search) -> None:
    """Codes and shifts change sides: the scale was negative."""
    for i in range(s.codes.size):
        s.codes[i] = 2 - int(s.codes[i])
    for k in range(s.up.size):
        s.up[k] = 1 - int(s.up[k])


@jit
def find_nearest(s: Search, key: int, k: int, scale: Any, lowest: Any) -> int:
    """The best near point of eight weights whose codes are none, or -1 where no sum is finite."""
    best, found = LARGEST, -1
    for j in range(s.start[key], s.start[key + 1]):
        total = ZERO
        for i in range(8):
            off = scale * (lowest + np.float32(s.points[s.near[j], i])) - s.x[8 * k + i]  # GRID_DIFF
            total += s.weights[8 * k + i] * off * off  # GRID_D2
        if total < best:
            best, found = total, s.near[j]
    return found


@jit
def snap(s: Search, scale: Any) -> Any:
    """Move codes that are no point to the best near one: s.numbers; where any moved, fit the scale again.

    return : scale, lost
    """
    moved, lost = False, False
    for k in range(s.numbers.size):
        key = 0
        for i in range(7, -1, -1):
            key = 3 * key + int(s.codes[8 * k + i])
        point = int(s.number[key])
        if point < 0:
            moved = True
            point = find_nearest(s, key, k, scale, (SHIFT if s.up[k] else -SHIFT) - ONE)
            lost |= point < 0
        s.numbers[k] = max(point, 0)
    if not moved:
        return scale, lost
    sum_qx, sum_q2 = ZERO, ZERO
    for i in range(s.x.size):
        w, shift = s.weights[i], SHIFT if s.up[i // 8] else -SHIFT
        q = np.float32(s.points[s.numbers[i // 8], i % 8]) - ONE + shift
        sum_qx += w * q * s.x[i]  # TERN_SQX
        sum_q2 += w * q * q  # TERN_SQ2
    return (sum_qx / sum_q2 if sum_qx > ZERO and sum_q2 > ZERO else scale), lost
