"""The search for a scale and a minimum per sub-block (Q2_K, Q4_K, Q5_K), 64 sub-blocks of 16 or 32 side by side.

ggml's make_qkx2_quants and make_qkx3_quants, which differ in their steps and weights alone. One lane is one
sub-block, so each lane adds in ggml's order. Groups of lanes take each step together: the divisions of
one hide behind the loop over the other's weights. All state is scratch that stays in the first-level cache.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.simd import ROOM, Lanes, Scratch, absolute, fill, inlined, maximum, minimum, select, sqrt
from refimpl.arith.simd_fused import add_product, subtract_products
from refimpl.arith.simd_memory import load, stack, store, transpose16
from refimpl.quants.search_simd import LIMIT, MAGIC, ONE, ZERO

LANES = ROOM  # sub-blocks of a group
BOTH = 64  # sub-blocks searched together
GROUPS = BOTH // LANES
TILE = 32 * LANES  # weights of a group of LANES sub-blocks of 32
TILES = 2048  # weights of all groups, at most
NEVER = np.float32(np.nan)


class Search(NamedTuple):
    """Scratch of one search, all float32. Tiles are [group, element, lane], the rest [group, lane]."""

    values: Scratch  # tile: the weights x
    importance: Scratch  # tile: w of each weight
    codes: Scratch  # tile: codes of the step at hand
    low: Scratch  # min(x), at most 0
    high: Scratch  # max(x)
    sum_w: Scratch
    sum_wx: Scratch
    scale: Scratch  # best so far: x is about scale*code + base
    base: Scratch
    error: Scratch  # of the best so far
    new_scale: Scratch  # of the step at hand; NaN where it has none
    new_base: Scratch
    inverse: Scratch  # the best codes are nearest(inverse*(x - origin))
    origin: Scratch
    new_inverse: Scratch
    wild: Scratch  # 1 where a code may have left the range in which rounding is exact, else 0


@inlined
def allocate() -> Search:
    """Scratch on the caller's stack."""
    return Search(
        stack(np.float32, TILES),
        stack(np.float32, TILES),
        stack(np.float32, TILES),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
    )


@inlined
def lay_out(x: NDArray[np.float32], at: int, tiles: Scratch) -> None:
    """tiles[group, i, lane] = x[at + 32*(32*group + lane) + i]"""
    for lane in range(0, BOTH, 16):
        corner = lane // LANES * TILE + lane % LANES
        transpose16(x, at + 32 * lane, 32, tiles, corner, LANES)
        transpose16(x, at + 32 * lane + 16, 32, tiles, corner + 16 * LANES, LANES)


@inlined
def weigh_plain(s: Search, build: Build) -> None:
    """w = sqrt(Σx²/32) + |x|"""
    for group in range(0, TILES, TILE):
        total = fill(ZERO, LANES)
        for i in range(group, group + TILE, LANES):
            v = load(s.values, i, LANES)
            total = add_product(build.ROW_SUMX2, total, v, v)
        spread = sqrt(total / np.float32(32))
        for i in range(group, group + TILE, LANES):
            store(s.importance, i, spread + absolute(load(s.values, i, LANES)))


@inlined
def weigh_by_imatrix(values: Scratch, importance: Scratch, size: int, sigma2: Scratch, build: Build) -> None:
    """w = imatrix * sqrt(sigma2 + x²), where the tile of w, `importance`, holds the imatrix before.

    sigma2 : float32 [group, lane]
    """
    for group in range(GROUPS):
        sigma = load(sigma2, group * LANES, LANES)
        for i in range(group * size * LANES, (group + 1) * size * LANES, LANES):
            v = load(values, i, LANES)
            store(importance, i, load(importance, i, LANES) * sqrt(add_product(build.ROW_W, sigma, v, v)))


@inlined
def survey(s: Search, group: int, size: int, top: np.float32, linear: bool, build: Build) -> None:
    """Range and sums of each sub-block, and the error of the scale (max - min)/top: the one to beat."""
    start, end = group * size * LANES, (group + 1) * size * LANES
    v = load(s.values, start, LANES)
    w = load(s.importance, start, LANES)
    low, high, sum_w, sum_wx = v, v, w, w * v
    for i in range(start + LANES, end, LANES):
        v = load(s.values, i, LANES)
        w = load(s.importance, i, LANES)
        low, high = minimum(v, low), maximum(v, high)
        sum_w += w
        sum_wx = add_product(build.QK_SUMX, sum_wx, w, v)
    low = select(low > ZERO, ZERO, low)
    inverse = top / (high - low)
    scale = ONE / inverse
    error = fill(ZERO, LANES)
    for i in range(start, end, LANES):
        v = load(s.values, i, LANES)
        code = add_product(build.QK_NI0, MAGIC, inverse, v - low) - MAGIC
        code = minimum(maximum(code, ZERO), top)
        miss = add_product(build.QK_DIFF0, low, scale, code) - v
        miss_size = absolute(miss) if linear else miss * miss
        error = add_product(build.QK_ERR0, error, load(s.importance, i, LANES), miss_size)
    at = group * LANES
    store(s.low, at, low)
    store(s.high, at, high)
    store(s.sum_w, at, sum_w)
    store(s.sum_wx, at, sum_wx)
    store(s.scale, at, scale)
    store(s.base, at, low)
    store(s.inverse, at, inverse)
    store(s.origin, at, low)
    store(s.error, at, error)
    store(s.wild, at, flag_wild(inverse, low, high, low))


@inlined
def flag_wild(inverse: Lanes, low: Lanes, high: Lanes, base: Lanes) -> Lanes:
    """1 where inverse*(x - base) may be huge, or may not grow with x, for some x from low to high; else 0."""
    tame = (base < high) & (inverse * (low - base) > -LIMIT) & (inverse * (high - base) < LIMIT)
    return select(tame, fill(ZERO, LANES), ONE)


@inlined
def propose(s: Search, group: int, size: int, top: np.float32, factor: np.float32, build: Build) -> None:
    """One step: codes under the inverse scale factor/(max - base), then the scale and base that suit them.

    A weighted linear regression of x on the codes; a base above 0 becomes 0. Codes need no ceiling while
    factor stays below top + 0.5, for inverse*(x - base) is at most factor.
    """
    at = group * LANES
    base, high = load(s.base, at, LANES), load(s.high, at, LANES)
    inverse = factor / (high - base)
    store(s.new_inverse, at, inverse)
    wild = flag_wild(inverse, load(s.low, at, LANES), high, base)
    store(s.wild, at, maximum(load(s.wild, at, LANES), wild))
    sum_l, sum_l2, sum_lx = fill(ZERO, LANES), fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(group * size * LANES, (group + 1) * size * LANES, LANES):
        v = load(s.values, i, LANES)
        code = maximum(add_product(build.QK_NI1, MAGIC, inverse, v - base) - MAGIC, ZERO)
        if factor > top + np.float32(0.4):
            code = minimum(code, top)
        store(s.codes, i, code)
        w = load(s.importance, i, LANES)
        wl = w * code
        sum_l = add_product(build.QK_SL, sum_l, w, code)
        sum_l2 = add_product(build.QK_SL2, sum_l2, wl, code)
        sum_lx = add_product(build.QK_SXL, sum_lx, wl, v)
    sum_w, sum_wx = load(s.sum_w, at, LANES), load(s.sum_wx, at, LANES)
    determinant = subtract_products(build.QK_D, sum_w, sum_l2, sum_l, sum_l)
    scale = subtract_products(build.QK_TS, sum_w, sum_lx, sum_wx, sum_l) / determinant
    base = subtract_products(build.QK_TM, sum_l2, sum_wx, sum_l, sum_lx) / determinant
    scale = select(base > ZERO, sum_lx / sum_l2, scale)
    store(s.new_base, at, select(base > ZERO, ZERO, base))
    store(s.new_scale, at, select(determinant > ZERO, scale, NEVER))


@inlined
def judge(s: Search, group: int, size: int, linear: bool, build: Build) -> None:
    """Keep the step's scale and base in the lanes where their error is smaller (a NaN never is)."""
    at = group * LANES
    scale, base = load(s.new_scale, at, LANES), load(s.new_base, at, LANES)
    error = fill(ZERO, LANES)
    for i in range(group * size * LANES, (group + 1) * size * LANES, LANES):
        miss = add_product(build.QK_DIFF1, base, scale, load(s.codes, i, LANES)) - load(s.values, i, LANES)
        miss_size = absolute(miss) if linear else miss * miss
        error = add_product(build.QK_ERR1, error, load(s.importance, i, LANES), miss_size)
    best = load(s.error, at, LANES)
    better = error < best
    store(s.error, at, select(better, error, best))
    store(s.scale, at, select(better, scale, load(s.scale, at, LANES)))
    store(s.inverse, at, select(better, load(s.new_inverse, at, LANES), load(s.inverse, at, LANES)))
    store(s.origin, at, select(better, load(s.base, at, LANES), load(s.origin, at, LANES)))
    store(s.base, at, select(better, base, load(s.base, at, LANES)))


@inlined
def search(
    s: Search,
    size: int,
    top: np.float32,
    start: np.float32,
    delta: np.float32,
    steps: int,
    linear: bool,
    build: Build,
) -> None:
    """From values and importance of sub-blocks of `size` weights to scale and base, codes from 0 to top.

    Step k tries the factor start + k*delta + top. linear: errors add up by their size, not their square.
    """
    for group in range(GROUPS):
        survey(s, group, size, top, linear, build)
    for step in range(steps):
        factor = add_product(build.QK_ISC, start, delta, np.float32(step)) + top
        for group in range(GROUPS):
            propose(s, group, size, top, factor, build)
        for group in range(GROUPS):
            judge(s, group, size, linear, build)
