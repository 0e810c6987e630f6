"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, then one draw.

The order is that of transformers, whose generation_config GLM-5.1 is published with: temperature 1, top-p 0.95.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Usage

Array = NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    temperature : logits are divided by it; 0 takes the likeliest (of equals the lowest id)
    top_k       : only so many of the likeliest, 0: all
    top_p       : the fewest of the likeliest whose probabilities reach this sum
    min_p       : only those at least this share as likely as the likeliest
    penalty     : logits of tokens that occurred are divided (positive) or multiplied (negative) by it
    seed        : of the draws; the same seed gives the same text
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0, 100), ("top_k", 0, 1 << 24), ("top_p", 0, 1), ("min_p", 0, 1), ("penalty", 0.01, 100),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise Usage(f"{name} must be {least} to {most}, not {getattr(self, name)}")


def distribution(logits: Array, seen: Sequence[int], how: Sampling) -> Array:  # [V] -> [V] float64
    """The probabilities that the next token is drawn with."""
    x = logits.astype(np.float64)
    if how.penalty != 1 and len(seen):
        ids = np.unique(np.asarray(seen, np.int64))
        x[ids] = np.where(x[ids] > 0, x[ids] / how.penalty, x[ids] * how.penalty)
    if how.temperature == 0:
        return np.eye(1, len(x), int(x.argmax()))[0]
    p = _normalise(np.exp((x - x.max()) / how.temperature))
    ranked = np.argsort(-p, kind="stable")
    if how.top_k:
        p[ranked[how.top_k :]] = 0
        p = _normalise(p)
    if how.top_p < 1:
        before = np.cumsum(p[ranked]) - p[ranked]
        p[ranked[1:][before[1:] >= how.top_p]] = 0  # the likeliest always stays
        p = _normalise(p)
    p[p < how.min_p * p.max()] = 0
    return _normalise(p)


def _normalise(p: Array) -> Array:
    return np.asarray(p / p.sum())


def draw(p: Array, random: np.random.Generator) -> int:  # [V] -> id
    """One token, by one uniform number."""
    sums = np.cumsum(p)
    return int(np.searchsorted(sums, random.random() * sums[-1], side="right"))
