"""Searches that several formats' vector encoders share; one lane is one sub-block, or one problem."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.simd import Lanes, Scratch, fill, inlined, maximum, minimum, select
from refimpl.arith.simd_fused import add_product, nearest_product, subtract_product
from refimpl.arith.simd_lanes import convert, high_half, low_half, mask_bits, reinterpret
from refimpl.arith.simd_memory import is_aligned, load, store, stream

MAGIC = np.float32(12582912)  # 1.5 * 2^23: (v + MAGIC) - MAGIC is v rounded to an integer, ties to even, ...
LIMIT = np.float32(4e6)  # ... as long as |v| stays below 2^22
STREAMED = 1 << 23  # weights, 32 MiB
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-15)  # ggml calls a sub-block below this all zero (GROUP_MAX_EPS)


@inlined
def is_streamed(out: NDArray[np.float32]) -> Any:
    """Should decoded weights bypass the caches? Twice as fast, where they would not stay there anyway."""
    return out.size >= STREAMED and is_aligned(out)


@inlined
def put_weights(out: NDArray[np.float32], i: int, weights: Lanes, streamed: bool) -> None:
    """Store decoded weights; i is a multiple of 16."""
    if streamed:
        stream(out, i, weights)
    else:
        store(out, i, weights)


@inlined
def nearest(v: Lanes) -> Lanes:
    """ggml's nearest_int, for any float: int32 lanes, wrapped to 23 bits outside ±2^22, 0 for NaN.

    The mantissa of v + 1.5*2^23 holds the rounded integer.
    """
    bits = reinterpret(v + MAGIC, np.int32)
    return (bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


@inlined
def gather(
    imatrix: NDArray[np.float32],
    rows_per_expert: int,
    per_row: int,
    block: int,
    count: int,
    width: int,
    target: Scratch,
) -> None:
    """Copy the imatrix's part for `count` blocks from `block` on; a row has per_row blocks of `width`."""
    for k in range(count):
        row = (block + k) // per_row
        source = (row // rows_per_expert * per_row + (block + k) % per_row) * width
        for i in range(0, width, 32):
            store(target, width * k + i, load(imatrix, source + i, 32))


@inlined
def find_largest(v: Lanes) -> Lanes:
    """The largest of 32 lanes without NaN, as a vector of one."""
    h = maximum(low_half(v), high_half(v))
    h = maximum(low_half(h), high_half(h))
    h = maximum(low_half(h), high_half(h))
    h = maximum(low_half(h), high_half(h))
    return maximum(low_half(h), high_half(h))


@inlined
def fit_positive(values: Scratch, weights: Scratch, codes: Scratch, n: int, top: int, build: Build) -> Lanes:
    """ggml's make_qp_quants for 16 problems: the scale and codes 0..top that fit n values each.

    values, weights : float32 [n, 16], problem in lanes
    codes           : int32 [n, 16], written
    return          : float32 [16] scales
    """
    largest = fill(ZERO, 16)
    for i in range(0, 16 * n, 16):
        largest = maximum(largest, load(values, i, 16))
    inverse = choose_inverse(values, weights, largest, n, top, build)
    sum_lx, sum_l2 = fill(ZERO, 16), fill(ZERO, 16)
    for i in range(0, 16 * n, 16):
        x, w = load(values, i, 16), load(weights, i, 16)
        code = minimum(nearest_product(build.QP_NI2, inverse, x), np.int32(top))
        store(codes, i, code & np.int32(255))  # ggml stores them as uint8
        level = convert(code, np.float32)
        sum_lx = add_product(build.QP_SLX, sum_lx, w * x, level)
        sum_l2 = add_product(build.QP_SL2, sum_l2, w * level, level)
    for _ in range(5):
        sum_lx, sum_l2, moved = move_codes(values, weights, codes, sum_lx, sum_l2, n, top, build)
        if moved == np.uint64(0):
            break
    dead = largest < TINY
    for i in range(0, 16 * n, 16):
        store(codes, i, select(dead, np.int32(0), load(codes, i, 16)))
    scale = select(sum_l2 > ZERO, sum_lx / sum_l2, ZERO)
    return select(dead, ZERO, scale)


@inlined
def choose_inverse(
    values: Scratch, weights: Scratch, largest: Lanes, n: int, top: int, build: Build
) -> Lanes:
    """The inverse scale (top + 0.1*is)/largest, is = -4..4, with the least weighted squared error."""
    inverse = np.float32(top) / largest
    scale = ONE / inverse
    chosen, best = inverse, fill(ZERO, 16)
    for i in range(0, 16 * n, 16):
        x = load(values, i, 16)
        code = nearest_product(build.QP_NI0, inverse, x) & np.int32(255)  # unclipped, and stored as uint8
        miss = subtract_product(build.QP_DIFF0, x, scale, convert(code, np.float32))
        best = add_product(build.QP_ERR0, best, load(weights, i, 16) * miss, miss)
    for turn in range(8):
        trial = np.float32(turn - 4 if turn < 4 else turn - 3)
        inverse = add_product(build.QP_ISC, np.float32(top), np.float32(0.1), trial) / largest
        scale = ONE / inverse
        error = fill(ZERO, 16)
        for i in range(0, 16 * n, 16):
            x = load(values, i, 16)
            code = minimum(nearest_product(build.QP_NI1, inverse, x), np.int32(top))
            miss = subtract_product(build.QP_DIFF1, x, scale, convert(code, np.float32))
            error = add_product(build.QP_ERR1, error, load(weights, i, 16) * miss, miss)
        better = error < best
        chosen = select(better, inverse, chosen)
        best = select(better, error, best)
    return chosen


@inlined
def move_codes(
    values: Scratch,
    weights: Scratch,
    codes: Scratch,
    sum_lx: Lanes,
    sum_l2: Lanes,
    n: int,
    top: int,
    build: Build,
) -> tuple[Lanes, Lanes, np.uint64]:
    """One round: each code in turn moves to its optimum where that brings the fit closer. Also: did any?"""
    moved = np.uint64(0)
    for i in range(0, 16 * n, 16):
        x, w, old = load(values, i, 16), load(weights, i, 16), load(codes, i, 16)
        level = convert(old, np.float32)
        rest_lx = subtract_product(build.QP_SLXSUB, sum_lx, w * x, level)
        rest_l2 = subtract_product(build.QP_SL2SUB, sum_l2, w * level, level)
        new = minimum(nearest(x * rest_l2 / rest_lx), np.int32(top))
        level = convert(new, np.float32)
        new_lx = add_product(build.QP_SLXADD, rest_lx, w * x, level)
        new_l2 = add_product(build.QP_SL2ADD, rest_l2, w * level, level)
        closer = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
        move = (rest_lx > ZERO) & (rest_l2 > ZERO) & (new != old) & closer
        store(codes, i, select(move, new & np.int32(255), old))
        sum_lx, sum_l2 = select(move, new_lx, sum_lx), select(move, new_l2, sum_l2)
        moved |= mask_bits(move)
    return sum_lx, sum_l2, moved
