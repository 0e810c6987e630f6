"""Small floats and C's conversions, over all fp16 values and at every boundary."""

import numpy as np
import pytest

from refimpl.arith import bits, bits_jit
from refimpl.arith.sums import add_lanes, add_up
from tests.bits import assert_same_bits

pytestmark = pytest.mark.portable
HALVES = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def test_every_half_widens_exactly() -> None:
    """Sign * 2^(e - 25) * (1024 + m), and 2^-24 * m for e = 0: all of it exact in float64."""
    sign = np.where(HALVES >> 15, -1.0, 1.0)
    exponent, fraction = (HALVES >> 10 & 31).astype(int), (HALVES & 1023).astype(float)
    value = sign * np.where(exponent == 0, fraction * 2.0**-24, (1024 + fraction) * 2.0 ** (exponent - 25))
    value[exponent == 31] = np.where(fraction[exponent == 31] == 0, sign[exponent == 31] * np.inf, np.nan)
    want = value.astype(np.float32)
    assert_same_bits(bits.decode_half(HALVES), want)
    assert_same_bits(np.float32([bits_jit.decode_half(int(h)) for h in HALVES]), want)


def test_rounding_to_half_is_to_nearest_ties_to_even() -> None:
    """At and beside each point half way between two neighbours, of either sign, subnormals too."""
    ordered = bits.decode_half(HALVES[:0x7C00]).astype(np.float64)  # finite, ascending from 0
    middle = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)  # exact: one bit more than fp16 has
    codes = HALVES[:0x7C00].astype(int)
    even = np.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    below, above = np.nextafter(middle, np.float32(-1)), np.nextafter(middle, np.float32(1e9))
    for x, want in ((middle, even), (below, codes[:-1]), (above, codes[1:])):
        assert_same_bits(bits.encode_half(x), want.astype(np.uint16))
        assert_same_bits(bits.encode_half(-x), (want | 0x8000).astype(np.uint16))
        assert [bits_jit.encode_half(v) for v in x] == want.tolist()
        assert [bits_jit.encode_half(-v) for v in x] == (want | 0x8000).tolist()


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (65504.0, 0x7BFF),  # the largest
        (65519.996, 0x7BFF),
        (65520.0, 0x7C00),  # half a step above it
        (-1e30, 0xFC00),
        (np.inf, 0x7C00),
        (np.nan, 0xFE00),  # x86's NaN, whatever ours was
        (-np.nan, 0xFE00),
        (2.0**-24, 1),  # the smallest subnormal
        (2.0**-25, 0),  # a tie with 0
        (1e-45, 0),
        (-1e-45, 0x8000),
        (-0.0, 0x8000),
    ],
)
def test_half_at_the_ends_of_its_range(x: float, want: int) -> None:
    assert int(bits.encode_half(np.float32([x]))[0]) == want
    assert int(bits_jit.encode_half(np.float32(x))) == want


@pytest.mark.parametrize(
    ("word", "want"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # half way, 0x3F80 is even
        (0x3F818000, 0x3F82),  # half way, 0x3F81 is odd
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0x80000001, 0x8000),
    ],
)
def test_bf16_rounds_to_nearest_ties_to_even(word: int, want: int) -> None:
    x = np.uint32([word]).view(np.float32)
    assert int(bits.encode_bf16(x)[0]) == want
    assert int(bits_jit.encode_bf16(x[0])) == want


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (2.5, 2),
        (3.5, 4),
        (-2.5, -2),
        (-0.5, 0),
        (4194303.0, 4194303),  # 2^22 - 1: the last that is right
        (4194304.0, -4194304),  # 2^22 wraps
        (2.0**24, 0x600000 - 0x400000),  # 2^24 + 1.5 * 2^23 = 1.75 * 2^24 = 0x4BE00000
        (1e30, 0x49F2CA - 0x400000),  # 1e30 = 0x7149F2CA swallows the addend: its own 23 bits, less 2^22
        (np.nan, 0),
        (np.inf, -4194304),  # infinity's low bits are 0
    ],
)
def test_nearest_int_wraps_where_ggml_wraps(x: float, want: int) -> None:
    assert int(bits.nearest_int(np.float32([x]))[0]) == want
    assert int(bits_jit.nearest_int(np.float32(x))) == want


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (16.99, 16),
        (-16.99, -16),
        (2147483520.0, 2147483520),  # the largest float32 below 2^31
        (2147483648.0, -(2**31)),
        (-2147483648.0, -(2**31)),
        (-2147483904.0, -(2**31)),
        (1e30, -(2**31)),
        (np.inf, -(2**31)),
        (-np.inf, -(2**31)),
        (np.nan, -(2**31)),
    ],
)
def test_what_does_not_fit_an_integer_becomes_int_min(x: float, want: int) -> None:
    assert int(bits.truncate(np.float32([x]))[0]) == want
    assert int(bits_jit.truncate(np.float32(x))) == want


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (0.5, 1.0),
        (-0.5, -1.0),
        (1.5, 2.0),
        (2.5, 3.0),  # ties to even would give 2
        (0.49999997, 0.0),  # x + 0.5 rounds to 1 in float32: adding a half would be wrong
        (8388609.0, 8388609.0),  # so would it here
        (-0.3, -0.0),
        (np.inf, np.inf),
    ],
)
def test_round_half_away(x: float, want: float) -> None:
    with np.errstate(invalid="ignore"):
        assert_same_bits(bits.round_half_away(np.float32([x])), np.float32([want]))
        assert_same_bits(np.float32(bits_jit.round_half_away(np.float32(x))), np.float32(want))


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 9999])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_found(at: int, value: float) -> None:
    x = np.full(10000, 3.4e38, np.float32)
    assert bits.find_not_finite(x) == bits_jit.find_not_finite(x) == -1
    x[at] = value
    x[-1] = np.inf
    assert bits.find_not_finite(x) == bits_jit.find_not_finite(x) == at


def test_sums_run_in_order() -> None:
    """2^24 + 1 = 2^24 in float32, so the ones are lost after it and kept before it."""
    assert add_up(np.float32([2**24, 1, 1])) == 2**24
    assert add_up(np.float32([1, 1, 2**24])) == 2**24 + 2


def test_lanes_fold_by_halves() -> None:
    """One 2^54 among ones, in steps of 4 there: lane 0 swallows the ones it meets alone, not their sums.

    2^54 + 1 = 2^54; + 2 = 2^54 (a tie, to even); + 4, + 8, + 16 are kept: 2^54 + 28. One after the other
    would give 2^54.
    """
    terms = np.ones(32)
    terms[0] = 2.0**54
    assert add_lanes(terms) == 2.0**54 + 28
    assert add_lanes(np.ones(256)) == 256
    assert add_lanes(np.float64([3.5])) == 3.5
