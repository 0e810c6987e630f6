"""The vector dot products: integer dots and fma by any CPU's instructions, tails, guarded buffers, an old CPU."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from refimpl import dots
from refimpl.arith import fma as reference
from refimpl.arith.jit import jit
from refimpl.arith.simd_dot import (
    add_fours,
    add_small_fours,
    fma,
    fuse_by_bits,
    give_signs,
    multiply_bytes,
    multiply_words,
)
from refimpl.arith.simd_lanes import mask_bits, mask_from
from refimpl.arith.simd_memory import load, store
from refimpl.dots import floats_simd, planes, words_simd
from refimpl.quants.formats import activations, find_codec
from tests.bits import assert_same_bits
from tests.dot_inputs import draw_edges, draw_tokens, draw_weights, set_steps

FORMATS = list(dots.PARTNERS)
# One format of each way to unpack.
WAYS = [
    "q8_0",
    "q5_1",
    "iq4_nl",
    "mxfp4",
    "q2_k",
    "q4_k",
    "q6_k",
    "iq4_xs",
    "tq1_0",
    "iq2_xs",
    "iq3_xxs",
    "iq3_s",
    "iq1_s",
    "iq1_m",
    "q1_0",
    "q2_0",
]
ORDERS = {
    "generic": ("generic", [False]),
    "generic-fma": ("generic", [True]),
    "avx2": ("avx2", []),
    "tiled": ("tiled", []),
}
CANARY = 0xA5


@jit
def run_integers(x, y, v, w, shorts, words, fours):
    store(shorts, 0, multiply_bytes(load(x, 0, 64), load(y, 0, 64)))
    store(words, 0, multiply_words(load(v, 0, 32), load(w, 0, 32)))
    store(fours, 0, add_fours(load(fours, 0, 16), load(x, 0, 64), load(y, 0, 64)))
    store(shorts, 32, multiply_bytes(load(x, 0, 32), load(y, 0, 32)))
    store(words, 16, multiply_words(load(v, 0, 8), load(w, 0, 8)))
    store(fours, 16, add_fours(load(fours, 16, 8), load(x, 0, 32), load(y, 0, 32)))


@jit
def run_signs(x, signs, out):
    store(out, 0, give_signs(load(x, 0, 64), load(signs, 0, 64)))
    store(out, 64, give_signs(load(x, 0, 16), load(signs, 0, 16)))


def test_signs_are_given_and_zero_takes_all():
    rng = np.random.default_rng(2)
    x, signs = rng.integers(-127, 127, (2, 64), np.int8, endpoint=True)
    signs[::3], out = 0, np.empty(80, np.int8)
    run_signs(x, signs, out)
    want = x * np.sign(signs)
    assert np.array_equal(out, np.concatenate([want, want[:16]]))


@jit
def run_fours(x, y, fours):
    store(fours, 0, add_fours(load(fours, 0, 16), load(x, 0, 64), load(y, 0, 64)))
    store(fours, 16, add_fours(load(fours, 16, 8), load(x, 0, 32), load(y, 0, 32)))


@jit
def run_small_fours(x, y, fours):
    store(fours, 0, add_small_fours(load(fours, 0, 16), load(x, 0, 64), load(y, 0, 64)))
    store(fours, 16, add_small_fours(load(fours, 16, 8), load(x, 0, 32), load(y, 0, 32)))


def test_sums_of_fours_are_exact_to_the_ends():
    for top, run in ((127, run_small_fours), (127, run_fours), (255, run_fours)):
        for low, high in ((-128, -128), (127, 127), (-128, 127)):
            x = np.array([top, top - 1] * 32, np.uint8)
            y = np.array([low, high] * 32, np.int8)
            fours = np.arange(24, dtype=np.int32)
            run(x, y, fours)
            quads = (x.astype(np.int32) * y).reshape(-1, 4).sum(1)
            assert np.array_equal(fours - np.arange(24), np.concatenate([quads, quads[:8]]))


def test_integer_dots_are_exact():
    rng = np.random.default_rng(1)
    for top in (127, 255):
        x, y = (
            rng.integers(0, top, 64, np.uint8, endpoint=True),
            rng.integers(-64, 63, 64, np.int8, endpoint=True),
        )
        v, w = (rng.integers(-(2**15), 2**15, 32).astype(np.int16) for _ in range(2))
        shorts, words = np.empty(48, np.int16), np.empty(20, np.int32)
        fours = rng.integers(-(2**20), 2**20, 24).astype(np.int32)
        start = fours.copy()
        run_integers(x, y, v, w, shorts, words, fours)
        products = x.astype(np.int32) * y
        pairs, quads = products.reshape(-1, 2).sum(1), products.reshape(-1, 4).sum(1)
        sums = (v.astype(np.int64) * w).reshape(-1, 2).sum(1).astype(np.int32)
        assert np.array_equal(shorts, np.concatenate([pairs, pairs[:16]]))
        assert np.array_equal(words, np.concatenate([sums, sums[:4]]))
        assert np.array_equal(fours - start, np.concatenate([quads, quads[:8]]))


@jit
def run_fma(a, b, c, by_cpu, by_bits):
    for i in range(0, a.size, 16):
        store(by_cpu, i, fma(load(a, i, 16), load(b, i, 16), load(c, i, 16)))
        store(by_bits, i, fuse_by_bits(load(a, i, 16), load(b, i, 16), load(c, i, 16)))


def test_fma_rounds_once():
    """Any bits; sums that nearly cancel; and products half a step off, where float64 alone rounds twice."""
    rng, n = np.random.default_rng(2), 1 << 16
    a, b, c = (rng.integers(0, 2**32, n, np.uint32).view(np.float32) for _ in range(3))
    with np.errstate(all="ignore"):
        a[: n // 2], b[: n // 2] = rng.standard_normal((2, n // 2))
        near = -(a * b) * rng.choice(np.float32([1, 1 + 2**-20, 0.5, 2**-30]), n)
        c[: n // 2] = near[: n // 2]
        k = n // 4  # (1 + 2^-12)^2 + tiny: 1 + 2^-11 + 2^-24 is a tie that the addend breaks
        a[:k] = b[:k] = np.float32(1 + 2**-12)
        c[:k] = rng.choice(np.float32([1e-20, -1e-20, 0, 2**-60]), k)
        got = np.empty((2, n), np.float32)
        run_fma(a, b, c, *got)
        want = reference.fma(a, b, c)
    assert_same_bits(got[0], want)
    assert_same_bits(got[1], want)
    with np.errstate(all="ignore"):
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice[:k] != want[:k]).any()  # the control: float64 would not do


def test_a_mask_is_made_of_bits():
    @jit
    def run(bits):
        return mask_bits(mask_from(bits))

    assert int(run(np.uint32(0x80000401))) == 0x80000401 and int(run(np.uint8(0x91))) == 0x91


def guard(array, offset):
    """A copy `offset` bytes after a multiple of 64, amid canaries; and a function that finds them whole."""
    memory = np.full(array.nbytes + 384, CANARY, np.uint8)
    start = -memory.ctypes.data % 64 + 128 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array

    def is_whole():
        return (memory[:start] == CANARY).all() and (memory[start + array.nbytes :] == CANARY).all()

    return copy, is_whole


def multiply(twin, fmt, order, raw, acts, out):
    module, fused = ORDERS[order]
    a = planes.split(acts, activations[dots.PARTNERS[fmt]])
    import_module(f"refimpl.dots.{module}_{twin}").multiply(find_codec(fmt).id, raw, *a, *fused, out)


def find_orders(fmt):
    return ORDERS


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("fmt", FORMATS)
def test_any_number_of_rows_and_tokens_at_any_address(fmt, offset):
    """Canaries around the blocks would spread into the sums; canaries around the results would be overwritten."""
    rng = np.random.default_rng(3)
    n = 768
    for rows, tokens in ((1, 1), (2, 3), (3, 8), (4, 17), (5, 2), (9, 16), (17, 33), (34, 5)):
        raw, whole = guard(draw_weights(rng, fmt, rows, n), offset)
        acts = dots.encode(draw_tokens(rng, tokens, n), dots.PARTNERS[fmt])
        for order in find_orders(fmt):
            got, untouched = guard(np.full((tokens, rows), np.nan, np.float32), 4 * offset)
            want = np.empty_like(got)
            multiply("simd", fmt, order, raw, acts, got)
            multiply("jit", fmt, order, raw, acts, want)
            assert_same_bits(got, want, f"{fmt} {order}, {rows} rows, {tokens} tokens")
            assert untouched() and whole()


@pytest.mark.parametrize("fmt", ["q8_0", "q5_0", "iq4_nl"])
@pytest.mark.parametrize("tokens", [132, 141])
def test_rows_blocks_and_tokens_beyond_what_is_multiplied_at_a_time(fmt, tokens):
    rng, n = np.random.default_rng(5), 32 * (words_simd.DEPTH + 1)
    raw = draw_weights(rng, fmt, words_simd.PANEL + 5, n)
    acts = dots.encode(draw_tokens(rng, tokens, n), dots.PARTNERS[fmt])
    got, want = np.full((2, tokens, len(raw)), np.nan, np.float32)
    multiply("simd", fmt, "tiled", raw, acts, got)
    multiply("jit", fmt, "tiled", raw, acts, want)
    assert_same_bits(got, want, f"{fmt}, {tokens} tokens")


@pytest.mark.parametrize("fmt", FORMATS)
def test_edges_on_vectors(fmt):
    for what, raw, x in draw_edges(fmt, rows=5):
        acts = dots.encode(x, dots.PARTNERS[fmt])
        for order in find_orders(fmt):
            got, want = np.empty((2, 2, 5), np.float32)
            multiply("simd", fmt, order, raw, acts, got)
            multiply("jit", fmt, order, raw, acts, want)
            assert_same_bits(got, want, f"{fmt} {order}, {what}")


def digest(formats):
    """One hash over what the vectors give for these formats in every order; nothing else is compiled for it."""
    total, rng = hashlib.sha256(), np.random.default_rng(4)
    for fmt in formats:
        raw = rng.integers(0, 256, (6, find_codec(fmt).row_bytes(768)), np.uint8)
        set_steps(raw, fmt, rng.uniform(-0.1, 0.1))
        acts = dots.encode(draw_tokens(rng, 17, 768), dots.PARTNERS[fmt], reference=True)
        for order in find_orders(fmt):
            out = np.empty((17, 6), np.float32)
            multiply("simd", fmt, order, raw, acts, out)
            total.update(out.tobytes())
    w, x = rng.standard_normal((2, 19, 48)).astype(np.float32)
    for tokens in (9, 19):
        floats_simd.multiply(w, x[:tokens], out := np.empty((tokens, 19), np.float32))
        total.update(out.tobytes())
    return total.hexdigest()


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="compiles for x86-64 CPUs of other kinds"
)
@pytest.mark.parametrize(
    ("cpu", "features", "formats"),
    [
        ("nehalem", "", WAYS),
        ("haswell", "+sse2,+ssse3,+avx,+avx2,+fma,+f16c", ["q8_0", "q5_1", "q4_k", "q6_k"]),
    ],
    ids=["nehalem", "haswell"],
)
def test_a_cpu_without_these_instructions_gives_the_same_bits(cpu, features, formats, tmp_path):
    code = "from numba import config; import test_simd_dots as t\n"
    code += f"print(config.CPU_NAME, t.digest({formats}))"
    old = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    paths = {"PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **old, **paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [cpu, digest(formats)]
