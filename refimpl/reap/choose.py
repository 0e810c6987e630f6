"""From saved statistics to a list of kept experts: the document that `reap select` writes."""

import os
from dataclasses import asdict
from typing import Any

from refimpl import __version__
from refimpl.errors import BadFile, Usage
from refimpl.files.safetensors import parse_json
from refimpl.files.source import LocalFile
from refimpl.reap import state
from refimpl.reap.saliency import CRITERIA, derive
from refimpl.reap.select import Lists, count_kept, find_cuts, find_super_experts, select

PathLike = str | os.PathLike[str]


def choose(
    path: PathLike,
    criterion: str = "reap",
    keep: int | None = None,
    ratio: float | None = None,
    scope: str = "layer",
    min_per_layer: int | None = None,
    preserve: str | None = None,
    groups: int = 1,
) -> dict[str, Any]:
    """Select experts by saved statistics (select.select has the rules); returns the document.

    preserve : "super" or "outliers" (experts of extreme activations in the first three quarters of the layers,
               or in all), or the path of a JSON object {layer: [experts]}
    """
    if criterion not in CRITERIA:
        raise Usage(f"unknown criterion {criterion!r}; there is {', '.join(CRITERIA)}")
    run, layers = state.load(path)
    scores = {layer: (s.sums | derive(s.sums))[criterion] for layer, s in layers.items()}
    count = count_kept(run.model.experts, keep, ratio)
    always = _read_preserved(preserve, {layer: s.sums["max_activations"] for layer, s in layers.items()})
    kept = select(scores, count, run.model.top_k, scope, min_per_layer, always, groups)
    unseen = {layer: [e for e in kept[layer] if s.sums["frequency"][e] == 0] for layer, s in layers.items()}
    return {
        "refimpl": __version__,
        "model": asdict(run.model) | {"layers": list(run.model.layers)},
        "criterion": criterion,
        "preset": run.preset,
        "data": list(run.data),
        "scope": scope,
        "groups": groups,
        "preserved": {str(layer): experts for layer, experts in always.items() if experts},
        "kept": {str(layer): experts for layer, experts in kept.items()},
        "cuts": [asdict(cut) | {"near_tie": cut.near_tie} for cut in find_cuts(scores, kept, always)],
        "kept_but_never_routed": {str(layer): experts for layer, experts in unseen.items() if experts},
    }


def _read_preserved(preserve: str | None, maxima: dict[int, Any]) -> Lists:
    if preserve is None:
        return {}
    if preserve in ("super", "outliers"):
        return find_super_experts(maxima, 0.75 if preserve == "super" else 1.0)
    file = LocalFile(preserve)
    try:
        document = parse_json(file.path, file.read(0, file.size))
    finally:
        file.close()
    try:
        lists = {int(layer): [int(e) for e in experts] for layer, experts in document.items()}
    except (TypeError, ValueError):
        raise BadFile(preserve, 0, "not an object {layer: [experts]}") from None
    return lists
