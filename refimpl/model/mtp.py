"""Multi-token prediction: one more decoder layer guesses the token after the next, from the hidden state of this one.

    token t + 1   ->  embedding  ->  enorm  \\
                                             (e | h)  ->  eh_proj  ->  block  ->  shared_head.norm  ->  head
    hidden t, after the last norm -> hnorm  /

Engines use it to draft tokens that the trunk then checks. Its attention is dense: llama.cpp leaves its indexer idle.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.files.hparams import Hparams
from refimpl.model.block import block
from refimpl.model.cache import Cache
from refimpl.model.config import Conventions
from refimpl.model.mla import Turn
from refimpl.model.norm import rms_norm
from refimpl.model.tap import Tap, silent
from refimpl.model.weights import Layer, linear

Array = NDArray[Any]


def draft(
    embedded: Array, hidden: Array, w: Layer, layer: int, cache: Cache, turn: Turn, hp: Hparams, conv: Conventions,
    tap: Tap = silent,
) -> Array:  # [T, D], [T, D] -> [T, D]  # fmt: skip
    """The hidden states, normed, that the head turns into logits for the token after the next.

    embedded : embeddings of the tokens t + 1
    hidden   : result_norm of the trunk for the tokens t
    """
    e = rms_norm(embedded, w.vector("nextn.enorm"), hp.rms_norm_eps)
    h = rms_norm(hidden, w.vector("nextn.hnorm"), hp.rms_norm_eps)
    h = tap("mtp_eh_proj", linear(w["nextn.eh_proj"], np.concatenate([e, h], axis=-1), conv))
    h, _ = block(h, w, layer, cache, turn, hp, replace(conv, dense=True), tap)
    return tap("mtp_shared_head_norm", rms_norm(h, w.vector("nextn.shared_head_norm"), hp.rms_norm_eps))
