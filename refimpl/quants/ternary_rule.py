"""What the search of IQ1 leaves in a block whatever the imatrix was: a rule for points and scales.

Two fifths of the points are not the nearest under the stored scale (the imatrix decides), still not every block can
come out of the search:

scales  the largest is the highest code, as it is what the block's step derives from
points  in ascending order the weights of a group fall into three parts; their codes 0, 1, 2 (or 2, 1, 0, where the
        scale came out negative) are the point, or are no point of the grid and have it among their near ones
zeros   a group that counts as zero holds zeros; so does one that no importance is left for

Of eight weights it matters only how many lie below either cut, so 45 pairs of counts are looked up for each point,
and then all cuts of the group.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.quants.grids import Stored, find_reach, load_grid

Floats = NDArray[Any]  # float32
Codes = NDArray[Any]  # integers

NAME, POWERS = "iq1_s", 3 ** np.arange(8)


def measure(d: Floats, stored: Stored, x: Floats, sub: int, epsilon: np.float32) -> Codes:
    """Count what the search does not leave, in each block.

    d       : [N] float32: blocks where it is 0 or not finite decode to nothing, and nothing counts
    x       : [N, 256] float32, finite: the source
    sub     : weights that share a scale
    epsilon : a group whose largest size lies below this counts as zero
    return  : [N, 1 + 256 / sub] int32, 1 where the scales or the points of a group are none
    """
    groups = x.reshape(-1, sub)
    numbers = stored.numbers.reshape(len(groups), -1)
    blank = ~numbers.any(1) & (stored.levels.reshape(-1) == 0)
    dead = np.abs(groups).max(1) < epsilon
    explained = np.where(dead, blank, blank | explain_points(groups, numbers))
    parts = (stored.levels.max(1) != 7)[:, None], ~explained.reshape(len(x), -1)
    some = np.isfinite(d) & (d != 0)
    return np.asarray(np.concatenate(parts, 1) & some[:, None], np.int32)


def explain_points(groups: Floats, numbers: Codes) -> NDArray[np.bool_]:
    """Does some cut give these points to each group? groups : [N, sub]; numbers : [N, sub / 8]; return : [N]."""
    count = groups.shape[1]
    order = groups.argsort(1, kind="stable")
    below = np.zeros((len(groups), count + 1, count // 8), np.int64)  # how many of each eight lie below a cut
    np.put_along_axis(below[:, 1:], (order // 8)[..., None], 1, 2)
    below = below.cumsum(1)
    within = groups.reshape(-1, 8).argsort(1, kind="stable")
    codes = load_grid(NAME).codes[numbers.reshape(-1)].astype(np.int64)
    explained = np.zeros(len(groups), np.bool_)
    for turned in (False, True):
        fits = np.zeros((len(codes), 9, 9), np.bool_)
        for a in range(9):
            for b in range(a, 9):
                rounded = np.empty_like(codes)
                ranks = (np.arange(8) >= a).astype(np.int64) + (np.arange(8) >= b)
                np.put_along_axis(
                    rounded, within, np.broadcast_to(2 - ranks if turned else ranks, codes.shape), 1
                )
                fits[:, a, b] = ((rounded - codes) ** 2).sum(1) <= find_reach(NAME)[rounded @ POWERS]
        fits = fits.reshape(*numbers.shape, 9, 9)
        row, point = np.ogrid[: len(groups), : numbers.shape[1]]
        for i in range(count + 1):
            for j in range(i, count + 1):
                explained |= fits[row, point, below[:, i], below[:, j]].all(1)
    return explained
