"""Mixture of experts: every token is sent to K of E small MLPs, and to one that all tokens share."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import FEW
from refimpl.engine import share, threads_worth
from refimpl.files.hparams import Hparams
from refimpl.model.config import Conventions
from refimpl.model.mlp import swiglu
from refimpl.model.tap import Tap, hears, silent
from refimpl.model.weights import Layer, linear

Array = NDArray[Any]


@dataclass(frozen=True)
class Routing:
    """What the router said.

    logits  : [T, E]
    probs   : [T, E], sigmoid(logits)
    chosen  : [T, K] int64, by descending choice score; equal scores: the lower index first
    weights : [T, K], what each chosen expert's output is multiplied by
    """

    logits: Array
    probs: Array
    chosen: Array
    weights: Array


def route(x: Array, w: Layer, hp: Hparams, conv: Conventions) -> Routing:  # [T, D] -> Routing
    """Choose K experts for every token; ties go to the lower index.

    p = sigmoid(router x), chosen = the K largest of p + bias, weight = p[chosen] / sum(p[chosen]) * 2.5

    The bias steers the choice alone. Experts come in groups, of which only the best topk_group take part (by the sum
    of their two best); GLM-5.1 has one group, where that changes nothing.
    """
    logits = linear(w["ffn_gate_inp"], x, conv)
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        probs = (1 / (1 + np.exp(-wide))).astype(x.dtype)
    choice = _mask_groups(probs + w.vector("exp_probs_b").astype(x.dtype), hp)
    chosen = np.argsort(-choice, axis=-1, kind="stable")[:, : hp.num_experts_per_tok]
    weights = np.take_along_axis(probs, chosen, axis=-1)
    weights = weights / _denominator(weights, conv)
    return Routing(logits, probs, chosen, weights * x.dtype.type(hp.routed_scaling_factor))


def _denominator(weights: Array, conv: Conventions) -> Array:  # [T, K] -> [T, 1]
    """The sum that the chosen weights are divided by, one term after the other."""
    total = np.zeros_like(weights[:, :1])
    for k in range(weights.shape[1]):
        total = total + weights[:, k : k + 1]
    if conv.denominator == "max(sum, 2^-14)":
        return np.maximum(total, total.dtype.type(2.0**-14))
    return total + total.dtype.type(1e-20) if conv.denominator == "sum + 1e-20" else total


def _mask_groups(choice: Array, hp: Hparams) -> Array:  # [T, E] -> [T, E]
    """Put -inf where an expert's group does not take part."""
    if hp.n_group == 1:
        return choice
    grouped = choice.reshape(len(choice), hp.n_group, -1)
    best = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    taking = np.argsort(-best, axis=-1, kind="stable")[:, : hp.topk_group]
    masked = np.full_like(grouped, -np.inf)
    np.put_along_axis(masked, taking[..., None], np.take_along_axis(grouped, taking[..., None], 1), 1)
    return masked.reshape(choice.shape)


def run_expert(e: int, x: Array, w: Layer, conv: Conventions, tap: Tap = silent) -> Array:  # [T, D] -> [T, D]
    """One routed expert's output, before its weight."""
    gate, up, down = (w.expert(f"ffn_{part}_exps", e) for part in ("gate", "up", "down"))
    return swiglu(x, gate, up, down, conv, tap)


def run_shared(x: Array, w: Layer, conv: Conventions, tap: Tap = silent) -> Array:  # [T, D] -> [T, D]
    """The shared expert's output."""
    return swiglu(x, w["ffn_gate_shexp"], w["ffn_up_shexp"], w["ffn_down_shexp"], conv, tap)


def run_chosen(
    x: Array, chosen: Array, w: Layer, conv: Conventions, tap: Tap = silent
) -> Array:  # [T, D], [T, K] -> [T, K, D]
    """The outputs of every token's experts; each expert runs once, on all tokens that chose it.

    For few tokens threads take whole experts: they part once instead of at each of 3 products of every expert.
    """
    out = np.empty((*chosen.shape, x.shape[1]), x.dtype)
    inner: dict[str, Array] = {}
    experts, jobs = np.unique(chosen), 1
    if tap is silent and len(chosen) < FEW and chosen.shape[1] > 1:
        size = w.expert("ffn_up_exps", int(experts[0])).shape[0] * x.size * chosen.shape[1] * 3
        jobs, conv = threads_worth(conv.jobs, size), replace(conv, jobs=1)

    def run(some: slice) -> None:
        for e in experts[some]:
            tokens, slots = np.nonzero(chosen == e)

            def keep(name: str, value: Array, at: tuple[Array, Array] = (tokens, slots)) -> Array:
                if not hears(tap, name.replace("ffn_", "ffn_moe_")):
                    return value
                inner.setdefault(name, np.empty((*chosen.shape, value.shape[1]), value.dtype))[at] = value
                return value

            out[tokens, slots] = run_expert(int(e), x[tokens], w, conv, silent if tap is silent else keep)

    share(run, len(experts), jobs)
    for name, value in inner.items():
        tap(name.replace("ffn_", "ffn_moe_"), value)
    return out


def combine(outputs: Array, routing: Routing, conv: Conventions) -> Array:  # [T, K, D] -> [T, D]
    """Add the weighted outputs, one expert after the other, in the engine's order."""
    order = np.argsort(routing.chosen, axis=-1) if conv.expert_sum == "index" else None
    total = np.zeros(outputs.shape[::2], outputs.dtype)
    tokens = np.arange(len(outputs))
    for k in range(outputs.shape[1]):
        slot = order[:, k] if order is not None else k
        total = total + outputs[tokens, slot] * routing.weights[tokens, slot][:, None]
    return total


def moe(x: Array, w: Layer, hp: Hparams, conv: Conventions, tap: Tap = silent) -> Array:  # [T, D] -> [T, D]
    """Routed experts, weighted, then the shared one."""
    routing = route(x, w, hp, conv)
    tap("ffn_moe_logits", routing.logits)
    tap("ffn_moe_probs", routing.probs)
    tap("ffn_moe_topk", routing.chosen)
    tap("ffn_moe_weights_scaled", routing.weights)
    outputs = tap("ffn_moe_down", run_chosen(x, routing.chosen, w, conv, tap))
    routed = tap("ffn_moe_out", combine(outputs, routing, conv))
    return routed + tap("ffn_shexp", run_shared(x, w, conv, tap))
