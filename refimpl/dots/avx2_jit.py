"""The order `avx2` for kernels: the twin of avx2.py. A row, taken apart, meets every token."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma_jit import fma
from refimpl.arith.jit import jit
from refimpl.dots.planes_jit import unpack_row
from refimpl.quants.formats import Q2_K, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]
Totals = NDArray[np.int64]

WITH_MINS, AROUND_32, MINS_FIRST, WITH_ONE_MIN = (Q4_K.id,), (Q6_K.id,), (Q2_K.id,), (Q5_K.id,)
WITH_M = (Q4_1.id, Q5_1.id)
LANES, RUN, GROUP, SUB = 8, 4, 16, 32
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
def total_large(codes: Codes, scales: Shorts, acts: Codes, totals: Totals) -> None:
    """The integers of a block of 256 in each lane."""
    for k in range(LANES):
        total = 0
        for s in range(0, codes.size, SUB):
            part = 0
            for i in range(s + RUN * k, s + RUN * k + RUN):
                part += int(codes[i]) * int(acts[i])
            total += part * int(scales[s // GROUP + k // 4])
        totals[k] = total


@jit
def take_off_32(scales: Shorts, acts: Codes, bsums: Shorts, totals: Totals) -> None:
    """What q6_K's lanes hold more: 32 times their own activations less those of two groups. See avx2.add_around_32."""
    for k in range(LANES):
        total = 0
        for s in range(0, acts.size, SUB):
            part = 0
            for i in range(s + RUN * k, s + RUN * k + RUN):
                part += int(acts[i])
            total += part * int(scales[s // GROUP + k // 4])
        total -= int(scales[2 * k]) * int(bsums[2 * k]) + int(scales[2 * k + 1]) * int(bsums[2 * k + 1])
        totals[k] += 32 * total


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
def multiply(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, out: Floats
) -> None:
    """Multiply rows of blocks with tokens.

    fmt                       : id of the weights' format
    raw                       : [m, bytes] uint8
    acts, act_d, act_s, bsums : the planes of t tokens
    out                       : [t, m] float32, written
    """
    n, blocks = acts.shape[1], act_d.shape[1]
    size, groups = n // blocks, n // blocks // GROUP
    codes, scratch = np.empty(n, np.int8), np.empty(256, np.uint8)
    scales, mins = np.empty(n // GROUP, np.int16), np.empty(n // GROUP, np.int16)
    d, dmin = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    lanes, least, totals = np.empty(LANES, np.float32), np.empty(4, np.float32), np.empty(LANES, np.int64)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, mins, d, dmin, scratch)
        for t in range(acts.shape[0]):
            lanes[:], least[:] = ZERO, ZERO
            for b in range(blocks):
                code, act = codes[b * size : (b + 1) * size], acts[t, b * size : (b + 1) * size]
                scale = scales[b * groups : (b + 1) * groups]
                if size == SUB:
                    total_small(code, act, totals)
                else:
                    total_large(code, scale, act, totals)
                if fmt in AROUND_32:
                    take_off_32(scale, act, bsums[t, b * groups : (b + 1) * groups], totals)
                low, sums = mins[b * groups : (b + 1) * groups], bsums[t, b * groups : (b + 1) * groups]
                if fmt in MINS_FIRST:
                    add_mins(low, sums, -act_d[t, b] * dmin[b], lanes)
                step = d[b] * act_d[t, b]
                for k in range(LANES):
                    lanes[k] = fma(step, np.float32(totals[k]), lanes[k])
                if fmt in WITH_MINS:
                    add_mins(low, sums, -act_d[t, b] * dmin[b], least)
                elif fmt in WITH_ONE_MIN:
                    add_mins(low, sums, -act_d[t, b] * dmin[b], least[:1])
                elif fmt in WITH_M:
                    least[0] = fma(dmin[b], act_s[t, b], least[0])
            out[t, r] = fold(lanes)
            if fmt in WITH_MINS:
                out[t, r] += fold(least)
            elif fmt in WITH_ONE_MIN or fmt in WITH_M:
                out[t, r] += least[0]
