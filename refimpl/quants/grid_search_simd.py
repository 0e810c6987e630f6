"""The search that IQ2 and IQ3 share, on explicit vectors: the results of grid_search_jit for every input.

The weights of a group are lanes while they are rounded; the near points of a group of codes are lanes while one
of them is chosen: sixteen at a time, each adding in ggml's order. The sums over a group run one after the other.
Everything here is pasted into a format's encoder, whose plan is a constant there.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import STRICT
from refimpl.arith.simd import Lanes, Scratch, fill, inlined, maximum, minimum
from refimpl.arith.simd_lanes import (
    constants,
    convert,
    first,
    high_half,
    low_half,
    lowest_lane,
    mask_bits,
    permutation,
)
from refimpl.arith.simd_memory import get, load, peek, poke, stack, store
from refimpl.quants.grid_search_jit import (
    Found,
    Group,
    find_peak,
    mean_square,
    split_even_signs,
    split_signs,
    weigh,
)
from refimpl.quants.grids import ALL, ANY, LARGEST, Plan, find_neighbours, load_grid
from refimpl.quants.search_jit import fit_positive
from refimpl.quants.search_simd import nearest

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

LANES = 16  # near points that are compared together
MOST = 320  # near points of one group of codes, at most, in whole vectors
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
THREES = constants("int16", [3 ** (i % 8) for i in range(32)])
EIGHTS = constants("int16", [8 ** (i % 4) for i in range(32)])
NEXT, SECOND, FOURTH = (permutation([i ^ h for i in range(32)]) for h in (1, 2, 4))


class Tables(NamedTuple):
    """The grid of a format, its near points in vectors of 16: the last is repeated to fill them."""

    number: Integers  # [levels^width]: the point with these codes, or -1
    chunk: Integers  # [levels^width + 1]: the first vector of near points of a missing group
    codes: Bytes  # [vectors, width, 16] uint8: of near points
    near: Integers  # [vectors, 16]: their numbers
    points: Bytes  # [G * width] uint8: codes


@cache
def load_tables(name: str) -> Tables:
    """The tables of a format."""
    grid, table = load_grid(name), find_neighbours(name)
    counts = np.diff(table.start)
    vectors = -(-counts // LANES)
    chunk = np.concatenate([[0], np.cumsum(vectors)]).astype(np.int32)
    key = np.repeat(np.arange(len(counts)), vectors)
    places = (np.arange(chunk[-1]) - chunk[key])[:, None] * LANES + np.arange(LANES)
    near = table.near[table.start[key][:, None] + np.minimum(places, counts[key][:, None] - 1)]
    codes = np.ascontiguousarray(grid.codes[near].transpose(0, 2, 1))
    return Tables(table.number, chunk, codes, near, grid.codes.reshape(-1))


def make_group() -> Group:
    """Scratch for one group, filled up with zeros to 32 weights."""
    floats, codes, points = np.zeros((3, 32), np.float32), np.zeros((2, 32), np.uint8), np.zeros(8, np.uint8)
    return Group(floats[0], floats[1], floats[2], codes[0], codes[1], points, points)


@inlined
def find_nearest(
    t: Tables,
    values: Floats,
    weights: Floats,
    key: int,
    at: int,
    scale: Any,
    lowest: Any,
    gap: int,
    width: int,
) -> int:
    """The best near point of the missing group `key`, whose values start at `at`; -1: none has a finite sum."""
    totals = stack(np.float32, MOST)
    begin, end = int(t.chunk[key]), int(t.chunk[key + 1])
    best = fill(LARGEST, 16)
    for c in range(begin, end):
        total = fill(ZERO, 16)
        for i in range(width):
            code = convert(load(t.codes, (c * width + i) * 16, 16), np.int32)
            q = lowest + convert(code * np.int32(gap), np.float32)
            off = scale * q - get(values, at + i)
            total += get(weights, at + i) * off * off
        store(totals, (c - begin) * 16, total)
        best = minimum(total, best)
    half = minimum(low_half(best), high_half(best))
    half4 = minimum(low_half(half), high_half(half))
    half2 = minimum(low_half(half4), high_half(half4))
    least = first(minimum(low_half(half2), high_half(half2)))
    found, c = -1, begin
    while found < 0 and c < end and least < LARGEST:
        lanes = mask_bits(load(totals, (c - begin) * 16, 16) == least)
        if lanes != np.uint64(0):
            found = int(get(t.near, c * 16 + lowest_lane(lanes)))
        c += 1
    return found


@inlined
def add_up(keys: Lanes, width: int) -> Lanes:
    """In every lane the sum over its point."""
    total = keys + NEXT(keys)
    total = total + SECOND(total)
    if width == 8:
        total = total + FOURTH(total)
    return total


@inlined
def snap(plan: Plan, t: Tables, g: Group, keys: Scratch, inverse: Any, scale: Any, wanted: int) -> Any:
    """Round the points whose bit is set in `wanted` to g.trial, and move them to the grid.

    return : bits: those that moved; lost: does one have no near point with a finite sum?
    """
    moved, lost = 0, False
    rounded = nearest(HALF * (inverse * load(g.values, 0, 32) - ONE))
    code = minimum(maximum(rounded, np.int32(0)), np.int32(plan.levels - 1))
    powers = THREES() if plan.levels == 3 else EIGHTS()
    store(keys, 0, add_up(convert(code, np.int16) * powers, plan.width))
    store(g.trial, 0, convert(code, np.uint8))
    for p in range(plan.sub // plan.width):
        at = p * plan.width
        key = int(get(keys, at))
        if wanted >> p & 1:
            if get(t.number, key) < np.int32(0):
                point = find_nearest(t, g.values, g.roots, key, at, scale, ONE, 2, plan.width)
                moved |= 1 << p
                if point < 0:
                    lost = True
                elif plan.width == 8:
                    poke(g.trial, at, peek(t.points, point * 8, np.uint64))
                else:
                    poke(g.trial, at, peek(t.points, point * 4, np.uint32))
        elif plan.width == 8:
            poke(g.trial, at, peek(g.codes, at, np.uint64))
        else:
            poke(g.trial, at, peek(g.codes, at, np.uint32))
    return moved, lost


@inlined
def measure(plan: Plan, g: Group, terms_x: Scratch, terms_w: Scratch) -> Any:
    """Sums of w x q and w q^2 with q = 2 code + 1 of g.trial, in order."""
    q = convert(convert(load(g.trial, 0, 32), np.int32) * np.int32(2) + np.int32(1), np.float32)
    w = load(g.weights, 0, 32)
    store(terms_x, 0, w * load(g.values, 0, 32) * q)
    store(terms_w, 0, w * q * q)
    sum_qx, sum_q2 = ZERO, ZERO
    for i in range(plan.sub):
        sum_qx += get(terms_x, i)
        sum_q2 += get(terms_w, i)
    return sum_qx, sum_q2


@inlined
def fit_group(plan: Plan, t: Tables, g: Group) -> Any:
    """Search the scale and the codes of one group: grid_search_jit.fit_group.

    return : scale, lost, living
    """
    keys, terms_x, terms_w = stack(np.int16, 32), stack(np.float32, 32), stack(np.float32, 32)
    every = (1 << plan.sub // plan.width) - 1
    peak = find_peak(g)
    living, lost = not peak < plan.epsilon, False
    scale = peak / np.float32(2 * plan.levels - 1)
    if plan.free and living:
        scale = fit_positive(
            g.values[: plan.sub], g.weights[: plan.sub], plan.levels + 1, g.codes[: plan.sub], STRICT
        )
        peak = scale * np.float32(plan.levels)
        living = not peak <= ZERO
    if not living:
        scale = ZERO
    else:
        store(g.codes, 0, fill(np.uint8(0), 32))
        best, top = ZERO, np.float32(2 * plan.levels - 1)
        again = every if plan.again == ANY else 0
        for k in range(-plan.steps, plan.steps + 1):
            inverse = (top + np.float32(k) * plan.step) / peak
            moved, gone = snap(plan, t, g, keys, inverse, ONE / inverse, every)
            lost |= gone
            sum_qx, sum_q2 = measure(plan, g, terms_x, terms_w)
            if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
                scale = sum_qx / sum_q2
                best = scale * sum_qx
                store(g.codes, 0, load(g.trial, 0, 32))
                again = moved
        if plan.again == ALL or (plan.again == ANY and again != 0):
            again = every
        if again != 0 and scale > ZERO:
            _, gone = snap(plan, t, g, keys, ONE / scale, scale, again)
            lost |= gone
            sum_qx, sum_q2 = measure(plan, g, terms_x, terms_w)
            store(g.codes, 0, load(g.trial, 0, 32))
            if sum_q2 > ZERO:
                scale = sum_qx / sum_q2
        lost |= not abs(scale) >= ZERO
    return scale, lost, living


@inlined
def number_points(plan: Plan, t: Tables, g: Group, keys: Scratch, numbers: Integers, start: int) -> None:
    """Write the numbers of the points that g.codes are."""
    powers = THREES() if plan.levels == 3 else EIGHTS()
    store(keys, 0, add_up(convert(load(g.codes, 0, 32), np.int16) * powers, plan.width))
    for p in range(plan.sub // plan.width):
        numbers[start + p] = get(t.number, int(get(keys, p * plan.width)))


@inlined
def search_block(plan: Plan, t: Tables, x: Floats, imatrix: Floats, g: Group, found: Found) -> bool:
    """Search one block: grid_search_jit.search_block."""
    keys = stack(np.int16, 32)
    n, points, refused = plan.sub, plan.sub // plan.width, False
    mean = mean_square(x, plan.times)
    found.numbers[:] = 0
    for j in range(256 // n):
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
        if living and not lost:
            number_points(plan, t, g, keys, found.numbers, points * j)
        refused |= lost
    return refused
