"""DeepSeek sparse attention: a small indexer scores every earlier token, and attention sees the best alone.

    q   [T, 32, 128]  32 queries a token, from the same compressed query as attention's
    k   [S, 128]      one key a token, LayerNorm'ed
    wt  [T, 32]       how much each of the 32 counts

    score[t, s] = sum over h of wt[t, h] * relu(q[t, h] . k[s])

ReLU makes plateaus of exact zeros, so that equal scores are the rule and not the exception; engines leave the choice
among them open. Here the lower index wins.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refimpl.files.hparams import Hparams
from refimpl.model.config import Conventions
from refimpl.model.norm import layer_norm
from refimpl.model.rope import rotate
from refimpl.model.tap import Tap, silent
from refimpl.model.weights import Layer, linear, product

Array = NDArray[Any]
Turn = tuple[Array, Array]

AT_ONCE = 1 << 24  # products of heads and keys, so that those of a long prompt need not exist all together


def index_keys(
    x: Array, w: Layer, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent
) -> Array:  # [T, D] -> [T, 128]
    """The indexer's key of each token; its first 64 channels are rotary."""
    k = tap("indexer_k_raw", linear(w["indexer.attn_k"], x, conv))
    k = layer_norm(k, w.vector("indexer.k_norm"), w.vector("indexer.k_norm.bias"), conv.key_eps)
    k = _rotate_first(tap("indexer_k_norm", k), turn, hp.qk_rope_head_dim)
    return tap("indexer_k", hadamard(k) if conv.hadamard else k)


def index_queries(
    x: Array, qr: Array, w: Layer, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent
) -> tuple[Array, Array]:  # [T, D], [T, 2048] -> [T, 32, 128], [T, 32]
    """The indexer's queries and their weights; both scales, 1/sqrt(32) and 1/sqrt(128), are in the weights."""
    heads, n = hp.index_n_heads, hp.index_head_dim
    q = tap("indexer_q_raw", linear(w["indexer.attn_q_b"], qr, conv)).reshape(len(x), heads, n)
    q = _rotate_first(q, turn, hp.qk_rope_head_dim)
    q = tap("indexer_q", hadamard(q) if conv.hadamard else q)
    weights = linear(w["indexer.proj"], x, conv) * x.dtype.type((heads * n) ** -0.5)
    return q, tap("indexer_weights", weights)


def _rotate_first(x: Array, turn: Turn, n: int) -> Array:
    """Rotate the first n channels. Attention's heads have them last."""
    return np.concatenate([rotate(x[..., :n], turn), x[..., n:]], axis=-1)


def hadamard(x: Array) -> Array:  # [..., n] -> [..., n], n a power of two
    """x H / sqrt(n), H of +1 and -1 by Sylvester's rule: it spreads outliers, and leaves dot products alone."""
    n, half, y = x.shape[-1], 1, np.ascontiguousarray(x)
    while half < n:
        pairs, y = y.reshape(-1, 2, half), np.empty_like(y)
        turned = y.reshape(-1, 2, half)
        np.add(pairs[:, 0], pairs[:, 1], out=turned[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=turned[:, 1])
        half *= 2
    return y * x.dtype.type(n**-0.5)


def score(
    q: Array, k: Array, weights: Array, conv: Conventions
) -> Array:  # [T, H, n], [S, n], [T, H] -> [T, S]
    """Score every key for every query.

    Rounds: the dot products as `product` does; each weighted head and each addition over heads, in the type of q.
    """
    if (
        conv.index != "f32"
    ):  # one scale for each vector: the queries' go into the weights, the keys' to the end
        (q, q_scale), (k, k_scale) = _to_fp8(q, conv.index), _to_fp8(k, conv.index)
        return _score(q, k, weights * q_scale[..., 0], conv) * k_scale[:, 0]
    return _score(q, k, weights, conv)


def _score(q: Array, k: Array, weights: Array, conv: Conventions) -> Array:
    heads = np.maximum(product(q.reshape(-1, q.shape[-1]), k, conv).reshape(*q.shape[:2], len(k)), 0)
    total = np.zeros((len(q), len(k)), q.dtype)
    for h in range(q.shape[1]):
        total += heads[:, h] * weights[:, h : h + 1]
    return total


def _to_fp8(x: Array, kind: str) -> tuple[Array, Array]:  # [..., n] -> [..., n], [..., 1]
    """e4m3 codes, as numbers, and their scale, which brings the largest to 448; ue8m0 rounds it up to a power of 2."""
    most = np.maximum(np.abs(x).max(axis=-1, keepdims=True), x.dtype.type(1e-4))
    scale = most * x.dtype.type(1 / 448)
    if kind == "fp8-ue8m0":
        part, exponent = np.frexp(scale)
        scale = np.ldexp(x.dtype.type(1), exponent - (part == 0.5)).astype(x.dtype)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(x.dtype), scale


def select_topk(scores: Array, first: int, count: int) -> list[Array]:  # [T, S] -> T x [<= count]
    """Choose the best `count` keys of each query among those not after it; equal scores: the lower index.

    first  : position of the first query; key s is at position s
    return : for each query its keys, ascending
    """
    chosen = []
    for t, row in enumerate(scores):
        seen = row[: first + t + 1]
        if len(seen) > count:
            seen = np.argsort(-seen, kind="stable")[:count]
            chosen.append(np.sort(seen))
        else:
            chosen.append(np.arange(len(seen)))
    return chosen


def select(
    q: Array, k: Array, weights: Array, first: int, hp: Hparams, conv: Conventions, tap: Tap = silent
) -> list[Array]:  # [T, H, n], [S, n], [T, H] -> T x [<= 2048]
    """Score and choose, some queries at a time."""
    chosen: list[Array] = []
    parts: list[Array] = []
    step = max(1, AT_ONCE // (q.shape[1] * len(k)))
    for t in range(0, len(q), step):
        scores = score(q[t : t + step], k, weights[t : t + step], conv)
        chosen += select_topk(scores, first + t, hp.index_topk)
        if tap is not silent:
            parts.append(
                np.where(np.arange(len(k)) <= first + t + np.arange(len(scores))[:, None], scores, -np.inf)
            )
    if parts:
        tap("indexer_score", np.concatenate(parts))
    return chosen
