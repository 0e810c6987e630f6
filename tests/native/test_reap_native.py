"""Every preset against an implementation of its own in torch, on the trained tiny model.

The oracle runs transformers' own experts and router on the inputs that each MoE block received, keeps to the
released programs' arithmetic (float32 softmax, batch means merged by counts) and knows nothing of ours.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GlmMoeDsaForCausalLM

import refimpl
from refimpl.reap import state
from refimpl.reap.presets import find_preset, presets
from refimpl.reap.saliency import derive
from refimpl.reap.score import Text, score

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
LENGTH, COUNT = 96, 192
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def tokens():
    from tokenizers import Tokenizer

    text = (TINY / "held-out-code.txt").read_text(encoding="utf-8")
    return np.array(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids[:COUNT])


@pytest.fixture(scope="module")
def batches(tokens):
    """{layer: [input of the MoE block, one per sequence]}"""
    m, found = refimpl.load(TINY), {1: [], 2: []}
    for start in range(0, COUNT, LENGTH):
        seen = m.trace(tokens[start : start + LENGTH])
        for layer, inputs in found.items():
            inputs.append(torch.from_numpy(seen[f"ffn_norm-{layer}"]))
    return found


@pytest.fixture(scope="module")
def experts():
    """{layer: transformers' MoE block}"""
    model = GlmMoeDsaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return {layer: model.model.layers[layer].mlp for layer in (1, 2)}


def run_all(moe, x):
    """Every expert on every token: [E, T, D], by transformers' own weights."""
    halves = torch.einsum("td,eid->eti", x, moe.experts.gate_up_proj.data)
    gate, up = halves.chunk(2, dim=-1)
    return torch.einsum("eti,edi->etd", torch.nn.functional.silu(gate) * up, moe.experts.down_proj.data)


def choose(name, moe, x, config):
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


def observe(name, moe, inputs, config):
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


@pytest.mark.parametrize("name", presets)
@torch.no_grad()
def test_each_preset_equals_its_oracle(name, tokens, batches, experts, tmp_path):
    score(TINY, [Text("code", tokens)], tmp_path / "s.safetensors", find_preset(name), LENGTH)
    _, layers = state.load(tmp_path / "s.safetensors")
    config = GlmMoeDsaForCausalLM.config_class.from_pretrained(TINY)
    for layer, saliency in layers.items():
        ours = saliency.sums | derive(saliency.sums)
        want = observe(name, experts[layer], batches[layer], config)
        for key, values in want.items():
            np.testing.assert_allclose(ours[key], values.numpy(), rtol=1e-6, err_msg=f"{name} {layer} {key}")


@torch.no_grad()
def test_the_oracle_tells_presets_apart(batches, experts):
    config = GlmMoeDsaForCausalLM.config_class.from_pretrained(TINY)
    scores = {name: observe(name, experts[1], batches[1], config)["reap"] for name in presets}
    for one, other in (("paper", "model"), ("model", "llm-compressor")):
        assert not torch.allclose(scores[one], scores[other], rtol=1e-3)
