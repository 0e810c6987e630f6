"""Dot products in named orders: worked by hand, batch-invariant, and errors that say what does not fit."""

import numpy as np
import pytest

import refimpl
from refimpl import dots, engine, quants
from refimpl.arith.sums import dot_lanes
from refimpl.dots import encoders
from refimpl.dots.planes import split
from refimpl.engine import share
from refimpl.quants.formats import BF16, Q8_K, activations, find_codec
from tests.bits import assert_same_bits
from tests.dot_inputs import draw_tokens, draw_weights

FORMATS = list(dots.PARTNERS)


def test_a_q8_k_block_by_hand() -> None:
    """The first of the largest is -4, so the scale is -127/-4 = 31.75 and d = 1/31.75; 3 * 31.75 = 95.25."""
    x = np.zeros((1, 256), np.float32)
    x[0, :4] = [1, -4, 3, 4]
    block = encoders.encode_q8_k(x)[0, 0]
    assert block["d"] == np.float32(1) / np.float32(31.75)
    assert block["qs"][:5].tolist() == [32, -127, 95, 127, 0]
    assert block["bsums"][:2].tolist() == [127, 0]


def test_q8_1_multiplies_the_sum_with_the_step_before_it_is_rounded() -> None:
    x = np.full((1, 32), 0.1, np.float32)
    block = encoders.encode_q8_1(x)[0, 0]
    assert block["qs"].tolist() == [127] * 32
    assert block["s"] == np.float16(np.float32(32 * 127) * (np.float32(0.1) / np.float32(127)))


def test_the_avx2_encoder_rounds_halves_to_even() -> None:
    """max 127 makes every step 1, so 0.5 is a tie: 1 in the C reference, 0 in ggml's AVX2 code."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = [127, 0.5, 1.5, -2.5]
    for reference in (False, True):
        plain, avx2 = (
            split(dots.encode(x, "q8_0", encoder, reference), activations["q8_0"]).codes[0, :4]
            for encoder in ("reference", "avx2")
        )
        assert plain.tolist() == [127, 1, 2, -3] and avx2.tolist() == [127, 0, 2, -2]


def test_activations_are_no_type_of_a_tensor() -> None:
    for fmt in ("q8_1", "q8_k"):
        assert fmt not in refimpl.formats
        with pytest.raises(ValueError, match="no codec"):
            find_codec(fmt)
    assert Q8_K.block.itemsize == 292 and activations["q8_1"].block.itemsize == 36


def test_a_dot_product_by_hand() -> None:
    """Weights 0.5 * 2 and activations of step 1: 32 products of 2 * 127, times 0.5."""
    raw = np.zeros((1, 34), np.uint8)
    block = raw.view(find_codec("q8_0").block)
    block["d"], block["qs"] = 0.5, 2
    x = np.full((1, 32), 127, np.float32)
    for reference in (False, True):
        assert refimpl.matmul(raw, "q8_0", x, "q8_0", reference=reference)[0, 0] == 0.5 * 2 * 127 * 32


@pytest.mark.parametrize("order", dots.ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_one_token_or_many_one_thread_or_three(fmt: str, order: str) -> None:
    rng = np.random.default_rng(1)
    raw, x = draw_weights(rng, fmt, 21, 1280), draw_tokens(rng, 19, 1280)
    whole = dots.matmul(raw, fmt, x, dots.PARTNERS[fmt], order, jobs=3)
    alone = [dots.matmul(raw, fmt, x[t : t + 1], dots.PARTNERS[fmt], order)[0] for t in range(len(x))]
    assert_same_bits(whole, np.stack(alone))
    assert_same_bits(whole[:, 5:6], dots.matmul(raw[5:6], fmt, x, dots.PARTNERS[fmt], order))


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", *FORMATS])
def test_float_activations_keep_one_order_for_one_token_or_many(fmt: str) -> None:
    rng = np.random.default_rng(2)
    for n in [256, 1280] if fmt in FORMATS else [1, 15, 16, 33, 256]:
        raw, x = draw_weights(rng, fmt, 21, n), draw_tokens(rng, 9, n)
        whole = dots.matmul(raw, fmt, x, "f32", jobs=2)
        assert_same_bits(whole, dots.matmul(raw, fmt, x, "f32", reference=True))
        alone = [dots.matmul(raw, fmt, x[t : t + 1], "f32")[0] for t in range(len(x))]
        assert_same_bits(whole, np.stack(alone))
        want = dot_lanes(quants.dequantize(raw, fmt)[None], x[:, None])
        assert_same_bits(whole, want)


@pytest.mark.parametrize("n", (16, 48, 256, 272, 800))
@pytest.mark.parametrize(("m", "tokens"), ((5, 16), (37, 200)))
def test_sums_of_floats_for_many_tokens(n: int, m: int, tokens: int) -> None:
    rng = np.random.default_rng(n)
    w, x = rng.normal(size=(m, n)).astype(np.float32), rng.normal(size=(tokens, n)).astype(np.float32)
    x[3], x[4], x[5, 7] = (
        -0.0,
        0.0,
        np.inf,
    )  # a row of -0: its sums are +0 and -0 alike, as those that begin with 0
    w[2] = np.abs(w[2])
    got, want = (dots.matmul(w.view(np.uint8), "f32", x, "f32", reference=r) for r in (False, True))
    assert_same_bits(got, want)
    assert not np.signbit(got[3]).any()


def test_our_order_of_floats_by_hand() -> None:
    """17 products: lane 0 holds the first and the last. 2^24 + 1 is lost, 1 + 1 first is not."""
    w, x = np.ones((1, 17), np.float32), np.zeros((1, 17), np.float32)
    x[0, [0, 8, 16]] = [2**24, 1, 1]  # lane 0: 2^24 + 1 = 2^24; then lane 0 + lane 8 = 2^24
    assert dots.matmul(w.view(np.uint8), "f32", x, "f32")[0, 0] == 2**24
    x[0, [0, 8, 16]] = [1, 2**24, 1]  # lane 0: 2; then 2 + 2^24
    assert dots.matmul(w.view(np.uint8), "f32", x, "f32")[0, 0] == 2**24 + 2


def test_nothing_to_multiply_is_zero() -> None:
    assert dots.matmul(np.empty((0, 34), np.uint8), "q8_0", np.ones((2, 32), np.float32), "q8_0").shape == (
        2,
        0,
    )
    assert dots.matmul(np.empty((3, 34), np.uint8), "q8_0", np.ones((0, 32), np.float32), "q8_0").shape == (
        0,
        3,
    )
    assert (
        dots.matmul(np.empty((3, 0), np.uint8), "bf16", np.ones((2, 0), np.float32), "f32").tolist()
        == [[0] * 3] * 2
    )
    assert BF16.row_bytes(0) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("q8_0", 32, 34, "q8_k", "generic"), ValueError, "q8_0 weights are multiplied with q8_0"),
        (("bf16", 32, 64, "q8_0", "generic"), ValueError, "bf16 weights are multiplied with f32"),
        (("q8_0", 32, 34, "q8_0", "best"), ValueError, "order 'best'"),
        (("q8_0", 32, 34, "f32", "generic-fma"), ValueError, "order 'generic-fma'"),
        (("q8_0", 33, 34, "q8_0", "generic"), ValueError, "multiple of 32 weights"),
        (("q8_0", 64, 34, "q8_0", "generic"), ValueError, "need rows of 68 bytes"),
        (("q8_9", 32, 34, "q8_0", "generic"), ValueError, "no codec"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple, error: type, text: str) -> None:
    fmt, n, size, activation, order = arguments
    with pytest.raises(error, match=text):
        dots.matmul(np.zeros((2, size), np.uint8), fmt, np.zeros((1, n), np.float32), activation, order)


def test_arrays_of_other_types_and_axes_are_refused() -> None:
    raw, x = np.zeros((2, 34), np.uint8), np.zeros((1, 32), np.float32)
    with pytest.raises(TypeError, match="x must be an array of float32"):
        dots.matmul(raw, "q8_0", x.astype(np.float64), "q8_0")
    with pytest.raises(TypeError, match="raw must be an array of uint8"):
        dots.matmul(raw.tolist(), "q8_0", x, "q8_0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x needs 2 axes"):
        dots.matmul(raw, "q8_0", x[0], "q8_0")


@pytest.mark.parametrize("name", ["q8_0", "q8_1", "q8_k"])
def test_encoded_tokens_are_taken_apart_in_one_call_as_by_the_planes(name):
    kind, rng = activations[name], np.random.default_rng(9)
    for tokens, blocks in ((1, 1), (3, 5)):
        raw = rng.integers(0, 256, (tokens, blocks * kind.block.itemsize), np.uint8)
        for got, want in zip(dots._split(raw, kind), split(raw, kind), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert got.tobytes() == want.tobytes()


@pytest.fixture(autouse=True)
def spread_small_work(monkeypatch):
    """Threads take part however small the work is, so that the tests of threads need not be long."""
    monkeypatch.setattr(engine, "ENOUGH", 1)


@pytest.mark.parametrize("jobs", [2, 3])
def test_threads_change_nothing_and_report_what_goes_wrong(jobs):
    rng = np.random.default_rng(10)
    raw = refimpl.quantize(rng.standard_normal((7, 256)).astype(np.float32), "q4_k")
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, 256)).astype(np.float32)
        for how in (["q8_k"], ["q8_k", "avx2"], ["f32"]):
            got = refimpl.matmul(raw, "q4_k", x, *how, jobs=jobs)
            assert np.array_equal(got, refimpl.matmul(raw, "q4_k", x, *how))

    def fail(rows):
        if rows.start:
            raise KeyError(rows.start)

    with pytest.raises(KeyError):
        share(fail, 7, jobs)


@pytest.mark.parametrize("fmt", ["q8_0", "q5_0", "q4_k", "q6_k"])
def test_a_few_tokens_in_one_call_have_the_reference_s_bits(fmt):
    rng = np.random.default_rng(11)
    for rows, tokens, n in ((4, 1, 256), (9, 2, 768), (5, 3, 512)):
        raw, x = draw_weights(rng, fmt, rows, n), draw_tokens(rng, tokens, n)
        got = refimpl.matmul(raw, fmt, x, dots.PARTNERS[fmt], "avx2")
        assert_same_bits(got, refimpl.matmul(raw, fmt, x, dots.PARTNERS[fmt], "avx2", reference=True))
