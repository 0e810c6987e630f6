"""The shape of the tiny GLM-5.1 and how it is written to disk.

What a quantizer looks at is as in the real model: the tensor names, nope 192 (whose k_b rows do not divide by
256 and so fall back to Q5_0), rope 64, v 256, the 32 x 128 indexer, F32 router bias, a shared expert. Widths
are the smallest that still give whole 256-weight blocks. 16 experts: llama.cpp has special rules for 8.
"""

import json
from pathlib import Path

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

SHAPE = {
    "vocab_size": 1280,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.05,  # the real 0.02 starves signals at this width: 0.5 nats behind after 200 steps
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
}

# Keys of the real config.json that transformers does not write by itself, and llama.cpp's converter reads.
ALSO_WRITTEN = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "moe_layer_freq": 1,
    "ep_size": 1,
    "pretraining_tp": 1,
    "rope_interleave": True,
    "indexer_rope_interleave": True,
}
# transformers writes these, the real config.json has none; bos_token_id would win over [gMASK] in a GGUF.
NOT_WRITTEN = (
    "bos_token_id",
    "indexer_types",
    "layer_types",
    "mlp_layer_types",
    "transformers_version",
    "_name_or_path",
)


def configure(eos: list[int], pad: int) -> GlmMoeDsaConfig:
    """Build the configuration; token ids come from the tokenizer."""
    return GlmMoeDsaConfig(**SHAPE, eos_token_id=eos, pad_token_id=pad, bos_token_id=None)


def build(config: GlmMoeDsaConfig, seed: int) -> GlmMoeDsaForCausalLM:
    """Make an untrained model in float32, the same one for the same seed."""
    torch.manual_seed(seed)
    return GlmMoeDsaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def save(model: GlmMoeDsaForCausalLM, folder: Path) -> None:
    """Write model.safetensors (BF16, router bias F32) and config.json as the real checkpoint has them."""
    biases = [layer.mlp.gate.e_score_correction_bias.float().clone() for layer in model.model.layers[1:]]
    model.to(torch.bfloat16)
    for layer, bias in zip(model.model.layers[1:], biases, strict=True):
        layer.mlp.gate.e_score_correction_bias = bias
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in NOT_WRITTEN} | ALSO_WRITTEN
    config["architectures"] = ["GlmMoeDsaForCausalLM"]
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
