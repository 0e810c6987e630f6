"""A random GLM-5.1 of a few thousand weights as a Hugging Face directory, for tests of the readers."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "glm_moe_dsa", "hidden_size": 32, "num_hidden_layers": 3, "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse", "sparse"], "intermediate_size": 24,
    "moe_intermediate_size": 16, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "num_attention_heads": 2, "q_lora_rank": 10,
    "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 16, "vocab_size": 40, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "tie_word_embeddings": False, "scoring_func": "sigmoid",
}  # fmt: skip

# Sizes with which both transformers and llama.cpp run, and 32 index heads: enough that scores rarely tie.
SOUND = CONFIG | {
    "hidden_size": 64, "index_n_heads": 32, "qk_rope_head_dim": 4, "head_dim": 4, "num_key_value_heads": 2,
    "kv_lora_rank": 32, "q_lora_rank": 32, "vocab_size": 96, "index_topk": 12, "indexer_rope_interleave": True,
    "pad_token_id": 0, "intermediate_size": 48, "n_routed_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip


def draw_weights(config, seed=0):
    """Every tensor of the checkpoint, float32 [out, in] of BF16 values, the router's bias full float32."""
    c, random = config, np.random.default_rng(seed)
    d, heads, nope, rope = (
        c[k] for k in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    attention = {
        "q_a_proj": (c["q_lora_rank"], d), "q_b_proj": (heads * (nope + rope), c["q_lora_rank"]),
        "kv_a_proj_with_mqa": (c["kv_lora_rank"] + rope, d),
        "kv_b_proj": (heads * (nope + c["v_head_dim"]), c["kv_lora_rank"]), "o_proj": (d,
        heads * c["v_head_dim"]),
        "q_a_layernorm": (c["q_lora_rank"],), "kv_a_layernorm": (c["kv_lora_rank"],),
        "indexer.wq_b": (c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"]),
        "indexer.wk": (c["index_head_dim"], d), "indexer.weights_proj": (c["index_n_heads"], d),
        "indexer.k_norm": (c["index_head_dim"],),
    }  # fmt: skip

    def mlp(prefix, width):
        return {
            f"{prefix}gate_proj": (width, d),
            f"{prefix}up_proj": (width, d),
            f"{prefix}down_proj": (d, width),
        }

    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    for n in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        at = f"model.layers.{n}."
        parts = {f"self_attn.{k}": v for k, v in attention.items()}
        parts |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        if n < c["first_k_dense_replace"]:
            parts |= mlp("mlp.", c["intermediate_size"])
        else:
            parts["mlp.gate"] = (c["n_routed_experts"], d)
            for e in range(c["n_routed_experts"]):
                parts |= mlp(f"mlp.experts.{e}.", c["moe_intermediate_size"])
            parts |= mlp("mlp.shared_experts.", c["moe_intermediate_size"])
        if n >= c["num_hidden_layers"]:
            parts |= {"eh_proj": (d, 2 * d), "enorm": (d,), "hnorm": (d,), "shared_head.norm": (d,)}
        shapes |= {f"{at}{k}.weight": v for k, v in parts.items()}
        shapes[f"{at}self_attn.indexer.k_norm.bias"] = (c["index_head_dim"],)
        if n >= c["first_k_dense_replace"]:
            shapes[f"{at}mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (c["vocab_size"], d)}
    weights = {k: random.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    return {k: v if is_float32(k) else to_bf16(v) for k, v in weights.items()}


def to_bf16(x):
    """float32 values that BF16 can hold."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def is_float32(name):
    """Whether the checkpoint stores the tensor as F32."""
    return name.endswith("e_score_correction_bias")


def write_checkpoint(folder, config=CONFIG, weights=None, shards=2):
    """Write config.json, shards and index; returns the weights."""
    weights = draw_weights(config) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, mapped, total = list(weights), {}, 0
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        stored = {k: weights[k] if is_float32(k) else weights[k].astype(ml_dtypes.bfloat16) for k in part}
        save_file(stored, folder / file)
        mapped |= dict.fromkeys(part, file)
        total += sum(v.nbytes for v in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": mapped}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def scale(weights, config):
    """Weights that keep activations near 1: a random matrix shrunk by its width, norms around 1; in BF16."""
    made = {}
    for name, w in weights.items():
        if name.endswith("_bias"):
            made[name] = w * np.float32(0.1)
        elif w.ndim == 1:
            made[name] = (
                np.float32(1) + np.float32(0.1) * w if name.endswith("weight") else np.float32(0.1) * w
            )
        else:
            made[name] = w if "embed" in name else w / np.float32(w.shape[1] ** 0.5)
        made[name] = to_bf16(made[name]) if not is_float32(name) else made[name]
    missing = {
        f"model.layers.{n}.self_attn.indexer"
        for n, kind in enumerate(config.get("indexer_types", []))
        if kind == "shared"
    }
    return {k: v for k, v in made.items() if not any(k.startswith(m + ".") for m in missing)}
