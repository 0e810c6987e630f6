"""The graph of GLM-5.1 as a list of operations that can be judged alone, each from the recorded values it takes.

An operation's name is the activation that it makes. It is judged where its inputs were recorded: `needs` lists them,
"<" standing for the layer's input. Two operations may make the same activation from different inputs (an engine without
the absorbed query has no `kqv`): the first whose inputs are there is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.crosscheck import bounds
from refimpl.crosscheck.bounds import Judged, gamma
from refimpl.crosscheck.scene import Scene
from refimpl.model.cache import rounded

Array = NDArray[Any]


@dataclass(frozen=True)
class Operation:
    """How one activation is made."""

    name: str
    needs: tuple[str, ...]
    judge: Callable[[Scene], Judged]


def _linear(weight: str, source: str) -> Callable[[Scene], Judged]:
    return lambda s: bounds.linear(s.w[weight], s[source], s.conv)


def _norm(weight: str, source: str) -> Callable[[Scene], Judged]:
    return lambda s: bounds.rms_norm(s[source], s.w.vector(weight).astype(np.float64), s.hp.rms_norm_eps)


def _sum(a: str, b: str) -> Callable[[Scene], Judged]:
    return lambda s: (s[a] + s[b], gamma(1) * np.abs(s[a] + s[b]))


def _through(weight: str, inner: Callable[[Scene], Judged]) -> Callable[[Scene], Judged]:
    """A product whose inputs were not recorded, but follow."""
    return lambda s: bounds.through(s.w[weight], inner(s), s.conv)


def _norm_of_sum(s: Scene) -> Judged:
    """The sum is rounded before the norm: twice as much, for the norm's scale moves with it."""
    y, bound = bounds.rms_norm(
        s["attn_out"] + s["<"], s.w.vector("ffn_norm").astype(np.float64), s.hp.rms_norm_eps
    )
    return y, bound + gamma(3) * np.abs(y)


def _last_sum(s: Scene) -> Judged:
    y = s["attn_out"] + s["<"] + s["ffn_out"]
    return y, gamma(2) * (np.abs(s["attn_out"] + s["<"]) + np.abs(y))


def _swiglu(s: Scene) -> Judged:
    return bounds.silu(s["ffn_gate"], s["ffn_up"])


def _expert_swiglu(s: Scene) -> Judged:
    return bounds.silu(s["ffn_moe_gate"], s["ffn_moe_up"])


def _split(s: Scene) -> tuple[Array, Array]:
    """q as nope and rope parts, [T, H, ·]."""
    q = s["q"].reshape(len(s["q"]), s.hp.num_attention_heads, -1)
    return q[..., : s.hp.qk_nope_head_dim], q[..., s.hp.qk_nope_head_dim :]


def _key_norm(s: Scene) -> Judged:
    weight, bias = (s.w.vector(f"indexer.k_norm{end}").astype(np.float64) for end in ("", ".bias"))
    return bounds.layer_norm(s["indexer_k_raw"], weight, bias, s.conv.key_eps)


def _queries(s: Scene) -> Judged:
    return s.turned_first(s["indexer_q_raw"].reshape(len(s["indexer_q_raw"]), s.hp.index_n_heads, -1))


def _index_weights(s: Scene) -> Judged:
    y, bound = bounds.linear(s.w["indexer.proj"], s["attn_norm"], s.conv)
    scale = (s.hp.index_n_heads * s.hp.index_head_dim) ** -0.5
    return y * scale, (bound + gamma(4) * np.abs(y)) * scale


def _scores(s: Scene) -> Judged:
    q, k = s["indexer_q"], rounded(s["indexer_k"].reshape(len(s["indexer_q"]), -1), s.conv.kv)
    exact = (
        (x, np.zeros_like(x))
        for x in (*(bounds.narrow(v, s.conv.index) for v in (q, k)), s["indexer_weights"])
    )
    return bounds.add_heads(*exact)


def replay_scores(s: Scene) -> Judged | None:
    """Scores that were not recorded, from queries and keys before their rotation; None where they cannot be had."""
    if not {"indexer_q_raw", "indexer_k_norm", "attn_norm"} <= s.values.keys():
        return None
    if s.conv.kv != "f32" or s.conv.index != "f32":  # what is rounded may have been rounded the other way
        return None
    return bounds.add_heads(_queries(s), s.turned_first(s["indexer_k_norm"]), _index_weights(s))


def _seen(s: Scene) -> Array:
    """The selection, or everything before where none was recorded."""
    return s["top_k"].astype(np.bool_) if "top_k" in s.values else np.tri(len(s.positions), dtype=np.bool_)


def _latent_attention(s: Scene) -> Judged:
    q = np.concatenate(
        [s["q_nope_absorbed"], s["q_pe"].reshape(len(s["q_pe"]), s.hp.num_attention_heads, -1)], -1
    )
    k = np.concatenate([s["kv_cmpr"], s["k_pe"].reshape(len(s["k_pe"]), -1)], -1)
    scale = (s.hp.qk_nope_head_dim + s.hp.qk_rope_head_dim) ** -0.5
    return bounds.attend(q, k, s["kv_cmpr"], _seen(s), scale, s.conv.kv)


def _values(s: Scene) -> Judged:
    y, bound = s.heads("attn_v_b", s["kqv"])
    return y.reshape(len(y), -1), bound.reshape(len(y), -1)


def _expanded_attention(s: Scene) -> Judged:
    """From latents to heads in one: keys and values restored, rotary parts turned here."""
    nope, rope = _split(s)
    q_pe, q_off = s.turned(rope)
    k_pe, k_off = s.turned(s["kv_cmpr_pe"][:, s.hp.kv_lora_rank :])
    if "k_pe" in s.values:
        k_pe, k_off = s["k_pe"].reshape(k_pe.shape), np.zeros_like(k_pe)
    latents = rounded(np.concatenate([s["kv_cmpr"], k_pe], -1), s.conv.kv)
    c, k_pe = latents[:, : s.hp.kv_lora_rank], latents[:, s.hp.kv_lora_rank :]
    scale = (s.hp.qk_nope_head_dim + s.hp.qk_rope_head_dim) ** -0.5
    keys, values, off, spread = [], [], [], []
    for h in range(nope.shape[1]):
        k, k_bound = bounds.product(c, s.w["attn_k_b"][h].values().astype(np.float64).T)
        v, v_bound = bounds.linear(s.w["attn_v_b"][h], c, s.conv)
        keys.append(np.concatenate([k, k_pe], -1))
        values.append(v)
        turned = q_off[:, h] @ np.abs(k_pe).T + (np.abs(q_pe[:, h]) + q_off[:, h]) @ k_off.T
        off.append((np.abs(nope[:, h]) @ k_bound.T + turned) * scale)
        spread.append(v_bound.max(axis=0))
    query = np.concatenate([nope, q_pe], -1)
    y, bound = bounds.attend(
        query, np.stack(keys), np.stack(values), _seen(s), scale, key_off=np.stack(off, 1)
    )
    return y.reshape(len(y), -1), (bound + np.stack(spread)[None]).reshape(len(y), -1)


def _residual(s: Scene) -> Judged:
    """Attention's output and the layer's input, where the output itself was not recorded."""
    y, bound = bounds.linear(s.w["attn_output"], s["kqv_out"], s.conv)
    return y + s["<"], bound + gamma(1) * (np.abs(y + s["<"]) + bound)


def _expert(matrix: str, source: str) -> Callable[[Scene], Judged]:
    """One matrix of every chosen expert, [T, K, ·]; the input is each token's, or each expert's own."""

    def judge(s: Scene) -> Judged:
        chosen, x = s["ffn_moe_topk"].astype(np.int64), s[source]
        x = np.broadcast_to(x[:, None], (*chosen.shape, x.shape[-1])) if x.ndim == 2 else x
        shape = (*chosen.shape, s.w.expert(f"ffn_{matrix}_exps", int(chosen.min())).shape[0])
        y, bound = np.empty(shape), np.empty(shape)
        for e in np.unique(chosen):
            at = np.nonzero(chosen == e)
            y[at], bound[at] = bounds.linear(s.w.expert(f"ffn_{matrix}_exps", int(e)), x[at], s.conv)
        return y, bound

    return judge


def probabilities(s: Scene) -> Judged:
    """As they were recorded, or else from the logits."""
    if "ffn_moe_probs" in s.values:
        return s["ffn_moe_probs"], np.zeros_like(s["ffn_moe_probs"])
    return bounds.sigmoid(s["ffn_moe_logits"])


def _expert_weights(s: Scene) -> Judged:
    p, off = (np.take_along_axis(x, s["ffn_moe_topk"].astype(np.int64), 1) for x in probabilities(s))
    total = p.sum(axis=1, keepdims=True)
    total = np.maximum(total, 2.0**-14) if s.conv.denominator == "max(sum, 2^-14)" else total
    y, slip = p / total * s.hp.routed_scaling_factor, off / p + off.sum(axis=1, keepdims=True) / total
    return y, (gamma(p.shape[1] + 4) + slip * (1 + slip)) * y


def _experts(s: Scene) -> Judged:
    chosen, weights = s["ffn_moe_topk"].astype(np.int64), s["ffn_moe_weights_scaled"]
    return bounds.experts(s["ffn_norm"], chosen, weights, s.w, s.conv)


def _mixture(s: Scene) -> Judged:
    terms = s["ffn_moe_down"] * s["ffn_moe_weights_scaled"][..., None]
    return terms.sum(axis=1), gamma(terms.shape[1] + 2) * np.abs(terms).sum(axis=1)


def _head_norm(s: Scene) -> Judged:
    return bounds.rms_norm(s["<"], s.top.vector("output_norm").astype(np.float64), s.hp.rms_norm_eps)


def _head(s: Scene) -> Judged:
    return bounds.linear(s.top["output"], s["result_norm"], s.conv)


ATTENTION = (
    Operation("attn_norm", ("<",), _norm("attn_norm", "<")),
    Operation("qr_raw", ("attn_norm",), _linear("attn_q_a", "attn_norm")),
    Operation(
        "qr", ("qr_raw",),
        lambda s: bounds.rms_norm(s["qr_raw"], s.w.vector("attn_q_a_norm").astype(np.float64), s.latent_eps),
    ),
    Operation("q", ("qr",), _linear("attn_q_b", "qr")),
    Operation("q_pe", ("q",), lambda s: s.turned(_split(s)[1])),
    Operation("kv_cmpr_pe", ("attn_norm",), _linear("attn_kv_a_mqa", "attn_norm")),
    Operation(
        "kv_cmpr", ("kv_cmpr_pe",),
        lambda s: bounds.rms_norm(
            s["kv_cmpr_pe"][:, : s.hp.kv_lora_rank], s.w.vector("attn_kv_a_norm").astype(np.float64), s.latent_eps
        ),
    ),
    Operation("k_pe", ("kv_cmpr_pe",), lambda s: s.turned(s["kv_cmpr_pe"][:, s.hp.kv_lora_rank :])),
    Operation("indexer_k_raw", ("attn_norm",), _linear("indexer.attn_k", "attn_norm")),
    Operation("indexer_k_norm", ("indexer_k_raw",), _key_norm),
    Operation("indexer_k", ("indexer_k_norm",), lambda s: s.turned_first(s["indexer_k_norm"])),
    Operation("indexer_q_raw", ("qr",), _linear("indexer.attn_q_b", "qr")),
    Operation("indexer_q", ("indexer_q_raw",), _queries),
    Operation("indexer_weights_raw", ("attn_norm",), _linear("indexer.proj", "attn_norm")),
    Operation("indexer_weights", ("attn_norm",), _index_weights),
    Operation("indexer_score", ("indexer_q", "indexer_k", "indexer_weights"), _scores),
    Operation("q_nope_absorbed", ("q",), lambda s: s.heads("attn_k_b", _split(s)[0])),
    Operation("kqv", ("q_nope_absorbed", "q_pe", "kv_cmpr", "k_pe"), _latent_attention),
    Operation("kqv_out", ("kqv",), _values),
    Operation("kqv_out", ("q", "kv_cmpr", "kv_cmpr_pe"), _expanded_attention),
    Operation("attn_out", ("kqv_out",), _linear("attn_output", "kqv_out")),
    Operation("attn_out", ("q", "kv_cmpr", "kv_cmpr_pe"), _through("attn_output", _expanded_attention)),
    Operation("ffn_inp", ("attn_out", "<"), _sum("attn_out", "<")),
    Operation("ffn_inp", ("kqv_out", "<"), _residual),
    Operation("ffn_norm", ("ffn_inp",), _norm("ffn_norm", "ffn_inp")),
    Operation("ffn_norm", ("attn_out", "<"), _norm_of_sum),
)  # fmt: skip
DENSE = (
    Operation("ffn_gate", ("ffn_norm",), _linear("ffn_gate", "ffn_norm")),
    Operation("ffn_up", ("ffn_norm",), _linear("ffn_up", "ffn_norm")),
    Operation("ffn_swiglu", ("ffn_gate", "ffn_up"), _swiglu),
    Operation("ffn_out", ("ffn_swiglu",), _linear("ffn_down", "ffn_swiglu")),
    Operation("ffn_out", ("ffn_gate", "ffn_up"), _through("ffn_down", _swiglu)),
)
SPARSE = (
    Operation("ffn_moe_logits", ("ffn_norm",), _linear("ffn_gate_inp", "ffn_norm")),
    Operation("ffn_moe_probs", ("ffn_moe_logits",), lambda s: bounds.sigmoid(s["ffn_moe_logits"])),
    Operation("ffn_moe_weights_scaled", ("ffn_moe_probs", "ffn_moe_topk"), _expert_weights),
    Operation("ffn_moe_weights_scaled", ("ffn_moe_logits", "ffn_moe_topk"), _expert_weights),
    Operation("ffn_moe_gate", ("ffn_norm", "ffn_moe_topk"), _expert("gate", "ffn_norm")),
    Operation("ffn_moe_up", ("ffn_norm", "ffn_moe_topk"), _expert("up", "ffn_norm")),
    Operation("ffn_moe_swiglu", ("ffn_moe_gate", "ffn_moe_up"), _expert_swiglu),
    Operation("ffn_moe_down", ("ffn_moe_swiglu", "ffn_moe_topk"), _expert("down", "ffn_moe_swiglu")),
    Operation("ffn_moe_out", ("ffn_moe_down", "ffn_moe_weights_scaled"), _mixture),
    Operation("ffn_moe_out", ("ffn_norm", "ffn_moe_topk", "ffn_moe_weights_scaled"), _experts),
    Operation("ffn_gate", ("ffn_norm",), _linear("ffn_gate_shexp", "ffn_norm")),
    Operation("ffn_up", ("ffn_norm",), _linear("ffn_up_shexp", "ffn_norm")),
    Operation("ffn_swiglu", ("ffn_gate", "ffn_up"), _swiglu),
    Operation("ffn_shexp", ("ffn_swiglu",), _linear("ffn_down_shexp", "ffn_swiglu")),
    Operation("ffn_shexp", ("ffn_gate", "ffn_up"), _through("ffn_down_shexp", _swiglu)),
    Operation("ffn_out", ("ffn_moe_out", "ffn_shexp"), _sum("ffn_moe_out", "ffn_shexp")),
)
LAST = (
    Operation("l_out", ("ffn_inp", "ffn_out"), _sum("ffn_inp", "ffn_out")),
    Operation("l_out", ("attn_out", "<", "ffn_out"), _last_sum),
)
HEAD = (
    Operation("result_norm", ("<",), _head_norm),
    Operation("result_output", ("result_norm",), _head),
)
