"""How a kept set compares with what a criterion would have kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from refimpl.reap.saliency import CRITERIA, Saliency, derive
from refimpl.reap.select import Lists, select


@dataclass(frozen=True)
class Layer:
    """One layer under one criterion.

    lost    : share of the layer's scores that the pruned experts had
    overlap : share of the kept experts that the criterion would have kept too
    regret  : how much less score was kept than could be, as a share of the latter
    tau     : Kendall's tau-b between score and being kept; None where one of the two does not vary
    """

    layer: int
    lost: float
    overlap: float
    regret: float
    tau: float | None


@dataclass(frozen=True)
class Comparison:
    """All layers under one criterion. same : the kept set is exactly the criterion's."""

    criterion: str
    same: bool
    overlap: float
    regret: float
    lost: float
    layers: list[Layer]


def compare_choice(kept: Lists, layers: Mapping[int, Saliency]) -> list[Comparison]:
    """Hold a kept set against every criterion, the closest first."""
    found = []
    for criterion in CRITERIA:
        rows = []
        for layer, saliency in layers.items():
            experts = sorted({e for e in kept.get(layer, []) if e >= 0})
            if experts:
                rows.append(_compare(layer, experts, (saliency.sums | derive(saliency.sums))[criterion]))
        if rows:
            same = all(row.overlap == 1 for row in rows)
            overlap, regret, lost = (
                float(np.mean([getattr(row, key) for row in rows])) for key in ("overlap", "regret", "lost")
            )
            found.append(Comparison(criterion, same, overlap, regret, lost, rows))
    return sorted(found, key=lambda one: (-one.overlap, one.regret))


def _compare(layer: int, experts: list[int], scores: Any) -> Layer:
    values = np.asarray(scores, np.float64)
    best = select({layer: values}, len(experts))[layer]
    total, top, held = values.sum(), values[best].sum(), values[experts].sum()
    inside = np.isin(np.arange(len(values)), experts)
    tau = float(stats.kendalltau(values, inside).statistic)
    return Layer(
        layer,
        float(1 - held / total) if total else 0.0,
        len(set(best) & set(experts)) / len(experts),
        float(1 - held / top) if top else 0.0,
        None if np.isnan(tau) else tau,
    )
