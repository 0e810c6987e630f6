"""Blocks of 32 with many tokens, for CPUs that do not multiply and add 4 bytes at once: the bits of avx2_jit.

A row's block becomes words, even codes and odd ones, and meets 8 tokens while it is in registers, with their 8 sums of
8 lanes; the tokens' words come from the nearest cache, which holds DEPTH blocks of 8 of them. Between such pieces the
lanes rest in memory.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd import Lanes, fill, inlined
from refimpl.arith.simd_dot import fma, multiply_words
from refimpl.arith.simd_lanes import convert, join, reinterpret
from refimpl.arith.simd_memory import get, load, prefetch, put, stack, store
from refimpl.dots.small_simd import fold
from refimpl.dots.unpack_simd import read_half

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

ROWS = 4  # the fewest
PANEL, TOKENS = 32, 128  # rows and tokens whose pieces the second cache holds, lanes included
EIGHT, DEPTH = 8, 32  # tokens and blocks that the nearest cache holds
SCALES = EIGHT * DEPTH
ZERO = np.float32(0)


@inlined
def split_words(codes: Lanes) -> Any:
    """int8 lanes as words: those of even number, and the others."""
    pairs = reinterpret(codes, np.int16)
    return (pairs << np.int16(8)) >> np.int16(8), pairs >> np.int16(8)


@jit
def lay_out(acts: Codes, act_d: Floats, first: int, count: int, words: Shorts, scales: Floats) -> None:
    """`count` tokens from `first` on, 8 at a time; behind the last comes the last one again.

    words  : [pieces, count/8, blocks of the piece, 8, 2, 16] the even codes and the odd ones
    scales : [pieces, count/8, blocks of the piece, 8]
    """
    blocks = act_d.shape[1]
    eights = -(-count // EIGHT)
    for t in range(eights * EIGHT):
        token = (first + min(t, count - 1)) * blocks
        for piece in range(0, blocks, DEPTH):
            width = min(DEPTH, blocks - piece)
            for k in range(width):
                i = (piece * eights + t // EIGHT * width + k) * EIGHT + t % EIGHT
                even, odd = split_words(load(acts, 32 * (token + piece + k), 32))
                store(words, 32 * i, even)
                store(words, 32 * i + 16, odd)
                scales[i] = act_d[first + min(t, count - 1), piece + k]


@inlined
def take_apart(
    codes: Any,
    size: int,
    bias: int,
    raw: Bytes,
    at: Any,
    rows: int,
    width: int,
    ahead: Any,
    q: Codes,
    steps: Floats,
) -> None:
    """`width` blocks of each of some rows, from byte `at` of the first: q [rows, width, 32], steps [rows, width].

    ahead : how many bytes further on lies what comes next
    """
    row = raw.shape[1]
    for k in range(rows):
        for b in range(width):
            block, i = at + k * row + b * size, k * width + b
            prefetch(raw, block + ahead)
            store(q, 32 * i, reinterpret(codes(raw, block) - np.uint8(bias), np.int8))
            put(steps, i, read_half(raw, block))


@inlined
def add_block(even: Lanes, odd: Lanes, words: Shorts, i: Any, step: Any, lanes: Lanes) -> Lanes:
    """lanes + a row's block times a token's."""
    total = multiply_words(even, load(words, i, 16)) + multiply_words(odd, load(words, i + 16, 16))
    return fma(fill(step, 8), convert(total, np.float32), lanes)


@inlined
def add_four(
    even: Lanes, odd: Lanes, words: Shorts, i: Any, both: Any, j: Any, a: Lanes, b: Lanes, c: Lanes, d: Lanes
) -> Any:
    """As add_block, with 4 tokens."""
    a = add_block(even, odd, words, i, get(both, j), a)
    b = add_block(even, odd, words, i + 32, get(both, j + 1), b)
    c = add_block(even, odd, words, i + 64, get(both, j + 2), c)
    return a, b, c, add_block(even, odd, words, i + 96, get(both, j + 3), d)


@inlined
def load_four(sums: Floats, i: Any) -> Any:
    return load(sums, i, 8), load(sums, i + 8, 8), load(sums, i + 16, 8), load(sums, i + 24, 8)


@inlined
def store_four(sums: Floats, i: Any, a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> None:
    store(sums, i, a)
    store(sums, i + 8, b)
    store(sums, i + 16, c)
    store(sums, i + 24, d)


@jit
def multiply_piece(
    q: Codes,
    steps: Floats,
    rows: int,
    width: int,
    words: Shorts,
    scales: Floats,
    start: int,
    count: int,
    sums: Floats,
) -> None:
    """sums [count/8, rows, 8 tokens, 8 lanes] += rows times tokens of a piece; theirs begins with block `start`."""
    both = stack(np.float32, SCALES)
    for some in range(-(-count // EIGHT)):
        first, few = start + some * width, count - some * EIGHT <= EIGHT // 2
        for row in range(rows):
            for k in range(width):
                store(both, 8 * k, load(scales, 8 * (first + k), 8) * fill(get(steps, row * width + k), 8))
            to = 64 * (some * rows + row)
            a, b, c, d = load_four(sums, to)
            if few:
                for k in range(width):
                    even, odd = split_words(load(q, 32 * (row * width + k), 32))
                    a, b, c, d = add_four(even, odd, words, 256 * (first + k), both, 8 * k, a, b, c, d)
            else:
                e, f, g, h = load_four(sums, to + 32)
                for k in range(width):
                    even, odd = split_words(load(q, 32 * (row * width + k), 32))
                    i, j = 256 * (first + k), 8 * k
                    a, b, c, d = add_four(even, odd, words, i, both, j, a, b, c, d)
                    e, f, g, h = add_four(even, odd, words, i + 128, both, j + 4, e, f, g, h)
                store_four(sums, to + 32, e, f, g, h)
            store_four(sums, to, a, b, c, d)


@jit
def put_sums(sums: Floats, rows: int, count: int, out: Floats, at: int) -> None:
    """Lanes folded, 4 rows at a time, to the flat index `at` of out and on."""
    m = out.shape[1]
    for t in range(count):
        for k in range(0, rows, ROWS):
            r = min(k, rows - ROWS)
            i = 64 * (t // EIGHT * rows + r) + 8 * (t % EIGHT)
            low, high = (
                join(load(sums, i, 8), load(sums, i + 64, 8)),
                join(load(sums, i + 128, 8), load(sums, i + 192, 8)),
            )
            store(out, at + t * m + r, fold(join(low, high)))


@inlined
def multiply_by_words(
    codes: Any, size: int, bias: int, raw: Bytes, acts: Codes, act_d: Floats, out: Floats
) -> None:
    """Blocks of `size` bytes that begin with d; 4 rows or more."""
    m, (tokens, blocks) = raw.shape[0], act_d.shape
    panels = -(-m // PANEL)
    rows, many, deep = -(-m // panels), min(TOKENS, -(-tokens // EIGHT) * EIGHT), min(DEPTH, blocks)
    q, steps = np.empty(rows * deep * 32, np.int8), np.empty(rows * deep, np.float32)
    words, scales = np.empty(many * blocks * 32, np.int16), np.empty(many * blocks, np.float32)
    sums = np.empty(many * rows * 8, np.float32)
    for first in range(0, tokens, many):
        count = min(many, tokens - first)
        eights = -(-count // EIGHT)
        lay_out(acts, act_d, first, count, words, scales)
        for panel in range(panels):
            r = min(panel * rows, m - rows)
            sums[:] = ZERO
            for piece in range(0, blocks, DEPTH):
                width = min(DEPTH, blocks - piece)
                at = r * blocks + piece
                ahead = width if piece + width < blocks else rows * blocks - piece
                take_apart(codes, size, bias, raw, at * size, rows, width, ahead * size, q, steps)
                multiply_piece(q, steps, rows, width, words, scales, piece * eights, count, sums)
            put_sums(sums, rows, count, out, first * m + r)
