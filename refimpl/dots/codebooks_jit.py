"""Dot products of the codebook formats for kernels: the twin of codebooks.py. A row, taken apart, meets every token."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.fma_jit import fma
from refimpl.arith.jit import jit
from refimpl.dots.avx2_jit import add_lanes, fold, total_large
from refimpl.dots.factors import EIGHTH, FACTORS, SHIFTED
from refimpl.dots.generic_jit import madd
from refimpl.quants import iq1_m_jit as iq1m
from refimpl.quants import iq1_s_jit as iq1s
from refimpl.quants import iq2_s_jit as iq2s
from refimpl.quants import iq2_xs_jit as iq2xs
from refimpl.quants import iq2_xxs_jit as iq2xxs
from refimpl.quants import iq3_s_jit as iq3s
from refimpl.quants import iq3_xxs_jit as iq3xxs
from refimpl.quants.formats import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S
from refimpl.quants.grids_jit import Stored, read_step, read_word

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]
Totals = NDArray[np.int64]

IQ1_S_ID, IQ1_M_ID, IQ2_XXS_ID, IQ2_XS_ID, IQ2_S_ID = IQ1_S.id, IQ1_M.id, IQ2_XXS.id, IQ2_XS.id, IQ2_S.id
IQ3_S_ID = IQ3_S.id
LANES, GROUP, BLOCK = 8, 16, 256
ZERO = np.float32(0)


@jit
def put_signed(points: Codes, s: Stored, codes: Codes) -> None:
    """Points with their signs. points : [G, 4 or 8] int8; codes : [256] int8, written."""
    size = points.shape[1]
    for k in range(codes.size // size):
        number, signs = s.numbers[k], int(s.signs[k * size // 8]) >> k * size % 8
        for i in range(size):
            value = int(points[number, i])
            codes[k * size + i] = -value if signs >> i & 1 else value


@jit
def put_shifted(number: int, shift: int, codes: Codes) -> None:
    """A point of IQ1 in eighths, shifted. codes : [8] int8, written."""
    for i in range(codes.size):
        codes[i] = 8 * int(iq1s.POINTS[number, i]) + shift


@jit
def unpack_iq1_s(block: Bytes, codes: Codes, scales: Shorts) -> None:
    for k in range(32):
        word = read_word(block, iq1s.QH + k // 4 * 2)
        number = int(block[iq1s.QS + k]) | (word >> k % 4 * 3 & 7) << 8
        put_shifted(number, -1 if word >> 15 else 1, codes[8 * k : 8 * k + 8])
        scales[k // 2] = 2 * (word >> 12 & 7) + 1


@jit
def unpack_iq1_m(block: Bytes, codes: Codes, scales: Shorts) -> None:
    for k in range(32):
        four = int(block[iq1m.QH + k // 2]) >> k % 2 * 4
        number = int(block[iq1m.QS + k]) | (four & 7) << 8
        put_shifted(number, -1 if four & 8 else 1, codes[8 * k : 8 * k + 8])
        scales[k // 2] = 2 * (read_word(block, iq1m.SCALES + k // 8 * 2) >> k // 2 % 4 * 3 & 7) + 1


@jit
def unpack_signed(fmt: int, block: Bytes, s: Stored, codes: Codes) -> None:
    """Take a block of IQ2 or IQ3 apart, but for d; s : room for one block."""
    if fmt == IQ2_XXS_ID:
        iq2xxs.unpack_block(block, s)
        put_signed(iq2xxs.POINTS, s, codes)
    elif fmt == IQ2_XS_ID:
        iq2xs.unpack_block(block, s)
        put_signed(iq2xs.POINTS, s, codes)
    elif fmt == IQ2_S_ID:
        iq2s.unpack_block(block, s)
        put_signed(iq2s.POINTS, s, codes)
    elif fmt == IQ3_S_ID:
        iq3s.unpack_block(block, s)
        put_signed(iq3s.POINTS, s, codes)
    else:
        iq3xxs.unpack_block(block, s)
        put_signed(iq3xxs.POINTS, s, codes)


@jit
def unpack_row(fmt: int, raw: Bytes, codes: Codes, scales: Shorts, d: Floats) -> None:
    """Take one row apart.

    fmt              : id of the format
    raw              : [bytes] uint8
    codes, scales, d : one row of each plane, written
    """
    size = raw.size // d.size
    s = Stored(np.zeros(64, np.int32), np.zeros(32, np.uint8), np.zeros(16, np.uint8))  # room for the most
    per = 1 if fmt in (IQ2_XS_ID, IQ2_S_ID) else 2  # groups of 16 under a scale
    for b in range(d.size):
        block, code = raw[b * size : (b + 1) * size], codes[b * BLOCK : (b + 1) * BLOCK]
        scale = scales[b * GROUP : (b + 1) * GROUP]
        if fmt == IQ1_M_ID:
            d[b] = iq1m.unpack_step(block)
            unpack_iq1_m(block, code, scale)
            continue
        d[b] = read_step(block)
        if fmt == IQ1_S_ID:
            unpack_iq1_s(block, code, scale)
            continue
        unpack_signed(fmt, block, s, code)
        for g in range(GROUP):
            scale[g] = 2 * int(s.levels[g // per]) + 1


@jit
def total_block(codes: Codes, scales: Shorts, acts: Codes) -> Any:
    """The integers of a block."""
    total = 0
    for g in range(GROUP):
        part = 0
        for i in range(g * GROUP, (g + 1) * GROUP):
            part += int(codes[i]) * int(acts[i])
        total += part * int(scales[g])
    return np.float32(total)


@jit
def add_generic(
    fmt: int, factor: Any, codes: Codes, scales: Shorts, d: Floats, acts: Codes, act_d: Floats, fused: bool
) -> Any:
    """One row and one token. See codebooks.multiply_generic."""
    result = ZERO
    for b in range(d.size):
        i, g = b * BLOCK, b * GROUP
        total = total_block(codes[i : i + BLOCK], scales[g : g + GROUP], acts[i : i + BLOCK])
        if fmt in SHIFTED:
            total *= factor
        result = madd(fused, d[b] * act_d[b], total, result)
    return result if fmt in SHIFTED else factor * result


@jit
def add_avx2(
    fmt: int,
    factor: Any,
    codes: Codes,
    shifts: Codes,
    scales: Shorts,
    d: Floats,
    acts: Codes,
    act_d: Floats,
    lanes: Floats,
    more: Floats,
    totals: Totals,
) -> Any:
    """One row and one token; of IQ1 codes are points. lanes, more, totals [8] are scratch."""
    lanes[:], more[:] = ZERO, ZERO
    for b in range(d.size):
        i, step = b * BLOCK, d[b] * act_d[b]
        scale, act = scales[b * GROUP : (b + 1) * GROUP], acts[i : i + BLOCK]
        total_large(codes[i : i + BLOCK], scale, act, totals)
        add_lanes(step, totals, lanes)
        if fmt == IQ1_M_ID:
            total_large(shifts[i : i + BLOCK], scale, act, totals)
            add_lanes(step, totals, more)
        elif fmt == IQ1_S_ID:
            more[0] = fma(step, total_block(shifts[i : i + BLOCK], scale, act), more[0])
    if fmt == IQ1_M_ID:
        return fma(EIGHTH, fold(more), fold(lanes))
    return fma(EIGHTH, more[0], fold(lanes)) if fmt == IQ1_S_ID else factor * fold(lanes)


@jit
def add_tiled(factor: Any, codes: Codes, scales: Shorts, d: Floats, acts: Codes, act_d: Floats) -> Any:
    """One row and one token. See tiled.add_chain."""
    result = ZERO
    for b in range(d.size):
        i, g = b * BLOCK, b * GROUP
        total = total_block(codes[i : i + BLOCK], scales[g : g + GROUP], acts[i : i + BLOCK])
        result = fma((d[b] * factor) * total, act_d[b], result)
    return result


@jit
def split_shifts(codes: Codes, shifts: Codes) -> None:
    """Eighths to points, in place, and shifts."""
    for i in range(codes.size):
        point = (int(codes[i]) + 4) >> 3
        shifts[i] = int(codes[i]) - 8 * point
        codes[i] = point


@jit
def generic_rows(
    fmt: int, factor: Any, raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats
) -> None:
    """Rows of blocks with tokens, in the orders generic and generic-fma."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, scales, d = np.empty(n, np.int8), np.empty(n // GROUP, np.int16), np.empty(blocks, np.float32)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, d)
        for t in range(acts.shape[0]):
            out[t, r] = add_generic(fmt, factor, codes, scales, d, acts[t], act_d[t], fused)


@jit
def avx2_rows(fmt: int, factor: Any, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """Rows of blocks with tokens, in the order avx2."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, shifts = np.empty(n, np.int8), np.empty(n, np.int8)
    scales, d = np.empty(n // GROUP, np.int16), np.empty(blocks, np.float32)
    lanes, more, totals = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.int64)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, d)
        if fmt in SHIFTED:
            split_shifts(codes, shifts)
        for t in range(acts.shape[0]):
            out[t, r] = add_avx2(
                fmt, factor, codes, shifts, scales, d, acts[t], act_d[t], lanes, more, totals
            )


@jit
def tiled_rows(fmt: int, factor: Any, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """Rows of blocks with tokens, in the order tiled."""
    n, blocks = acts.shape[1], act_d.shape[1]
    codes, scales, d = np.empty(n, np.int8), np.empty(n // GROUP, np.int16), np.empty(blocks, np.float32)
    for r in range(raw.shape[0]):
        unpack_row(fmt, raw[r], codes, scales, d)
        for t in range(acts.shape[0]):
            out[t, r] = add_tiled(factor, codes, scales, d, acts[t], act_d[t])


def multiply_generic(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, fused: bool, out: Floats) -> None:
    """As generic_jit.multiply."""
    generic_rows(fmt, FACTORS[fmt], raw, acts, act_d, fused, out)


def multiply_avx2(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """As avx2_jit.multiply."""
    avx2_rows(fmt, FACTORS[fmt], raw, acts, act_d, out)


def multiply_tiled(fmt: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats) -> None:
    """As tiled_jit.multiply."""
    tiled_rows(fmt, FACTORS[fmt], raw, acts, act_d, out)
