"""The statistics of one layer's experts, from which every criterion follows.

Over the tokens x that are routed to expert j, with f = its output before any weight and g = its weight:

    frequency                count                        weighted_frequency_sum   sum g
    ean_sum                  sum |f|                      ean_mean                 mean |f|
    weighted_ean_sum         sum g |f|                    reap                     mean g |f|
    max_activations          largest entry of f, or 0     max_abs                  largest |entry| of f
    ean_ca                   | mean f |

|f| is the Euclidean norm. An expert that no token reached has 0 everywhere. Sums of squares are kept for
standard errors, and the sum of f for ean_ca, so that the statistics of two runs merge by addition.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SUMS = (
    "ean_sum",
    "ean_squares",
    "weighted_frequency_sum",
    "weighted_ean_sum",
    "weighted_ean_squares",
)
CRITERIA = MappingProxyType(
    {
        "reap": "mean of weight times norm",
        "frequency": "tokens routed",
        "ean_sum": "sum of norms",
        "ean_mean": "mean of norms",
        "weighted_ean_sum": "sum of weight times norm",
        "weighted_frequency_sum": "sum of weights",
        "max_activations": "largest entry, signed",
        "max_abs": "largest entry in size",
        "ean_ca": "norm of the mean output",
    }
)


class Saliency:
    """The running statistics of one layer.

    tokens : how many tokens the layer saw
    sums   : {name: [E] float64}, frequency [E] int64, the maxima [E] float32, characteristic_sum [E, D] float64
    """

    def __init__(self, experts: int, width: int) -> None:
        self.tokens = 0
        self.sums: dict[str, Array] = {name: np.zeros(experts) for name in SUMS}
        self.sums["frequency"] = np.zeros(experts, np.int64)
        self.sums["max_activations"] = np.zeros(experts, np.float32)
        self.sums["max_abs"] = np.zeros(experts, np.float32)
        self.sums["characteristic_sum"] = np.zeros((experts, width))

    def add(self, expert: int, outputs: Array, weights: Array) -> None:
        """Add the tokens of one expert. outputs : [t, D] float32, before any weight; weights : [t] float64."""
        if not len(outputs):
            return
        wide = outputs.astype(np.float64)
        norms = np.sqrt(np.einsum("td,td->t", wide, wide))
        sums, weighted = self.sums, weights * norms
        sums["frequency"][expert] += len(outputs)
        sums["ean_sum"][expert] += norms.sum()
        sums["ean_squares"][expert] += (norms * norms).sum()
        sums["weighted_frequency_sum"][expert] += weights.sum()
        sums["weighted_ean_sum"][expert] += weighted.sum()
        sums["weighted_ean_squares"][expert] += (weighted * weighted).sum()
        for name, entry in (("max_activations", outputs.max()), ("max_abs", np.abs(outputs).max())):
            sums[name][expert] = max(sums[name][expert], entry)
        sums["characteristic_sum"][expert] += wide.sum(axis=0)

    def merge(self, other: "Saliency") -> None:
        """Add what another run saw."""
        self.tokens += other.tokens
        for name, mine in self.sums.items():
            if name.startswith("max_"):
                np.maximum(mine, other.sums[name], out=mine)
            else:
                mine += other.sums[name]


def derive(sums: Mapping[str, Array]) -> dict[str, Array]:
    """Compute the means of a layer, [E] float64 each; 0 for an expert without a token."""
    count = sums["frequency"]
    least = np.maximum(count, 1)
    return {
        "reap": sums["weighted_ean_sum"] / least,
        "ean_mean": sums["ean_sum"] / least,
        "ean_ca": np.sqrt((np.square(sums["characteristic_sum"] / least[:, None])).sum(axis=1)),
    }
