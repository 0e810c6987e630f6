"""The search that IQ2 and IQ3 share: groups of weights snap to points of a grid, under the scale of least error.

Every comment in capitals (`# GRID_SQX`) names a place where a compiler may fuse a product and a sum into one
rounding; the texts here round both. All arithmetic is float32, in the order written, vectorized over groups.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import nearest_int
from refimpl.arith.builds import STRICT
from refimpl.arith.sums import add_up
from refimpl.quants.grids import ALL, ANY, LARGEST, PLANS, Refused, find_neighbours, load_grid
from refimpl.quants.search import fit_positive

Floats = NDArray[Any]  # float32
Codes = NDArray[Any]  # integers
Mask = NDArray[Any]  # bool

HALF, ONE, ZERO = np.float32(0.5), np.float32(1), np.float32(0)
SOME = 1 << 14  # groups that are searched together: memory is bounded


class Found(NamedTuple):
    """What the search found for N blocks; all 0 for groups that count as zero."""

    scales: Floats  # [N, 256 / sub] >= 0
    numbers: Codes  # [N, 256 / width]: of the points
    signs: NDArray[np.uint8]  # [N, 32]: a set bit is a minus; 0..127 in formats with even signs
    dead: Mask  # [N, 256 / sub]: counts as zero


class Groups(NamedTuple):
    """Groups of n weights that share a scale."""

    values: Floats  # [N, n]: sizes of the weights; minus where a sign had to be wrong
    weights: Floats  # [N, n]: how much the error of each counts
    roots: Floats  # [N, n]: their square roots, by which neighbours are compared


def search(name: str, x: Floats, imatrix: Floats | None) -> Found:
    """Find the scales, points and signs of rows of weights.

    Trial scales around the peak snap to points; some or all of the points are searched once more under the best
    scale, which is then fitted to them. See grids.PLANS for what differs between the formats.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None

    Raises: grids.Refused where ggml aborts.
    """
    plan = PLANS[name]
    groups, mean = x.reshape(-1, plan.sub), mean_squares(x, plan.times)
    weights = weigh(x, imatrix, mean, plan.quarter).reshape(groups.shape)
    values, signs = split_even_signs(groups, weights) if plan.even else split_signs(groups)
    work = Groups(values, weights, np.sqrt(weights))
    peak = values.max(1)
    dead = peak < plan.epsilon
    scale, codes = peak / np.float32(2 * plan.levels - 1), np.zeros(values.shape, np.int32)
    if plan.free:
        scale, codes = fit_positive(values, weights, plan.levels + 1, STRICT)
        peak = scale * np.float32(plan.levels)
        dead |= peak <= 0
    moved = np.full((len(values), plan.sub // plan.width), plan.again == ANY)
    scale, codes, moved, lost = try_scales(name, work, peak, (scale, codes, moved), plan.steps, plan.step)
    again = moved.any(1, keepdims=True) if plan.again == ANY else moved | (plan.again == ALL)
    scale, codes, lost = snap_again(name, work, scale, codes, np.broadcast_to(again, moved.shape), lost)
    codes, scale = np.where(dead[:, None], 0, codes), np.where(dead, ZERO, scale)
    turned = np.where(scale < 0, 127 if plan.even else 255, 0).astype(np.uint8)
    signs = np.where(dead[:, None], 0, signs ^ turned[:, None]).reshape(-1, 32)
    scales = np.abs(scale).reshape(-1, 256 // plan.sub)
    refuse((lost & ~dead).reshape(scales.shape), scales)
    keys = codes.reshape(len(scales), -1, plan.width) @ plan.levels ** np.arange(plan.width)
    return Found(scales, find_neighbours(name).number[keys], signs, dead.reshape(scales.shape))


def mean_squares(x: Floats, times: int) -> Floats:
    """times * sum x^2 / 256, of each block. x : [R, n] float32; return : [R * n/256, 1] float32."""
    blocks = x.reshape(-1, 256)
    return (np.float32(times) * add_up(blocks * blocks) / np.float32(256))[:, None]  # BLOCK_SUMX2


def weigh(x: Floats, imatrix: Floats | None, mean: Floats, quarter: bool = False) -> Floats:
    """imatrix * sqrt(mean + x^2), or x^2, or mean / 4 + x^2. x, imatrix : [R, n]; mean : [N, 1]; return : [N, 256]."""
    blocks = x.reshape(-1, 256)
    if imatrix is None:
        return np.float32(0.25) * mean + blocks * blocks if quarter else blocks * blocks  # PLAIN_W
    return imatrix.reshape(-1, 256) * np.sqrt(mean + blocks * blocks)  # BLOCK_W


def split_signs(x: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Sizes and signs. x : [N, n]; return : [N, n] float32 >= 0, [N, n/8] uint8: a set bit is a minus."""
    minus = ~(x >= 0)
    return np.where(minus, -x, x), np.packbits(minus, axis=1, bitorder="little")


def split_even_signs(x: Floats, weights: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Sizes and signs, of which each eight have an even number of minuses.

    Where they have not, the weight that matters least (the first of the smallest w x^2) gets the wrong sign and
    its size becomes negative.

    x, weights : [N, n] float32
    return     : [N, n] float32, [N, n/8] uint8 in 0..127: seven signs, which tell the eighth
    """
    values, signs = split_signs(x)
    costs = (weights * x * x).reshape(-1, 8)
    least, at = costs[:, 0], np.zeros(len(costs), np.int64)
    for i in range(1, 8):
        lower = costs[:, i] < least
        least, at = np.where(lower, costs[:, i], least), np.where(lower, i, at)
    odd = np.bitwise_count(signs.reshape(-1)) & 1
    flat = values.reshape(-1, 8)
    flat[np.arange(len(flat)), at] *= np.where(odd, np.float32(-1), ONE)
    return values, ((signs.reshape(-1) ^ odd << at) & 127).astype(np.uint8).reshape(signs.shape)


def snap(name: str, groups: Groups, inverse: Floats, scale: Floats) -> tuple[Codes, Mask, Mask]:
    """Round groups of weights under a scale to codes, and move those that are no point to the best near point.

    code = nearest((inverse * x - 1) / 2);  best: the first with the least sum of root * (scale * (2 code + 1) - x)^2

    inverse, scale : [N]
    return         : codes [N, n], moved [N, points]: was it no point?, lost [N]: all near sums overflow (or NaN)
    """
    grid, table = load_grid(name), find_neighbours(name)
    levels, width = int(grid.codes.max()) + 1, grid.codes.shape[1]
    n = groups.values.shape[1]
    rounded = nearest_int(HALF * (inverse[:, None] * groups.values - ONE))  # GRID_NI
    codes = np.clip(rounded, 0, levels - 1).reshape(-1, width)
    key = codes @ levels ** np.arange(width)
    moved = np.flatnonzero(table.number[key] < 0)
    lost = np.zeros(len(codes), np.bool_)
    for part in np.array_split(moved, max(1, len(moved) // SOME)):
        x, roots = groups.values.reshape(-1, width)[part], groups.roots.reshape(-1, width)[part]
        lowest = np.ones(len(part), np.float32)
        best = find_nearest(name, key[part], x, roots, scale.repeat(n // width)[part], lowest, 2)
        lost[part] = best < 0
        codes[part] = grid.codes[best]
    mask = np.isin(np.arange(len(codes)), moved)
    return codes.reshape(-1, n), mask.reshape(-1, n // width), np.asarray(lost.reshape(-1, n // width).any(1))


def find_nearest(
    name: str, key: Codes, x: Floats, weights: Floats, scale: Floats, lowest: Floats, gap: int
) -> Codes:
    """The best near point of each missing group, or -1 where none has a finite sum.

    best: the first with the least sum of weight * (scale * q - x)^2, q = lowest + gap * code

    key, scale, lowest : [M]; x, weights : [M, 4 or 8]; return : [M] numbers of points
    """
    grid, table = load_grid(name), find_neighbours(name)
    counts = table.start[key + 1] - table.start[key]
    order = np.arange(counts.max(initial=1))
    near = table.near[np.minimum(table.start[key][:, None] + order, len(table.near) - 1)]
    steps = (gap * grid.codes).astype(np.float32)
    total = np.zeros(near.shape, np.float32)
    for i in range(x.shape[1]):
        off = scale[:, None] * (lowest[:, None] + steps[near, i]) - x[:, i, None]  # GRID_DIFF
        total = total + weights[:, i, None] * off * off  # GRID_D2
    total = np.where((order < counts[:, None]) & (total < LARGEST), total, np.float32(np.inf))
    best = total.argmin(1)
    rows = np.arange(len(key))
    return np.where(np.isinf(total[rows, best]), -1, near[rows, best])


def measure(groups: Groups, codes: Codes) -> tuple[Floats, Floats]:
    """Sums of w x q and w q^2 with q = 2 code + 1. Return : [N], [N]."""
    q = (2 * codes + 1).astype(np.float32)
    return (
        add_up(groups.weights * groups.values * q),  # GRID_SQX
        add_up(groups.weights * q * q),  # GRID_SQ2
    )


def try_scales(
    name: str, groups: Groups, peak: Floats, first: tuple[Floats, Codes, Mask], steps: int, step: Any
) -> tuple[Floats, Codes, Mask, Mask]:
    """Snap under 2 * steps + 1 scales around peak / (2 levels - 1), and keep the one of least error.

    first  : scale [N], codes [N, n] and moved [N, points] for groups that no trial serves
    return : scale, codes, moved, lost [N]
    """
    scale, codes, moved = first
    lost, best = np.zeros(len(peak), np.bool_), np.zeros(len(peak), np.float32)
    top = np.float32(2 * int(load_grid(name).codes.max()) + 1)
    for k in range(-steps, steps + 1):
        inverse = (top + np.float32(k) * step) / peak  # GRID_ISC
        trial, aside, gone = snap(name, groups, inverse, ONE / inverse)
        sum_qx, sum_q2 = measure(groups, trial)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = np.where(better, sum_qx / sum_q2, scale)
        best = np.where(better, scale * sum_qx, best)
        codes, moved = np.where(better[:, None], trial, codes), np.where(better[:, None], aside, moved)
        lost |= gone
    return scale, codes, moved, lost


def snap_again(
    name: str, groups: Groups, scale: Floats, codes: Codes, again: Mask, lost: Mask
) -> tuple[Floats, Codes, Mask]:
    """Snap some points once more, under the scale that was found, and fit the scale to them all.

    again : [N, points]: which
    """
    served = again.any(1) & (scale > 0)
    trial, _, gone = snap(name, groups, ONE / scale, scale)
    changed = (again & served[:, None]).repeat(codes.shape[1] // again.shape[1], 1)
    codes = np.where(changed, trial, codes)
    sum_qx, sum_q2 = measure(groups, codes)
    scale = np.where(served & (sum_q2 > 0), sum_qx / sum_q2, scale)
    return scale, codes, lost | served & gone


def round_scales(scales: Floats, levels: int) -> tuple[Floats, Codes]:
    """The block's step and the codes of its scales.

    step = largest / (2 levels - 1);  code = nearest((scale / step - 1) / 2)

    scales : [N, S] float32 >= 0
    return : [N], [N, S]; 0 and 0 where all scales are 0
    """
    step = scales.max(1) / np.float32(2 * levels - 1)
    inverse = ONE / step
    codes = np.clip(nearest_int(HALF * (inverse[:, None] * scales - ONE)), 0, levels - 1)  # SCALE_NI
    dead = scales.max(1) == 0
    return np.where(dead, ZERO, step), np.where(dead[:, None], 0, codes)


def refuse(lost: Mask, scale: Floats) -> None:
    """Raise Refused for the first block with a group that ggml aborts on. lost, scale : [N, groups]."""
    bad = (lost | ~(scale >= 0)).any(1)
    if bad.any():
        raise Refused(int(bad.argmax()))
