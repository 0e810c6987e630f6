"""DeepSeek sparse attention: a small indexer scores every earlier token, and attention sees the best alone.

    q   [T, 32, 128]  32 queries a token, from the same compressed query as attention's
    k   [S, 128]      one key a token, LayerNorm'ed
    wt  [T, 32]       how much each of the 32 counts

    score[t, s] = sum over h of wt[t, h] * relu(q[t, h] . k[s])

ReLU makes plateaus of exact zeros, so that equal scores are the rule and not the exception; engines leave the choice
among them open. Here the lower index wins.
"""

from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refimpl.engine import share, threads_worth
from refimpl.files.hparams import Hparams
from refimpl.model.config import Conventions
from refimpl.model.norm import layer_norm
from refimpl.model.rope import rotate
from refimpl.model.tap import Tap, hears, silent
from refimpl.model.weights import Layer, linear, product

Array = NDArray[Any]
Turn = tuple[Array, Array]

AT_ONCE = 1 << 21  # products of heads and keys, so that those of a long prompt need not exist all together
QUERIES = 96  # tokens whose queries exist at a time: 1.5 MB of them, which the caches hold and malloc keeps


def index_keys(
    x: Array, w: Layer, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent
) -> Array:  # [T, D] -> [T, 128]
    """The indexer's key of each token; its first 64 channels are rotary (attention's heads have them last)."""
    k = tap("indexer_k_raw", linear(w["indexer.attn_k"], x, conv))
    k = layer_norm(k, w.vector("indexer.k_norm"), w.vector("indexer.k_norm.bias"), conv.key_eps)
    k = rotate(tap("indexer_k_norm", k), turn)
    return tap("indexer_k", hadamard(k) if conv.hadamard else k)


def index_queries(
    x: Array, qr: Array, w: Layer, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent
) -> tuple[Array, Array]:  # [T, D], [T, 2048] -> [T, 32, 128], [T, 32]
    """The indexer's queries and their weights; both scales, 1/sqrt(32) and 1/sqrt(128), are in the weights."""
    heads, n = hp.index_n_heads, hp.index_head_dim
    q = tap("indexer_q_raw", linear(w["indexer.attn_q_b"], qr, conv)).reshape(len(x), heads, n)
    q = rotate(q, turn)
    q = tap("indexer_q", hadamard(q) if conv.hadamard else q)
    weights = linear(w["indexer.proj"], x, conv) * x.dtype.type((heads * n) ** -0.5)
    return q, tap("indexer_weights", weights)


def hadamard(x: Array, reference: bool = False) -> Array:  # [..., n] -> [..., n], n a power of two
    """x H / sqrt(n), H of +1 and -1 by Sylvester's rule: it spreads outliers, and leaves dot products alone.

    reference : True takes the NumPy text for float32 too
    """
    n, half, y = x.shape[-1], 1, np.ascontiguousarray(x)
    if x.dtype == np.float32 and not reference:
        out = np.empty((y.size // n, n), np.float32)
        import_module("refimpl.model.dsa_jit").hadamard(y.reshape(out.shape), np.float32(n**-0.5), out)
        return out.reshape(x.shape)
    while half < n:
        pairs, y = y.reshape(-1, 2, half), np.empty_like(y)
        turned = y.reshape(-1, 2, half)
        np.add(pairs[:, 0], pairs[:, 1], out=turned[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=turned[:, 1])
        half *= 2
    return y * x.dtype.type(n**-0.5)


def score(
    q: Array, k: Array, weights: Array, conv: Conventions, first: int | None = None
) -> Array:  # [T, H, n], [S, n], [T, H] -> [T, S]
    """Score every key for every query, or those that it sees.

    first : position of the first query, where key s is at position s: of keys after a query, any number comes back

    Rounds: the dot products as `product` does; each weighted head and each addition over heads, in the type of q.
    """
    if (
        conv.index != "f32"
    ):  # one scale for each vector: the queries' go into the weights, the keys' to the end
        (q, q_scale), (k, k_scale) = to_fp8(q, conv.index), to_fp8(k, conv.index)
        return add_heads(q, k, weights * q_scale[..., 0], conv, first) * k_scale[:, 0]
    return add_heads(q, k, weights, conv, first)


def add_heads(
    q: Array, k: Array, weights: Array, conv: Conventions, first: int | None = None, reference: bool = False
) -> Array:  # [T, H, n], [S, n], [T, H] -> [T, S]
    """The sum over heads of weights[t, h] * relu(q[t, h] . k[s]), one head after the other.

    reference : True takes the NumPy text for float32 too, which scores all keys
    """
    tokens, width = len(q), q.shape[-1]
    if q.dtype == np.float32 and width % 16 == 0 and not reference:
        kernel, q, k = import_module("refimpl.model.dsa_simd").add_heads, *map(np.ascontiguousarray, (q, k))
        jobs, first = threads_worth(conv.jobs, q.size * len(k)), len(k) if first is None else first
        weights, out = np.ascontiguousarray(weights), np.zeros((tokens, len(k)), np.float32)
        if tokens == 1:
            share(lambda some: kernel(q, k[some], weights, len(k), out[:, some].reshape(1, -1)), len(k), jobs)
        else:
            share(lambda some: kernel(q[some], k, weights[some], first + some.start, out[some]), tokens, jobs)
        return out
    heads = np.maximum(product(q.reshape(-1, width), k, conv).reshape(*q.shape[:2], len(k)), 0)
    total = np.zeros((tokens, len(k)), q.dtype)
    for h in range(q.shape[1]):
        total += heads[:, h] * weights[:, h : h + 1]
    return total


def to_fp8(x: Array, kind: str) -> tuple[Array, Array]:  # [..., n] -> [..., n], [..., 1]
    """e4m3 codes, as numbers, and their scale, which brings the largest to 448; ue8m0 rounds it up to a power of 2."""
    most = np.maximum(np.abs(x).max(axis=-1, keepdims=True), x.dtype.type(1e-4))
    scale = most * x.dtype.type(1 / 448)
    if kind == "fp8-ue8m0":
        part, exponent = np.frexp(scale)
        scale = np.ldexp(x.dtype.type(1), exponent - (part == 0.5)).astype(x.dtype)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(x.dtype), scale


def select_topk(
    scores: Array, first: int, count: int, reference: bool = False
) -> list[Array]:  # [T, S] -> T x [<= count]
    """Choose the best `count` keys of each query among those not after it; equal scores: the lower index.

    first     : position of the first query; key s is at position s
    reference : True takes the NumPy text for float32 too
    return    : for each query its keys, ascending
    """
    seen = [min(first + t + 1, scores.shape[1]) for t in range(len(scores))]
    chosen = [np.arange(n) for n in seen if n <= count]  # all there are
    rest = scores[len(chosen) :]
    if scores.dtype == np.float32 and len(rest) and not reference:
        best = np.empty((len(rest), count), np.int64)
        kernel = import_module("refimpl.model.dsa_jit").select_topk
        kernel(np.ascontiguousarray(rest), first + len(chosen), best)
        return chosen + list(best)
    for row, n in zip(rest, seen[len(chosen) :], strict=True):
        chosen.append(np.sort(np.argsort(-row[:n], kind="stable")[:count]))
    return chosen


def select(
    q: Array, k: Array, weights: Array, first: int, hp: Hparams, conv: Conventions, tap: Tap = silent
) -> list[Array]:  # [T, H, n], [S, n], [T, H] -> T x [<= 2048]
    """Score and choose, some queries at a time."""
    chosen: list[Array] = []
    heard = np.full((len(q), len(k)), -np.inf, q.dtype) if hears(tap, "indexer_score") else None
    step = max(1, AT_ONCE // (q.shape[1] * len(k)))
    for t in range(0, len(q), step):
        last = min(t + step, len(q))
        seen = k[: first + last]  # no query of these sees the keys behind
        scores = score(q[t:last], seen, weights[t:last], conv, first + t)
        chosen += select_topk(scores, first + t, hp.index_topk)
        if heard is not None:
            mask = np.arange(len(seen)) <= first + np.arange(t, last)[:, None]
            heard[t:last, : len(seen)] = np.where(mask, scores, -np.inf)
    if heard is not None:
        tap("indexer_score", heard)
    return chosen


def choose(
    x: Array, qr: Array, keys: Array, first: int, w: Layer, turn: Turn, hp: Hparams, conv: Conventions,
    tap: Tap = silent,
) -> list[Array]:  # [T, D], [T, 2048], [S, 128] -> T x [<= 2048]  # fmt: skip
    """Make queries, score and choose: QUERIES tokens at a time where nobody listens, so that all stays in the caches.

    Tokens that see no more keys than may be chosen then need no queries. No part is a short one where there are more
    tokens: ggml adds in another order for a few tokens than for many.
    """
    start, step = 0, len(x)
    if not hears(tap, "indexer_q"):
        if first + len(x) <= hp.index_topk:
            return [np.arange(first + t + 1) for t in range(len(x))]
        start, step = max(0, min(hp.index_topk - first, len(x) - QUERIES // 2)), QUERIES
    ends = [*range(start + step, len(x) - step // 2, step), len(x)]
    chosen = [np.arange(first + t + 1) for t in range(start)]
    for t, last in zip([start, *ends], ends, strict=False):
        part = turn[0][t:last], turn[1][t:last]
        q, weights = index_queries(x[t:last], qr[t:last], w, part, hp, conv, tap)
        chosen += select(q, keys[: first + last], weights, first + t, hp, conv, tap)
    return chosen
