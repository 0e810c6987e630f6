"""The order `tiled` on vectors: the bits of tiled_jit.

Tokens are lanes: 32 of them meet 4 rows at a time. 16 rows are taken apart once and meet every token. Codes are made
unsigned; what that is too much (the bias times the scale) is taken off by the sums of the activations, as mins are.
"""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_dot import add_fours, add_small_fours, fma, multiply_words
from refimpl.arith.simd_lanes import convert, reinterpret
from refimpl.arith.simd_memory import get, load, peek, put, store, transpose16
from refimpl.dots import avx2_simd, levels_simd, small_simd, tiled_jit
from refimpl.dots.factors import FACTORS
from refimpl.dots.levels_simd import IQ4_XS_BYTES, unpack_iq4_xs
from refimpl.dots.super_simd import EVEN
from refimpl.dots.unpack_simd import unpack_q2_k, unpack_q3_k, unpack_q4_k, unpack_q5_k, unpack_q6_k
from refimpl.quants.formats import IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

TOKENS, ROWS, TOGETHER = 32, 16, 4  # lanes; rows taken apart at a time; rows multiplied at a time
BLOCK, GROUPS = 256, 16
Q2_K_BYTES, Q3_K_BYTES, Q4_K_BYTES = Q2_K.block.itemsize, Q3_K.block.itemsize, Q4_K.block.itemsize
Q5_K_BYTES, Q6_K_BYTES = Q5_K.block.itemsize, Q6_K.block.itemsize
ZERO, NONE = np.float32(0), np.int32(0)


@inlined
def spread(q: Bytes, i: int) -> Lanes:
    """uint8 [128]: 4 codes, for every token."""
    return reinterpret(fill(peek(q, i, np.uint32), 32), np.uint8)


@inlined
def spread_pair(low: Shorts, i: int) -> Lanes:
    """int16 [64]: 2 neighbours, for every token."""
    return reinterpret(fill(peek(low, i, np.uint32), 32), np.int16)


@inlined
def multiply_block(
    add: Any,
    per: int,
    q: Bytes,
    i: int,
    stride: int,
    scales: Ints,
    j: int,
    low: Shorts,
    acts: Codes,
    c: int,
    sums: Shorts,
    s: int,
) -> Any:
    """The integers of a block of 4 rows and 32 tokens, and what comes off them: 8 times int32 [32].

    add    : add_small_fours; add_fours where codes are 128 or more
    per    : dwords of codes under one scale
    q, low : at element i and j of the first row; rows are `stride` codes apart
    acts   : from c on, dword by dword [64][32 tokens][4]; sums: from s on, pair by pair of groups [32 tokens][2]
    """
    groups = stride // (4 * per)
    a, b, e, f = fill(NONE, 32), fill(NONE, 32), fill(NONE, 32), fill(NONE, 32)
    for g in range(64 // per):
        ta, tb, te, tf = fill(NONE, 32), fill(NONE, 32), fill(NONE, 32), fill(NONE, 32)
        for k in range(per):
            at = i + 4 * (g * per + k)
            v = load(acts, c + 128 * (g * per + k), 128)
            ta = add(ta, spread(q, at), v)
            tb = add(tb, spread(q, at + stride), v)
            te = add(te, spread(q, at + 2 * stride), v)
            tf = add(tf, spread(q, at + 3 * stride), v)
        a = a + ta * get(scales, j + g)
        b = b + tb * get(scales, j + g + groups)
        e = e + te * get(scales, j + g + 2 * groups)
        f = f + tf * get(scales, j + g + 3 * groups)
    oa, ob, oe, of = fill(NONE, 32), fill(NONE, 32), fill(NONE, 32), fill(NONE, 32)
    for g in range(0, 64 // per, 2):
        v = load(sums, s + 32 * g, 64)
        oa = oa + multiply_words(v, spread_pair(low, j + g))
        ob = ob + multiply_words(v, spread_pair(low, j + g + groups))
        oe = oe + multiply_words(v, spread_pair(low, j + g + 2 * groups))
        of = of + multiply_words(v, spread_pair(low, j + g + 3 * groups))
    return a, b, e, f, oa, ob, oe, of


@inlined
def add_block(
    mins: bool, total: Lanes, off: Lanes, d: Any, dmin: Any, act_d: Lanes, acc: Floats, i: int
) -> None:
    """acc[i:] = fma(part, d', acc[i:]) of a row and 32 tokens. See tiled.multiply."""
    if mins:
        part = fill(d, 32) * convert(total, np.float32)
        part = fma(fill(-dmin, 32), convert(off, np.float32), part)
    else:
        part = fill(d, 32) * convert(total - off, np.float32)
    store(acc, i, fma(part, act_d, load(acc, i, 32)))


@inlined
def multiply_tiles(
    unpack: Any,
    add: Any,
    per: int,
    mins: bool,
    size: int,
    raw: Bytes,
    acts: Codes,
    sums: Shorts,
    act_d: Floats,
    out: Floats,
) -> None:
    """Rows of blocks of `size` bytes with tokens laid out by lay_out()."""
    m, (tokens, _) = raw.shape[0], out.shape
    blocks = raw.shape[1] // size
    n, groups = blocks * BLOCK, blocks * 64 // per
    q, scales, low = (
        np.empty(ROWS * n, np.uint8),
        np.empty(ROWS * groups, np.int32),
        np.empty(ROWS * groups, np.int16),
    )
    d, dmin, acc = (
        np.empty(ROWS * blocks, np.float32),
        np.empty(ROWS * blocks, np.float32),
        np.empty(ROWS * TOKENS, np.float32),
    )
    for r in range(0, m, ROWS):
        for k in range(ROWS):
            for b in range(blocks):
                at = (min(r + k, m - 1) * blocks + b) * size
                scale, off, step, least = unpack(raw, at, q, k * n + b * BLOCK)
                j = k * groups + b * 64 // per
                if per == 4:
                    store(scales, j, convert(scale, np.int32))
                    store(low, j, off)
                else:
                    store(scales, j, convert(EVEN(scale), np.int32))
                    store(low, j, EVEN(off))
                put(d, k * blocks + b, step)
                put(dmin, k * blocks + b, least)
        for t in range(0, tokens, TOKENS):
            acc[:] = ZERO
            for b in range(blocks):
                at = t // TOKENS * blocks + b
                act_step = load(act_d, at * TOKENS, 32)
                for k in range(0, ROWS, TOGETHER):
                    found = multiply_block(
                        add,
                        per,
                        q,
                        k * n + b * BLOCK,
                        n,
                        scales,
                        k * groups + b * 64 // per,
                        low,
                        acts,
                        at * BLOCK * TOKENS,
                        sums,
                        at * 64 // per * TOKENS,
                    )
                    i = k * blocks + b
                    add_block(mins, found[0], found[4], get(d, i), get(dmin, i), act_step, acc, k * TOKENS)
                    i += blocks
                    add_block(
                        mins, found[1], found[5], get(d, i), get(dmin, i), act_step, acc, (k + 1) * TOKENS
                    )
                    i += blocks
                    add_block(
                        mins, found[2], found[6], get(d, i), get(dmin, i), act_step, acc, (k + 2) * TOKENS
                    )
                    i += blocks
                    add_block(
                        mins, found[3], found[7], get(d, i), get(dmin, i), act_step, acc, (k + 3) * TOKENS
                    )
            put_tile(acc, r, t, out)


@inlined
def put_tile(acc: Floats, r: int, t: int, out: Floats) -> None:
    """acc [16 rows, 32 tokens] to out [t, m] from row r and token t on, as far as there are any."""
    tokens, m = out.shape
    for h in range(t, min(t + TOKENS, tokens), 16):
        if r + ROWS <= m and h + 16 <= tokens:
            transpose16(acc, h - t, TOKENS, out, h * m + r, m)
        else:
            for i in range(h, min(h + 16, tokens)):
                for k in range(min(ROWS, m - r)):
                    out[i, r + k] = acc[k * TOKENS + i - t]


@jit
def tiled_q2_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q2_k, add_small_fours, 4, True, Q2_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q3_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q3_k, add_small_fours, 4, False, Q3_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q4_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q4_k, add_small_fours, 8, True, Q4_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q5_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q5_k, add_small_fours, 8, True, Q5_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q6_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q6_k, add_small_fours, 4, False, Q6_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_iq4_xs(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_iq4_xs, add_fours, 8, False, IQ4_XS_BYTES, raw, acts, sums, act_d, out)


KERNELS = {  # and how many groups of 16 a scale holds for
    Q2_K.id: (tiled_q2_k, 1),
    Q3_K.id: (tiled_q3_k, 1),
    Q4_K.id: (tiled_q4_k, 2),
    Q5_K.id: (tiled_q5_k, 2),
    Q6_K.id: (tiled_q6_k, 1),
    IQ4_XS.id: (tiled_iq4_xs, 2),
}


def lay_out(acts: Codes, act_d: Floats, bsums: Shorts, joined: int) -> tuple[Codes, Shorts, Floats]:
    """Tokens become lanes, 32 at a time; those that are missing are zero.

    acts   : [t, n] -> [t/32, n/4, 32, 4]
    bsums  : [t, n/16], added `joined` at a time -> [t/32, pairs, 32, 2]
    act_d  : [t, blocks] -> [t/32, blocks, 32]
    """
    tokens = -(-len(acts) // TOKENS) * TOKENS

    def turn(plane: NDArray[Any]) -> NDArray[Any]:
        padded = plane
        if tokens != len(plane):
            padded = np.zeros((tokens, plane.shape[1]), plane.dtype)
            padded[: len(plane)] = plane
        return np.ascontiguousarray(padded.reshape(-1, TOKENS, plane.shape[1]).swapaxes(1, 2))

    sums = np.ascontiguousarray(bsums.reshape(len(bsums), -1, joined).sum(2, dtype=np.int16))
    return turn(acts.view(np.int32)).view(np.int8), turn(sums.view(np.int32)).view(np.int16), turn(act_d)


def multiply(
    fmt: int, raw: Bytes, acts: Codes, act_d: Floats, act_s: Floats, bsums: Shorts, out: Floats
) -> None:
    """Multiply rows of blocks with tokens, as tiled_jit.multiply does."""
    if fmt in KERNELS:
        kernel, joined = KERNELS[fmt]
        codes, sums, steps = lay_out(acts, act_d, bsums, joined)
        kernel(raw, codes, sums, steps, out)
    elif fmt in FACTORS:  # grids are loaded for who needs them
        import_module("refimpl.dots.plain_simd").multiply(fmt, raw, acts, act_d, bsums, out)
    elif fmt == IQ4_NL.id and len(raw) >= small_simd.ROWS:
        levels_simd.tiled_iq4_nl(raw, acts, act_d, small_simd.sum_fours(acts, levels_simd.IQ4_BIAS), out)
    elif fmt not in tiled_jit.CHAINED and fmt not in tiled_jit.ONE_SET:
        avx2_simd.multiply(fmt, raw, acts, act_d, act_s, bsums, out)
    else:
        tiled_jit.multiply(fmt, raw, acts, act_d, act_s, bsums, out)
