"""One decoder layer: attention and MLP, each on a norm of the stream of hidden states, each added to it."""

from typing import Any

from numpy.typing import NDArray

from refimpl.files.hparams import Hparams
from refimpl.model.cache import Cache
from refimpl.model.config import Conventions
from refimpl.model.mla import Rows, Turn, attention
from refimpl.model.mlp import swiglu
from refimpl.model.moe import moe
from refimpl.model.norm import rms_norm
from refimpl.model.tap import Tap, silent
from refimpl.model.weights import Layer

Array = NDArray[Any]


def block(
    h: Array, w: Layer, layer: int, cache: Cache, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent,
    shared: Rows | None = None,
) -> tuple[Array, Rows]:  # [T, D] -> [T, D]  # fmt: skip
    """h += attention(norm(h)); h += mlp(norm(h)). Also returns which keys each query looked at."""
    h, rows = add_attention(h, w, layer, cache, turn, hp, conv, tap, shared)
    x = tap("ffn_norm", rms_norm(h, w.vector("ffn_norm"), hp.rms_norm_eps))
    if layer < hp.first_k_dense_replace:
        out = swiglu(x, w["ffn_gate"], w["ffn_up"], w["ffn_down"], conv, tap)
    else:
        out = moe(x, w, hp, conv, tap)
    return tap("l_out", h + tap("ffn_out", out)), rows


def add_attention(
    h: Array, w: Layer, layer: int, cache: Cache, turn: Turn, hp: Hparams, conv: Conventions, tap: Tap = silent,
    shared: Rows | None = None,
) -> tuple[Array, Rows]:  # [T, D] -> [T, D]  # fmt: skip
    """The first half of a block: h + attention(norm(h))."""
    x = tap("attn_norm", rms_norm(h, w.vector("attn_norm"), hp.rms_norm_eps))
    out, rows = attention(x, w, layer, cache, turn, hp, conv, tap, shared)
    return tap("ffn_inp", h + out), rows
