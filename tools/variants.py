"""Variants of the tiny checkpoint, for what the tiny one lacks: an MTP block, shards, a model card, odd tokens.

They are made from its own weights, so that no random generator stands between a golden digest and a test.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors needs it for BF16)
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Weights = dict[str, NDArray[Any]]

CARD = """---
license: mit
language:
- en
- zh
library_name: transformers
pipeline_tag: text-generation
base_model: zai-org/GLM-5.1
---

# A variant of a tiny model
"""
GENERATION = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
SHARDS = 3


def plain(golden: Path, place: Path) -> Path:
    """The tiny checkpoint itself, without the files beside it."""
    place.mkdir(parents=True, exist_ok=True)
    names = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    for name in names:
        shutil.copyfile(golden / "tiny-glm-dsa" / name, place / name)
    return place


def with_mtp(golden: Path, place: Path) -> Path:
    """An MTP block behind the last layer, in three shards, with a model card, sampling defaults and two more tokens."""
    plain(golden, place)
    weights: Weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    config = json.loads((place / "config.json").read_text())
    last, new = config["num_hidden_layers"] - 1, config["num_hidden_layers"]
    config["num_nextn_predict_layers"] = 1
    (place / "config.json").write_text(json.dumps(config, indent=2))
    head = f"model.layers.{new}."
    for name in [n for n in weights if n.startswith(f"model.layers.{last}.")]:
        weights[head + name.split(".", 3)[3]] = weights[name]
    norm = weights[f"{head}input_layernorm.weight"]
    weights |= {f"{head}{name}.weight": norm for name in ("enorm", "hnorm", "shared_head.norm")}
    gate = weights[f"{head}mlp.shared_experts.gate_proj.weight"]
    weights[f"{head}eh_proj.weight"] = np.concatenate([gate, gate[::-1]], axis=1)
    _save_shards(place, weights)
    (place / "README.md").write_text(CARD)
    (place / "generation_config.json").write_text(json.dumps(GENERATION))
    _change_tokenizer(place)
    return place


def _save_shards(place: Path, weights: Weights) -> None:
    """Cut in the middle of layers, so that one layer's experts lie in two shards."""
    names, mapped = sorted(weights), {}
    for i in range(SHARDS):
        part = names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: np.ascontiguousarray(weights[name]) for name in part}, place / file)
        mapped |= dict.fromkeys(part, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": mapped}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _change_tokenizer(place: Path) -> None:
    """Two added tokens that are not special, and a post-processor that puts [gMASK]<sop> first, as GLM's does."""
    data = json.loads((place / "tokenizer.json").read_text())
    free = 1 + max(entry["id"] for entry in data["added_tokens"])
    for number, text in ((free, "<a token>"), (free + 1, "<|half special|>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        data["added_tokens"].append({"id": number, "content": text, **flags})
    ids = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    start = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("[gMASK]", "<sop>")]
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*start, first],
        "pair": [*start, first, second],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[gMASK]", "<sop>")},
    }
    (place / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
