"""GLM-5.1 against transformers in float32: logits to 2e-6 of the largest, on the trained model and on random ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GlmMoeDsaForCausalLM

import refimpl
from refimpl.model import perplexity
from refimpl.reap.statistics import wilson
from tests import float_gguf, tiny_checkpoint
from tools.llama_run import Llama

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
BOUND = 2e-6
SHAPES = {
    "three layers": {},
    "twelve experts": {"n_routed_experts": 12},
    "one layer": {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]},
    "six layers": {"num_hidden_layers": 6, "mlp_layer_types": ["dense"] + 5 * ["sparse"]},
    "an MTP layer, that transformers leaves out": {"num_nextn_predict_layers": 1},
    "layers that share an indexer": {
        "num_hidden_layers": 6, "mlp_layer_types": ["dense"] + 5 * ["sparse"],
        "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
    },
    "four groups of experts, two of which take part": {"n_group": 4, "topk_group": 2},
}  # fmt: skip


def theirs(folder, ids):
    model = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def deviation(got, want):
    """The largest difference of each row, as a share of the largest logit."""
    return np.abs(got.astype(np.float64) - want).max(axis=1) / np.abs(want).max()


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("kind", ["text", "code"])
def test_logits_of_the_trained_model_are_those_of_transformers(kind, attention):
    ids = [1258, 1260, *np.random.default_rng(len(kind)).integers(0, 1256, 198).tolist()]
    if kind == "text":
        ids = refimpl_tokens(200)
    model = refimpl.load(TINY, engine="transformers", attention=attention)
    off = deviation(model.logits(ids), theirs(TINY, ids))
    assert len(ids) > model.hp.index_topk
    assert off.max() <= BOUND


def refimpl_tokens(count):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = (TINY / "held-out-text.txt").read_text(encoding="utf-8")[:4000]
    return tokenizer.encode(text, add_special_tokens=False)[:count]


def tie_free(model, ids):
    """How many leading tokens have no tie at the edge of a selection, in any layer."""
    trace = model.trace(ids)
    count = len(ids)
    for name, scores in trace.items():
        if name.startswith("indexer_score"):
            for t, row in enumerate(scores):
                ranked = np.sort(row[: t + 1])[::-1]
                if len(ranked) > model.hp.index_topk and np.isclose(
                    *ranked[model.hp.index_topk - 1 :][:2], rtol=1e-5
                ):
                    count = min(count, t)
    return count


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_random_models_are_those_of_transformers(tmp_path, shape):
    config = tiny_checkpoint.SOUND | SHAPES[shape]
    weights = tiny_checkpoint.scale(tiny_checkpoint.draw_weights(config, seed=7), config)
    tiny_checkpoint.write_checkpoint(tmp_path, config, weights)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 60).tolist()
    model = refimpl.load(tmp_path, engine="transformers")
    rows = tie_free(model, ids)
    assert rows > 2 * config["index_topk"]
    off = deviation(model.logits(ids), theirs(tmp_path, ids))[:rows]
    assert off.max() <= BOUND


def test_the_indexer_matters_here():
    """Must-fail control: without the selection the trained model's logits are far off."""
    ids = refimpl_tokens(200)
    off = deviation(refimpl.load(TINY, engine="transformers", dense=True).logits(ids), theirs(TINY, ids))
    assert off[:64].max() <= BOUND
    assert off[64:].max() > 1000 * BOUND


LLAMA = {"engine": "llama.cpp", "kv": "f32", "activations": "float"}


@pytest.mark.parametrize("steps", [False, True], ids=["one batch", "token by token"])
def test_logits_of_the_trained_model_are_those_of_llama_cpp(tmp_path, steps):
    file = float_gguf.write(tmp_path / "f32.gguf", TINY)
    ids = np.random.default_rng(1).integers(0, 1256, 150).tolist()
    llama = Llama(file)
    want = np.concatenate([llama.decode([t]) for t in ids]) if steps else llama.decode(ids)
    llama.close()
    for path in (file, TINY):
        assert deviation(refimpl.load(path, **LLAMA).logits(ids), want).max() <= BOUND


@pytest.mark.parametrize("shape", [name for name in SHAPES if "groups" not in name])
def test_logits_of_random_models_are_those_of_llama_cpp(tmp_path, shape):
    config = (
        tiny_checkpoint.SOUND
        | SHAPES[shape]
        | {"index_head_dim": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64}
    )
    tiny_checkpoint.write_checkpoint(
        tmp_path, config, tiny_checkpoint.scale(tiny_checkpoint.draw_weights(config, seed=7), config)
    )
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 60).tolist()
    llama = Llama(float_gguf.write(tmp_path / "f32.gguf", tmp_path), context=64)
    want = llama.decode(ids)
    llama.close()
    model = refimpl.load(tmp_path, **LLAMA)
    rows = tie_free(model, ids)
    assert rows > 2 * config["index_topk"]
    assert deviation(model.logits(ids), want)[:rows].max() <= BOUND


def test_llama_cpp_norms_the_latents_with_the_configs_eps():
    """Must-fail control: transformers' 1e-6 there is seen."""
    ids = np.random.default_rng(1).integers(0, 1256, 40).tolist()
    one, two = (refimpl.load(TINY, **LLAMA, latent_eps=eps).logits(ids) for eps in (None, 1e-6))
    assert deviation(one, two).max() > BOUND


@torch.no_grad()
def test_the_mtp_block_is_what_transformers_modules_make_of_it(tmp_path):
    config = tiny_checkpoint.SOUND | {"num_nextn_predict_layers": 1, "index_topk": 64}
    weights = tiny_checkpoint.scale(tiny_checkpoint.draw_weights(config, seed=7), config)
    tiny_checkpoint.write_checkpoint(tmp_path, config, weights)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 40)
    model = GlmMoeDsaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    hidden = model.model(input_ids=torch.tensor([ids.tolist()]), use_cache=False).last_hidden_state
    at = "model.layers.3."
    w = {k.removeprefix(at): torch.tensor(v) for k, v in weights.items() if k.startswith(at)}

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config["rms_norm_eps"])

    e, h = (
        norm(model.model.embed_tokens(torch.tensor([ids[1:].tolist()])), "enorm"),
        norm(hidden[:, :-1], "hnorm"),
    )
    x = torch.cat([e, h], -1) @ w["eh_proj.weight"].T
    layer = model.model.layers[2]  # a sparse layer, given the MTP block's weights
    for part in ("gate", "up", "down"):
        w[part] = torch.stack([w.pop(f"mlp.experts.{n}.{part}_proj.weight") for n in range(16)])
    w["mlp.experts.gate_up_proj"] = torch.cat([w.pop("gate"), w.pop("up")], 1)
    w["mlp.experts.down_proj"] = w.pop("down")
    layer.load_state_dict({k: v for k, v in w.items() if k in layer.state_dict()}, strict=True)
    positions = torch.arange(39)[None]
    mask = torch.triu(torch.full((39, 39), float("-inf")), 1)[None, None]
    y = layer(x, attention_mask=mask, position_embeddings=model.model.rotary_emb(x, positions))
    y = norm(y[0] if isinstance(y, tuple) else y, "shared_head.norm")
    want = model.lm_head(y)[0].numpy()
    got = refimpl.load(tmp_path, engine="transformers").draft_logits(ids)
    assert deviation(got, want).max() <= BOUND


@pytest.mark.parametrize("file", ["stock", "protected"])
def test_a_quantized_file_says_to_us_what_it_says_to_llama_cpp(file):
    """Selections are chaotic, so whole models are compared by statistics; pytest -s prints them."""
    ids = refimpl_tokens(250)
    llama = Llama(TINY / f"{file}.gguf")
    want = perplexity.log_softmax(llama.decode(ids))
    llama.close()
    model = refimpl.load(TINY / f"{file}.gguf", engine="llama.cpp", kv="f32")
    got = perplexity.log_softmax(model.logits(ids))
    kl = (np.exp(want) * (want - got)).sum(axis=1)
    same = got.argmax(1) == want.argmax(1)
    other = perplexity.log_softmax(refimpl.load(TINY).logits(ids))  # how far quantization itself goes
    far = (np.exp(want) * (want - other)).sum(axis=1)
    error, equal = kl.std() / len(kl) ** 0.5, (got == want).all(axis=1).mean()
    low, high = wilson(int(same.sum()), len(same))
    print(
        f"{file}: KL {kl.mean():.2e} ± {error:.1e}, same top-1 {same.mean():.3f} ({low:.3f} to {high:.3f}), "
        f"equal rows {equal:.3f}"
    )
    print(f"{file}: KL of the unquantized model {far.mean():.2e}")
    assert kl.mean() < far.mean() / 4 and same.mean() > 0.97
