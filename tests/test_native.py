"""What `refimpl native` holds products and activations to: exact values, proven bounds, and that they can be missed."""

import numpy as np
import pytest

from refimpl import dots
from refimpl.crosscheck import native_activations, native_dots
from refimpl.crosscheck.native_inputs import edge_blocks, random_blocks, step_fields, unit_blocks
from refimpl.crosscheck.native_mistakes import exact_weights
from refimpl.crosscheck.native_symbols import Symbol, list_symbols, partner_of
from refimpl.crosscheck.native_trial import Trial
from refimpl.quants.formats import activations, formats

DOTS = {s.format.name: s for s in list_symbols() if s.kind == "dot"}
STEPPED = [name for name, fmt in formats.items() if step_fields(fmt) and fmt.weights > 1]
rng = np.random.default_rng(0)


@pytest.mark.parametrize("name", STEPPED)
def test_decoding_without_rounding_is_linear_in_the_steps(name: str) -> None:
    """d times what d = 1 gives, less dmin times what dmin = 1 gives: in float64, nothing is rounded."""
    fmt = formats[name]
    for raw in (random_blocks(fmt, rng, 300), edge_blocks(fmt, rng)):
        blocks = raw.view(fmt.block).reshape(-1)
        total = np.zeros((len(blocks), fmt.weights))
        for step in step_fields(fmt):
            one = blocks.copy()
            for other in step_fields(fmt):
                one[other] = other == step
            total += exact_weights(fmt, one) * blocks[step].astype(np.float64)[:, None]
        np.testing.assert_array_equal(exact_weights(fmt, blocks), total)


def test_every_pair_is_the_one_that_matmul_knows() -> None:
    for name, partner in dots.PARTNERS.items():
        assert partner_of(formats[name]) == partner, name


def make_trial(
    symbol: Symbol, raw: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact values and bounds of one row a product, and matmul's own results."""
    rows = len(raw) // len(tokens)
    trial = Trial("", {"blocks": raw, "tokens": tokens}, rows)
    exact, bound = native_dots.evaluate(symbol, trial, native_dots.encode_tokens(symbol, tokens))
    got = dots.matmul(raw.reshape(rows, -1), symbol.format, tokens.reshape(1, -1), symbol.partner)[0]
    return exact, bound, got


@pytest.mark.parametrize("name", [name for name in dots.PARTNERS if name in DOTS])
def test_matmul_keeps_the_bound_and_one_code_more_breaks_it(name: str) -> None:
    symbol = DOTS[name]
    fmt, per_row = symbol.format, 8 * max(1, activations[symbol.partner].weights // symbol.format.weights)
    tokens = rng.standard_normal((per_row, fmt.weights), np.float32)
    raw = native_dots._tame(fmt, random_blocks(fmt, rng, 80 * per_row))
    exact, bound, got = make_trial(symbol, raw[: len(raw) // per_row * per_row], tokens)
    assert (bound > 0).all() and (np.abs(got - exact) <= bound).all()
    assert (np.abs(got * np.float32(1.01) - exact) > bound).mean() > 0.5


@pytest.mark.parametrize("name", [name for name in dots.PARTNERS if name in DOTS])
def test_integers_have_a_bound_of_zero_and_matmul_meets_it(name: str) -> None:
    symbol = DOTS[name]
    fmt, per_row = symbol.format, max(1, activations[symbol.partner].weights // symbol.format.weights)
    tokens = rng.integers(-9, 10, (per_row, fmt.weights)).astype(np.float32)
    tokens[:, ::32] = 127
    exact, bound, got = make_trial(symbol, unit_blocks(fmt, rng, 64 * per_row), tokens)
    assert (bound == 0).sum() > 32
    np.testing.assert_array_equal(got[bound == 0], exact[bound == 0])


def test_every_trial_of_a_product_has_rows_that_prove_the_integer_part() -> None:
    for symbol in DOTS.values():
        proven = 0
        for trial in native_dots.list_products(symbol, 64):
            partner = native_dots.encode_tokens(symbol, trial.inputs["tokens"])
            exact, bound = native_dots.evaluate(symbol, trial, partner)
            assert np.isfinite(exact).all() and np.isfinite(bound).all(), (symbol.name, trial.case)
            proven += int((bound == 0).sum())
        assert proven > 100, symbol.name


@pytest.mark.parametrize("name", activations)
@pytest.mark.parametrize("encoder", native_activations.ENCODERS)
def test_encoders_of_activations_keep_their_bound(name: str, encoder: str) -> None:
    fmt = activations[name]
    sizes = 10.0 ** rng.integers(-3, 9, (100, 1))
    sizes[:3] = 5e37
    x = (rng.standard_normal((100, fmt.weights)) * sizes).astype(np.float32)
    got = dots.encode(x.reshape(1, -1), name, encoder).reshape(100, -1)
    assert name == "q8_k" or np.isinf(got.view(fmt.block)["d"]).any()  # and what overflows is right
    ratio, wrong = native_activations.measure(x, got, fmt)
    assert not wrong.any() and 0.9 < ratio <= 1
    for field, change in (("qs", 1), ("d", -8), ("s", 4), ("bsums", 1)):
        if field in (fmt.block.names or ()):
            odd = got.copy()
            bits = odd.view(fmt.block).reshape(-1)[field]
            bits.view(f"i{bits.itemsize}").reshape(100, -1)[:, 0] += change
            wrong = native_activations.measure(x, odd, fmt)[1]
            assert wrong[np.isfinite(got.view(fmt.block)["d"].reshape(-1))].mean() > 0.9, field
