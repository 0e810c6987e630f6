"""The order `avx2` for kernels: the twin of avx2.py. A row, taken apart, meets every token."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma_jit import fma
from refimpl.arith.jit import jit
from refimpl.dots.factors import FACTORS
from refimpl.dots.generic_jit import add_blocks_of_blocks, multiply_some
from refimpl.dots.planes_jit import count_steps, unpack_row
from refimpl.quants.formats import (
    IQ4_NL,
    MXFP4,
    NVFP4,
    Q1_0,
    Q2_0,
    Q2_K,
    Q4_1,
    Q4_K,
    Q5_1,
    Q5_K,
    Q6_K,
    TQ1_0,
    TQ2_0,
)

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]
Totals = NDArray[np.int64]

WITH_MINS, AROUND_32, MINS_FIRST, WITH_ONE_MIN = (Q4_K.id,), (Q6_K.id,), (Q2_K.id,), (Q5_K.id,)
WITH_M, BY_TWOS, IN_HALVES = (Q4_1.id, Q5_1.id), (IQ4_NL.id, MXFP4.id), (NVFP4.id,)
AROUND_1, WITHIN, AS_GENERIC = (TQ1_0.id, TQ2_0.id), (Q1_0.id,), (Q2_0.id,)
LANES, RUN, GROUP, SUB, BLOCK = 8, 4, 16, 32, 256
ZERO = np.float32(0)


@jit
def fold(v: Floats) -> Any:
    """Add 8 lanes, or 4. See avx2.fold."""
    if v.size == LANES:
        return ((v[4] + v[0]) + (v[6] + v[2])) + ((v[5] + v[1]) + (v[7] + v[3]))
    return (v[0] + v[2]) + (v[1] + v[3])


@jit
def total_small(codes: Codes, acts: Codes, totals: Totals) -> None:
    """The integers of a block of 32 in each lane."""
    for k in range(LANES):
        total = 0
        for i in range(RUN * k, RUN * k + RUN):
            total += int(codes[i]) * int(acts[i])
        totals[k] = total


@jit
def read_scale(scales: Shorts, g: int) -> Any:
    """The scale of a group; 1 where there are none."""
    return int(scales[g]) if scales.size else 1


@jit
def total_large(codes: Codes, scales: Shorts, acts: Codes, totals: Totals) -> None:
    """The integers of a block of 256 in each lane."""
    for k in range(LANES):
        total = 0
        for s in range(0, codes.size, SUB):
            part = 0
            for i in range(s + RUN * k, s + RUN * k + RUN):
                part += int(codes[i]) * int(acts[i])
            total += part * read_scale(scales, s // GROUP + k // 4)
        totals[k] = total


@jit
def take_off(bias: int, scales: Shorts, acts: Codes, bsums: Shorts, totals: Totals) -> None:
    """What lanes hold more: the bias times their own activations less those of two groups. See avx2.add_around."""
    for k in range(LANES):
        total = 0
        for s in range(0, acts.size, SUB):
            part = 0
            for i in range(s + RUN * k, s + RUN * k + RUN):
                part += int(acts[i])
            total += part * read_scale(scales, s // GROUP + k // 4)
        for g in (2 * k, 2 * k + 1):
            total -= read_scale(scales, g) * int(bsums[g])
        totals[k] += bias * total


@jit
def add_lanes(step: Any, totals: Totals, lanes: Floats) -> None:
    """lane[k] = fma(step, total[k], lane[k])."""
    for k in range(LANES):
        lanes[k] = fma(step, np.float32(totals[k]), lanes[k])


@jit
def add_mins(mins: Shorts, bsums: Shorts, step: Any, least: Floats) -> None:
    """A block's mins in as many lanes as there are: 4 of q4_K, 8 of q2_K, 1 of q5_K."""
    groups = GROUP // least.size
    for j in range(least.size):
        total = 0
        for g in range(groups * j, groups * j + groups):
            total += int(mins[g]) * int(bsums[g])
        least[j] = fma(step, np.float32(total), least[j])


@jit
def add_large(
    fmt: int,
    codes: Codes,
    scales: Shorts,
    mins: Shorts,
    d: Floats,
    dmin: Floats,
    acts: Codes,
    act_d: Floats,
    bsums: Shorts,
    lanes: Floats,
    least: Floats,
    totals: Totals,
) -> Any:
    """One row and one token of blocks of 256. lanes [8], least [4], totals [8] are scratch."""
    lanes[:], least[:] = ZERO, ZERO
    for b in range(d.size):
        code, act = codes[b * BLOCK : (b + 1) * BLOCK], acts[b * BLOCK : (b + 1) * BLOCK]
        scale, low = scales[b * GROUP : (b + 1) * GROUP], mins[b * GROUP : (b + 1) * GROUP]
        sums = bsums[b * GROUP : (b + 1) * GROUP]
        if fmt in AROUND_1:
            scale = scale[:0]
        total_large(code, scale, act, totals)
        if fmt in AROUND_32:
            take_off(32, scale, act, sums, totals)
        elif fmt in AROUND_1:
            take_off(1, scale, act, sums, totals)
        if fmt in MINS_FIRST:
            add_mins(low, sums, -act_d[b] * dmin[b], lanes)
        add_lanes(d[b] * act_d[b], totals, lanes)
        if fmt in WITH_MINS:
            add_mins(low, sums, -act_d[b] * dmin[b], least)
        elif fmt in WITH_ONE_MIN:
            add_mins(low, sums, -act_d[b] * dmin[b], least[:1])
    if fmt in WITH_MINS:
        return fold(lanes) + fold(least)
    return fold(lanes) + least[0] if fmt in WITH_ONE_MIN else fold(lanes)


@jit
def add_small(
    fmt: int,
    codes: Codes,
    d: Floats,
    dmin: Floats,
    acts: Codes,
    act_d: Floats,
    act_s: Floats,
    lanes: Floats,
    totals: Totals,
) -> Any:
    """One row and one token of blocks of 32. lanes [8], totals [8] are scratch."""
    lanes[:], least = ZERO, ZERO
    for b in range(act_d.size):
        total_small(codes[b * SUB : (b + 1) * SUB], acts[b * SUB : (b + 1) * SUB], totals)
        if fmt in IN_HALVES:
            for k in range(LANES):
                step = d[2 * b + k // 4] * act_d[b]
                lanes[k] = fma(step, np.float32(totals[k]), lanes[k])
        else:
            add_lanes(d[b] * act_d[b], totals, lanes)
        if fmt in WITH_M:
            least = fma(dmin[b], act_s[b], least)
    return fold(lanes) + least if fmt in WITH_M else fold(lanes)


@jit
def add_by_twos(
    codes: Codes, d: Floats, acts: Codes, act_d: Floats, lanes: Floats, odd: Floats, totals: Totals
) -> Any:
    """One row and one token. See avx2.add_by_twos. lanes, odd, totals [8] are scratch."""
    lanes[:], odd[:] = ZERO, ZERO
    for b in range(d.size // 2 * 2):
        total_small(codes[b * SUB : (b + 1) * SUB], acts[b * SUB : (b + 1) * SUB], totals)
        add_lanes(d[b] * act_d[b], totals, odd if b % 2 else lanes)
    for k in range(LANES):
        lanes[k] += odd[k]
    result = fold(lanes)
    if d.size % 2:
        total = multiply_some(codes, acts, d.size - 1, SUB)
        result = fma(d[d.size - 1] * act_d[d.size - 1], total, result)
    return result


@jit
def add_within(
    codes: Codes, d: Floats, acts: Codes, act_d: Floats, lanes: Floats, part: Floats, totals: Totals
) -> Any:
    """One row and one token. See avx2.add_blocks_of_blocks. lanes, part, totals [8] are scratch."""
    lanes[:] = ZERO
    for b in range(d.size):
        for s in range(4 * b, 4 * b + 4):
            total_small(codes[s * SUB : (s + 1) * SUB], acts[s * SUB : (s + 1) * SUB], totals)
            if s == 4 * b:
                for k in range(LANES):
                    part[k] = act_d[s] * np.float32(totals[k])
            else:
                add_lanes(act_d[s], totals, part)
        for k in range(LANES):
            lanes[k] = fma(d[b], part[k], lanes[k])
    return fold(lanes)


@jit
def multiply_rows(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, by_twos: bool, out: Floats
) -> None:
    """As multiply(); by_twos: whether those formats that ggml_vec_dot takes two blocks of at a time are added so."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, scratch = np.empty(n, np.int8), np.empty(256, np.uint8)
    scales, mins = np.empty(n // GROUP, np.int16), np.empty(n // GROUP, np.int16)
    d, dmin = np.empty(count_steps(fmt, n, blocks), np.float32), np.empty(blocks, np.float32)
    lanes, more, totals = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.int64)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, mins, d, dmin, scratch)
        for t in range(acts.shape[0]):
            act, step = acts[t], act_d[t]
            if n == blocks * BLOCK:
                out[t, r] = add_large(
                    fmt, codes, scales, mins, d, dmin, act, step, bsums[t], lanes, more[:4], totals
                )
            elif fmt in BY_TWOS and by_twos:
                out[t, r] = add_by_twos(codes, d, act, step, lanes, more, totals)
            elif fmt in WITHIN:
                out[t, r] = add_within(codes, d, act, step, lanes, more, totals)
            elif fmt in AS_GENERIC:
                out[t, r] = add_blocks_of_blocks(codes, d, act, step, True)
            else:
                out[t, r] = add_small(fmt, codes, d, dmin, act, step, act_s[t], lanes, totals)


def multiply(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, out: Floats
) -> None:
    """Multiply rows of blocks with tokens.

    fmt                       : id of the weights' format
    raw                       : [m, bytes] uint8
    acts, act_d, act_s, bsums : the planes of t tokens
    out                       : [t, m] float32, written
    """
    if fmt in FACTORS:  # grids are loaded for who needs them
        import_module("refimpl.dots.codebooks_jit").multiply_avx2(fmt, raw, acts, act_d, out)
    else:
        multiply_rows(fmt, raw, acts, act_d, act_s, bsums, True, out)
