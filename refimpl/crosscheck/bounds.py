"""What rounding can do to one operation: its value in float64, and a bound on any engine's distance from it.

u = 2^-24 is what one float32 operation can be off by, as a share; n of them one after the other at most

    gamma(n) = n u / (1 - n u)

and a sum of n products, in any order and with or without fused operations, stays within gamma(n) * sum of |terms|
(N. Higham, Accuracy and Stability of Numerical Algorithms, chapter 3). Each function below returns (value, bound), both
float64, from an operation's own inputs: nothing is carried from one operation to the next, and nothing is tuned.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import PARTNERS, encode
from refimpl.model import dsa
from refimpl.model.cache import rounded
from refimpl.model.config import Conventions, Precision
from refimpl.model.weights import Layer, Matrix
from refimpl.quants import dequantize, quantize
from refimpl.quants.formats import activations

Array = NDArray[Any]
Judged = tuple[Array, Array]

U = 2.0**-24
EXP = 4  # roundings that an engine's exp may cost: 2 ulp, as ggml's vector code and the C libraries promise
TINY = 2.0**-126  # below it float32 loses its relative precision, or is flushed to zero


def gamma(n: int) -> float:
    """The share that n roundings can cost."""
    return n * U / (1 - n * U)


def product(
    x: Array, w: Array, size: Array | None = None, extra: int = 0
) -> Judged:  # [T, n], [m, n] -> [T, m]
    """x W^T. size: |terms| of the weights where they are sums themselves."""
    bound = np.abs(x) @ (np.abs(w) if size is None else size).T
    return x @ w.T, gamma(x.shape[-1] + 2 + extra) * bound + x.shape[-1] * TINY


def linear(w: Matrix, x: Array, conv: Conventions) -> Judged:  # [T, n] -> [T, m]
    """A product with a matrix of the file, on inputs quantized as the conventions say."""
    weights = w.values().astype(np.float64)
    return product(quantized(x, w, conv), weights, _term_sizes(w, weights), extra=8)


def through(w: Matrix, given: Judged, conv: Conventions) -> Judged:  # [T, n] -> [T, m]
    """A product with inputs that may be off themselves."""
    y, bound = linear(w, given[0], conv)
    slip = given[1] @ np.abs(w.values().astype(np.float64)).T
    return y, bound + (1 + gamma(w.shape[-1] + 10)) * slip


def quantized(x: Array, w: Matrix, conv: Conventions) -> Array:
    """The inputs that the engine multiplies: in ggml's conventions rounded to what goes with the weights."""
    name, narrow = w.format.name, x.astype(np.float32)
    if conv.activations == "float" or name == "f32":
        return x
    if name in ("f16", "bf16"):
        return dequantize(quantize(narrow, name), name).astype(np.float64)
    partner = PARTNERS[name]
    kind = activations[partner]
    encoder = "avx2" if conv.order in ("avx2", "tiled", "ggml") else "reference"
    blocks = encode(narrow, partner, encoder=encoder).view(kind.block)
    steps = blocks["d"].astype(np.float64)[..., None]
    return np.asarray(steps * blocks["qs"]).reshape(x.shape)


def _term_sizes(w: Matrix, weights: Array) -> Array:
    """|terms| of each weight: engines add step * code and offset apart, and the two may cancel."""
    if w.format.weights == 1:
        return np.abs(weights)
    zeroed = w.raw.copy().reshape(-1, w.raw.shape[-1]).view(w.format.block)
    for field in zeroed.dtype.names or ():
        if re.fullmatch(r"q[slh]", field):
            zeroed[field] = 0
    offset = dequantize(zeroed.view(np.uint8).reshape(w.raw.shape), w.format).astype(np.float64)
    return np.abs(weights - offset) + np.abs(offset)


def rms_norm(x: Array, weight: Array, eps: float) -> Judged:
    """The sum of squares costs at most n roundings, of which the root halves the share."""
    y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight
    return y, gamma(x.shape[-1] // 2 + 8) * np.abs(y) + TINY


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Judged:
    """As rms_norm, with what the mean's own error does to each difference and to their squares."""
    n = x.shape[-1]
    mean = x.mean(axis=-1, keepdims=True)
    centred = x - mean
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(variance + eps)
    off = gamma(n + 2) * np.abs(x).mean(axis=-1, keepdims=True) + U * np.abs(centred)
    share = (2 * np.abs(centred) * off + off**2).mean(axis=-1, keepdims=True) / (variance + eps) / 2
    y = centred * scale * weight
    return y + bias, np.abs(scale * weight) * off + np.abs(y) * (share + gamma(n // 2 + 8)) + gamma(
        2
    ) * np.abs(bias)


def rotate(x: Array, turn: tuple[Array, Array], positions: Array, theta: float) -> Judged:  # [T, ..., n]
    """Pairs turned; an angle of i steps carries i + 4 roundings, and turns the pair by as much too far."""
    n = x.shape[-1]
    cos, sin = (part.reshape(len(x), *[1] * (x.ndim - 2), -1) for part in turn)
    angle = positions[:, None] * theta ** (-np.arange(0, n, 2) / n)
    slip = (U * (np.arange(n // 2) + 4) * angle).reshape(cos.shape)
    a, b = x[..., 0::2], x[..., 1::2]
    y, bound = np.empty_like(x), np.empty_like(x)
    y[..., 0::2], y[..., 1::2] = a * cos - b * sin, a * sin + b * cos
    bound[..., 0::2] = gamma(5) * (np.abs(a * cos) + np.abs(b * sin)) + slip * (np.abs(a) + np.abs(b))
    bound[..., 1::2] = gamma(5) * (np.abs(a * sin) + np.abs(b * cos)) + slip * (np.abs(a) + np.abs(b))
    return y, bound + TINY


def hadamard(value: Array, bound: Array, rotated: Array) -> Judged:  # what goes in, its bound, what comes out
    """A rotation adds n terms of equal weight."""
    n = value.shape[-1]
    size = (np.abs(value) * gamma(n + 2) + bound).sum(axis=-1, keepdims=True) * n**-0.5
    return rotated, np.broadcast_to(size, value.shape)


def silu(g: Array, up: Array) -> Judged:
    """g / (1 + exp(-g)) * up. Engines that flush exp's far ends differ by what is too small to matter."""
    with np.errstate(over="ignore"):
        y = g / (1 + np.exp(-g)) * up
    return y, gamma(EXP + 6) * np.abs(y) + TINY * (1 + np.abs(up))


def sigmoid(x: Array) -> Judged:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        y = 1 / (1 + np.exp(-x))
    return y, gamma(EXP + 4) * y + TINY


def narrow(x: Array, kind: str) -> Array:
    """What the indexer multiplies: fp8 codes times their scale, exact in float64."""
    if kind == "f32":
        return x
    codes, scale = dsa.to_fp8(x.astype(np.float32), kind)
    return codes.astype(np.float64) * scale


def add_heads(q: Judged, k: Judged, weights: Judged) -> Judged:  # [T, H, n], [S, n], [T, H] -> [T, S]
    """weights * relu(q . k) added over heads, of inputs that may be off themselves; -inf for keys after the query."""
    sizes = [np.abs(x) for x, _ in (q, k, weights)]
    most = [size + off for size, (_, off) in zip(sizes, (q, k, weights), strict=True)]
    dots = np.maximum(np.einsum("thn,sn->ths", q[0], k[0], optimize=True), 0)
    size, reach = (np.einsum("thn,sn->ths", a, b, optimize=True) for a, b, _ in (sizes, most))
    y = np.einsum("ths,th->ts", dots, weights[0], optimize=True)
    spread = (1 + gamma(sum(q[0].shape[1:]) + 4)) * reach - size
    bound = np.einsum("ths,th->ts", spread, most[2], optimize=True)
    bound += np.einsum("ths,th->ts", size, most[2] - sizes[2], optimize=True)
    causal = np.tri(len(y), dtype=np.bool_)
    return np.where(causal, y, -np.inf), np.where(causal, bound, 0)


def experts(x: Array, chosen: Array, weights: Array, w: Layer, conv: Conventions) -> Judged:
    # [T, D], [T, K], [T, K] -> [T, D]
    """Routed experts from their input to the weighted sum, where nothing between was recorded.

    What each step may be off by goes through the next: |silu(g)| <= |g|, and its slope is below 1.1.
    """
    y, bound, size = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for e in np.unique(chosen):
        t, slot = np.nonzero(chosen == e)
        gate, up, down = (w.expert(f"ffn_{part}_exps", int(e)) for part in ("gate", "up", "down"))
        (g, g_off), (u, u_off) = linear(gate, x[t], conv), linear(up, x[t], conv)
        h, h_off = silu(g, u)
        h_off = h_off + 1.1 * g_off * (np.abs(u) + u_off) + np.abs(g) * u_off
        out, off = through(down, (h, h_off), conv)
        weight = weights[t, slot][:, None]
        y[t] += weight * out
        bound[t] += np.abs(weight) * off
        size[t] += np.abs(weight * out)
    return y, bound + gamma(chosen.shape[1] + 2) * (size + bound)


def attend(
    q: Array, keys: Array, values: Array, mask: Array, scale: float, kv: Precision = "f32",
    key_off: Array | None = None,
) -> Judged:  # [T, H, n], [S, n] or [H, S, n], [S, m] or [H, S, m], [T, S] -> [T, H, m]  # fmt: skip
    """Softmax and weighted sum. A score that is off by e changes its probability by exp(2 e) at most.

    kv      : queries and keys are rounded to what the caches store; f16 rounds the probabilities too
    key_off : [T, H, S] what the keys' own making may have done to the scores
    """
    q, keys, values = rounded(q, kv), rounded(keys, kv), rounded(values, kv)
    heads, n = q.shape[1], q.shape[2]
    k = np.broadcast_to(keys, (heads, *keys.shape[-2:]))
    v = np.broadcast_to(values, (heads, *values.shape[-2:]))
    scores = np.einsum("thn,hsn->ths", q, k, optimize=True) * scale
    off = gamma(n + 3) * np.einsum("thn,hsn->ths", np.abs(q), np.abs(k), optimize=True) * scale
    off = off if key_off is None else off + key_off
    seen = mask[:, None, :]
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    largest = np.where(seen, off, 0).max(axis=-1, keepdims=True)
    reach = np.abs(np.where(seen, scores, 0) - scores.max(axis=-1, keepdims=True)).max(axis=-1, keepdims=True)
    count = int(mask.sum(axis=1).max())
    share = np.expm1(2 * largest + 2 * U * reach) + gamma(2 * count + EXP + 8)
    half = (
        (2.0**-11, 2.0**-24) if kv == "f16" else (0.0, TINY)
    )  # of normal probabilities, and of the smallest
    out = np.einsum("ths,hsm->thm", p, v, optimize=True)
    size = np.einsum("ths,hsm->thm", p, np.abs(v), optimize=True)
    least = np.einsum("ts,hsm->thm", mask.astype(np.float64), np.abs(v), optimize=True)
    return out, ((1 + half[0]) * share + half[0]) * size + half[1] * least
