"""What the search of IQ2 and IQ3 leaves in a block whatever the imatrix was: the twin of grid_rule.py."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.grids import MOVED, Plan, find_neighbours, find_reach, load_grid
from refimpl.quants.grids_jit import Stored, make_stored

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

BELOW, ABOVE = 0.5 * (1 - 2.0**-20), 0.5 * (1 + 2.0**-20)
WILD = 2.0**22
VAGUE = 2.0**-18
TINY = np.float32(1e-30)
FREE, FIXED, REACHED = 1, 2, 4
NEARBY = 1.25  # scales within this factor of the stored one are tried first: they mostly serve


class RuleTables(NamedTuple):
    """The grid of a format."""

    points: Bytes  # [G, width] uint8: codes
    number: Integers  # [levels^width]
    reach: Integers  # [levels^width]


class Rule(NamedTuple):
    """A grid, what one block holds, and scratch."""

    points: Bytes
    number: Integers
    reach: Integers
    stored: Stored
    values: Doubles  # [sub]
    inverses: Doubles  # [2 steps + 1 + sub (levels - 1)]: of the scales to try
    needs: Integers  # [2 steps + 1]: points of a group, a bit each, that a trial leaves to a second search


def load_rule(name: str) -> RuleTables:
    """The tables of a format."""
    return RuleTables(load_grid(name).codes, find_neighbours(name).number, find_reach(name))


@jit
def make_rule(t: RuleTables, plan: Plan) -> Rule:
    """Room for one block."""
    trials = 2 * plan.steps + 1
    inverses = np.zeros(trials + plan.sub * (plan.levels - 1), np.float64)
    values, needs = np.zeros(plan.sub, np.float64), np.zeros(trials, np.int32)
    return Rule(t.points, t.number, t.reach, make_stored(plan), values, inverses, needs)


@jit
def count_bits(byte: int) -> int:
    """How many bits of a byte are set."""
    count = 0
    for i in range(8):
        count += byte >> i & 1
    return count


@jit
def round_down(value: Any, half: Any, top: int) -> int:
    """The code of a quotient, half a step below or above a tie."""
    return min(int(max(value, 0.0) * half), top)


@jit
def check_point(plan: Plan, r: Rule, number: int, start: int, inverse: Any) -> int:
    """FREE, FIXED, REACHED: what rounding the weights of one point allows, over all ways to round ties."""
    low, tied, found, top = 0, 0, 0, plan.levels - 1
    for i in range(plan.width):
        quotient = inverse * r.values[start + i]
        if quotient >= WILD:
            return FREE | FIXED | REACHED
        code = round_down(quotient, BELOW, top)
        tied |= (1 if round_down(quotient, ABOVE, top) > code else 0) << i
        low |= code << 3 * i
    way = tied
    while True:
        key, apart, power = 0, 0, 1
        for i in range(plan.width):
            code = (low >> 3 * i & 7) + (way >> i & 1)
            off = code - int(r.points[number, i])
            apart += off * off
            key += power * code
            power *= plan.levels
        found |= (REACHED if apart <= r.reach[key] else 0) | (FIXED if apart == 0 else 0)
        found |= FREE if r.number[key] < 0 else 0
        if way == 0:
            return found
        way = way - 1 & tied


@jit
def check_points(plan: Plan, r: Rule, j: int, inverse: Any) -> Any:
    """The points of group j, a bit each, that may come from this scale: reached, free, fixed (grid_rule.py)."""
    count, reached, free, fixed = plan.sub // plan.width, 0, 0, 0
    for p in range(count):
        found = check_point(plan, r, r.stored.numbers[count * j + p], p * plan.width, inverse)
        reached |= (1 if found & REACHED else 0) << p
        free |= (1 if found & FREE else 0) << p
        fixed |= (1 if found & FIXED else 0) << p
    return reached, free, fixed


@jit
def list_inverses(plan: Plan, r: Rule, peak: Any, stored: Any) -> int:
    """Fill r.inverses: the trial scales', then where a code changes: first those near the stored one, then the rest.

    peak : of r.values; stored : the inverse of the stored scale; return : how many
    """
    count = 2 * plan.steps + 1
    for k in range(count):
        r.inverses[k] = (2 * plan.levels - 1 + np.float64(plan.step) * (k - plan.steps)) / peak
    for late in range(2):
        for i in range(plan.sub):
            for c in range(1, plan.levels if r.values[i] > 0 else 1):
                inverse = 2.0 * c / r.values[i]
                near = stored < inverse * NEARBY and inverse < stored * NEARBY
                if near != (late == 1):
                    r.inverses[count] = inverse
                    count += 1
    return count


@jit
def explain_points(plan: Plan, r: Rule, j: int, peak: Any, stored: Any) -> bool:
    """Does some scale give group j its points? peak : of r.values; stored : the inverse of the stored scale."""
    points, needs = plan.sub // plan.width, 1
    every = (1 << points) - 1
    r.needs[0] = every
    count = list_inverses(plan, r, peak, stored)
    if plan.again == MOVED:
        largest, needs = 0, 0
        for p in range(points):
            for i in range(plan.width):
                largest = max(largest, int(r.points[r.stored.numbers[points * j + p], i]))
        if largest == 0:
            return True
        for k in range(2 * plan.steps + 1):
            _, free, fixed = check_points(plan, r, j, r.inverses[k])
            if free | fixed == every:
                r.needs[needs] = every & ~fixed
                needs += 1
    for k in range(count):
        reached, _, _ = check_points(plan, r, j, r.inverses[k])
        for i in range(needs):
            if r.needs[i] & ~reached == 0:
                return True
    return False


@jit
def check_group(plan: Plan, r: Rule, j: int, d: Any, x: Floats) -> int:
    """How many eights of signs, and whether the points, of group j are none that the search leaves."""
    eights, count = plan.sub // 8, plan.sub // plan.width
    size, blank, turned, off = np.float32(0), r.stored.levels[j] == 0, plan.even, 0
    for i in range(plan.sub):
        size = max(size, abs(x[i]))
    for p in range(count):
        blank &= r.stored.numbers[count * j + p] == 0
    for e in range(eights):
        blank &= r.stored.signs[eights * j + e] == 0
    if size < plan.epsilon:
        return 0 if blank else 1
    if blank and plan.even:
        return 0
    for e in range(eights):
        turned &= count_bits(find_wrong(r, j, e, eights, x)) >= 7
    peak, least = -1.0, np.inf
    for e in range(eights):
        wrong = find_wrong(r, j, e, eights, x) ^ (255 if turned else 0)
        off += count_bits(wrong) > (1 if plan.even else 0)
        for i in range(8 * e, 8 * e + 8):
            value = np.float64(abs(x[i]))
            r.values[i] = -value if wrong >> i - 8 * e & 1 else value
            peak, least = max(peak, r.values[i]), min(least, value)
    if off or peak < TINY or (r.stored.levels[j] == 0 and least < peak * VAGUE):
        return off
    stored = 1 / abs(np.float64(d) * (2 * int(r.stored.levels[j]) + 1))
    return 0 if explain_points(plan, r, j, peak, stored) else 1


@jit
def find_wrong(r: Rule, j: int, e: int, eights: int, x: Floats) -> int:
    """The weights of eight e of group j, a bit each, whose stored sign is not the source's."""
    minus = 0
    for i in range(8):
        minus |= (1 if x[8 * e + i] < 0 else 0) << i
    return int(r.stored.signs[eights * j + e]) ^ minus


@jit
def check_block(plan: Plan, r: Rule, d: Any, x: Floats) -> int:
    """Count what the search does not leave in one block. x : [256] float32."""
    if not np.isfinite(d) or d == 0:
        return 0
    off = 0 if r.stored.levels.max() == 15 else 1
    for j in range(r.stored.levels.size):
        off += check_group(plan, r, j, d, x[plan.sub * j : plan.sub * (j + 1)])
    return off
