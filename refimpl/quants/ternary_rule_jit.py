"""What the search of IQ1 leaves in a block whatever the imatrix was: the twin of ternary_rule.py."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.grids import find_reach, load_grid

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

NAME = "iq1_s"


class Rule(NamedTuple):
    """The grid, what one block holds, and scratch."""

    points: Bytes  # [2048, 8] uint8: codes
    reach: Integers  # [3^8]
    numbers: Integers  # [32]: of the block's points
    levels: Bytes  # [256 / sub]
    order: Bytes  # [sub]: of a group, ascending
    within: Bytes  # [8]: of eight weights, ascending
    below: Bytes  # [sub + 1, sub / 8]: how many of each eight lie below a cut
    fits: Bytes  # [sub / 8, 9, 9]: 1 where a point may be, by how many of its weights lie below either cut


def make_rule(sub: int) -> Rule:
    """The tables, and room for one block."""
    order, within = np.zeros(sub, np.uint8), np.zeros(8, np.uint8)
    below, fits = np.zeros((sub + 1, sub // 8), np.uint8), np.zeros((sub // 8, 9, 9), np.uint8)
    numbers, levels = np.zeros(32, np.int32), np.zeros(256 // sub, np.uint8)
    return Rule(load_grid(NAME).codes, find_reach(NAME), numbers, levels, order, within, below, fits)


@jit
def sort(x: Floats, order: Bytes) -> None:
    """The order of some weights, ascending, equal ones in order."""
    for i in range(x.size):
        j = i
        while j > 0 and x[order[j - 1]] > x[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i


@jit
def list_fits(r: Rule, p: int, number: int, turned: bool) -> None:
    """Fill r.fits of point p, whose weights' order is r.within."""
    for a in range(9):
        for b in range(a, 9):
            key, apart = 0, 0
            for i in range(8):
                code = 0 if i < a else 1 if i < b else 2
                code, at, power = 2 - code if turned else code, int(r.within[i]), 1
                for _ in range(at):
                    power *= 3
                off = code - int(r.points[number, at])
                apart += off * off
                key += power * code
            r.fits[p, a, b] = apart <= r.reach[key]


@jit
def find_cut(r: Rule) -> bool:
    """Does one cut of the group fit all its points?"""
    count = r.below.shape[0]
    for i in range(count):
        for j in range(i, count):
            fits = True
            for p in range(r.below.shape[1]):
                fits &= r.fits[p, r.below[i, p], r.below[j, p]] != 0
            if fits:
                return True
    return False


@jit
def explain_points(r: Rule, first: int, x: Floats) -> bool:
    """Does some cut give a group its points, of which `first` is the first? x : [sub] float32."""
    sort(x, r.order)
    r.below[0] = 0
    for i in range(x.size):
        r.below[i + 1] = r.below[i]
        r.below[i + 1, r.order[i] // 8] += 1
    for turned in range(2):
        for p in range(x.size // 8):
            sort(x[8 * p : 8 * (p + 1)], r.within)
            list_fits(r, p, r.numbers[first + p], turned == 1)
        if find_cut(r):
            return True
    return False


@jit
def check_group(r: Rule, j: int, x: Floats, epsilon: Any) -> int:
    """1 where the points of group j are none that the search leaves. x : [sub] float32."""
    count, size, blank = x.size // 8, np.float32(0), r.levels[j] == 0
    for i in range(x.size):
        size = max(size, abs(x[i]))
    for p in range(count):
        blank &= r.numbers[count * j + p] == 0
    if blank:
        return 0
    return 0 if size >= epsilon and explain_points(r, count * j, x) else 1


@jit
def check_block(r: Rule, d: Any, x: Floats, epsilon: Any) -> int:
    """Count what the search does not leave in one block. x : [256] float32."""
    if not np.isfinite(d) or d == 0:
        return 0
    off, sub = 0 if r.levels.max() == 7 else 1, 256 // r.levels.size
    for j in range(r.levels.size):
        off += check_group(r, j, x[sub * j : sub * (j + 1)], epsilon)
    return off
