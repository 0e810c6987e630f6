"""Traces: the named activations of one forward pass, from any engine, under one set of names.

Names are those of llama.cpp's callbacks with the layer behind them, "attn_norm-0"; where llama.cpp gives one name to
several stages the last keeps it, and earlier ones are ours ("qr_raw" is "qr" before its norm). Files that are read:

    X.safetensors, written by `refimpl trace`
    X.safetensors of forward hooks in Hugging Face's names, "model.layers.0.self_attn.q_a_proj"
    X.safetensors of llama.cpp's eval callback, "0007.attn_norm-0" in the order of evaluation (tools/llama_run.py)
    the log of llama-eval-callback, which prints a few values of each activation (printed.py)
    a folder of .npy, in our names or in Hugging Face's
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import refimpl
from refimpl.crosscheck.printed import Printed, read_log
from refimpl.errors import BadFile, Unsupported
from refimpl.files.replace import replacing
from refimpl.files.source import Source
from refimpl.model.glm import Glm

Array = NDArray[Any]

# our name -> the Hugging Face module below model.layers.N whose output it is
HF_NAMES = {
    "attn_norm": "input_layernorm", "qr_raw": "self_attn.q_a_proj", "qr": "self_attn.q_a_layernorm",
    "q": "self_attn.q_b_proj", "kv_cmpr_pe": "self_attn.kv_a_proj_with_mqa", "kv_cmpr": "self_attn.kv_a_layernorm",
    "indexer_k_raw": "self_attn.indexer.wk", "indexer_k_norm": "self_attn.indexer.k_norm",
    "indexer_q_raw": "self_attn.indexer.wq_b", "indexer_weights_raw": "self_attn.indexer.weights_proj",
    "top_k": "self_attn.indexer", "attn_out": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_out": "mlp", "ffn_moe_logits": "mlp.gate",
    "ffn_moe_weights_scaled": "mlp.gate.1", "ffn_moe_topk": "mlp.gate.2",  # its second and third output
    "ffn_moe_out": "mlp.experts", "ffn_shexp": "mlp.shared_experts", "l_out": "",
}  # fmt: skip
_HF_TOP = {"model.embed_tokens": "inp_embd", "model.norm": "result_norm", "lm_head": "result_output"}
_HF_SHARED = {"mlp.shared_experts.gate_proj": "ffn_gate", "mlp.shared_experts.up_proj": "ffn_up"}
_FROM_HF = {hf: ours for ours, hf in HF_NAMES.items()} | _HF_SHARED

# llama.cpp's name -> ours, in the order in which the name occurs in a layer; None is skipped
LLAMA_NAMES: dict[str, tuple[str | None, ...]] = {
    "qr": ("qr_raw", "qr"), "q": ("q",), "q_pe": (None, "q_pe"), "kv_cmpr_pe": ("kv_cmpr_pe",),
    "kv_cmpr": (None, "kv_cmpr"), "k_pe": (None, "k_pe"),
    "indexer_k": ("indexer_k_raw", "indexer_k_norm", None, "indexer_k"),
    "indexer_q": ("indexer_q_raw", None, "indexer_q"), "indexer_weights": ("indexer_weights_raw", "indexer_weights"),
    "indexer_score": ("indexer_score",), "top_k": ("top_k",), "q_nope_absorbed_perm": ("q_nope_absorbed",),
    "kqv": ("kqv",), "kqv_out": ("kqv_out",), "attn_norm": ("attn_norm",), "ffn_inp": ("ffn_inp",),
    "ffn_norm": ("ffn_norm",), "ffn_gate": ("ffn_gate",), "ffn_up": ("ffn_up",), "ffn_swiglu": ("ffn_swiglu",),
    "ffn_out": ("ffn_out",), "ffn_moe_logits": ("ffn_moe_logits",), "ffn_moe_probs": ("ffn_moe_probs",),
    "ffn_moe_topk": ("ffn_moe_topk",), "ffn_moe_weights_scaled": ("ffn_moe_weights_scaled",),
    "ffn_moe_gate": ("ffn_moe_gate",), "ffn_moe_up": ("ffn_moe_up",), "ffn_moe_swiglu": ("ffn_moe_swiglu",),
    "ffn_moe_down": ("ffn_moe_down",), "ffn_moe_out": ("ffn_moe_out",), "ffn_shexp": ("ffn_shexp",),
    "l_out": ("l_out",), "result_norm": ("result_norm",), "result_output": ("result_output",), "embd": ("inp_embd",),
}  # fmt: skip
_NUMBERED = re.compile(r"\d{4,}\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.?(.*)")


@dataclass
class Trace:
    """Activations by name, tokens first, in the graph's order as far as the file has one."""

    path: str
    values: dict[str, Array]
    metadata: dict[str, str] = field(default_factory=dict)
    printed: dict[str, Printed] = field(default_factory=dict)  # instead of values: what a log shows of them


def describe(model: Glm, engine: str, tokens: Sequence[int] | None, whole: bool) -> dict[str, str]:
    """What a trace says of itself; the file's hash only where all of it was read anyway."""
    source = model.weights.source
    said = {
        "refimpl": refimpl.__version__, "engine": engine, "file": source.path, "numpy": np.__version__,
        "layers": f"{model.layers.start}:{model.layers.stop}",
    }  # fmt: skip
    if tokens is not None:
        said["tokens"] = ",".join(map(str, tokens))
    if whole:
        said["sha256"] = " ".join(_hash(part) for part in source.sources)
    return said


def _hash(part: Source) -> str:
    digest = hashlib.sha256()
    for start in range(0, part.size, 1 << 24):
        digest.update(part.read(start, min(1 << 24, part.size - start)))
    return digest.hexdigest()


def write_trace(path: Path, values: dict[str, Array], metadata: dict[str, str]) -> None:
    """Write a trace, atomically; an existing file is replaced."""
    from safetensors.numpy import save_file

    order = {"refimpl.order": " ".join(values)}
    kept = {name: np.ascontiguousarray(value) for name, value in values.items()}
    with replacing(path) as temporary:
        save_file(kept, temporary, metadata | order)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace of any of the kinds above. Raises BadFile or Unsupported."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raw, metadata = _read_folder(path), dict[str, str]()
    elif not path.endswith(".safetensors"):
        return _read_log(path)
    else:
        raw, metadata = _read_safetensors(path)
    if any(_NUMBERED.fullmatch(name) for name in raw):
        values = _from_llama(raw)
    elif any(name.startswith(("model.", "lm_head")) for name in raw):
        values = _from_hf(raw)
    else:
        order = metadata.get("refimpl.order", "").split()
        values = {name: raw[name] for name in order if name in raw} | raw
    if not values:
        raise Unsupported(f"{path}: no activation of a known name")
    return Trace(path, values, metadata)


def _read_safetensors(path: str) -> tuple[dict[str, Array], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadFile(path, None, f"no trace: {error}") from None


def _read_log(path: str) -> Trace:
    records = read_log(path)
    named = zip(_name_stages([name for name, _ in records]), records, strict=True)
    printed = {ours: record for ours, (_, record) in named if ours is not None}
    if not printed:
        raise Unsupported(f"{path}: no activation of a known name")
    return Trace(path, {}, printed=printed)


def _read_folder(path: str) -> dict[str, Array]:
    found = {}
    for file in sorted(Path(path).glob("*.npy")):
        try:
            found[file.stem] = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadFile(file, None, f"no array: {error}") from None
    return found


def _from_hf(raw: dict[str, Array]) -> dict[str, Array]:
    """Module names to ours; the batch axis goes, indices of selected keys become a mask."""
    values = {}
    for name, value in raw.items():
        match = _HF_LAYER.fullmatch(name)
        ours = _FROM_HF.get(match[2]) if match else _HF_TOP.get(name)
        if ours is None:
            continue
        value = value[0] if value.ndim == 3 and len(value) == 1 else value
        layer = f"-{int(match[1])}" if match else ""
        values[ours + layer] = _mask(value, len(value)) if ours == "top_k" else value
    return values


def _mask(chosen: Array, keys: int) -> Array:  # [T, K] -> [T, S]
    """Indices as a mask; keys after the query's own do not count: engines choose them where nothing is left."""
    mask = np.zeros((len(chosen), keys), np.bool_)
    np.put_along_axis(mask, chosen.astype(np.int64), True, axis=1)
    return np.asarray(np.tril(mask))


def _from_llama(raw: dict[str, Array]) -> dict[str, Array]:
    """Numbered callbacks to our names and shapes."""
    keys = sorted(raw)
    named = zip(_name_stages([key.partition(".")[2] for key in keys]), keys, strict=True)
    values = {ours: raw[key] for ours, key in named if ours is not None}
    tokens = next((v.shape[-2] for n, v in values.items() if n.startswith(("attn_norm", "inp_embd"))), 0)
    return {name: _tokens_first(name, value, tokens) for name, value in values.items()}


def _name_stages(names: Sequence[str]) -> list[str | None]:
    """Our names of callbacks in the order of evaluation: the n-th occurrence of a name in a layer has its own."""
    found: list[str | None] = []
    seen: dict[str, int] = {}
    for name in names:
        base, dash, layer = name.rpartition("-")
        base = base if dash else name
        ours = None
        if " (" not in name and base in LLAMA_NAMES:
            stage, seen[name] = seen.get(name, 0), seen.get(name, 0) + 1
            stages = LLAMA_NAMES[base]
            ours = stages[stage] if stage < len(stages) else None
        found.append(f"{ours}-{layer}" if ours is not None and dash else ours)
    return found


def _tokens_first(name: str, value: Array, tokens: int) -> Array:
    """ggml's four axes to [T, ...]; padded keys go, selected keys become a mask."""
    base = name.rpartition("-")[0] or name
    if base == "kqv":
        return np.ascontiguousarray(value[0].transpose(1, 0, 2))
    value = value.reshape([n for i, n in enumerate(value.shape) if n > 1 or i == 3])
    if value.size and len(value) != tokens:
        value = value.reshape(tokens, -1)
    if base == "top_k":
        return _mask(value, max(tokens, int(value.max()) + 1))[:, :tokens]
    if base == "indexer_score":
        return np.where(np.tri(tokens, dtype=np.bool_), value[:, :tokens], -np.inf)
    return value[..., 0] if base == "ffn_moe_weights_scaled" and value.ndim == 3 else value
