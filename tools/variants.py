"""Variants of the tiny checkpoint, for what the tiny one lacks: an MTP block, shards, a model card, odd tokens.

They are made from its own weights, so that no random generator stands between a golden digest and a test.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors needs it for BF16)
import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from refimpl.files import encode, imatrix, names
from refimpl.quants.formats import BF16, F32
from refimpl.writers import keys

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
REAL = {
    "model_type": "glm_moe_dsa", "hidden_size": 6144, "num_hidden_layers": 78, "first_k_dense_replace": 3,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "num_attention_heads": 64, "q_lora_rank": 2048, "kv_lora_rank": 512,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32,
    "index_head_dim": 128, "index_topk": 2048, "vocab_size": 154880, "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "num_nextn_predict_layers": 0,
}  # fmt: skip


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


def with_eight_experts(golden: Path, place: Path) -> Path:
    """The first 8 of the 16 routed experts: llama-quantize has rules of its own for 8."""
    plain(golden, place)
    weights: Weights = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    config["n_routed_experts"] = 8
    (place / "config.json").write_text(json.dumps(config, indent=2))
    kept = {}
    for name, weight in weights.items():
        _, expert, rest = name.partition(".mlp.experts.")
        if expert and int(rest.split(".", 1)[0]) >= 8:
            continue
        kept[name] = weight[:8].copy() if ".mlp.gate." in name else weight
    save_file(kept, place / "model.safetensors")
    return place


def legacy_imatrix(golden: Path, path: Path) -> Path:
    """The golden imatrix in the legacy format: sums that its number of calls divides, 3 for all."""
    calls, name = 3, b"calibration.txt"
    with imatrix.read(golden / "tiny-glm-dsa" / "imatrix.gguf") as given:
        parts = [struct.pack("<i", len(given))]
        for weight in given:
            values = given.values(weight) * np.float32(calls)
            text = weight.encode()
            parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", calls, len(values))]
            parts.append(values.astype("<f4").tobytes())
        parts += [struct.pack("<ii", given.chunks, len(name)), name]
    path.write_bytes(b"".join(parts))
    return path


def real_header(path: Path, experts: int, mtp: bool) -> Path:
    """The header of the real GLM-5.1 in BF16, and a hole where the weights would be."""
    config = REAL | {"n_routed_experts": experts, "num_nextn_predict_layers": int(mtp)}
    hp = names.Hparams.from_config(config)
    made = {"general.architecture": (GGUFValueType.STRING, "glm-dsa")} | keys.hyperparameters(config, hp, 32)
    tensors = [(link.gguf, shape, F32 if link.f32 else BF16) for link, shape in names.expected(hp)]
    head, _, size = encode.header_bytes(made, tensors)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path
