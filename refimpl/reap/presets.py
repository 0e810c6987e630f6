"""What is scored: the paper and the released programs disagree, so every choice between them is a switch.

    preset              weight of a chosen expert              chosen by    divided by the chosen ones' sum
    paper               softmax of all logits                  raw logits   yes
    cerebras            softmax of all logits, at least 2^-23  raw logits   where norm_topk_prob is true
    cerebras-layerwise  softmax of all logits, at least 2^-23  raw logits   yes
    llm-compressor      the model's own, factor included       the model    as the model does
    model               the model's own, without the factor    the model    as the model does

The model's own choice adds the selection bias and limits groups; its weight is a sigmoid. 2^-23 is float32's
epsilon, the floor of a weight that was divided; it applies where division takes place.
Source: arXiv 2510.13999; CerebrasResearch/reap 1970473, observer.py and pruning_metrics.py; llm-compressor
ab1ba3e, REAPPruningModifier.
"""

from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Usage

Array = NDArray[Any]
EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Preset:
    """How an expert's weight for a token is formed.

    router    : the function from logits to weights
    selection : top-k of the raw logits, or the model's own choice
    normalise : divide by the chosen experts' sum: always, never, or where the config says so
    floor     : least weight after that division
    scale     : multiply by routed_scaling_factor
    """

    name: str
    router: Literal["softmax", "sigmoid"]
    selection: Literal["logits", "model"]
    normalise: Literal["always", "config", "never"]
    floor: float = 0.0
    scale: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


presets = MappingProxyType(
    {
        p.name: p
        for p in (
            Preset("paper", "softmax", "logits", "always"),
            Preset("cerebras", "softmax", "logits", "config", EPSILON),
            Preset("cerebras-layerwise", "softmax", "logits", "always", EPSILON),
            Preset("llm-compressor", "sigmoid", "model", "config", scale=True),
            Preset("model", "sigmoid", "model", "config"),
        )
    }
)


def find_preset(name: str, **switches: Any) -> Preset:
    """The preset of that name, with single switches set otherwise (its name then says which).

    Raises Usage for an unknown name or value.
    """
    if name not in presets:
        raise Usage(f"unknown preset {name!r}; there is {', '.join(presets)}")
    preset, legal = presets[name], {
        "router": ("softmax", "sigmoid"), "selection": ("logits", "model"), "normalise": ("always", "config", "never")
    }  # fmt: skip
    changed = {k: v for k, v in switches.items() if v is not None and v != getattr(preset, k)}
    for key, value in changed.items():
        if key in legal and value not in legal[key]:
            raise Usage(f"{key} is one of {', '.join(legal[key])}, not {value!r}")
    if "floor" in changed and not 0 <= changed["floor"] < 1:
        raise Usage(f"a floor lies in 0..1, not at {changed['floor']}")
    if changed:
        suffix = ",".join(f"{k}={v}" for k, v in sorted(changed.items()))
        preset = replace(preset, name=f"{name}:{suffix}", **changed)
    return preset


@dataclass(frozen=True)
class Router:
    """What of a model's configuration scoring depends on."""

    top_k: int
    norm_topk_prob: bool = True
    scaling_factor: float = 1.0


def weigh(logits: Array, chosen: Array, router: Router, preset: Preset) -> tuple[Array, Array]:
    """Choose experts as the preset does, and weigh them.

    logits : [T, E] float32, of the router, without the bias
    chosen : [T, K] int, the model's own choice
    return : chosen [T, K] int64, weights [T, K] float64

    Rounds: float64 throughout; the released programs weigh in float32, which differs by some 1e-7.
    """
    wide = logits.astype(np.float64)
    if preset.selection == "logits":
        chosen = np.argsort(-wide, axis=-1, kind="stable")[:, : router.top_k]
    chosen = chosen.astype(np.int64)
    if preset.router == "softmax":
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        scores = powers / powers.sum(axis=-1, keepdims=True)
    else:
        with np.errstate(over="ignore"):
            scores = 1 / (1 + np.exp(-wide))
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if preset.normalise == "always" or (preset.normalise == "config" and router.norm_topk_prob):
        weights = np.maximum(weights / weights.sum(axis=-1, keepdims=True), preset.floor)
    return chosen, weights * router.scaling_factor if preset.scale else weights
