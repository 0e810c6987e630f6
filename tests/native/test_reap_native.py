"""Every preset against an implementation of its own in torch, on the trained tiny model.

The oracle (tools/reap_torch.py) sees the inputs that each MoE block received here.
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
from tools.reap_torch import observe

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
LENGTH, COUNT = 96, 192


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
