"""What the search of IQ2 and IQ3 leaves in a block whatever the imatrix was: a rule for points, signs and scales.

Which points are stored depends on the imatrix, and the scale that is stored is fitted after they were chosen: a
third of the points are not the nearest under it. Still not every block can come out of the search:

scales  the largest is the highest code, as it is what the block's step derives from
signs   they are the source's; where their number must be even and is not, of exactly one weight of eight the sign
        is wrong. Where the fitted scale was negative all signs of the group change
points  under some scale the weights of the group round to codes that are the point, or that are no point of the
        grid and have it among their near ones (grids.find_neighbours). Formats that search only moved points once more
        (MOVED) leave the others as one of the trial scales rounded them
zeros   a group that counts as zero holds zeros

Where an important weight is (nearly) 0, the fitted scale may come out so small that roundings under it mean nothing:
of groups with such a weight and the lowest scale no points are checked.

A rounding that lies within 2^-20 of a tie counts as either: builds differ there. Everything is float64.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.quants.grids import MOVED, PLANS, Plan, Stored, find_neighbours, find_reach, load_grid

Floats = NDArray[Any]
Codes = NDArray[Any]  # integers
Mask = NDArray[Any]  # bool

BELOW, ABOVE = 0.5 * (1 - 2.0**-20), 0.5 * (1 + 2.0**-20)
WILD = 2.0**22  # quotients from here on round to anything (nearest_int)
VAGUE = 2.0**-18  # of the largest weight: 15 of these are WILD
TINY = np.float32(1e-30)  # below this the search's quotients overflow


def measure(name: str, d: Floats, stored: Stored, x: Floats) -> Codes:
    """Count what the search does not leave, in each block.

    d      : [N] float32: blocks where it is 0 or not finite decode to nothing, and nothing counts
    x      : [N, 256] float32, finite: the source
    return : [N, 1 + 32 + 256 / sub] int32, 1 where the scales, eight signs or the points of a group are none
    """
    plan = PLANS[name]
    subs, eights = 256 // plan.sub, plan.sub // 8
    groups = x.reshape(-1, plan.sub)
    minus = np.packbits(x < 0, axis=1, bitorder="little")
    wrong = stored.signs ^ minus
    turned = (
        (np.bitwise_count(wrong) >= 7).reshape(-1, eights).all(1)
        if plan.even
        else np.zeros(len(groups), bool)
    )
    wrong = wrong.reshape(-1, eights) ^ np.where(turned, 255, 0).astype(np.uint8)[:, None]
    bad_signs = np.bitwise_count(wrong) > (1 if plan.even else 0)
    flipped = np.unpackbits(wrong, axis=1, bitorder="little")
    values = np.abs(groups).astype(np.float64) * np.where(flipped, -1, 1)
    numbers = stored.numbers.reshape(len(groups), -1)
    blank = ~numbers.any(1) & ~stored.signs.reshape(-1, eights).any(1) & (stored.levels.reshape(-1) == 0)
    dead = np.abs(groups).max(1) < plan.epsilon
    hidden = blank & plan.even  # what counts as zero may depend on the imatrix
    bad_signs = np.where((dead | hidden)[:, None], False, bad_signs)
    explained = np.where(dead, blank, hidden)
    open_ = ~(dead | hidden | bad_signs.any(1))
    explained |= ~(dead | hidden | open_) | (open_ & (values.max(1) < TINY))
    explained |= open_ & is_vague(values, stored.levels.reshape(-1))
    for i in np.flatnonzero(open_ & ~explained):
        explained[i] = explain_points(plan, name, values[i], numbers[i])
    full = stored.levels.max(1) == (15)
    parts = (~full[:, None], bad_signs.reshape(-1, 32), ~explained.reshape(-1, subs))
    some = np.isfinite(d) & (d != 0)
    return np.asarray(np.concatenate(parts, 1) & some[:, None], np.int32)


def is_vague(values: Floats, levels: Codes) -> Mask:
    """May the scale of a group have been next to nothing? values : [N, n]; levels : [N]; return : [N]."""
    return np.asarray((levels == 0) & (np.abs(values).min(1) < values.max(1) * VAGUE))


def explain_points(plan: Plan, name: str, values: Floats, numbers: Codes) -> bool:
    """Does some scale give these points to one group? values : [n] float64; numbers : [points]."""
    codes = load_grid(name).codes[numbers].astype(np.int64)
    tried = 2 * plan.levels - 1 + float(plan.step) * np.arange(-plan.steps, plan.steps + 1)
    trials = tried / values.max()  # inverse scales, all of them
    turns = (2.0 * np.arange(1, plan.levels)[:, None] / values[values > 0]).reshape(
        -1
    )  # where a code changes
    reached, free, fixed = check_points(plan, name, values, codes, np.concatenate([trials, turns]))
    if plan.again != MOVED:
        return bool(reached.all(1).any())
    if not codes.any():  # the importance of all weights is 0 (or no trial serves)
        return True
    need = ~fixed[: len(trials)][(free | fixed)[: len(trials)].all(1)]
    return bool((reached | ~need[:, None]).all(2).any())


def check_points(
    plan: Plan, name: str, values: Floats, codes: Codes, inverses: Floats
) -> tuple[Mask, Mask, Mask]:
    """What the codes may be that each point's weights round to under some scales, over all ways to round ties.

    values   : [n] float64; codes : [P, width] of the points; inverses : [S] float64
    return   : reached: the point, or none and the point is near; free: none; fixed: the point. All [S, P]
    """
    number, reach = find_neighbours(name).number, find_reach(name)
    quotients = (inverses[:, None] * values).reshape(len(inverses), -1, plan.width)
    low, high = (
        np.clip(np.trunc(np.clip(quotients, 0, WILD) * half), 0, plan.levels - 1).astype(np.int64)
        for half in (BELOW, ABOVE)
    )
    fixed = (quotients >= WILD).any(2)
    reached, free = fixed.copy(), fixed.copy()
    ways = np.unique((high - low) @ 2 ** np.arange(plan.width))
    for way in range(2**plan.width):
        if not (way & ~ways == 0).any():
            continue
        up = way >> np.arange(plan.width) & 1
        rounded = low + up
        use = (rounded <= high).all(2)
        key = np.minimum(rounded, plan.levels - 1) @ plan.levels ** np.arange(plan.width)
        apart = ((rounded - codes) ** 2).sum(2)
        reached |= use & (apart <= reach[key])
        free |= use & (number[key] < 0)
        fixed |= use & (apart == 0)
    return np.asarray(reached), np.asarray(free), np.asarray(fixed)
