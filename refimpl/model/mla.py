"""Multi-head latent attention: a token leaves 512 + 64 numbers behind, from which every head takes its key and value.

    c    [512]  the latent, RMSNorm'ed      key of head h   = (k_b[h]^T c | k_pe)    192 + 64
    k_pe [64]   a rotary key for all heads  value of head h =  v_b[h] c              256

Expanded attention restores keys and values. Absorbed attention moves k_b to the other side of the dot product,
q . (k_b^T c) = (k_b q) . c, and v_b behind the weighted sum: it works on the latents themselves, 576 numbers for all
64 heads. Both are the same in exact arithmetic.
"""

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.sums import add_lanes
from refimpl.engine import share, threads_worth
from refimpl.files.hparams import Hparams
from refimpl.model import dsa
from refimpl.model.cache import Cache, rounded
from refimpl.model.config import Conventions
from refimpl.model.norm import rms_norm
from refimpl.model.rope import rotate
from refimpl.model.tap import Tap, hears, silent
from refimpl.model.weights import Layer, linear, linear_each, product

Array = NDArray[Any]
Turn = tuple[Array, Array]
Rows = list[Array]  # for each query the keys it looks at, ascending

AT_ONCE = 1 << 20  # scores, so that those of a long prompt stay in the caches
CHOSEN = 1 << 16  # scores of chosen keys, which several arrays hold at a time


def softmax(scores: Array) -> Array:  # [..., n] -> [..., n]
    """exp(s - max) / sum. Rounds: once; it is computed in float64, the sum in lanes."""
    wide = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return (wide / add_lanes(wide)[..., None]).astype(scores.dtype)


def mix(
    q: Array, keys: Array, values: Array, scale: float, conv: Conventions, mask: Array | None = None
) -> Array:
    # [Q, n], [K, n], [K, m], [Q, K] -> [Q, m]
    """Weighted sums of values: p = softmax(scale * q keys^T), out = p values.

    mask : which keys each query sees; None: all. Unseen ones add exact zeros, so that bits are as without them.

    Rounds: products as `product` does, the scaled scores, and p once, in the type of q.
    """
    scores = product(rounded(q, conv.kv), keys, conv) * q.dtype.type(scale)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf).astype(q.dtype)
    p = softmax(scores)
    p = rounded(p, "f16") if conv.kv == "f16" else p
    return product(p, values.T, conv)


def mix_chosen(
    q: Array, keys: Array, values: Array, rows: Array, scale: float, conv: Conventions
) -> Array:  # [T, H, n], [S, n], [S, m], [T, K] -> [T, H, m]
    """`mix` for many queries, each with as many keys of its own; float32, widths and K multiples of 16."""
    gather, q = import_module("refimpl.model.gather_simd"), rounded(q, conv.kv)
    scores, out = (
        np.empty((*q.shape[:2], rows.shape[1]), q.dtype),
        np.empty((*q.shape[:2], values.shape[1]), q.dtype),
    )

    def work(some: slice) -> None:
        gather.multiply_rows(q[some], keys, rows[some], scores[some])
        p = softmax(scores[some] * q.dtype.type(scale))
        gather.mix_rows(rounded(p, "f16") if conv.kv == "f16" else p, values, rows[some], out[some])

    share(work, len(q), threads_worth(conv.jobs, 2 * q.size * rows.shape[1]))
    return out


def attend(q: Array, keys: Array, values: Array, rows: Rows, scale: float, conv: Conventions) -> Array:
    # [T, H, n], [S, n], [S, m], T x [K] -> [T, H, m]
    """Each query's heads on the keys that it looks at; the others cost nothing."""
    out, at_once = (
        np.empty((*q.shape[:2], values.shape[1]), q.dtype),
        max(1, AT_ONCE // (q.shape[1] * len(keys))),
    )
    whole = [*q.shape[2:], *values.shape[1:]] if q.dtype == np.float32 else [1]
    t = 0
    while t < len(q):
        last = t
        while last < len(q) and last - t < at_once and rows[last][-1] == len(rows[last]) - 1:
            last += 1  # queries that see all keys up to some one go together
        if last - t < 2:
            last, count = t, len(rows[t])
            while last < len(q) and (last - t) * count * q.shape[1] < CHOSEN and len(rows[last]) == count:
                last += 1
            if last - t > 1 and all(n % 16 == 0 for n in (count, *whole)):
                q, keys, values = (np.ascontiguousarray(x) for x in (q, keys, values))
                out[t:last] = mix_chosen(q[t:last], keys, values, np.stack(rows[t:last]), scale, conv)
                t = last
                continue
            out[t] = mix(q[t], keys[rows[t]], values[rows[t]], scale, conv)
            t += 1
            continue
        seen = np.array([len(r) for r in rows[t:last]])
        mask = np.arange(seen.max()) < np.repeat(seen, q.shape[1])[:, None]
        heads = q[t:last].reshape(-1, q.shape[2])
        together = mix(heads, keys[: seen.max()], values[: seen.max()], scale, conv, mask)
        out[t:last] = together.reshape(last - t, *out.shape[1:])
        t = last
    return out


def absorbed(
    q: Array, q_pe: Array, latents: Array, rows: Rows, w: Layer, hp: Hparams, conv: Conventions, tap: Tap
) -> Array:  # [T, H, 192], [T, H, 64], [S, 576] -> [T, H, 256]
    """Attention on the latents; a latent is key (with k_pe behind it) and value at once."""
    q = tap("q_nope_absorbed", linear_each(w["attn_k_b"], q, conv))
    q, scale = np.concatenate([q, q_pe], axis=-1), (hp.qk_nope_head_dim + hp.qk_rope_head_dim) ** -0.5
    mixed = tap("kqv", attend(q, latents, latents[:, : hp.kv_lora_rank], rows, scale, conv))
    return linear_each(w["attn_v_b"], mixed, conv)


def expanded(
    q: Array, q_pe: Array, latents: Array, rows: Rows, w: Layer, hp: Hparams, conv: Conventions, tap: Tap
) -> Array:  # [T, H, 192], [T, H, 64], [S, 576] -> [T, H, 256]
    """Attention on every head's own keys and values, restored from the latents as the cache holds them, in float."""
    c, k_pe, out = latents[:, : hp.kv_lora_rank], latents[:, hp.kv_lora_rank :], []
    wide = replace(conv, kv="f32")
    q, scale = np.concatenate([q, q_pe], axis=-1), (hp.qk_nope_head_dim + hp.qk_rope_head_dim) ** -0.5
    for h in range(hp.num_attention_heads):
        keys = np.concatenate([product(c, w["attn_k_b"][h].values().T, conv), k_pe], axis=-1)
        out.append(attend(q[:, h : h + 1], keys, linear(w["attn_v_b"][h], c, conv), rows, scale, wide))
    return np.concatenate(out, axis=1)


def attention(
    x: Array, w: Layer, layer: int, cache: Cache, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent,
    shared: Rows | None = None,
) -> tuple[Array, Rows]:  # [T, D] -> [T, D]  # fmt: skip
    """One layer's attention, with its indexer; appends the tokens to the cache.

    shared : the selection of the last layer that made one, for layers without an indexer (GLM-5.2)
    return : the output, and which keys each query looked at
    """
    tokens, heads, nope = len(x), hp.num_attention_heads, hp.qk_nope_head_dim
    eps = hp.rms_norm_eps if conv.latent_eps is None else conv.latent_eps
    qr = rms_norm(tap("qr_raw", linear(w["attn_q_a"], x, conv)), w.vector("attn_q_a_norm"), eps)
    q = tap("q", linear(w["attn_q_b"], tap("qr", qr), conv)).reshape(tokens, heads, -1)
    q_pe = tap("q_pe", rotate(q[..., nope:], turn))

    kv = tap("kv_cmpr_pe", linear(w["attn_kv_a_mqa"], x, conv))
    c = tap("kv_cmpr", rms_norm(kv[:, : hp.kv_lora_rank], w.vector("attn_kv_a_norm"), eps))
    k_pe = tap("k_pe", rotate(kv[:, hp.kv_lora_rank :], turn))
    first = cache.length(layer)
    latents = cache.append_latents(layer, np.concatenate([c, k_pe], axis=-1))

    if conv.dense:
        rows = [np.arange(first + t + 1) for t in range(tokens)]
    elif shared is not None:
        rows = shared
    else:
        keys = cache.append_keys(layer, dsa.index_keys(x, w, turn, hp, conv, tap))
        choosing = first + tokens > hp.index_topk  # otherwise all keys fit
        if choosing or hears(tap, "indexer_score"):
            rows = dsa.choose(x, qr, keys, first, w, turn, hp, conv, tap)
        else:
            rows = [np.arange(first + t + 1) for t in range(tokens)]
    tap_rows(rows, len(latents), tap)

    how = absorbed if conv.attention == "absorbed" else expanded
    out = how(q[..., :nope], q_pe, latents, rows, w, hp, conv, tap).reshape(tokens, -1)
    return tap("attn_out", linear(w["attn_output"], tap("kqv_out", out), conv)), rows


def tap_rows(rows: Rows, keys: int, tap: Tap) -> None:
    """Tell the tap the selection as a mask [T, S]."""
    if hears(tap, "top_k"):
        mask = np.zeros((len(rows), keys), np.bool_)
        for t, chosen in enumerate(rows):
            mask[t, chosen] = True
        tap("top_k", mask)
