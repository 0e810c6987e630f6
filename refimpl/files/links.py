"""Every GLM-5.1 tensor in its two spellings, Hugging Face and GGUF, with the transform between them.

One table is the whole map; link, from_hf and expected read it in either direction, origin.py applies it.

    stack  one tensor per expert           -> [E, out, in]
    k_b    kv_b_proj [H * (nope + v), rank] -> its k rows, transposed per head: [H, rank, nope]
    v_b    the same tensor                  -> its v rows: [H, v, rank]

Source: conversion/glm.py, conversion/deepseek.py, gguf-py/gguf/tensor_mapping.py, llama.cpp 0c1e570.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast

from refimpl.files.hparams import Hparams

Transform = Literal["same", "stack", "k_b", "v_b"]
Role = Literal[
    "routed", "router", "router_bias", "norm", "embed", "head",
    "attention", "indexer", "shared", "dense", "mtp",
]  # fmt: skip
Matrix = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class Link:
    """One GGUF tensor and where it comes from.

    hf     : its name in the checkpoint; "{e}" stands for the expert's number
    f32    : convert always writes it as F32 (1-D, norms, the router, indexer.proj)
    layer  : its layer, None for the embedding, the last norm and the head
    matrix : which of gate, up and down, None for other tensors
    """

    gguf: str
    hf: str
    transform: Transform
    role: Role
    f32: bool
    layer: int | None
    matrix: Matrix | None


# where : in the model, in every layer, in dense, sparse or MTP layers; "?": legal but not expected
# how   : the transform; as: F32 where convert always writes that, else the type asked for
# shape : NumPy order, letters of _sizes
_TABLE_TEXT = """
where  GGUF, below blk.N.            HF, below model.layers.N.             how   role        as  shape
model  token_embd.weight             model.embed_tokens.weight             same  embed       -   vocab D
layer  attn_norm.weight              input_layernorm.weight                same  norm        F32 D
layer  attn_q_a.weight               self_attn.q_a_proj.weight             same  attention   -   q_rank D
layer  attn_q_a_norm.weight          self_attn.q_a_layernorm.weight        same  norm        F32 q_rank
layer  attn_q_b.weight               self_attn.q_b_proj.weight             same  attention   -   q q_rank
layer  attn_kv_a_mqa.weight          self_attn.kv_a_proj_with_mqa.weight   same  attention   -   kv D
layer  attn_kv_a_norm.weight         self_attn.kv_a_layernorm.weight       same  norm        F32 rank
layer? attn_kv_b.weight              self_attn.kv_b_proj.weight            same  attention   -   kv_b rank
layer  attn_k_b.weight               self_attn.kv_b_proj.weight            k_b   attention   -   H rank nope
layer  attn_v_b.weight               self_attn.kv_b_proj.weight            v_b   attention   -   H v rank
layer  attn_output.weight            self_attn.o_proj.weight               same  attention   -   D o
layer  indexer.attn_q_b.weight       self_attn.indexer.wq_b.weight         same  indexer     -   iq q_rank
layer  indexer.attn_k.weight         self_attn.indexer.wk.weight           same  indexer     -   ik D
layer  indexer.k_norm.weight         self_attn.indexer.k_norm.weight       same  norm        F32 ik
layer  indexer.k_norm.bias           self_attn.indexer.k_norm.bias         same  norm        F32 ik
layer  indexer.proj.weight           self_attn.indexer.weights_proj.weight same  indexer     F32 ih D
layer  ffn_norm.weight               post_attention_layernorm.weight       same  norm        F32 D
dense  ffn_gate.weight               mlp.gate_proj.weight                  same  dense       -   F D
dense  ffn_up.weight                 mlp.up_proj.weight                    same  dense       -   F D
dense  ffn_down.weight               mlp.down_proj.weight                  same  dense       -   D F
sparse ffn_gate_inp.weight           mlp.gate.weight                       same  router      F32 E D
sparse exp_probs_b.bias              mlp.gate.e_score_correction_bias      same  router_bias F32 E
sparse ffn_gate_exps.weight          mlp.experts.{e}.gate_proj.weight      stack routed      -   E I D
sparse ffn_up_exps.weight            mlp.experts.{e}.up_proj.weight        stack routed      -   E I D
sparse ffn_down_exps.weight          mlp.experts.{e}.down_proj.weight      stack routed      -   E D I
sparse ffn_gate_shexp.weight         mlp.shared_experts.gate_proj.weight   same  shared      -   S D
sparse ffn_up_shexp.weight           mlp.shared_experts.up_proj.weight     same  shared      -   S D
sparse ffn_down_shexp.weight         mlp.shared_experts.down_proj.weight   same  shared      -   D S
mtp    nextn.eh_proj.weight          eh_proj.weight                        same  mtp         -   D 2D
mtp    nextn.enorm.weight            enorm.weight                          same  mtp         F32 D
mtp    nextn.hnorm.weight            hnorm.weight                          same  mtp         F32 D
mtp    nextn.shared_head_norm.weight shared_head.norm.weight               same  mtp         F32 D
mtp?   nextn.embed_tokens.weight     embed_tokens.weight                   same  mtp         -   vocab D
mtp?   nextn.shared_head_head.weight shared_head.head.weight               same  mtp         -   vocab D
model  output_norm.weight            model.norm.weight                     same  norm        F32 D
model  output.weight                 lm_head.weight                        same  head        -   vocab D
"""


@dataclass(frozen=True)
class _Row:
    where: str
    gguf: str
    hf: str
    transform: Transform
    role: Role
    f32: bool
    matrix: Matrix | None
    shape: tuple[str, ...]


def _parse_row(line: str) -> _Row:
    where, gguf, hf, transform, role, kind, *letters = line.split()
    matrix = next((m for m in _MATRICES if gguf.startswith(f"ffn_{m}")), None) if role in _MLP else None
    t, r = cast(Transform, transform), cast(Role, role)
    return _Row(where, gguf, hf, t, r, kind == "F32", matrix, tuple(letters))


_MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
_MLP = ("dense", "shared", "routed")
_TABLE = [_parse_row(line) for line in _TABLE_TEXT.strip().splitlines()[1:]]
_BY_GGUF = {row.gguf: row for row in _TABLE}
# kv_b_proj has two halves: its k part, the first of its rows, answers for the name
_BY_HF = {row.hf: row for row in reversed(_TABLE) if row.where != "layer?"}
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,4})\.(.+)")
_HF_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d{0,4})\.")


def _sizes(hp: Hparams) -> dict[str, int]:
    heads, nope, v = hp.num_attention_heads, hp.qk_nope_head_dim, hp.v_head_dim
    return {
        "D": hp.hidden_size, "2D": 2 * hp.hidden_size, "vocab": hp.vocab_size,
        "H": heads, "nope": nope, "v": v,
        "q_rank": hp.q_lora_rank, "q": heads * (nope + hp.qk_rope_head_dim), "rank": hp.kv_lora_rank,
        "kv": hp.kv_lora_rank + hp.qk_rope_head_dim, "kv_b": heads * (nope + v), "o": heads * v,
        "iq": hp.index_n_heads * hp.index_head_dim, "ik": hp.index_head_dim, "ih": hp.index_n_heads,
        "F": hp.intermediate_size, "E": hp.n_routed_experts, "I": hp.moe_intermediate_size,
        "S": hp.moe_intermediate_size * hp.n_shared_experts,
    }  # fmt: skip


def _places(layer: int | None, hp: Hparams) -> set[str]:
    """Which rows of the table belong to a layer; the MTP block is a sparse layer with more."""
    if layer is None:
        return {"model"}
    if layer >= hp.layers:
        return set()
    mtp = {"mtp", "mtp?"} if layer >= hp.num_hidden_layers else set()
    return {"layer", "layer?", "dense" if layer < hp.first_k_dense_replace else "sparse"} | mtp


def _make(row: _Row, layer: int | None) -> Link:
    gguf, hf = row.gguf, row.hf
    if layer is not None:
        gguf, hf = f"blk.{layer}.{gguf}", f"model.layers.{layer}.{hf}"
    return Link(gguf, hf, row.transform, row.role, row.f32, layer, row.matrix)


def link(gguf_name: str, hp: Hparams) -> Link | None:
    """The link of a GGUF tensor; None for a name that the hyperparameters have no place for."""
    match = _GGUF_LAYER.fullmatch(gguf_name)
    layer, name = (int(match[1]), match[2]) if match else (None, gguf_name)
    row = _BY_GGUF.get(name)
    return _make(row, layer) if row is not None and row.where in _places(layer, hp) else None


def from_hf(hf_name: str, hp: Hparams) -> tuple[Link, int | None] | None:
    """The link of a checkpoint's tensor, and which expert of it; for kv_b_proj the link of its k part."""
    match = _HF_LAYER.fullmatch(hf_name)
    layer, name = (int(match[1]), match[2]) if match else (None, hf_name)
    expert = _HF_EXPERT.match(name)
    if expert:
        name = f"mlp.experts.{{e}}.{name[expert.end() :]}"
    row = _BY_HF.get(name)
    if row is None or row.where not in _places(layer, hp) or (expert is None) != (row.transform != "stack"):
        return None
    return _make(row, layer), int(expert[1]) if expert else None


def expected(hp: Hparams) -> list[tuple[Link, tuple[int, ...]]]:
    """Every tensor that the hyperparameters imply, with its shape: embedding, layers, last norm, head."""
    found: list[Link] = []
    model = [_make(row, None) for row in _TABLE if row.where == "model"]
    found += model[:1]
    for layer in range(hp.layers):
        places = {place for place in _places(layer, hp) if not place.endswith("?")}
        rows = [row for row in _TABLE if row.where in places]
        found += [_make(row, layer) for row in rows if hp.has_indexer(layer) or row.gguf[:8] != "indexer."]
    return [(made, shape(made, hp)) for made in found + model[1:]]


def shape(link: Link, hp: Hparams) -> tuple[int, ...]:
    """The shape of a GGUF tensor, NumPy order."""
    sizes = _sizes(hp)
    name = link.gguf if link.layer is None else link.gguf.split(".", 2)[2]
    return tuple(sizes[letter] for letter in _BY_GGUF[name].shape)
