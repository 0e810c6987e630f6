"""Which experts to keep: the highest scores, as many in every layer, or by one ranking over all layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Usage

Scores = Mapping[int, NDArray[Any]]  # layer -> [E]
Lists = dict[int, list[int]]  # layer -> experts, ascending
NEAR = 0.01  # a cut whose two sides differ by less than this share is a near-tie


@dataclass(frozen=True)
class Cut:
    """Where a layer's ranking was cut.

    kept, pruned : the expert of the lowest score that stays, and of the highest that goes (None: none)
    margin       : their scores' difference over the greater one, 0..1
    """

    layer: int
    kept: int
    pruned: int | None
    margin: float

    @property
    def near_tie(self) -> bool:
        return self.pruned is not None and self.margin < NEAR


def count_kept(experts: int, keep: int | None, ratio: float | None) -> int:
    """How many experts stay: `keep` itself, or experts - floor(experts * ratio)."""
    if (keep is None) == (ratio is None):
        raise Usage("say either how many experts to keep or which ratio to prune")
    if ratio is not None:
        if not 0 <= ratio < 1:
            raise Usage(f"a ratio lies in 0..1, not at {ratio}")
        return experts - int(experts * ratio)
    assert keep is not None
    return keep


def select(
    scores: Scores,
    keep: int,
    top_k: int = 1,
    scope: str = "layer",
    min_per_layer: int | None = None,
    preserve: Mapping[int, list[int]] | None = None,
    groups: int = 1,
) -> Lists:
    """Keep the experts of the highest scores; of equal ones the lower index stays.

    scores        : {layer: [E]}
    keep          : experts per layer, with scope "global" their mean
    scope         : "layer", or "global": one ranking of scores divided by their layer's sum
    min_per_layer : with scope "global" the least a layer keeps (top_k where not given)
    preserve      : experts that stay whatever their score
    groups        : each of so many equal groups keeps the same number

    Raises Usage where that cannot be: keep below top_k or above E, more preserved than kept, groups that do
    not divide.
    """
    preserve = {layer: sorted(set(kept)) for layer, kept in (preserve or {}).items()}
    least = top_k if min_per_layer is None else min_per_layer
    _check(scores, keep, top_k, least, preserve, groups)
    if scope == "global":
        if groups > 1:
            raise Usage("one ranking over all layers knows no groups")
        return _rank_all(scores, keep, least, preserve)
    if scope != "layer":
        raise Usage(f"scope is layer or global, not {scope!r}")
    kept = {}
    for layer, values in scores.items():
        size, quota, found = len(values) // groups, keep // groups, []
        for group in range(groups):
            part = range(group * size, (group + 1) * size)
            always = set(preserve.get(layer, [])) & set(part)
            if len(always) > quota:
                raise Usage(f"layer {layer}: {len(always)} experts are preserved, {quota} can stay")
            order = sorted(part, key=lambda e: (e not in always, -values[e], e))
            found += order[:quota]
        kept[layer] = sorted(found)
    return kept


def _check(
    scores: Scores, keep: int, top_k: int, least: int, preserve: Mapping[int, list[int]], groups: int
) -> None:
    for layer, values in scores.items():
        if not np.isfinite(values).all():
            raise Usage(f"layer {layer} has scores that are not finite")
        if not top_k <= keep <= len(values):
            raise Usage(f"{keep} experts cannot stay: there are {len(values)}, and a token needs {top_k}")
        if groups < 1 or len(values) % groups or keep % groups:
            raise Usage(
                f"{len(values)} experts, {keep} of them kept, do not split into {groups} equal groups"
            )
        if any(not 0 <= e < len(values) for e in preserve.get(layer, [])):
            raise Usage(f"layer {layer} has experts 0 to {len(values) - 1}; others cannot be preserved")
    if not top_k <= least <= keep:
        raise Usage(f"the least a layer keeps lies between {top_k} and {keep}, not at {least}")
    if strangers := sorted(set(preserve) - set(scores)):
        raise Usage(f"layers {strangers} to preserve experts of were not scored")


def _rank_all(scores: Scores, keep: int, least: int, preserve: Mapping[int, list[int]]) -> Lists:
    """Prune the lowest normalised scores of all layers, while a layer keeps its least."""
    total = {layer: float(values.sum()) or 1.0 for layer, values in scores.items()}
    order = sorted(
        (float(values[e]) / total[layer], -layer, -e)
        for layer, values in scores.items()
        for e in range(len(values))
        if e not in preserve.get(layer, [])
    )
    kept = {layer: set(range(len(values))) for layer, values in scores.items()}
    left = sum(len(values) - keep for values in scores.values())
    for _, layer, e in order:
        if left and len(kept[-layer]) > least:
            kept[-layer].remove(-e)
            left -= 1
    if left:
        raise Usage(f"{left} experts more should go, but they are preserved or their layers' last {least}")
    return {layer: sorted(chosen) for layer, chosen in kept.items()}


def find_cuts(scores: Scores, kept: Lists, preserve: Mapping[int, list[int]] | None = None) -> list[Cut]:
    """Where each layer's ranking was cut, and by how much."""
    cuts = []
    for layer, values in scores.items():
        free = [e for e in kept[layer] if e not in (preserve or {}).get(layer, [])]
        gone = sorted(set(range(len(values))) - set(kept[layer]), key=lambda e: (-values[e], e))
        lowest = min(free or kept[layer], key=lambda e: (values[e], -e))
        if not gone:
            cuts.append(Cut(layer, lowest, None, 1.0))
            continue
        high = max(abs(float(values[lowest])), abs(float(values[gone[0]])))
        margin = 0.0 if high == 0 else max(0.0, float(values[lowest] - values[gone[0]])) / high
        cuts.append(Cut(layer, lowest, gone[0], margin))
    return cuts


def are_nested(cuts: list[Lists]) -> bool:
    """Is each selection, from few experts to many, part of the next?"""
    return all(set(a[layer]) <= set(b[layer]) for a, b in pairwise(cuts) for layer in a)


def find_super_experts(maxima: Scores, layers: float = 0.75) -> Lists:
    """Experts with extreme activations: above the 99.5th percentile of all and a tenth of the greatest.

    maxima : {layer: [E]}, the largest entry of each expert's output
    layers : share of the MoE layers, from the first on, in which they count ("outliers": 1.0)
    """
    every = np.concatenate([np.asarray(values, np.float64) for values in maxima.values()])
    bar = max(float(np.quantile(every, 0.995)), float(every.max()) / 10)
    counted = sorted(maxima)[: int(len(maxima) * layers)]
    return {layer: np.flatnonzero(np.asarray(maxima[layer]) > bar).tolist() for layer in counted}
