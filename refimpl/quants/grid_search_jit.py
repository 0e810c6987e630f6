"""The search that IQ2 and IQ3 share, for one group of weights at a time: the twin of grid_search.py.

Comments in capitals: see grid_search.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import nearest_int
from refimpl.arith.builds import STRICT
from refimpl.arith.jit import jit
from refimpl.quants.grids import ALL, ANY, LARGEST, Plan, find_neighbours, load_grid
from refimpl.quants.search_jit import fit_positive

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

ZERO, QUARTER, HALF, ONE = np.float32(0), np.float32(0.25), np.float32(0.5), np.float32(1)


class Tables(NamedTuple):
    """The grid of a format: see grids.Grid and grids.Neighbours."""

    points: Bytes  # [G, width] uint8: codes
    number: Integers  # [levels^width]
    start: Integers  # [levels^width + 1]
    near: Integers


class Found(NamedTuple):
    """What the search found for one block; all 0 for groups that count as zero. Written in place."""

    scales: Floats  # [256 / sub] >= 0
    numbers: Integers  # [256 / width]: of the points
    signs: Bytes  # [32]: a set bit is a minus; 0..127 in formats with even signs
    living: Bytes  # [256 / sub]: 0 where a group counts as zero


class Group(NamedTuple):
    """One group of n weights, and what is known of its codes."""

    values: Floats  # [n]: sizes of the weights; minus where a sign had to be wrong
    weights: Floats  # [n]
    roots: Floats  # [n]
    codes: Bytes  # [n]: the best
    trial: Bytes  # [n]
    moved: Bytes  # [n / width]: 1 where the best codes came from the near points
    aside: Bytes  # [n / width]: the same of the trial


def load_tables(name: str) -> Tables:
    """The tables of a format."""
    return Tables(load_grid(name).codes, *find_neighbours(name))


@jit
def make_found(plan: Plan) -> Found:
    """Room for the results of one block."""
    subs = 256 // plan.sub
    return Found(
        np.zeros(subs, np.float32),
        np.zeros(256 // plan.width, np.int32),
        np.zeros(32, np.uint8),
        np.zeros(subs, np.uint8),
    )


@jit
def make_group(plan: Plan) -> Group:
    """Scratch for one group."""
    floats, points = np.zeros((3, plan.sub), np.float32), plan.sub // plan.width
    codes, marks = np.zeros((2, plan.sub), np.uint8), np.zeros((2, points), np.uint8)
    return Group(floats[0], floats[1], floats[2], codes[0], codes[1], marks[0], marks[1])


@jit
def mean_square(x: Floats, times: int) -> Any:
    """times * sum x^2 / 256. x : [256] float32."""
    total = ZERO
    for i in range(x.size):
        total += x[i] * x[i]  # BLOCK_SUMX2
    return np.float32(times) * total / np.float32(256)


@jit
def weigh(plan: Plan, x: Floats, imatrix: Floats, mean: Any, g: Group) -> None:
    """Weights and their roots. x : [n] float32; imatrix : [n] float32, or [0]: none."""
    for i in range(x.size):
        square = x[i] * x[i]
        if imatrix.size > 0:
            g.weights[i] = imatrix[i] * np.sqrt(mean + square)  # BLOCK_W
        else:
            g.weights[i] = QUARTER * mean + square if plan.quarter else square  # PLAIN_W
        g.roots[i] = np.sqrt(g.weights[i])


@jit
def split_signs(x: Floats, g: Group, signs: Bytes) -> None:
    """Sizes to g.values. x : [n] float32; signs : [n/8] uint8, written: a set bit is a minus."""
    for k in range(x.size // 8):
        bits = 0
        for i in range(8):
            v = x[8 * k + i]
            minus = not v >= ZERO
            g.values[8 * k + i] = -v if minus else v
            bits |= (1 if minus else 0) << i
        signs[k] = bits


@jit
def split_even_signs(x: Floats, g: Group, signs: Bytes) -> None:
    """The same with an even number of minuses in each eight: signs in 0..127 tell the eighth."""
    split_signs(x, g, signs)
    for k in range(x.size // 8):
        bits = int(signs[k])
        count = 0
        for i in range(8):
            count += bits >> i & 1
        if count & 1:
            at = 8 * k
            least = g.weights[at] * x[at] * x[at]
            for i in range(8 * k + 1, 8 * k + 8):
                cost = g.weights[i] * x[i] * x[i]
                if cost < least:
                    least, at = cost, i
            g.values[at] = -g.values[at]
            bits ^= 1 << at - 8 * k
        signs[k] = bits & 127


@jit
def find_peak(g: Group) -> Any:
    """The largest of the values."""
    return g.values.max()


@jit
def find_nearest(t: Tables, g: Group, key: int, at: int, scale: Any) -> int:
    """The best near point of a missing group, or -1 where none has a finite sum; the group starts at `at`."""
    best, found = LARGEST, -1
    for j in range(t.start[key], t.start[key + 1]):
        total = ZERO
        for i in range(t.points.shape[1]):
            off = scale * np.float32(2 * int(t.points[t.near[j], i]) + 1) - g.values[at + i]  # GRID_DIFF
            total += g.roots[at + i] * off * off  # GRID_D2
        if total < best:
            best, found = total, t.near[j]
    return found


@jit
def snap_point(t: Tables, g: Group, k: int, levels: int, inverse: Any, scale: Any, codes: Bytes) -> int:
    """Round group k to codes; where they are no point, move to the best near one.

    return : 0: they were a point; 1: moved; 2: no near point has a finite sum, and nothing moved
    """
    width = t.points.shape[1]
    key, power = 0, 1
    for i in range(k * width, (k + 1) * width):
        code = max(0, min(levels - 1, nearest_int(HALF * (inverse * g.values[i] - ONE))))  # GRID_NI
        codes[i] = code
        key += code * power
        power *= levels
    if t.number[key] >= 0:
        return 0
    point = find_nearest(t, g, key, k * width, scale)
    if point < 0:
        return 2
    for i in range(width):
        codes[k * width + i] = t.points[point, i]
    return 1


@jit
def measure(g: Group, codes: Bytes) -> Any:
    """Sums of w x q and w q^2 with q = 2 code + 1."""
    sum_qx, sum_q2 = ZERO, ZERO
    for i in range(codes.size):
        q = np.float32(2 * int(codes[i]) + 1)
        sum_qx += g.weights[i] * g.values[i] * q  # GRID_SQX
        sum_q2 += g.weights[i] * q * q  # GRID_SQ2
    return sum_qx, sum_q2


@jit
def try_scales(plan: Plan, t: Tables, g: Group, peak: Any, scale: Any) -> Any:
    """Snap under 2 * steps + 1 scales around peak / (2 levels - 1); keep the codes of least error.

    scale  : what to return if no trial serves
    return : scale, lost: some group of some trial has no point
    """
    best, lost, top = ZERO, False, np.float32(2 * plan.levels - 1)
    for k in range(-plan.steps, plan.steps + 1):
        inverse = (top + np.float32(k) * plan.step) / peak  # GRID_ISC
        for p in range(g.aside.size):
            g.aside[p] = snap_point(t, g, p, plan.levels, inverse, ONE / inverse, g.trial)
            lost |= g.aside[p] == 2
        sum_qx, sum_q2 = measure(g, g.trial)
        if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
            scale = sum_qx / sum_q2
            best = scale * sum_qx
            g.codes[:] = g.trial
            g.moved[:] = g.aside
    return scale, lost


@jit
def snap_again(plan: Plan, t: Tables, g: Group, scale: Any, lost: bool) -> Any:
    """Snap some or all points once more, under the scale that was found; fit the scale to them all."""
    some = g.moved.max() > 0
    if plan.again == ALL or (plan.again == ANY and some):
        g.moved[:] = 1
        some = True
    if not (some and scale > ZERO):
        return scale, lost
    for p in range(g.moved.size):
        if g.moved[p] != 0:
            lost |= snap_point(t, g, p, plan.levels, ONE / scale, scale, g.codes) == 2
    sum_qx, sum_q2 = measure(g, g.codes)
    return (sum_qx / sum_q2 if sum_q2 > ZERO else scale), lost


@jit
def fit_group(plan: Plan, t: Tables, g: Group) -> Any:
    """Search the scale and the codes of one group.

    return : scale, lost, living: does it not count as zero?
    """
    peak = find_peak(g)
    g.codes[:] = 0
    g.moved[:] = 1 if plan.again == ANY else 0
    if peak < plan.epsilon:
        return ZERO, False, False
    scale = peak / np.float32(2 * plan.levels - 1)
    if plan.free:
        scale = fit_positive(g.values, g.weights, plan.levels + 1, g.codes, STRICT)
        peak = scale * np.float32(plan.levels)
        if peak <= ZERO:
            return ZERO, False, False
    scale, lost = try_scales(plan, t, g, peak, scale)
    scale, lost = snap_again(plan, t, g, scale, lost)
    return scale, lost or not abs(scale) >= ZERO, True


@jit
def search_block(plan: Plan, t: Tables, x: Floats, imatrix: Floats, g: Group, found: Found) -> bool:
    """Search one block. x : [256] float32; imatrix : [256] float32, or [0]; return : does ggml abort on it?"""
    mean, n, refused = mean_square(x, plan.times), plan.sub, False
    found.numbers[:] = 0
    for j in range(found.scales.size):
        part, signs = x[n * j : n * (j + 1)], found.signs[n // 8 * j : n // 8 * (j + 1)]
        weigh(plan, part, imatrix[n * j : n * (j + 1)] if imatrix.size > 0 else imatrix, mean, g)
        if plan.even:
            split_even_signs(part, g, signs)
        else:
            split_signs(part, g, signs)
        scale, lost, living = fit_group(plan, t, g)
        found.scales[j], found.living[j] = abs(scale), living
        for k in range(signs.size):
            turned = int(signs[k]) ^ (0 if scale >= ZERO else 127 if plan.even else 255)
            signs[k] = turned if living else 0
        for k in range(g.moved.size):
            if living and not lost:
                found.numbers[g.moved.size * j + k] = number_point(t, g, k, plan.levels)
        refused |= lost
    return refused


@jit
def number_point(t: Tables, g: Group, k: int, levels: int) -> int:
    """The number of the point that g.codes of group k are."""
    width = t.points.shape[1]
    key = 0
    for i in range((k + 1) * width - 1, k * width - 1, -1):
        key = key * levels + int(g.codes[i])
    return int(t.number[key])


@jit
def find_step(scales: Floats, levels: int) -> Any:
    """The block's step: the largest scale over 2 levels - 1. scales : [S] float32 >= 0."""
    largest = ZERO
    for i in range(scales.size):
        largest = max(largest, scales[i])
    return largest / np.float32(2 * levels - 1)


@jit
def round_scale(scale: Any, inverse: Any, levels: int) -> int:
    """The code of a scale."""
    return max(0, min(levels - 1, nearest_int(HALF * (inverse * scale - ONE))))  # SCALE_NI


@jit
def write_half(half: int, block: Bytes) -> None:
    """Write the fp16 that a block begins with."""
    block[0], block[1] = half & 255, half >> 8
