"""The orders `generic` and `generic-fma` for kernels: the twin of generic.py. A row, taken apart, meets every token."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma_jit import fma
from refimpl.arith.jit import jit
from refimpl.dots.factors import FACTORS
from refimpl.dots.planes_jit import count_steps, unpack_row
from refimpl.quants.formats import IQ4_XS, NVFP4, Q1_0, Q2_0, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

IN_LANES = (Q3_K.id, Q4_K.id, Q5_K.id, Q6_K.id)
WITH_MINS = (Q4_K.id, Q5_K.id)
STEPS_IN_TURN, WITH_M, LESS_MINS = (Q4_0.id,), (Q4_1.id, Q5_1.id), (Q2_K.id,)
IN_SUB_BLOCKS, IN_GROUPS, WITHIN = (IQ4_XS.id,), (NVFP4.id,), (Q1_0.id, Q2_0.id)
HAVE_MINS = WITH_MINS + WITH_M + LESS_MINS
LANES, GROUP, SUB = 8, 16, 32
ZERO = np.float32(0)


@jit
def madd(fused: bool, a: Any, b: Any, c: Any) -> Any:
    """a*b + c, rounded once or twice."""
    return fma(a, b, c) if fused else a * b + c


@jit
def multiply_some(codes: Codes, acts: Codes, b: int, size: int) -> Any:
    """The integers of the `size` weights from size * b on."""
    total = 0
    for i in range(b * size, (b + 1) * size):
        total += int(codes[i]) * int(acts[i])
    return np.float32(total)


@jit
def add_blocks(codes: Codes, d: Floats, acts: Codes, act_d: Floats, fused: bool) -> Any:
    """One row and one token: blocks one after the other. See generic.add_blocks."""
    result = ZERO
    for b in range(d.size):
        result = madd(fused, d[b] * act_d[b], multiply_some(codes, acts, b, codes.size // d.size), result)
    return result


@jit
def add_steps_in_turn(codes: Codes, d: Floats, acts: Codes, act_d: Floats, fused: bool) -> Any:
    """One row and one token. See generic.add_steps_in_turn."""
    result = ZERO
    for b in range(d.size):
        result = madd(fused, multiply_some(codes, acts, b, codes.size // d.size) * d[b], act_d[b], result)
    return result


@jit
def add_sub_blocks(codes: Codes, scales: Shorts, d: Floats, acts: Codes, act_d: Floats, fused: bool) -> Any:
    """One row and one token. See generic.add_sub_blocks."""
    result = ZERO
    for s in range(codes.size // SUB):
        step = (d[s // 8] * act_d[s // 8]) * np.float32(int(scales[2 * s]))
        result = madd(fused, step, multiply_some(codes, acts, s, SUB), result)
    return result


@jit
def add_groups(codes: Codes, d: Floats, acts: Codes, act_d: Floats, fused: bool) -> Any:
    """One row and one token. See generic.add_groups."""
    result = ZERO
    for g in range(d.size):
        result = madd(fused, act_d[g // 2] * d[g], multiply_some(codes, acts, g, GROUP), result)
    return result


@jit
def add_blocks_of_blocks(codes: Codes, d: Floats, acts: Codes, act_d: Floats, fused: bool) -> Any:
    """One row and one token. See generic.add_blocks_of_blocks."""
    result, each = ZERO, act_d.size // d.size
    for b in range(d.size):
        part = ZERO
        for k in range(b * each, (b + 1) * each):
            part = madd(fused, act_d[k], multiply_some(codes, acts, k, SUB), part)
        result = madd(fused, d[b], part, result)
    return result


@jit
def add_with_m(
    codes: Codes, d: Floats, dmin: Floats, acts: Codes, act_d: Floats, act_s: Floats, fused: bool
) -> Any:
    """One row and one token. See generic.add_with_m."""
    result = ZERO
    for b in range(d.size):
        total = multiply_some(codes, acts, b, codes.size // d.size)
        result += madd(fused, d[b] * act_d[b], total, dmin[b] * act_s[b])
    return result


@jit
def add_less_mins(
    codes: Codes,
    scales: Shorts,
    mins: Shorts,
    d: Floats,
    dmin: Floats,
    acts: Codes,
    act_d: Floats,
    bsums: Shorts,
    fused: bool,
) -> Any:
    """One row and one token. See generic.add_less_mins."""
    result = ZERO
    for b in range(d.size):
        total, least = 0, 0
        for g in range(b * GROUP, (b + 1) * GROUP):
            part = 0
            for i in range(g * GROUP, (g + 1) * GROUP):
                part += int(codes[i]) * int(acts[i])
            total += part * int(scales[g])
            least += int(mins[g]) * int(bsums[g])
        taken = (act_d[b] * dmin[b]) * np.float32(least)
        result += madd(fused, act_d[b] * d[b], np.float32(total), -taken)
    return result


@jit
def add_lanes(
    codes: Codes,
    scales: Shorts,
    mins: Shorts,
    d: Floats,
    dmin: Floats,
    acts: Codes,
    act_d: Floats,
    bsums: Shorts,
    fused: bool,
    lanes: Floats,
    totals: NDArray[np.int64],
) -> Any:
    """One row and one token: eight lanes, then the lanes one after the other. See generic.add_lanes.

    lanes [8] float32 and totals [8] int64 are scratch
    """
    result = ZERO
    lanes[:] = ZERO
    for b in range(d.size):
        totals[:] = 0
        least = 0
        for g in range(b * GROUP, (b + 1) * GROUP):
            for i in range(g * GROUP, (g + 1) * GROUP):
                totals[i % LANES] += int(codes[i]) * int(acts[i]) * int(scales[g])
            if dmin.size:
                least += int(mins[g]) * int(bsums[g])
        step = d[b] * act_d[b]
        for k in range(LANES):
            lanes[k] = madd(fused, step, np.float32(totals[k]), lanes[k])
        if dmin.size:
            result = madd(fused, -(dmin[b] * act_d[b]), np.float32(least), result)
    for k in range(LANES):
        result += lanes[k]
    return result


@jit
def multiply_rows(
    fmt: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    act_s: Floats,
    bsums: Shorts,
    fused: bool,
    out: Floats,
) -> None:
    """As multiply(); of all formats but those of codebooks."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, scratch = np.empty(n, np.int8), np.empty(256, np.uint8)
    scales, mins = np.empty(n // GROUP, np.int16), np.empty(n // GROUP, np.int16)
    d = np.empty(count_steps(fmt, n, blocks), np.float32)
    dmin = np.empty(blocks if fmt in HAVE_MINS else 0, np.float32)
    lanes, totals = np.empty(LANES, np.float32), np.empty(LANES, np.int64)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, mins, d, dmin, scratch)
        for t in range(acts.shape[0]):
            if fmt in IN_LANES:
                out[t, r] = add_lanes(
                    codes, scales, mins, d, dmin, acts[t], act_d[t], bsums[t], fused, lanes, totals
                )
            elif fmt in LESS_MINS:
                out[t, r] = add_less_mins(codes, scales, mins, d, dmin, acts[t], act_d[t], bsums[t], fused)
            elif fmt in WITH_M:
                out[t, r] = add_with_m(codes, d, dmin, acts[t], act_d[t], act_s[t], fused)
            elif fmt in IN_SUB_BLOCKS:
                out[t, r] = add_sub_blocks(codes, scales, d, acts[t], act_d[t], fused)
            elif fmt in IN_GROUPS:
                out[t, r] = add_groups(codes, d, acts[t], act_d[t], fused)
            elif fmt in WITHIN:
                out[t, r] = add_blocks_of_blocks(codes, d, acts[t], act_d[t], fused)
            elif fmt in STEPS_IN_TURN:
                out[t, r] = add_steps_in_turn(codes, d, acts[t], act_d[t], fused)
            else:
                out[t, r] = add_blocks(codes, d, acts[t], act_d[t], fused)


def multiply(
    fmt: int,
    raw: Bytes,
    acts: Codes,
    act_d: Floats,
    act_s: Floats,
    bsums: Shorts,
    fused: bool,
    out: Floats,
) -> None:
    """Multiply rows of blocks with tokens.

    fmt                       : id of the weights' format
    raw                       : [m, bytes] uint8
    acts, act_d, act_s, bsums : the planes of t tokens
    fused                     : generic-fma rather than generic
    out                       : [t, m] float32, written
    """
    if fmt in FACTORS:  # grids are loaded for who needs them
        import_module("refimpl.dots.codebooks_jit").multiply_generic(fmt, raw, acts, act_d, fused, out)
    else:
        multiply_rows(fmt, raw, acts, act_d, act_s, bsums, fused, out)
