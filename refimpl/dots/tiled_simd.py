"""The order `tiled` on vectors: the bits of tiled_jit.

Tokens are lanes: 32 of them meet 4 rows at a time. 16 rows are taken apart once and meet every token. Codes are made
unsigned; what that is too much (the bias times the scale) is taken off by the sums of the activations, as mins are.
"""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import FEATURES, Lanes, fill, inlined
from refimpl.arith.simd_dot import HAS_FOURS, add_fours, fma, multiply_bytes, multiply_words
from refimpl.arith.simd_lanes import convert, reinterpret
from refimpl.arith.simd_memory import get, load, peek, put, store, transpose16
from refimpl.dots import avx2_simd, many_simd, tiled_jit
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
WIDE = 32 if "avx512bw" in FEATURES else 8  # tokens whose integers of 4 rows stay in registers
CODES, PAIRS = 4 * WIDE, 2 * WIDE  # of theirs that are multiplied at once
BLOCK, GROUPS = 256, 16
Q2_K_BYTES, Q3_K_BYTES, Q4_K_BYTES = Q2_K.block.itemsize, Q3_K.block.itemsize, Q4_K.block.itemsize
Q5_K_BYTES, Q6_K_BYTES = Q5_K.block.itemsize, Q6_K.block.itemsize
ZERO, NONE = np.float32(0), np.int32(0)


@inlined
def spread(q: Bytes, i: int) -> Lanes:
    """uint8 [4 x WIDE]: 4 codes, for every token."""
    return reinterpret(fill(peek(q, i, np.uint32), WIDE), np.uint8)


@inlined
def spread_pair(low: Shorts, i: int) -> Lanes:
    """int16 [2 x WIDE]: 2 neighbours, for every token."""
    return reinterpret(fill(peek(low, i, np.uint32), WIDE), np.int16)


@inlined
def add_scaled(a: Lanes, total: Lanes, scales: Ints, j: int) -> Lanes:
    """a + total * scale."""
    return a + total * get(scales, j)


@inlined
def add_fours_under_scale(
    run: int, per: int, q: Bytes, i: int, stride: int, scales: Ints, j: int, groups: int, acts: Codes, c: int,
    a: Lanes, b: Lanes, e: Lanes, f: Lanes,
) -> Any:  # fmt: skip
    """4 rows' integers plus those of `per` dwords of codes under one scale, 4 codes at a time."""
    ta, tb, te, tf = fill(NONE, WIDE), fill(NONE, WIDE), fill(NONE, WIDE), fill(NONE, WIDE)
    for k in range(per):
        v, at = load(acts, c + 4 * TOKENS * k, CODES), i + 4 * k
        ta = add_fours(ta, spread(q, at), v)
        tb = add_fours(tb, spread(q, at + stride), v)
        te = add_fours(te, spread(q, at + 2 * stride), v)
        tf = add_fours(tf, spread(q, at + 3 * stride), v)
    a, b = add_scaled(a, ta, scales, j), add_scaled(b, tb, scales, j + groups)
    return a, b, add_scaled(e, te, scales, j + 2 * groups), add_scaled(f, tf, scales, j + 3 * groups)


@inlined
def add_pairs_under_scale(
    run: int, per: int, q: Bytes, i: int, stride: int, scales: Ints, j: int, groups: int, acts: Codes, c: int,
    a: Lanes, b: Lanes, e: Lanes, f: Lanes,
) -> Any:  # fmt: skip
    """As add_fours_under_scale, 2 codes at a time in int16, where sums of `run` such products fit."""
    for h in range(0, per, run):
        v, at = load(acts, c + 4 * TOKENS * h, CODES), i + 4 * h
        pa, pb = multiply_bytes(spread(q, at), v), multiply_bytes(spread(q, at + stride), v)
        pe = multiply_bytes(spread(q, at + 2 * stride), v)
        pf = multiply_bytes(spread(q, at + 3 * stride), v)
        for k in range(1, run):
            v, at = load(acts, c + 4 * TOKENS * (h + k), CODES), i + 4 * (h + k)
            pa = pa + multiply_bytes(spread(q, at), v)
            pb = pb + multiply_bytes(spread(q, at + stride), v)
            pe = pe + multiply_bytes(spread(q, at + 2 * stride), v)
            pf = pf + multiply_bytes(spread(q, at + 3 * stride), v)
        a = a + multiply_words(pa, reinterpret(fill(get(scales, j), WIDE), np.int16))
        b = b + multiply_words(pb, reinterpret(fill(get(scales, j + groups), WIDE), np.int16))
        e = e + multiply_words(pe, reinterpret(fill(get(scales, j + 2 * groups), WIDE), np.int16))
        f = f + multiply_words(pf, reinterpret(fill(get(scales, j + 3 * groups), WIDE), np.int16))
    return a, b, e, f


add_under_scale = add_fours_under_scale if HAS_FOURS else add_pairs_under_scale


@inlined
def multiply_block(
    add: Any,
    run: int,
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
    """The integers of a block of 4 rows and WIDE tokens, and what comes off them: 8 times int32 [WIDE].

    per    : dwords of codes under one scale
    q, low : at element i and j of the first row; rows are `stride` codes apart
    acts   : from c on, dword by dword [64][TOKENS][4]; sums: from s on, pair by pair of groups [TOKENS][2]
    """
    groups = stride // (4 * per)
    a, b, e, f = fill(NONE, WIDE), fill(NONE, WIDE), fill(NONE, WIDE), fill(NONE, WIDE)
    for g in range(64 // per):
        at, k = i + 4 * g * per, c + 4 * TOKENS * g * per
        a, b, e, f = add(run, per, q, at, stride, scales, j + g, groups, acts, k, a, b, e, f)
    oa, ob, oe, of = fill(NONE, WIDE), fill(NONE, WIDE), fill(NONE, WIDE), fill(NONE, WIDE)
    for g in range(0, 64 // per, 2):
        v = load(sums, s + TOKENS * g, PAIRS)
        oa = oa + multiply_words(v, spread_pair(low, j + g))
        ob = ob + multiply_words(v, spread_pair(low, j + g + groups))
        oe = oe + multiply_words(v, spread_pair(low, j + g + 2 * groups))
        of = of + multiply_words(v, spread_pair(low, j + g + 3 * groups))
    return a, b, e, f, oa, ob, oe, of


@inlined
def add_block(
    mins: bool, total: Lanes, off: Lanes, d: Any, dmin: Any, act_d: Lanes, acc: Floats, i: int
) -> None:
    """acc[i:] = fma(part, d', acc[i:]) of a row and WIDE tokens. See tiled.multiply."""
    if mins:
        part = fill(d, WIDE) * convert(total, np.float32)
        part = fma(fill(-dmin, WIDE), convert(off, np.float32), part)
    else:
        part = fill(d, WIDE) * convert(total - off, np.float32)
    store(acc, i, fma(part, act_d, load(acc, i, WIDE)))


@inlined
def as_factors(run: int, scale: Lanes) -> Lanes:
    """Scales as int32, or where pairs are multiplied as both halves of one."""
    wide = convert(scale, np.int32)
    return wide if HAS_FOURS or run == 0 else (wide << np.int32(16)) | (wide & np.int32(0xFFFF))


@inlined
def multiply_tiles(
    unpack: Any,
    add: Any,
    run: int,
    per: int,
    mins: bool,
    size: int,
    raw: Bytes,
    acts: Codes,
    sums: Shorts,
    act_d: Floats,
    out: Floats,
) -> None:
    """Rows of blocks of `size` bytes with tokens laid out by lay_out().

    add, run : add_under_scale, and how many sums of 2 products of the largest code fit in int16; or
               add_fours_under_scale, where not one does
    """
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
                    store(scales, j, as_factors(run, scale))
                    store(low, j, off)
                else:
                    store(scales, j, as_factors(run, EVEN(scale)))
                    store(low, j, EVEN(off))
                put(d, k * blocks + b, step)
                put(dmin, k * blocks + b, least)
        for t in range(0, tokens, TOKENS):
            acc[:] = ZERO
            for b in range(blocks):
                at = t // TOKENS * blocks + b
                for k in range(0, ROWS, TOGETHER):
                    for w in range(0, min(TOKENS, tokens - t), WIDE):
                        act_step = load(act_d, at * TOKENS + w, WIDE)
                        found = multiply_block(
                            add,
                            run,
                            per,
                            q,
                            k * n + b * BLOCK,
                            n,
                            scales,
                            k * groups + b * 64 // per,
                            low,
                            acts,
                            at * BLOCK * TOKENS + 4 * w,
                            sums,
                            at * 64 // per * TOKENS + 2 * w,
                        )
                        i, to = k * blocks + b, k * TOKENS + w
                        add_block(mins, found[0], found[4], get(d, i), get(dmin, i), act_step, acc, to)
                        i, to = i + blocks, to + TOKENS
                        add_block(mins, found[1], found[5], get(d, i), get(dmin, i), act_step, acc, to)
                        i, to = i + blocks, to + TOKENS
                        add_block(mins, found[2], found[6], get(d, i), get(dmin, i), act_step, acc, to)
                        i, to = i + blocks, to + TOKENS
                        add_block(mins, found[3], found[7], get(d, i), get(dmin, i), act_step, acc, to)
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
    multiply_tiles(unpack_q2_k, add_under_scale, 4, 4, True, Q2_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q3_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q3_k, add_under_scale, 4, 4, False, Q3_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q4_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q4_k, add_under_scale, 8, 8, True, Q4_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q5_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q5_k, add_under_scale, 4, 8, True, Q5_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_q6_k(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(unpack_q6_k, add_under_scale, 2, 4, False, Q6_K_BYTES, raw, acts, sums, act_d, out)


@jit
def tiled_iq4_xs(raw: Bytes, acts: Codes, sums: Shorts, act_d: Floats, out: Floats) -> None:
    multiply_tiles(
        unpack_iq4_xs, add_fours_under_scale, 0, 8, False, IQ4_XS_BYTES, raw, acts, sums, act_d, out
    )


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
    elif fmt == IQ4_NL.id and len(raw) >= many_simd.ROWS and len(acts) >= many_simd.TOKENS:
        many_simd.many_iq4_nl(raw, acts, act_d, out)
    elif fmt not in tiled_jit.CHAINED and fmt not in tiled_jit.ONE_SET:
        avx2_simd.multiply(fmt, raw, acts, act_d, act_s, bsums, out)
    else:
        tiled_jit.multiply(fmt, raw, acts, act_d, act_s, bsums, out)
