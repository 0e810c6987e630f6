"""REAP in torch, an implementation of its own: what the tests and the benchmark hold `reap score` to.

It runs transformers' own experts and router, every expert on every token as the released programs do, keeps to their
arithmetic (float32 softmax, batch means merged by counts) and knows nothing of ours.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


def run_all(moe: Any, x: Tensor) -> Tensor:
    """Every expert on every token: [E, T, D], by transformers' own weights."""
    halves = torch.einsum("td,eid->eti", x, moe.experts.gate_up_proj.data)
    gate, up = halves.chunk(2, dim=-1)
    return torch.einsum("eti,edi->etd", torch.nn.functional.silu(gate) * up, moe.experts.down_proj.data)


def choose(name: str, moe: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] and their weights [T, K], as the program of that name has them."""
    logits = torch.nn.functional.linear(x.float(), moe.gate.weight.float())
    k = config.num_experts_per_tok
    if name in ("llm-compressor", "model"):  # the model's own routing
        scores = logits.sigmoid()
        chosen = torch.topk(scores + moe.gate.e_score_correction_bias, k, dim=-1, sorted=True).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * config.routed_scaling_factor if name == "llm-compressor" else weights
    p = torch.softmax(logits, dim=1, dtype=torch.float32)
    chosen = torch.topk(logits, k, dim=-1).indices
    if name == "paper" or name == "cerebras-layerwise" or config.norm_topk_prob:
        p = p / p.gather(1, chosen).sum(dim=-1, keepdim=True)
        if name != "paper":
            p = p.clamp(min=EPSILON)
    return chosen, p.gather(1, chosen)


def observe(name: str, moe: Any, inputs: Iterable[Tensor], config: Any) -> dict[str, Tensor]:
    """The statistics of a layer, batch by batch, means merged by counts as the released observer does."""
    count = moe.experts.down_proj.shape[0]
    found = {key: torch.zeros(count, dtype=torch.float64) for key in (
        "frequency", "ean_sum", "weighted_ean_sum", "weighted_frequency_sum", "ean_mean", "reap",
        "max_activations", "max_abs",
    )}  # fmt: skip
    total = torch.zeros(count, config.hidden_size, dtype=torch.float64)
    for x in inputs:
        outputs = run_all(moe, x)
        chosen, weights = choose(name, moe, x, config)
        for e in range(count):
            mask = chosen == e
            routed = mask.any(dim=1)
            n = int(routed.sum())
            if n == 0:
                continue
            out, w = outputs[e, routed], (weights * mask).sum(dim=1)[routed]
            norms = torch.linalg.norm(out, dim=-1)
            before = found["frequency"][e].item()
            for key, mean in (("ean_mean", norms.mean()), ("reap", (norms * w).mean())):
                found[key][e] += (mean.double() - found[key][e]) * n / (before + n)
            found["frequency"][e] += n
            found["ean_sum"][e] += norms.double().sum()
            found["weighted_ean_sum"][e] += (norms * w).double().sum()
            found["weighted_frequency_sum"][e] += w.double().sum()
            found["max_activations"][e] = max(found["max_activations"][e], out.max().double())
            found["max_abs"][e] = max(found["max_abs"][e], out.abs().max().double())
            total[e] += out.double().sum(dim=0)
    found["ean_ca"] = torch.linalg.norm(total / found["frequency"].clamp(min=1)[:, None], dim=1)
    return found


@torch.no_grad()
def score(model: Any, tokens: Tensor, length: int, name: str) -> dict[int, dict[str, Tensor]]:
    """The statistics of every MoE layer, by transformers' own forward pass over sequences of so many tokens."""
    inputs: dict[int, list[Tensor]] = {
        n: [] for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")
    }

    def keep(n: int) -> Any:
        return lambda _, given: inputs[n].append(given[0].reshape(-1, given[0].shape[-1]))

    hooks = [model.model.layers[n].mlp.register_forward_pre_hook(keep(n)) for n in inputs]
    try:
        for sequence in tokens.split(length):
            model.model(sequence[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {n: observe(name, model.model.layers[n].mlp, inputs[n], model.config) for n in inputs}
