"""GLM-5.1's hyperparameters, from config.json or from a GGUF's metadata, checked before they are relied on.

Names are those of the Hugging Face config. One table says where each comes from and what is absurd.
Source: conversion/glm.py and conversion/deepseek.py, llama.cpp 0c1e570; GlmMoeDsaConfig, transformers 5.23.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from refimpl.errors import BadFile, Unsupported

ARCHITECTURE = "glm-dsa"
MODEL_TYPE = "glm_moe_dsa"

_REQUIRED = object()
_SIZE, _COUNT, _LAYERS, _EXPERTS = (1, 1 << 24), (1, 1 << 31), (1, 4096), (1, 1 << 16)

_LONG = 1 << 20  # context of GLM-5.2

# field -> (key below glm-dsa., (least, most) of an integer or None of a float, value where absent)
_FIELDS: dict[str, tuple[str, tuple[int, int] | None, Any]] = {
    "hidden_size": ("embedding_length", _SIZE, _REQUIRED),
    "num_hidden_layers": ("block_count", _LAYERS, _REQUIRED),
    "num_nextn_predict_layers": ("nextn_predict_layers", (0, 64), 0),
    "first_k_dense_replace": ("leading_dense_block_count", (0, 4096), 0),
    "intermediate_size": ("feed_forward_length", _SIZE, _REQUIRED),
    "moe_intermediate_size": ("expert_feed_forward_length", _SIZE, _REQUIRED),
    "n_routed_experts": ("expert_count", _EXPERTS, _REQUIRED),
    "n_shared_experts": ("expert_shared_count", _EXPERTS, _REQUIRED),
    "num_experts_per_tok": ("expert_used_count", _EXPERTS, _REQUIRED),
    "n_group": ("expert_group_count", _EXPERTS, 1),
    "topk_group": ("expert_group_used_count", _EXPERTS, 1),
    "routed_scaling_factor": ("expert_weights_scale", None, 1.0),
    "num_attention_heads": ("attention.head_count", _SIZE, _REQUIRED),
    "q_lora_rank": ("attention.q_lora_rank", _SIZE, _REQUIRED),
    "kv_lora_rank": ("attention.kv_lora_rank", _SIZE, _REQUIRED),
    "qk_nope_head_dim": ("attention.key_length_mla", _SIZE, _REQUIRED),
    "qk_rope_head_dim": ("rope.dimension_count", _SIZE, _REQUIRED),
    "v_head_dim": ("attention.value_length_mla", _SIZE, _REQUIRED),
    "index_n_heads": ("attention.indexer.head_count", _SIZE, _REQUIRED),
    "index_head_dim": ("attention.indexer.key_length", _SIZE, _REQUIRED),
    "index_topk": ("attention.indexer.top_k", _COUNT, _REQUIRED),
    "vocab_size": ("vocab_size", _SIZE, _REQUIRED),
    "max_position_embeddings": ("context_length", _COUNT, _REQUIRED),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", None, _REQUIRED),
    "rope_theta": ("rope.freq_base", None, _REQUIRED),
}


@dataclass(frozen=True)
class Hparams:
    """Hyperparameters of one model; sizes in weights, eps and theta as stored.

    num_hidden_layers counts the trunk alone; the MTP block is layer num_hidden_layers where
    num_nextn_predict_layers is 1. indexer_types says of each layer of the trunk whether it has an indexer of its
    own ("full") or looks where the last full one looked ("shared", GLM-5.2); empty: all are full.
    """

    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    indexer_types: tuple[str, ...] = ()

    def has_indexer(self, layer: int) -> bool:
        """Whether the layer selects for itself."""
        return layer >= len(self.indexer_types) or self.indexer_types[layer] == "full"

    @property
    def layers(self) -> int:
        """Layers of the trunk and the MTP block together."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: str = "config.json") -> Self:
        """Read them from a parsed config.json; `path` is for error messages."""
        if config.get("model_type") != MODEL_TYPE:
            raise Unsupported(f"{path}: model_type is {config.get('model_type')!r}, {MODEL_TYPE!r} is known")
        values = dict(config)
        rope = config.get("rope_parameters")
        if isinstance(rope, Mapping):
            values.setdefault("rope_theta", rope.get("rope_theta"))
            if rope.get("rope_type", "default") != "default":
                raise Unsupported(
                    f"{path}: rope_type {rope['rope_type']!r}; only unscaled rotary positions are known"
                )
        kinds = config.get("mlp_layer_types")
        if kinds is not None:
            dense = _leading(kinds, "dense", "sparse", path)
            if values.setdefault("first_k_dense_replace", dense) != dense:
                raise BadFile(path, None, "mlp_layer_types and first_k_dense_replace disagree")
        for key, plain in (
            ("tie_word_embeddings", False),
            ("scoring_func", "sigmoid"),
            ("attention_bias", False),
            ("norm_topk_prob", True),
            ("rope_interleave", True),
            ("indexer_rope_interleave", True),
        ):
            if config.get(key, plain) != plain:
                raise Unsupported(f"{path}: {key} is {config[key]!r}, not {plain!r}")
        made = {name: _check(name, name, values.get(name), path, None) for name in _FIELDS}
        made["indexer_types"] = _indexers(config.get("indexer_types"), made["num_hidden_layers"], path)
        return cls._make(made, path)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Read them from a GGUF's metadata."""
        path: str = getattr(metadata, "path", "metadata")
        offsets: Mapping[str, int] = getattr(metadata, "offsets", {})
        architecture = metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise Unsupported(f"{path}: architecture {architecture!r}, {ARCHITECTURE!r} is known")
        values = {}
        for name, (suffix, _, _) in _FIELDS.items():
            key = f"{ARCHITECTURE}.{suffix}"
            values[name] = _check(name, key, metadata.get(key), path, offsets.get(key))
        values["qk_nope_head_dim"] -= values["qk_rope_head_dim"]  # key_length_mla is the whole head
        values["num_hidden_layers"] -= values["num_nextn_predict_layers"]  # block_count counts the MTP block
        if values["qk_nope_head_dim"] < 1 or values["num_hidden_layers"] < 1:
            raise BadFile(
                path,
                None,
                "a head is no longer than its rotary part, or no layer is left beside the MTP block",
            )
        gating = metadata.get(f"{ARCHITECTURE}.expert_gating_func", 2)
        if gating != 2:
            raise Unsupported(f"{path}: expert_gating_func {gating!r}, 2 (sigmoid) is known")
        count, kinds = values["num_hidden_layers"], metadata.get(f"{ARCHITECTURE}.attention.indexer.types")
        if kinds is None and values["max_position_embeddings"] >= _LONG:
            kinds = [
                n < 2 or n % 4 == 2 for n in range(count)
            ]  # what llama.cpp takes for a GLM-5.2 without the key
        if kinds is not None and all(kinds):
            kinds = None  # whatever its length: a block_count that lies is told by the container check
        named = None if kinds is None else ["full" if kind else "shared" for kind in kinds]
        values["indexer_types"] = _indexers(named, count, path)
        return cls._make(values, path)

    @classmethod
    def _make(cls, values: dict[str, Any], path: str) -> Self:
        made = cls(**values)
        for least, most in (
            ("num_experts_per_tok", "n_routed_experts"), ("first_k_dense_replace", "num_hidden_layers"),
            ("topk_group", "n_group"),
        ):  # fmt: skip
            if values[least] > values[most]:
                raise BadFile(path, None, f"{least} is {values[least]:,}, more than {most}, {values[most]:,}")
        return made


def _check(name: str, key: str, value: Any, path: str, offset: int | None) -> Any:
    """A value of the right kind and size. Raises BadFile."""
    _, bounds, absent = _FIELDS[name]
    if value is None:
        if absent is _REQUIRED:
            raise BadFile(path, offset, f"{key} is missing")
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadFile(path, offset, f"{key} is {value!r}, not a number")
    if bounds is None:
        if not (math.isfinite(value) and value > 0):
            raise BadFile(path, offset, f"{key} is {value!r}, not a positive number")
        return float(value)
    if not isinstance(value, int) or not bounds[0] <= value <= bounds[1]:
        raise BadFile(path, offset, f"{key} is {value!r}, not {bounds[0]:,} to {bounds[1]:,}")
    return value


def _leading(kinds: Any, first: str, then: str, path: str) -> int:
    """How many `first` there are before all the `then`."""
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {first, then}:
        raise BadFile(path, None, f"mlp_layer_types is not a list of {first!r} and {then!r}")
    count = kinds.count(first)
    if kinds != [first] * count + [then] * (len(kinds) - count):
        raise Unsupported(f"{path}: {first} layers after a {then} one")
    return count


def _indexers(kinds: Any, layers: int, path: str) -> tuple[str, ...]:
    """The kinds of indexer of the trunk's layers; empty where all are full. Raises BadFile."""
    if not kinds:
        return ()
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"full", "shared"} or len(kinds) < layers:
        raise BadFile(path, None, f"indexer types are not a list of 'full' and 'shared' for {layers} layers")
    if kinds[0] != "full":
        raise BadFile(path, None, "the first layer shares an indexer, but there is none before it")
    return () if "shared" not in kinds[:layers] else tuple(kinds[:layers])
