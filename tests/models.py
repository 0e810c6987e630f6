"""GGUF headers of GLM-5.1 models of any size, for tests; files have a hole where the weights would be."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import recipes
from refimpl.files import gguf, names
from refimpl.files.gguf import GGUFValueType as T
from refimpl.files.hparams import Hparams
from refimpl.quants.formats import formats

REAL = Hparams(
    hidden_size=6144,
    num_hidden_layers=78,
    num_nextn_predict_layers=0,
    first_k_dense_replace=3,
    intermediate_size=12288,
    moe_intermediate_size=2048,
    n_routed_experts=192,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.5,
    num_attention_heads=64,
    q_lora_rank=2048,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    vocab_size=154_880,
    max_position_embeddings=202_752,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
)
TINY = replace(
    REAL,
    hidden_size=256,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=512,
    moe_intermediate_size=256,
    n_routed_experts=16,
    num_experts_per_tok=4,
    num_attention_heads=2,
    q_lora_rank=256,
    kv_lora_rank=320,
    index_topk=64,
    vocab_size=1280,
    max_position_embeddings=4096,
)

Shapes = dict[str, tuple[int, ...]]
Keys = dict[str, tuple[T, Any]]


def metadata(hp: Hparams, **names_of: str) -> Keys:
    """Keys as convert writes them, without the tokenizer; `name="X"` becomes general.name."""
    counts = {
        "block_count": hp.layers,
        "context_length": hp.max_position_embeddings,
        "embedding_length": hp.hidden_size,
        "feed_forward_length": hp.intermediate_size,
        "attention.head_count": hp.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": hp.kv_lora_rank + hp.qk_rope_head_dim,
        "attention.value_length": hp.kv_lora_rank,
        "attention.key_length_mla": hp.qk_nope_head_dim + hp.qk_rope_head_dim,
        "attention.value_length_mla": hp.v_head_dim,
        "attention.q_lora_rank": hp.q_lora_rank,
        "attention.kv_lora_rank": hp.kv_lora_rank,
        "attention.indexer.head_count": hp.index_n_heads,
        "attention.indexer.key_length": hp.index_head_dim,
        "attention.indexer.top_k": hp.index_topk,
        "rope.dimension_count": hp.qk_rope_head_dim,
        "expert_count": hp.n_routed_experts,
        "expert_used_count": hp.num_experts_per_tok,
        "expert_shared_count": hp.n_shared_experts,
        "expert_feed_forward_length": hp.moe_intermediate_size,
        "expert_group_count": hp.n_group,
        "expert_group_used_count": hp.topk_group,
        "expert_gating_func": 2,
        "leading_dense_block_count": hp.first_k_dense_replace,
        "nextn_predict_layers": hp.num_nextn_predict_layers,
        "vocab_size": hp.vocab_size,
    }
    floats = {
        "rope.freq_base": hp.rope_theta,
        "attention.layer_norm_rms_epsilon": hp.rms_norm_eps,
        "expert_weights_scale": hp.routed_scaling_factor,
    }
    keys: Keys = {"general.architecture": (T.STRING, "glm-dsa")}
    keys |= {f"general.{key}": (T.STRING, text) for key, text in names_of.items()}
    keys |= {f"glm-dsa.{key}": (T.UINT32, n) for key, n in counts.items()}
    return keys | {f"glm-dsa.{key}": (T.FLOAT32, x) for key, x in floats.items()}


def vocabulary(n: int) -> Keys:
    """A tokenizer of n tokens and twice as many merges."""
    return {
        "tokenizer.ggml.model": (T.STRING, "gpt2"),
        "tokenizer.ggml.tokens": (T.ARRAY, [f"token{i}" for i in range(n)]),
        "tokenizer.ggml.token_type": (T.ARRAY, np.ones(n, np.int32)),
        "tokenizer.ggml.merges": (T.ARRAY, [f"to ken{i}" for i in range(2 * n)]),
        "tokenizer.ggml.eos_token_id": (T.UINT32, n - 1),
    }


def shapes(hp: Hparams) -> Shapes:
    """Every tensor that the hyperparameters imply."""
    return {link.gguf: shape for link, shape in names.expected(hp)}


def write(
    path: Path,
    hp: Hparams = TINY,
    keys: Mapping[str, tuple[T, Any]] | None = None,
    tensors: Shapes | None = None,
    recipe: str = "q4_k_m-protected",
    types: Mapping[str, str] | None = None,
) -> Path:
    """Write the header, and the rest as a hole; `types` override the recipe's."""
    listed = shapes(hp) if tensors is None else tensors
    chosen = recipes.load(recipe).types(hp, listed) | dict(types or {})
    rows = [(name, shape, formats[chosen[name]]) for name, shape in listed.items()]
    head, _, size = gguf.header_bytes(metadata(hp) if keys is None else keys, rows)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def config(hp: Hparams) -> dict[str, Any]:
    """config.json of a checkpoint."""
    return {"model_type": "glm_moe_dsa", **asdict(hp)}
