"""Dot products: the bits of one of refimpl's orders, or an error inside the bound that rounding is proven to keep.

The exact product is evaluated in float64 from the blocks' own fields: E, the sum of the terms, and T, the sum of
their magnitudes. In whatever order a kernel adds n terms and n/16 mins, with at most four roundings in a term,

    |result - E| <= gamma_k * T,   gamma_k = k*u / (1 - k*u),   u = 2^-24,   k = n + n/16 + 4

provided that nothing over- or underflows, which the inputs see to. Where all terms are multiples of one power of
two g and T <= 2^24 * g, every partial sum is exact and the bound is 0: rows of that kind prove the integer part.
Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1.
"""

from collections.abc import Iterator

import numpy as np

from refimpl import dots
from refimpl.crosscheck.native_inputs import SEED, edge_blocks, random_blocks, unit_blocks
from refimpl.crosscheck.native_library import Argument, Buffer, Library
from refimpl.crosscheck.native_mistakes import decode, exact_weights, find_mistake, without_min
from refimpl.crosscheck.native_symbols import Symbol
from refimpl.crosscheck.native_trial import Array, Result, Trial, alignment, died
from refimpl.quants import dequantize, quantize
from refimpl.quants.formats import Format, activations

UNIT = 2.0**-24
ROW = 16  # blocks of a row of the largest trial
SMALL, LARGE = 2.0**-80, 2.0**60  # weights between these neither under- nor overflow in a product


def gamma(k: float) -> float:
    """The relative error that k roundings to float32 can add up to."""
    return k * UNIT / (1 - k * UNIT)


def multiply(library: Library, symbol: Symbol, trial: Trial, order: str | None) -> Result:
    """Multiply every row with the token; the bits must be those of the order, or (None) keep the bound."""
    fmt, rows = symbol.format, trial.rows
    raw = np.ascontiguousarray(trial.inputs["blocks"])
    tokens = np.ascontiguousarray(trial.inputs["tokens"])
    partner = encode_tokens(symbol, tokens)
    stride, n = raw.nbytes // rows, trial.blocks // rows * fmt.weights
    other = alignment(activations.get(symbol.partner, fmt))
    shift = (alignment(fmt), other, 4) if trial.shifted else (0, 0, 0)
    arguments: list[Argument] = [
        ("i", n),
        Buffer(4 * rows, shift[2], 4),
        ("z", 0),
        Buffer(raw.reshape(-1).view(np.uint8), shift[0], stride),
        ("z", 0),
        Buffer(partner, shift[1]),
        ("z", 0),
        ("i", 1),
    ]
    outcome = library.call(symbol.name, "v", arguments, rows)
    if outcome.crash is not None or outcome.output is None:
        return died(outcome, evaluate(symbol, trial, partner)[0])
    got = outcome.output.view(np.float32)
    if outcome.spill is not None:
        return Result(outcome.spill, "spill", 0, got, evaluate(symbol, trial, partner)[0])
    if order is not None:
        want = dots.matmul(raw.reshape(rows, -1), fmt, tokens.reshape(1, -1), symbol.partner, order).reshape(
            -1
        )
        differ = np.flatnonzero(got.view(np.uint32) != want.view(np.uint32))
        problem = f"{len(differ):,} of {rows:,} products are not the ones of {order}" if len(differ) else None
        return Result(problem, "values" if problem else "", 0, got, want)
    exact, bound = evaluate(symbol, trial, partner)
    with np.errstate(all="ignore"):
        error = np.abs(got - exact)
        wrong = np.flatnonzero(~(error <= bound))
        ratio = float(np.max(error[bound > 0] / bound[bound > 0], initial=0))
    if not len(wrong):
        return Result(None, "", 0, got, exact, ratio)
    at = int(wrong[0])
    what = "an exact sum of integers" if bound[at] == 0 else f"off by {error[at]:.3g}, bound {bound[at]:.3g}"
    problem = f"{len(wrong):,} of {rows:,} products are wrong; the first is {what}"
    return Result(problem, "values", at * (trial.blocks // rows), got, exact, ratio)


def encode_tokens(symbol: Symbol, tokens: Array) -> Array:
    """The token as the function reads it: [bytes] uint8."""
    if symbol.partner in activations:
        return dots.encode(tokens.reshape(1, -1), symbol.partner).reshape(-1)
    return quantize(tokens.reshape(1, -1), symbol.format).reshape(-1)


def evaluate(
    symbol: Symbol, trial: Trial, partner: Array, weights: Array | None = None
) -> tuple[Array, Array]:
    """The exact products and how far rounding may lead away from them: [rows] float64 each.

    partner : the encoded token
    weights : [N, weights] float64, or None: as decoded without rounding
    """
    if weights is None:
        weights = exact_weights(symbol.format, trial.inputs["blocks"].view(symbol.format.block).reshape(-1))
    rows, n = trial.rows, weights.size // trial.rows
    fmt = activations.get(symbol.partner, symbol.format)
    blocks = partner.view(fmt.block).reshape(-1)
    raw = np.ascontiguousarray(trial.inputs["blocks"]).view(symbol.format.block).reshape(-1)
    if symbol.partner == "q8_1":  # mins are multiplied with the stored sums s, not with the codes
        codes = blocks["d"].astype(np.float64)[:, None] * blocks["qs"]
        minimum = weights - without_min(symbol.format, raw)
        terms = (weights - minimum).reshape(rows, n) * codes.reshape(1, n)
        mins = minimum[:, 0].reshape(rows, -1) * blocks["s"].astype(np.float64)
    else:
        x = (
            decode(fmt, blocks)
            if fmt.name != "q8_k"
            else blocks["d"].astype(np.float64)[:, None] * blocks["qs"]
        )
        terms, mins = weights.reshape(rows, n) * x.reshape(1, n), np.zeros((rows, 1))
    exact = terms.sum(1) + mins.sum(1)
    size = np.abs(terms).sum(1) + np.abs(mins).sum(1)
    bound = gamma(n + n // 16 + 4) * size
    bound[are_integers(np.concatenate([terms, mins], 1), size)] = 0
    return exact, bound


def are_integers(terms: Array, size: Array) -> Array:
    """Rows whose terms are multiples of a power of two that is at least size / 2^24: all their sums are exact."""
    unit = 2.0 ** np.ceil(np.log2(np.maximum(size, 2.0**-120) * UNIT))
    scaled = terms / unit[:, None]
    whole: Array = (scaled == np.rint(scaled)).all(1)
    return whole


def list_products(symbol: Symbol, most: int) -> Iterator[Trial]:
    """Everything that a dot product is tried on."""
    fmt = symbol.format
    if symbol.kind == "product":
        yield from _list_floats(symbol, most)
        return
    least = max(1, activations[symbol.partner].weights // fmt.weights)
    rng = np.random.default_rng([SEED, fmt.id, 3])

    def trial(
        case: str, raw: Array, per_row: int, tokens: Array | None = None, shifted: bool = False
    ) -> Trial:
        raw = raw[: len(raw) // per_row * per_row]
        if tokens is None:
            tokens = rng.standard_normal((per_row, fmt.weights), np.float32)
        return Trial(case, {"blocks": raw, "tokens": tokens}, len(raw) // per_row, shifted)

    for blocks in (1, 2, 3):
        per_row = least * blocks
        whole = rng.integers(-9, 10, (per_row, fmt.weights)).astype(np.float32)
        whole[:, ::32] = 127  # so that the step is 1 and the codes are these integers
        yield trial(f"integers, {blocks} to a row", unit_blocks(fmt, rng, 64 * per_row), per_row, whole)
    peaks = np.full((least, fmt.weights), 127, np.float32)
    for name, tokens in (
        ("127", peaks),
        ("-127", -peaks),
        ("both signs", peaks * rng.choice([-1, 1], peaks.shape)),
    ):
        full = _tame(fmt, edge_blocks(fmt, rng))
        yield trial(f"codes at their limits, activations {name}", full, least, tokens.astype(np.float32))
    sparse = np.where(rng.random(peaks.shape) < 0.02, peaks, 0).astype(np.float32)
    sparse[:, ::32] = 127
    yield trial("integers, few large ones", unit_blocks(fmt, rng, 64 * least, full=True), least, sparse)
    yield trial("activations of zero", random_blocks(fmt, rng, 3 * least), least, peaks * 0)
    ordinary = _tame(fmt, random_blocks(fmt, rng, 3000))
    yield trial("one block", ordinary[:least], least)
    yield trial("rows of 17 blocks", ordinary, 17 * least)
    yield trial("pointers of the least alignment", ordinary[: 33 * least], 3 * least, shifted=True)
    large = _tame(fmt, random_blocks(fmt, rng, most))
    yield trial(f"{len(large):,} blocks", large, min(ROW * least, len(large) // least * least))


def _list_floats(symbol: Symbol, most: int) -> Iterator[Trial]:
    """Float types: rows of every length, ordinary numbers and integers whose sums are exact."""
    fmt, rng = symbol.format, np.random.default_rng([SEED, symbol.format.id, 3])
    for n in (1, 7, 32, 33, 257, 4096):
        rows = max(3, most // 4096) if n == 4096 else 3
        for case in ("integers", "ordinary numbers"):
            w = rng.standard_normal((rows, n), np.float32)
            x = rng.standard_normal((n, 1), np.float32)
            if case == "integers":
                w, x = np.rint(4 * w), np.rint(4 * x)
            raw = quantize(w, fmt).reshape(-1, fmt.block.itemsize)
            yield Trial(f"{case}, {n} to a row", {"blocks": raw, "tokens": x}, rows, n == 33)


def _tame(fmt: Format, raw: Array) -> Array:
    """The blocks without those whose products could over- or underflow."""
    size = np.abs(dequantize(raw, fmt))
    kept: Array = raw[(((size == 0) | (size > SMALL)) & (size < LARGE)).all(1)]
    return kept


def name_mistake(symbol: Symbol, trial: Trial, result: Result) -> str | None:
    """The classic mistake under which the products would be right."""
    assert result.got is not None
    partner, got = encode_tokens(symbol, trial.inputs["tokens"]), result.got.astype(np.float64)

    def fits(weights: Array) -> bool:
        exact, bound = evaluate(symbol, trial, partner, weights)
        return bool((np.abs(got - exact) <= bound).all())

    return find_mistake(symbol.format, trial.inputs["blocks"], fits)
