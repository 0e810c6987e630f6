"""The keys of a GGUF as convert_hf_to_gguf writes them: what the model is called, its sizes, its tokenizer.

Order and types are part of the file's bytes. A key's value is GLM-5.1's config.json by name (hparams.py), with
GlmMoeDsaConfig's defaults where the converter lets transformers fill them in.
Source: conversion/base.py, deepseek.py and glm.py, llama.cpp 0c1e570; GlmMoeDsaConfig, transformers 5.24.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gguf import GGUFWriter, Metadata, size_label
from gguf.constants import GGUFValueType as Kind

from refimpl.errors import BadFile, Unsupported
from refimpl.files.hparams import ARCHITECTURE
from refimpl.files.names import Hparams, Link, shape
from refimpl.files.safetensors import Checkpoint
from refimpl.writers.vocabulary import add_vocabulary

Keys = dict[str, tuple[Kind, Any]]

PROVENANCE = "refimpl.provenance"  # the one key that is ours: JSON of who made the file, how, and from what
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
QUANTIZATION_VERSION = (Kind.UINT32, 2)
CARD_BYTES = 1 << 22
_CARDS = ("README.md", "generation_config.json", "config.json")

# In the converter's order. A name of Hparams, or the value of the config key, or of both config keys together.
_SIZES = (
    ("block_count", "layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
)
_EXPERTS = (
    ("expert_count", "n_routed_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
)
_LAYOUT = (
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("vocab_size", "vocab_size"),
    ("attention.q_lora_rank", "q_lora_rank"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
)
_INDEXER = (
    ("attention.indexer.head_count", "index_n_heads"),
    ("attention.indexer.key_length", "index_head_dim"),
    ("attention.indexer.top_k", "index_topk"),
)


def converted_keys(
    source: Checkpoint, hp: Hparams, links: Sequence[Link], file_type: int, name: str | None, mtp: bool
) -> Keys:
    """All keys of the GGUF that this checkpoint makes.

    name : general.name; None: from the model card, the config or the directory, as the converter finds it
    mtp  : is the multi-token-prediction block kept, if there is one?
    """
    logging.getLogger("gguf").addHandler(logging.NullHandler())  # its warnings quote the files
    logging.getLogger("metadata").addHandler(logging.NullHandler())
    keys = _model_card(source, hp, links, name) | hyperparameters(source.config, hp, file_type, mtp)
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys | add_vocabulary(source, hp)


def provenance(command: str, **facts: Any) -> tuple[Kind, str]:
    """The value of PROVENANCE: which command of which version made the file, and the facts that decided its bytes."""
    from refimpl import __version__

    said = {"refimpl": __version__, "command": command, **facts}
    return Kind.STRING, json.dumps(said, ensure_ascii=False)


def parse_provenance(metadata: Mapping[str, Any]) -> Any:
    """What an earlier PROVENANCE says, None where there is none that can be read."""
    try:
        return json.loads(metadata.get(PROVENANCE, "null"))
    except (ValueError, TypeError, RecursionError):
        return None


def written_keys(writer: GGUFWriter) -> Keys:
    """What a writer of the gguf package has collected, in order."""
    return {key: (value.type, value.value) for key, value in writer.kv_data[0].items()}


def _model_card(source: Checkpoint, hp: Hparams, links: Sequence[Link], name: str | None) -> Keys:
    """The keys below general., found by the gguf package, as the converter lets it."""
    folder = Path(os.path.abspath(source.path))
    for file in _CARDS:
        if (folder / file).is_file() and (folder / file).stat().st_size > CARD_BYTES:
            raise BadFile(folder / file, CARD_BYTES, "too long for what it is")
    sizes = [(link, int(np.prod(shape(link, hp), dtype=object))) for link in links]
    stacked = [size // hp.n_routed_experts for link, size in sizes if link.transform == "stack"]
    shared = sum(size for link, size in sizes if link.transform != "stack")
    total = shared + sum(stacked) * hp.n_routed_experts
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_type("model")
    try:
        card = Metadata.load(None, folder, name, total)
        card.name = card.name or folder.name
        if card.sampling_penalty_repeat is None:  # gguf 0.19 lacks the second spelling
            card.sampling_penalty_repeat = Metadata.load_generation_config(folder).get("repetition_penalty")
        if card.size_label is None:
            card.size_label = size_label(total, shared, sum(stacked), hp.n_routed_experts if stacked else 0)
        card.set_gguf_meta_model(writer)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise BadFile(folder, None, f"README.md, config.json or generation_config.json: {error}") from None
    except yaml.YAMLError as error:
        raise BadFile(folder / "README.md", None, f"its front matter is not YAML: {error}") from None
    return written_keys(writer)


def hyperparameters(config: Mapping[str, Any], hp: Hparams, file_type: int, mtp: bool = True) -> Keys:
    """The keys below glm-dsa., and general.file_type among them, from config.json."""
    _refuse_unknown(config)
    keys: Keys = {}

    def add(kind: Kind, key: str, value: Any) -> None:
        keys[f"{ARCHITECTURE}.{key}"] = (kind, value)

    def add_sizes(rows: tuple[tuple[str, str], ...]) -> None:
        for key, name in rows:
            add(Kind.UINT32, key, getattr(hp, name))

    latent = hp.kv_lora_rank
    add_sizes(_SIZES)
    add(Kind.UINT32, "attention.head_count_kv", 1)  # MLA is multi-query attention over the latent
    add(Kind.FLOAT32, "rope.freq_base", hp.rope_theta)
    add(Kind.FLOAT32, "attention.layer_norm_rms_epsilon", hp.rms_norm_eps)
    add_sizes(_EXPERTS)
    if "scoring_func" in config:
        add(Kind.UINT32, "expert_gating_func", 2)  # sigmoid
    add(Kind.UINT32, "attention.key_length", latent + hp.qk_rope_head_dim)
    add(Kind.UINT32, "attention.value_length", latent)
    keys["general.file_type"] = (Kind.UINT32, file_type)
    add_sizes(_LAYOUT)
    add(Kind.UINT32, "attention.key_length_mla", hp.qk_nope_head_dim + hp.qk_rope_head_dim)
    add(Kind.UINT32, "attention.value_length_mla", hp.v_head_dim)
    add(Kind.UINT32, "expert_feed_forward_length", hp.moe_intermediate_size)
    add(Kind.UINT32, "expert_shared_count", hp.n_shared_experts)
    add(Kind.FLOAT32, "expert_weights_scale", hp.routed_scaling_factor)
    if config.get("norm_topk_prob", True):
        add(Kind.BOOL, "expert_weights_norm", True)
    add(Kind.UINT32, "rope.dimension_count", hp.qk_rope_head_dim)
    if mtp and config.get("num_nextn_predict_layers") is not None:
        add(Kind.UINT32, "nextn_predict_layers", hp.num_nextn_predict_layers)
    add_sizes(_INDEXER)
    add(Kind.ARRAY, "attention.indexer.types", np.ones(hp.num_hidden_layers, np.bool_))
    return keys


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    """Settings that would need keys which GLM-5.1's files do not have."""
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    for key, plain, values in (
        ("index_topk_freq", 1, config),
        ("index_topk_pattern", None, config),
        ("layer_norm_eps", None, config),
        ("layer_norm_epsilon", None, config),
        ("partial_rotary_factor", 1.0, rope),
        ("mscale_all_dim", None, rope),
        ("mrope_section", None, rope),
    ):
        if values.get(key, plain) != plain:
            raise Unsupported(f"config.json: {key} is {values[key]!r}; GLM-5.1 has none such")
