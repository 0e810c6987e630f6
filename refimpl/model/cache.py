"""What a token leaves behind in every layer: its latent with the rotary key (512 + 64), and the indexer's key (128)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import encode
from refimpl.model.config import Conventions, Precision
from refimpl.quants import dequantize

Array = NDArray[Any]


def rounded(x: Array, to: Precision) -> Array:
    """x as a cache of that precision gives it back, in the type of x; q8_0 as ggml's CPU code on x86-64 stores it."""
    if to == "f32":
        return x
    if to == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(x.dtype)
    raw = encode(x.reshape(-1, x.shape[-1]).astype(np.float32), "q8_0", encoder="avx2")
    return dequantize(raw, "q8_0").reshape(x.shape).astype(x.dtype)


class Cache:
    """Latents [S, 576] and the indexer's keys [S, 128] of each layer; grows by doubling."""

    def __init__(self, conv: Conventions) -> None:
        self._conv = conv
        self._latents: dict[int, tuple[Array, int]] = {}
        self._keys: dict[int, tuple[Array, int]] = {}

    def length(self, layer: int) -> int:
        """Tokens that the layer has seen."""
        return self._latents[layer][1] if layer in self._latents else 0

    def append_latents(self, layer: int, new: Array) -> Array:  # [T, 576] -> [S, 576]
        """Add tokens; all that there are now."""
        return _append(self._latents, layer, rounded(new, self._conv.kv))

    def append_keys(self, layer: int, new: Array) -> Array:  # [T, 128] -> [S, 128]
        """Add tokens; all that there are now."""
        return _append(self._keys, layer, rounded(new, self._conv.kv))


def _append(kept: dict[int, tuple[Array, int]], layer: int, new: Array) -> Array:
    room, used = kept.get(layer, (np.empty((0, new.shape[1]), new.dtype), 0))
    total = used + len(new)
    if total > len(room):
        grown = np.empty((max(total, 2 * len(room)), new.shape[1]), new.dtype)
        grown[:used] = room[:used]
        room = grown
    room[used:total] = new
    kept[layer] = room, total
    return room[:total]
