"""The model as a whole: embedding, layers, last norm, head.

>>> m = refimpl.load("model.gguf", engine="refimpl")
>>> m.logits([3, 1, 4])            # [T, V]
>>> m.trace([3, 1, 4])["l_out-0"]  # every named activation
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.start import load_numba
from refimpl.errors import Unsupported, Usage
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import ARCHITECTURE, Hparams
from refimpl.files.origin import hparams
from refimpl.files.source import open
from refimpl.model.block import block
from refimpl.model.cache import Cache
from refimpl.model.config import Conventions, conventions
from refimpl.model.mla import Rows
from refimpl.model.mtp import draft
from refimpl.model.norm import rms_norm
from refimpl.model.rope import angles
from refimpl.model.sampling import Sampling, distribution, draw
from refimpl.model.tap import Recorder, Tap, silent
from refimpl.model.weights import Layer, Weights, linear

Array = NDArray[Any]
_DIVIDED = f"{ARCHITECTURE}.expert_weights_norm"  # the chosen experts' weights are divided by their sum


class Glm:
    """A GLM-5.1 that can be run: weights of one file, conventions of one engine.

    hp     : its sizes; with `experts` given, n_routed_experts counts those
    layers : which layers of the trunk run
    """

    def __init__(self, weights: Weights, hp: Hparams, conv: Conventions, layers: range) -> None:
        self.weights, self.hp, self.conv, self.layers = weights, hp, conv, layers
        self.top = Layer(weights, None)
        self.layer = {n: Layer(weights, n) for n in range(hp.layers)}

    def embed(self, tokens: Iterable[int], float64: bool = False) -> Array:  # [T] -> [T, D]
        """The hidden states before the first layer. Raises Usage for a token the vocabulary lacks."""
        ids = np.asarray(list(tokens), np.int64)
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self.hp.vocab_size:
            raise Usage(f"tokens must be 0 to {self.hp.vocab_size - 1:,}, and at least one")
        rows = self.top["token_embd"].values(ids)
        return rows.astype(np.float64) if float64 else rows

    def run_layers(self, h: Array, cache: Cache, tap: Recorder | None = None) -> Array:  # [T, D] -> [T, D]
        """The layers, from hidden states to hidden states; positions follow what the cache has seen."""
        first = cache.length(self.layers.start)
        turn = self.turn(first, len(h))
        shared: Rows | None = None
        for n in self.layers:
            listen = silent if tap is None else tap.at(n)
            given = None if self.hp.has_indexer(n) else shared
            h, shared = block(h, self.layer[n], n, cache, turn, self.hp, self.conv, listen, given)
        return h

    def turn(self, first: int, count: int) -> tuple[Array, Array]:  # -> 2 x [T, 32]
        """Cosines and sines of `count` positions from `first` on."""
        positions = np.arange(first, first + count)
        return angles(positions, self.hp.qk_rope_head_dim, self.hp.rope_theta, self.conv.angles)

    def head(self, h: Array, tap: Tap = silent) -> Array:  # [T, D] -> [T, V]
        """Last norm and head."""
        x = tap("result_norm", rms_norm(h, self.top.vector("output_norm"), self.hp.rms_norm_eps))
        return tap("result_output", linear(self.top["output"], x, self.conv))

    def step(self, tokens: Iterable[int], cache: Cache, last: bool = False) -> Array:  # [T] -> [T or 1, V]
        """Logits of the tokens that come after those in the cache; of the last one only, where that is enough."""
        h = self.run_layers(self.embed(tokens), cache)
        return self.head(h[-1:] if last else h)

    def logits(self, tokens: Iterable[int], float64: bool = False) -> Array:  # [T] -> [T, V]
        """What may follow each token, as logits; float64: the truth that bounds are measured against."""
        self._whole()
        return self.head(self.run_layers(self.embed(tokens, float64), Cache(self.conv)))

    def draft_logits(self, tokens: Iterable[int], float64: bool = False) -> Array:  # [T] -> [T - 1, V]
        """What the MTP block says may follow the token after each token. Raises Usage where the file has none."""
        self._whole()
        n = self.hp.num_hidden_layers
        if "nextn.eh_proj" not in self.layer.get(n, ()):
            raise Usage(f"{self.weights.source.path} has no MTP block")
        h = self.embed(tokens, float64)
        if len(h) < 2:
            raise Usage("the MTP block needs two tokens at least")
        hidden = rms_norm(
            self.run_layers(h, Cache(self.conv)), self.top.vector("output_norm"), self.hp.rms_norm_eps
        )
        turn = self.turn(0, len(h) - 1)
        drafted = draft(h[1:], hidden[:-1], self.layer[n], n, Cache(self.conv), turn, self.hp, self.conv)
        return linear(self.top["output"], drafted, self.conv)

    def trace(
        self, tokens: Iterable[int] | None = None, hidden: Array | None = None, float64: bool = False
    ) -> dict[str, Array]:
        """Every named activation of a forward pass, in order.

        tokens : [T], where the layers begin with the first
        hidden : [T, D] instead: what goes into the first of the layers
        """
        tap = Recorder()
        if (tokens is None) == (hidden is None):
            raise Usage("give either tokens or hidden states")
        if hidden is None:
            if self.layers.start:
                raise Usage(
                    f"the layers begin with {self.layers.start}: give the hidden states that go into it"
                )
            hidden = tap.at(None)("inp_embd", self.embed(() if tokens is None else tokens, float64))
        else:
            hidden = np.asarray(hidden, np.float64 if float64 else np.float32)
            if hidden.ndim != 2 or hidden.shape[1] != self.hp.hidden_size:
                raise Usage(f"hidden states have the shape {hidden.shape}, not [T, {self.hp.hidden_size}]")
            hidden = tap.at(None)("inp_hidden", hidden)
        h = self.run_layers(hidden, Cache(self.conv), tap)
        if self.layers.stop == self.hp.num_hidden_layers:
            self.head(h, tap.at(None))
        return tap.kept

    def generate(self, tokens: Iterable[int], n: int) -> list[int]:
        """The n likeliest next tokens, one after the other."""
        return list(self.sample(tokens, n, Sampling(temperature=0)))

    def sample(
        self, tokens: Iterable[int], n: int, how: Sampling, eos: frozenset[int] = frozenset()
    ) -> Iterator[int]:
        """Draw up to n tokens, one after the other; ends behind a token of `eos`."""
        self._whole()
        cache, ids, random = Cache(self.conv), [int(t) for t in tokens], np.random.default_rng(how.seed)
        new = ids
        for _ in range(n):
            token = draw(distribution(self.step(new, cache, last=True)[0], ids, how), random)
            yield token
            if token in eos:
                return
            ids, new = [*ids, token], [token]

    def _whole(self) -> None:
        if self.layers != range(self.hp.num_hidden_layers):
            raise Usage("some layers only: from tokens to logits it takes all; use trace")


def load(
    path: str | os.PathLike[str],
    engine: str | Conventions = "refimpl",
    layers: range | tuple[int, int] | None = None,
    experts: Sequence[int] | None = None,
    **changes: Any,
) -> Glm:
    """Open a GGUF or a checkpoint to run it; weights are read when they are needed.

    engine  : whose conventions: refimpl, transformers, llama.cpp or deepseek
    layers  : a range of trunk layers; None: all
    experts : which routed experts to keep, in this order; None: all
    changes : single conventions, such as dense=True

    Raises: BadFile, Unsupported, and Usage for layers and experts that the model lacks.
    """
    load_numba()
    source = open(path)
    try:
        hp = hparams(source)
        if isinstance(source, Gguf) and source.metadata.get(_DIVIDED, True) is not True:
            raise Unsupported(f"{source.path}: {_DIVIDED} is not true")
        chosen = range(hp.num_hidden_layers) if layers is None else _range(layers, hp.num_hidden_layers)
        weights = Weights(source, hp, None if experts is None else _experts(experts, hp))
    except BaseException:
        source.close()
        raise
    if experts is not None:
        hp = replace(hp, n_routed_experts=len(experts))
    return Glm(weights, hp, conventions(engine, **changes), chosen)


def _range(layers: range | tuple[int, int], count: int) -> range:
    made = layers if isinstance(layers, range) else range(*layers)
    if made.step != 1 or not 0 <= made.start < made.stop <= count:
        raise Usage(f"layers {made.start}:{made.stop} are not in 0:{count}")
    return made


def _experts(experts: Sequence[int], hp: Hparams) -> list[int]:
    kept = [int(e) for e in experts]
    if len(set(kept)) != len(kept) or not all(0 <= e < hp.n_routed_experts for e in kept):
        raise Usage(f"experts must be different numbers from 0 to {hp.n_routed_experts - 1}")
    if len(kept) < hp.num_experts_per_tok or hp.n_group != 1:
        raise Usage(f"every token needs {hp.num_experts_per_tok} experts of one group")
    return kept
