"""How well a model predicts a text, as llama-perplexity counts it, and how far it is from a base model.

The text is cut into pieces of n_ctx tokens that do not overlap; in each, the second half is predicted (the first half
is context). nll[i] = -log softmax(logits)[next token], in float64.

    perplexity = exp(mean nll), its standard error = perplexity * sqrt((mean nll^2 - (mean nll)^2) / (count - 1))
    KL         = sum over tokens of p_base * (log p_base - log p), one number a position

Source: tools/perplexity/perplexity.cpp, llama.cpp 0c1e570.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Usage
from refimpl.model.glm import Glm

Array = NDArray[Any]


@dataclass
class Scores:
    """What was measured at every predicted position.

    nll : [P] float64; base_nll, kl : [P] and same_top : [P] bool, empty without a base
    """

    nll: Array
    base_nll: Array
    kl: Array
    same_top: Array

    def to_json(self) -> dict[str, Any]:
        """The figures, each with its standard error where it has one."""
        found: dict[str, Any] = {"tokens": len(self.nll), **_perplexity(self.nll)}
        if len(self.kl):
            base = _perplexity(self.base_nll)
            agree = float(self.same_top.mean())
            found |= {
                "base": base,
                "kl": {
                    "mean": float(self.kl.mean()), "error": _error(self.kl), "median": float(np.median(self.kl)),
                    "p99": float(np.quantile(self.kl, 0.99)), "max": float(self.kl.max()),
                },
                "top1": {"share": agree, "error": (agree * (1 - agree) / (len(self.kl) - 1)) ** 0.5},
            }  # fmt: skip
        return found


def _perplexity(nll: Array) -> dict[str, float]:
    value = float(np.exp(nll.mean()))
    return {
        "perplexity": value,
        "error": value * _error(nll),
        "bits_per_token": float(nll.mean() / np.log(2)),
    }


def _error(x: Array) -> float:
    """Standard error of the mean."""
    spread = float((x**2).mean() - x.mean() ** 2)
    return (max(spread, 0.0) / (len(x) - 1)) ** 0.5


def log_softmax(logits: Array) -> Array:  # [T, V] -> [T, V] float64
    """Logarithms of the probabilities."""
    x = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def score_pieces(model: Glm, tokens: Sequence[int], n_ctx: int, base: Glm | None = None) -> Iterator[Scores]:
    """Score one piece of the text after the other. Raises Usage where there is not one whole piece."""
    pieces, first = len(tokens) // n_ctx, n_ctx // 2
    if n_ctx < 4 or not pieces:
        raise Usage(
            f"{len(tokens):,} tokens do not fill one piece of {n_ctx:,}; pieces of 4 tokens are the least"
        )
    for i in range(pieces):
        ids = np.asarray(tokens[i * n_ctx : (i + 1) * n_ctx])
        rows, after = slice(first, n_ctx - 1), ids[first + 1 :, None]
        p = log_softmax(model.logits(ids)[rows])
        nll = -np.take_along_axis(p, after, 1)[:, 0]
        if base is None:
            yield Scores(nll, *(np.empty(0) for _ in range(3)))
            continue
        q = log_softmax(base.logits(ids)[rows])
        kl = (np.exp(q) * (q - p)).sum(axis=1)
        yield Scores(nll, -np.take_along_axis(q, after, 1)[:, 0], kl, p.argmax(1) == q.argmax(1))


def join(parts: Sequence[Scores]) -> Scores:
    """The scores of all pieces together."""
    names = ("nll", "base_nll", "kl", "same_top")
    return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
