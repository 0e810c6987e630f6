"""The search for a scale alone (Q6_K, and Q5_0 with an imatrix), 64 sub-blocks side by side.

ggml's make_qx_quants: x is about scale*code, codes from -top to top - 1. One lane is one sub-block, so each
lane adds in ggml's order. Groups of lanes take each step together: the divisions of one hide behind
the loop over the other's weights.
"""

from typing import NamedTuple

import numpy as np

from refimpl.arith.builds import Build, Form
from refimpl.arith.simd import ROOM, Scratch, absolute, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import add_product
from refimpl.arith.simd_memory import load, stack, store
from refimpl.quants.search_simd import MAGIC, TINY, ZERO

LANES = ROOM  # sub-blocks of a group
BOTH = 64  # sub-blocks searched together
GROUPS = BOTH // LANES
TILES = 2048  # their weights, at most


class ScaleSearch(NamedTuple):
    """Scratch of one search, all float32. Tiles are [group, element, lane], the rest [group, lane]."""

    values: Scratch  # tile: the weights x
    importance: Scratch  # tile: w
    products: Scratch  # tile: w*x
    peak: Scratch  # the first of the x that are largest in size
    scale: Scratch  # best so far, 0 where all x are (nearly) 0
    merit: Scratch  # (Σwlx)²/Σwl² of the best: what it takes off the error
    inverse: Scratch  # the inverse scale that gave the best codes


@inlined
def allocate() -> ScaleSearch:
    """Scratch on the caller's stack."""
    return ScaleSearch(
        stack(np.float32, TILES),
        stack(np.float32, TILES),
        stack(np.float32, TILES),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
        stack(np.float32, BOTH),
    )


@inlined
def survey(s: ScaleSearch, group: int, size: int) -> None:
    """Peak and products of the sub-blocks of `size` weights."""
    top, peak = fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(group * size * LANES, (group + 1) * size * LANES, LANES):
        v = load(s.values, i, LANES)
        larger = absolute(v) > top
        top, peak = select(larger, absolute(v), top), select(larger, v, peak)
        store(s.products, i, load(s.importance, i, LANES) * v)
    store(s.peak, group * LANES, peak)


@inlined
def attempt(
    s: ScaleSearch,
    group: int,
    size: int,
    top: int,
    factor: np.float32,
    always: bool,
    nearest: Form,
    slx: Form,
    sl2: Form,
) -> None:
    """One step: codes under the inverse scale -factor/peak, kept where they fit better (or `always`).

    |inverse*x| is at most factor: the clamps to -top and top - 1 are left out where they could not act.
    """
    at = group * LANES
    inverse = -factor / load(s.peak, at, LANES)
    low, high = np.float32(-top), np.float32(top - 1)
    sum_lx, sum_l2 = fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(group * size * LANES, (group + 1) * size * LANES, LANES):
        code = add_product(nearest, MAGIC, inverse, load(s.values, i, LANES)) - MAGIC
        if factor > np.float32(top) - np.float32(0.55):
            code = minimum(code, high)
        if factor > np.float32(top) + np.float32(0.45):
            code = maximum(code, low)
        sum_lx = add_product(slx, sum_lx, load(s.products, i, LANES), code)
        sum_l2 = add_product(sl2, sum_l2, load(s.importance, i, LANES) * code, code)
    scale, merit = sum_lx / sum_l2, load(s.merit, at, LANES)
    if always:
        scale = select(sum_l2 == ZERO, ZERO, scale)
        store(s.scale, at, scale)
        store(s.merit, at, scale * sum_lx)
        store(s.inverse, at, inverse)
    else:
        better = (sum_l2 > ZERO) & (sum_lx * sum_lx > merit * sum_l2)
        store(s.scale, at, select(better, scale, load(s.scale, at, LANES)))
        store(s.merit, at, select(better, scale * sum_lx, merit))
        store(s.inverse, at, select(better, inverse, load(s.inverse, at, LANES)))


@inlined
def search(s: ScaleSearch, size: int, top: int, build: Build) -> None:
    """From values and importance to scale and inverse: the factors top, then top - 0.9 to top + 0.9."""
    for group in range(GROUPS):
        survey(s, group, size)
    for group in range(GROUPS):
        attempt(s, group, size, top, np.float32(top), True, build.QX_NI0, build.QX_SLX0, build.QX_SL20)
    for turn in range(18):
        trial = np.float32(turn - 9 if turn < 9 else turn - 8)
        factor = add_product(build.QX_ISC, np.float32(top), np.float32(0.1), trial)
        for group in range(GROUPS):
            attempt(s, group, size, top, factor, False, build.QX_NI1, build.QX_SLX1, build.QX_SL21)
    for at in range(0, BOTH, LANES):
        dead = absolute(load(s.peak, at, LANES)) < TINY
        store(s.scale, at, select(dead, ZERO, load(s.scale, at, LANES)))
        store(s.inverse, at, select(dead, ZERO, load(s.inverse, at, LANES)))
