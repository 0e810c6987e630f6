"""The search for a scale by moves of single codes (Q3_K without an imatrix), many sub-blocks side by side.

ggml's make_q3_quants: x is about scale*code, codes from -4 to 3, x^2 weighs. After one trial scale, code after code
moves to where the others want it, for up to five rounds; four sub-blocks of five are settled at once. So each
sub-block is tested first, without divisions, and those whose codes might move queue up until LANES are together.
One lane is one sub-block of 16 weights, so each lane adds in ggml's order.
"""

from typing import NamedTuple

import numpy as np

from refimpl.arith.builds import Build
from refimpl.arith.simd import ROOM, Lanes, Scratch, absolute, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import add_product, nearest_product, subtract_product
from refimpl.arith.simd_lanes import convert, lowest_lane, mask_bits
from refimpl.arith.simd_memory import get, load, put, stack, store, transpose16
from refimpl.quants.search_simd import TINY, ZERO, nearest

LANES = 64 if ROOM == 32 else 16  # sub-blocks searched together
TILE = 16 * LANES  # their weights
QUEUE = 2 * TILE  # weights that may wait: fewer than LANES sub-blocks, and as many more
PLACES = 2 * LANES  # sub-blocks that may wait
BOTTOM, TOP = np.float32(-4), np.float32(3)
NO_MOVE = np.float32(0.4999)  # a value so near its code rounds to it, whatever the roundings of the test
STEEP = np.float32(1e-6)  # a code's wish below its inverse stays far from 2^22, where nearest() wraps
LEAST, MOST = np.float32(1e-36), np.float32(1e30)  # outside the test may underflow or overflow


class Moves(NamedTuple):
    """Scratch of one search. Tiles are float32 [element, lane]."""

    values: Scratch  # tile: the weights x
    codes: Scratch  # tile: the codes, as floats
    queue: Scratch  # float32 [sub-block, 16]: weights of those that wait
    places: Scratch  # int32 [sub-block]: where their scales go


@inlined
def allocate_moves() -> Moves:
    """Scratch on the caller's stack; the queue holds numbers from the start, as its tail is searched too."""
    m = Moves(
        stack(np.float32, TILE), stack(np.float32, TILE), stack(np.float32, QUEUE), stack(np.int32, PLACES)
    )
    for i in range(0, QUEUE, LANES):
        store(m.queue, i, fill(ZERO, LANES))
    return m


@inlined
def lay_out(x: Scratch, at: int, tile: Scratch) -> None:
    """tile[i, lane] = x[at + 16*lane + i]"""
    for lane in range(0, LANES, 16):
        transpose16(x, at + 16 * lane, 16, tile, lane, LANES)


@inlined
def start(m: Moves, build: Build) -> tuple[Lanes, Lanes, Lanes]:
    """Codes under the scale that takes the first largest weight to -4; that weight, Σwxq and Σwqq."""
    size, peak = fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(0, TILE, LANES):
        v = load(m.values, i, LANES)
        larger = absolute(v) > size
        size, peak = select(larger, absolute(v), size), select(larger, v, peak)
    inverse = BOTTOM / peak
    sum_lx, sum_l2 = fill(ZERO, LANES), fill(ZERO, LANES)
    for i in range(0, TILE, LANES):
        v = load(m.values, i, LANES)
        code = convert(minimum(nearest_product(build.Q3_NI0, inverse, v), np.int32(3)), np.float32)
        store(m.codes, i, code)
        w = v * v
        sum_lx = add_product(build.Q3_SLX, sum_lx, w * v, code)
        sum_l2 = add_product(build.Q3_SL2, sum_l2, w * code, code)
    return peak, sum_lx, sum_l2


@inlined
def find_doubtful(m: Moves, peak: Lanes, sum_lx: Lanes, sum_l2: Lanes, build: Build) -> np.uint64:
    """In which lanes may a code move? A code q stays if x*rest_l2/rest_lx rounds to it, or if rest_lx <= 0.

    So it stays if x*rest_l2, clamped as codes are, is within rest_lx/2 of q*rest_lx; but for a tiny rest_lx.
    """
    floor = absolute(peak) * sum_l2 * STEEP
    doubtful = (floor < LEAST) | (floor > MOST) | (floor != floor)
    for i in range(0, TILE, LANES):
        v, code = load(m.values, i, LANES), load(m.codes, i, LANES)
        w = v * v
        rest_lx = subtract_product(build.Q3_SLXSUB, sum_lx, w * v, code)
        rest_l2 = subtract_product(build.Q3_SL2SUB, sum_l2, w * code, code)
        wish = minimum(maximum(v * rest_l2, BOTTOM * rest_lx), TOP * rest_lx)
        far = absolute(wish - code * rest_lx) >= NO_MOVE * (rest_lx - floor)
        doubtful = doubtful | ((rest_lx > ZERO) & far)
    return mask_bits(doubtful & (absolute(peak) >= TINY))


@inlined
def move_codes(m: Moves, sum_lx: Lanes, sum_l2: Lanes, build: Build) -> tuple[Lanes, Lanes, np.uint64]:
    """One round: each code in turn moves to its optimum where that brings the fit closer. Also: which lanes did?"""
    moved = np.uint64(0)
    for i in range(0, TILE, LANES):
        v, old = load(m.values, i, LANES), load(m.codes, i, LANES)
        w = v * v
        rest_lx = subtract_product(build.Q3_SLXSUB, sum_lx, w * v, old)
        rest_l2 = subtract_product(build.Q3_SL2SUB, sum_l2, w * old, old)
        code = minimum(maximum(nearest(v * rest_l2 / rest_lx), np.int32(-4)), np.int32(3))
        new = convert(code, np.float32)
        new_lx = add_product(build.Q3_SLXADD, rest_lx, w * v, new)
        new_l2 = add_product(build.Q3_SL2ADD, rest_l2, w * new, new)
        closer = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
        move = (rest_lx > ZERO) & (new != old) & (new_l2 > ZERO) & closer
        store(m.codes, i, select(move, new, old))
        sum_lx, sum_l2 = select(move, new_lx, sum_lx), select(move, new_l2, sum_l2)
        moved |= mask_bits(move)
    return sum_lx, sum_l2, moved


@inlined
def conclude(peak: Lanes, sum_lx: Lanes, sum_l2: Lanes) -> Lanes:
    """The scale of each lane; 0 for weights that are all (nearly) 0."""
    scale = select(sum_l2 > ZERO, sum_lx / sum_l2, ZERO)
    return select(absolute(peak) < TINY, ZERO, scale)


@inlined
def fit_settled(
    x: Scratch, at: int, m: Moves, scales: Scratch, place: int, waiting: int, build: Build
) -> int:
    """Scales of LANES sub-blocks from x[at] on; those in doubt join the `waiting`. Returns how many wait then."""
    lay_out(x, at, m.values)
    peak, sum_lx, sum_l2 = start(m, build)
    store(scales, place, conclude(peak, sum_lx, sum_l2))
    doubtful = find_doubtful(m, peak, sum_lx, sum_l2, build)
    while doubtful != np.uint64(0):
        lane = lowest_lane(doubtful)
        store(m.queue, 16 * waiting, load(x, at + 16 * lane, 16))
        put(m.places, waiting, np.int32(place + lane))
        waiting += 1
        doubtful &= doubtful - np.uint64(1)
    return waiting


@inlined
def fit_waiting(m: Moves, scales: Scratch, first: int, end: int, build: Build) -> None:
    """Scales of the sub-blocks first to end of the queue, LANES at most."""
    lay_out(m.queue, 16 * first, m.values)
    peak, sum_lx, sum_l2 = start(m, build)
    for _ in range(5):
        sum_lx, sum_l2, moved = move_codes(m, sum_lx, sum_l2, build)
        if moved == np.uint64(0):
            break
    found = stack(np.float32, LANES)
    store(found, 0, conclude(peak, sum_lx, sum_l2))
    for k in range(first, end):
        put(scales, get(m.places, k), get(found, k - first))
