"""Traces of transformers and llama.cpp: each operation lies within its bound, on float and on quantized files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import GlmMoeDsaForCausalLM

import refimpl
from refimpl.crosscheck.compare import compare
from refimpl.crosscheck.trace import Trace, read_trace
from tests import float_gguf
from tools.llama_run import Llama

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
IDS = np.random.default_rng(1).integers(0, 1256, 100).tolist()


def record_hooks(model, ids):
    """The README's recipe: every module's output by its name."""
    kept = {}

    def hook(name):
        def keep(module, inputs, output):
            for i, value in enumerate(output if isinstance(output, tuple) else [output]):
                if isinstance(value, torch.Tensor) and value.ndim < 4:
                    kept.setdefault(f"{name}.{i}" if i else name, value.detach().contiguous().float().numpy())

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def test_transformers_computes_within_the_bounds(tmp_path):
    model = GlmMoeDsaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    save_file(record_hooks(model, IDS), tmp_path / "hf.safetensors")
    ours = refimpl.load(TINY, engine="transformers")
    theirs = read_trace(tmp_path / "hf.safetensors")
    found = compare(Trace("ours", ours.trace(IDS)), theirs, ours)
    judged = [row for row in found.rows if row.ratio is not None]
    assert found.passed, found.first
    assert len(judged) + 6 == len(found.rows) and {
        "qr",
        "attn_norm",
        "ffn_moe_logits",
        "ffn_moe_weights_scaled",
        "ffn_moe_out",
    } <= {row.name for row in judged}
    assert not any(row.flips for row in found.rows) and max(row.deviation or 0 for row in judged) < 1e-5
    # must fail: with the config's eps in the latents' norms transformers is out of its bound, right there
    found = compare(theirs, theirs, refimpl.load(TINY, engine="transformers", latent_eps=1e-5))
    assert found.first.name in ("qr", "kv_cmpr")


@pytest.mark.parametrize("file", ["f32", "stock", "protected"])
def test_llama_cpp_computes_within_the_bounds(tmp_path, file):
    path = TINY / f"{file}.gguf"
    if file == "f32":
        path = float_gguf.write(tmp_path / "f32.gguf", TINY)
    llama = Llama(path, watch=True)
    llama.decode(IDS)
    dump = {f"{i:04}.{name}": value for i, (name, value) in enumerate(llama.seen)}
    llama.close()
    save_file(dump, tmp_path / "l.safetensors")
    theirs, ours = read_trace(tmp_path / "l.safetensors"), refimpl.load(path, engine="llama.cpp", kv="f32")
    found = compare(Trace("ours", ours.trace(IDS)), theirs, ours)
    assert found.passed, found.first
    assert sum(row.ratio is not None for row in found.rows) > 75
    assert all(row.wrong == 0 for row in found.rows if row.name in ("top_k", "ffn_moe_topk"))
    # must fail: had llama.cpp rounded its inputs otherwise, or normed with another eps, it would be seen
    other = {"latent_eps": 1e-6} if file == "f32" else {"activations": "float"}
    assert not compare(theirs, theirs, refimpl.load(path, engine="llama.cpp", kv="f32", **other)).passed
