"""Encoders of activations: the bytes of one of refimpl's, or codes that rounding can be proven to give.

A vectorised encoder may multiply by 127/max where the reference divides by max/127 first, and round halves to
even. Whatever it does with at most three roundings, a code lies within 1/2 + gamma_3 * 127 of the exact
quotient, d is the rounded max/127, and the sums belong to the codes that were written. Where d is 0 in the
block, no code means anything.
"""

from dataclasses import replace

import numpy as np

from refimpl import dots
from refimpl.crosscheck.native_dots import gamma
from refimpl.crosscheck.native_library import Argument, Buffer, Library
from refimpl.crosscheck.native_symbols import Symbol
from refimpl.crosscheck.native_trial import Array, Result, Trial, alignment, compared, died
from refimpl.quants.formats import Format

ENCODERS = ("reference", "avx2")
LARGEST = 127
HALF_UNIT, HALF_TINY = 2.0**-11, 2.0**-25  # of fp16: relative half step, and that of its subnormals
HALF_OVERFLOW = 65520  # what rounds to infinity


def encode(library: Library, symbol: Symbol, trial: Trial, encoder: str | None) -> Result:
    """Encode activations; the bytes must be those of the encoder, or (None) keep the bound."""
    fmt, x = symbol.format, np.ascontiguousarray(trial.inputs["x"])
    shift = (4, alignment(fmt)) if trial.shifted else (0, 0)
    size = fmt.row_bytes(x.size)
    arguments: list[Argument] = [Buffer(x.view(np.uint8), shift[0]), Buffer(size, shift[1]), ("l", x.size)]
    outcome = library.call(symbol.name, "v", arguments)
    want = dots.encode(x.reshape(1, -1), fmt.name, encoder or ENCODERS[0]).reshape(-1, fmt.block.itemsize)
    if outcome.crash is not None or outcome.output is None:
        return died(outcome, want)
    got = outcome.output.reshape(want.shape)
    if encoder is None:
        ratio, wrong = measure(x, got, fmt)
        return replace(compared(got, want, wrong, outcome.spill), ratio=ratio)
    differ = got != want
    if fmt.name == "q8_k":  # of zeros, C writes d and the codes alone
        differ[want.view(fmt.block)["d"].reshape(-1) == 0, fmt.offset("bsums") :] = False
    return compared(got, want, differ.any(1), outcome.spill)


def measure(x: Array, got: Array, fmt: Format) -> tuple[float, Array]:
    """The largest error of a code as a share of its bound, and which blocks are wrong [N]."""
    blocks = got.view(fmt.block).reshape(-1)
    codes, x = blocks["qs"].astype(np.float64), x.astype(np.float64)
    with np.errstate(all="ignore"):
        at = np.abs(x).argmax(1)
        largest = x[np.arange(len(x)), at]
        if fmt.name == "q8_k":
            exact = -LARGEST * x / largest[:, None]
            wrong = np.abs(blocks["d"] * LARGEST + largest) > gamma(3) * np.abs(largest)
            wrong |= (blocks["bsums"] != blocks["qs"].reshape(len(x), 16, 16).sum(2)).any(1) & (largest != 0)
        else:
            exact = LARGEST * x / np.abs(largest)[:, None]
            step = np.abs(largest) / LARGEST
            wrong = ~_is_half_of(blocks["d"], step, 1)
        if fmt.name == "q8_1":
            wrong |= ~_is_half_of(blocks["s"], step * codes.sum(1), 2)
        share = np.abs(codes - exact) / (0.5 + gamma(3) * LARGEST)
    share[blocks["d"] == 0] = 0
    wrong |= ~(share <= 1).all(1)
    return float(np.nanmax(share, initial=0)), wrong


def _is_half_of(half: Array, exact: Array, roundings: int) -> Array:
    """Whether fp16 numbers are what exact values can be rounded to, after so many roundings to float32."""
    slack = np.abs(exact) * (HALF_UNIT + 2 * gamma(roundings)) + HALF_TINY
    overflowed = np.isinf(half) & (np.abs(exact) * (1 + gamma(roundings)) >= HALF_OVERFLOW)
    fits: Array = (np.abs(half - exact) <= slack) | overflowed & (np.sign(half) == np.sign(exact))
    return fits
