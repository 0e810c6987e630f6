"""The SIMD value type for kernels: its arithmetic is NumPy's, lane by lane, and misuse does not compile."""

import numpy as np
import pytest
from numba.core.errors import TypingError

from refimpl.arith.bits_simd import find_not_finite, widen_bf16s
from refimpl.arith.jit import jit
from refimpl.arith.simd import absolute, fill, maximum, minimum, round_away, select, sqrt
from refimpl.arith.simd_lanes import (
    as_float32,
    constants,
    convert,
    decode_half,
    encode_half,
    first,
    high_half,
    join,
    lookup,
    low_half,
    lowest_lane,
    mask_bits,
    narrow_half_by_bits,
    permutation,
    reinterpret,
    staircase,
    widen_half_by_bits,
)
from refimpl.arith.simd_memory import (
    fence,
    get,
    is_aligned,
    load,
    peek,
    poke,
    prefetch,
    put,
    stack,
    store,
    stream,
    transpose16,
)

N = 24  # no power of two: any lane count is legal
EXPRESSION = 4
REVERSED = permutation(range(N - 1, -1, -1))
COUNTED = constants("int32", range(N))


def draw(dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return (rng.standard_normal(N) * 3).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, N, dtype, endpoint=True)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64]
)
def test_arithmetic_is_that_of_numpy_in_every_lane(dtype):
    @jit
    def run(x, y, out):
        a, b = load(x, 0, 24), load(y, 0, 24)
        store(out, 0, a + b)
        store(out, 24, a - b)
        store(out, 48, a * b)

    x, y, out = draw(dtype, 1), draw(dtype, 2), np.empty(3 * N, dtype)
    run(x, y, out)
    assert np.array_equal(out, np.concatenate([x + y, x - y, x * y]))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.uint64])
def test_bit_operations_and_shifts_follow_the_sign_of_the_type(dtype):
    @jit
    def run(x, y, by, out):
        a, b = load(x, 0, 24), load(y, 0, 24)
        store(out, 0, a & b)
        store(out, 24, a | b)
        store(out, 48, a ^ b)
        store(out, 72, a << by)
        store(out, 96, a >> by)

    x, y, by, out = draw(dtype, 1), draw(dtype, 2), dtype(3), np.empty(5 * N, dtype)
    run(x, y, by, out)
    assert np.array_equal(out, np.concatenate([x & y, x | y, x ^ y, x << by, x >> by]))


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint8])
def test_comparisons_give_masks(dtype):
    @jit
    def run(x, y):
        a, b = load(x, 0, 24), load(y, 0, 24)
        return (
            mask_bits(a < b),
            mask_bits(a <= b),
            mask_bits(a > b),
            mask_bits(a >= b),
            mask_bits(a == b),
            mask_bits(a != b),
        )

    x, y = draw(dtype, 1), draw(dtype, 2)
    y[::3] = x[::3]
    want = [x < y, x <= y, x > y, x >= y, x == y, x != y]
    assert list(run(x, y)) == [sum(1 << i for i in range(N) if mask[i]) for mask in want]


def test_nan_compares_as_in_c():
    @jit
    def run(x):
        v, nan = load(x, 0, 4), fill(np.float32(np.nan), 4)
        return (
            mask_bits(v < nan),
            mask_bits(v == nan),
            mask_bits(v != nan),
            first(minimum(nan, v)),
            first(maximum(nan, v)),
        )

    assert run(np.arange(4, dtype=np.float32) + 7) == (0, 0, 15, 7, 7)


def test_a_product_and_a_sum_are_rounded_apart():
    @jit
    def run(x, out):
        v = load(x, 0, 24)
        store(out, 0, v * v + v)
        v *= v
        store(out, 24, sqrt(v) / np.float32(3))

    x, out = draw(np.float32), np.empty(2 * N, np.float32)
    run(x, out)
    wide = x.astype(np.float64)
    assert np.array_equal(out[:N], x * x + x)
    assert not np.array_equal(out[:N], (wide * wide + wide).astype(np.float32))  # a fused result would differ
    assert np.array_equal(out[N:], np.sqrt(x * x) / np.float32(3))


def test_a_scalar_stands_for_every_lane_on_either_side():
    @jit
    def run(x, out):
        v = load(x, 0, 24)
        store(out, 0, np.float32(2) - v)
        store(out, 24, select(v > np.float32(0), v, np.float32(9)))

    x, out = draw(np.float32), np.empty(2 * N, np.float32)
    run(x, out)
    assert np.array_equal(out, np.concatenate([np.float32(2) - x, np.where(x > 0, x, np.float32(9))]))


def test_rounding_halves_goes_away_from_zero():
    @jit
    def run(x, out):
        store(out, 0, round_away(load(x, 0, 8)))
        store(out, 8, absolute(load(x, 0, 8)))

    x = np.array(
        [0.5, -0.5, 1.5, 2.5, -2.5, np.nextafter(np.float32(0.5), np.float32(0)), 8388609.0, -0.2], np.float32
    )
    out = np.empty(16, np.float32)
    run(x, out)
    assert np.array_equal(out[:8], [1, -1, 2, 3, -3, 0, 8388609, 0])
    assert np.array_equal(out[8:], abs(x))


def test_conversions_keep_values_and_reinterpretation_keeps_bits():
    @jit
    def run(x, bytes_, halves, words, wide):
        v = load(x, 0, 24)
        store(bytes_, 0, convert(v, np.int8))
        store(halves, 0, convert(convert(v, np.int8), np.int16))
        store(words, 0, reinterpret(v, np.uint32))
        store(wide, 0, convert(v, np.float64))
        return first(reinterpret(load(bytes_, 0, 8), np.uint64))

    x = (draw(np.float32) * 30).clip(-100, 100)
    bytes_, halves, words, wide = (
        np.empty(N, np.int8),
        np.empty(N, np.int16),
        np.empty(N, np.uint32),
        np.empty(N),
    )
    eight = run(x, bytes_, halves, words, wide)
    assert np.array_equal(bytes_, x.astype(np.int8)) and np.array_equal(
        halves, x.astype(np.int8).astype(np.int16)
    )
    assert np.array_equal(words, x.view(np.uint32)) and np.array_equal(wide, x.astype(np.float64))
    assert int(eight) == int(bytes_[:8].view(np.uint64)[0])


def test_lanes_move_where_they_are_told():
    @jit
    def run(x, out):
        v = load(x, 0, 24)
        store(out, 0, REVERSED(v))
        store(out, 24, join(high_half(v), low_half(v)))
        store(out, 48, COUNTED())
        return lowest_lane(mask_bits(v == v)), lowest_lane(np.uint64(40)), lowest_lane(np.uint64(0))

    x, out = draw(np.int32), np.empty(3 * N, np.int32)
    assert run(x, out) == (0, 3, 64)
    assert np.array_equal(out, np.concatenate([x[::-1], np.roll(x, 12), np.arange(N)]))


def test_bf16_bits_widen_and_float32_stays():
    @jit
    def run(x, out):
        store(out, 0, as_float32(load(x, 0, 8)))

    out, bits = (
        np.empty(8, np.float32),
        np.array([0, 0x8000, 0x3F80, 0xC2F7, 1, 0x7F7F, 0x7F80, 0xFF80], np.uint16),
    )
    run(bits, out)
    assert np.array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)
    run(np.arange(8, dtype=np.float32), out)
    assert np.array_equal(out, np.arange(8))


@jit
def widen(halves, out):
    for i in range(0, halves.size, 16):
        store(out, i, decode_half(load(halves, i, 16)))


@jit
def widen_by_bits(halves, out):
    for i in range(0, halves.size, 16):
        store(out, i, widen_half_by_bits(load(halves, i, 16)))


@jit
def narrow(x, out):
    for i in range(0, x.size, 16):
        store(out, i, encode_half(load(x, i, 16)))


@jit
def narrow_by_bits(x, out):
    for i in range(0, x.size, 16):
        store(out, i, narrow_half_by_bits(load(x, i, 16)))


@pytest.mark.parametrize("kernel", [widen, widen_by_bits])
def test_every_half_widens_exactly(kernel):
    halves, out = np.arange(1 << 16, dtype=np.uint16), np.empty(1 << 16, np.float32)
    kernel(halves, out)
    want = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(want)
    assert np.array_equal(out[number].view(np.uint32), want[number].view(np.uint32))
    assert np.isnan(out[~number]).all()


@pytest.mark.parametrize("kernel", [narrow, narrow_by_bits])
def test_halves_round_to_even_at_every_size(kernel):
    rng = np.random.default_rng(3)
    halves = np.arange(31744, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    near = [np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(1e9))]
    bits = rng.integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    x = np.concatenate(
        [halves, *near, -ties, bits[~np.isnan(bits)], [65519.996, 65520, np.inf, -np.inf, -0.0]]
    )
    x = np.resize(x, len(x) // 16 * 16 + 16).astype(np.float32)
    out = np.empty(len(x), np.uint16)
    kernel(x, out)
    with np.errstate(over="ignore"):
        assert np.array_equal(out, x.astype(np.float16).view(np.uint16))


def test_scratch_holds_what_is_put_there():
    @jit
    def run(out):
        scratch = stack(np.float32, 256)
        for i in range(256):
            put(scratch, i, np.float32(i))
        turned = stack(np.float32, 512)
        transpose16(scratch, 0, 16, turned, 5, 17)
        for i in range(256):
            out[i] = get(turned, 5 + i % 16 * 17 + i // 16)

    out = np.empty(256, np.float32)
    run(out)
    assert np.array_equal(out, np.arange(256))


def test_bytes_are_read_and_written_at_any_offset():
    @jit
    def run(raw):
        prefetch(raw, 1 << 40)
        poke(raw, 3, np.uint32(0x01020304))
        return peek(raw, 1, np.uint64)

    raw = np.zeros(16, np.uint8)
    assert int(run(raw)) == int(raw[1:9].copy().view(np.uint64)[0])
    assert raw[3:7].tolist() == [4, 3, 2, 1]


def test_streamed_stores_land_like_any_other():
    @jit
    def run(out):
        aligned = is_aligned(out)
        if aligned:
            stream(out, 16, fill(np.float32(3), 16))
            fence()
        return aligned

    memory = np.zeros(80, np.float32)
    start = -memory.ctypes.data % 64 // 4
    out = memory[start : start + 48]
    assert run(out) and not run(memory[start + 1 : start + 49])
    assert np.array_equal(out, np.repeat([0, 3, 0], 16))


def expression_as_size(x):
    return get(stack(np.float32, EXPRESSION * 8), 0)


def argument_as_lanes(x, n=4):
    return first(load(x, 0, n))


def strided(x):
    return first(load(x[::2], 0, 4))


def mixed_types(x):
    return first(load(x, 0, 4) + fill(np.float64(1), 4))


def promoted_scalar(x):
    return first(load(x, 0, 4) * 2.0)


def float_shift(x):
    return first(load(x, 0, 4) << np.float32(1))


def wrong_store(x):
    store(x, 0, fill(np.int32(1), 4))


def mask_of_another_width(x):
    return first(select(load(x, 0, 8) > np.float32(0), load(x, 0, 4), load(x, 0, 4)))


@pytest.mark.parametrize(
    "misuse",
    [
        expression_as_size,
        argument_as_lanes,
        strided,
        mixed_types,
        promoted_scalar,
        float_shift,
        wrong_store,
        mask_of_another_width,
    ],
)
def test_misuse_does_not_compile(misuse):
    with pytest.raises(TypingError):
        jit(misuse)(np.zeros(16, np.float32), *([4] if misuse is argument_as_lanes else []))


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 4096, 4127, 10_000])
def test_sources_widen_exactly(size):
    bits = np.random.default_rng(size).integers(0, 0x7F80, size, np.uint16)
    out = np.full(size, np.nan, np.float32)
    assert widen_bf16s(bits, out) == -1 == find_not_finite(out)
    assert np.array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("at", [0, 1, 31, 32, 4095, 4096, 8191, 9_983, 9_999])
@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
def test_the_first_nan_or_infinity_is_found(at, bad):
    bits = np.random.default_rng(at).integers(0x8000, 0xFF80, 10_000, np.uint16)
    bits[at] = bits[9_999] = bad
    out = np.empty(10_000, np.float32)
    assert widen_bf16s(bits, out) == at == find_not_finite(out)
    assert np.array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)


TABLE = tuple(range(-128, 112, 15))
READ = lookup(TABLE)
STEPS = ((-2.5, 3.0), (0.0, 1.0), (0.25, 7.0))
DESCEND = staircase(9.0, STEPS)


def test_a_table_is_looked_up_in_every_lane():
    @jit
    def run(codes, out):
        store(out, 0, READ(load(codes, 0, 16)))

    codes, out = np.random.default_rng(1).permutation(16).astype(np.uint8), np.zeros(16, np.int8)
    run(codes, out)
    assert out.tolist() == [TABLE[c] for c in codes]


def test_a_staircase_descends_below_its_thresholds_and_nan_stays_on_top():
    @jit
    def run(x, out):
        store(out, 0, DESCEND(load(x, 0, 8)))

    x, out = np.float32([-9, -2.5, -1, -0.0, 0.1, 0.25, np.inf, np.nan]), np.zeros(8, np.float32)
    run(x, out)
    assert out.tolist() == [9 - sum(h for t, h in STEPS if v < t) for v in x]
