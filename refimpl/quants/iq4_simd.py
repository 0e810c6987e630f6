"""What IQ4_NL and IQ4_XS share on vectors: the search for the scale of 64 sub-blocks of 32 side by side.

One lane is one sub-block, so each lane adds in ggml's order. Nothing is left to the portable kernel: a lane does
what it does, for any input.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build, Form
from refimpl.arith.simd import Lanes, absolute, fill, inlined, select, sqrt
from refimpl.arith.simd_fused import add_product
from refimpl.arith.simd_lanes import convert, high_half, join, lookup, low_half, staircase
from refimpl.arith.simd_memory import load, put, stack, store, transpose16
from refimpl.quants.levels import IQ4, IQ4_MIDDLES
from refimpl.quants.scale_simd import BOTH, GROUPS, LANES, TILES, ScaleSearch
from refimpl.quants.search_simd import TINY, ZERO

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ONE, TOP, TRIALS = np.float32(1), np.float32(127), 7
SIZE = 32 * LANES  # weights of a group
read_levels = lookup(IQ4)
round_level = staircase(IQ4[-1], [(IQ4_MIDDLES[k], float(IQ4[k + 1] - IQ4[k])) for k in range(15)])
round_code = staircase(15.0, [(middle, 1.0) for middle in IQ4_MIDDLES])


@inlined
def decode(qs: Lanes) -> Lanes:
    """The levels of packed codes: uint8 [16] -> float32 [32]."""
    levels = read_levels(join(qs & np.uint8(15), qs >> np.uint8(4)))
    return convert(convert(levels, np.int32), np.float32)


@inlined
def pack_codes(x: Floats, i: int, inverse: np.float32) -> Lanes:
    """Codes of the 32 weights from i on times inverse, packed: uint8 [16]."""
    codes = convert(convert(round_code(load(x, i, 32) * inverse), np.int32), np.uint8)
    return low_half(codes) | (high_half(codes) << np.uint8(4))


@inlined
def sum_squares(x: Floats, width: int, out: Floats, build: Build) -> None:
    """out[g] = sum of x^2 of the g-th `width` weights, added in order; 16 side by side, so 16 or more."""
    tile = stack(np.float32, 256)
    for start in range(0, out.size, 16):
        group = min(start, out.size - 16)
        total = fill(ZERO, 16)
        for i in range(0, width, 16):
            transpose16(x, group * width + i, width, tile, 0, 16)
            for k in range(0, 256, 16):
                v = load(tile, k, 16)
                total = add_product(build.ROW_SUMX2, total, v, v)
        store(out, group, total)


@inlined
def weigh_plain(s: ScaleSearch) -> None:
    """importance = x^2"""
    for i in range(0, TILES, LANES):
        v = load(s.values, i, LANES)
        store(s.importance, i, v * v)


@inlined
def weigh_by_imatrix(s: ScaleSearch, build: Build) -> None:
    """importance *= sqrt(sigma2 + x^2); s.peak holds sigma2."""
    for i in range(0, TILES, LANES):
        v = load(s.values, i, LANES)
        square = load(s.peak, i // SIZE * LANES, LANES)
        store(s.importance, i, load(s.importance, i, LANES) * sqrt(add_product(build.ROW_W, square, v, v)))


@inlined
def find_peaks(s: ScaleSearch, group: int) -> None:
    """The first of the weights of each lane that are largest in size."""
    top, peak = fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(group * SIZE, (group + 1) * SIZE, LANES):
        v = load(s.values, i, LANES)
        larger = absolute(v) > top
        top, peak = select(larger, absolute(v), top), select(larger, v, peak)
    store(s.peak, group * LANES, peak)


@inlined
def sum_levels(s: ScaleSearch, group: int, inverse: Lanes, form_x: Form, form_2: Form) -> tuple[Lanes, Lanes]:
    """Sums of w * level * x and of w * level^2 under a trial scale."""
    sum_qx, sum_q2 = fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(group * SIZE, (group + 1) * SIZE, LANES):
        v = load(s.values, i, LANES)
        level = round_level(inverse * v)
        weighed = load(s.importance, i, LANES) * level
        sum_qx = add_product(form_x, sum_qx, weighed, v)
        sum_q2 = add_product(form_2, sum_q2, weighed, level)
    return sum_qx, sum_q2


@inlined
def search(s: ScaleSearch, build: Build) -> None:
    """From values and importance to scale, 0 where all weights are (nearly) 0."""
    for group in range(GROUPS):
        find_peaks(s, group)
        at = group * LANES
        peak = load(s.peak, at, LANES)
        sum_qx, sum_q2 = sum_levels(s, group, ONE / (peak / TOP), build.NL_SQX0, build.NL_SQ20)
        scale = select(sum_q2 > ZERO, sum_qx / sum_q2, ZERO)
        store(s.scale, at, scale)
        store(s.merit, at, scale * sum_qx)
    for k in range(-TRIALS, TRIALS + 1):
        for group in range(GROUPS):
            at = group * LANES
            inverse = np.float32(k - 127) / load(s.peak, at, LANES)
            sum_qx, sum_q2 = sum_levels(s, group, inverse, build.NL_SQX1, build.NL_SQ21)
            merit, scale = load(s.merit, at, LANES), sum_qx / sum_q2
            better = (sum_q2 > ZERO) & (sum_qx * sum_qx > merit * sum_q2)
            store(s.scale, at, select(better, scale, load(s.scale, at, LANES)))
            store(s.merit, at, select(better, scale * sum_qx, merit))
    for at in range(0, BOTH, LANES):
        dead = absolute(load(s.peak, at, LANES)) < TINY
        store(s.scale, at, select(dead, ZERO, load(s.scale, at, LANES)))


@inlined
def spread_squares(s: ScaleSearch, squares: Floats, block: int, share: int, factor: np.float32) -> None:
    """s.peak[lane] = sigma2 of the lane's block, of which `share` lanes are part."""
    for lane in range(BOTH):
        put(s.peak, lane, squares[(block + lane) // share] * factor)
