"""Score the experts of a model over a text: one layer after the other, all sequences through each.

The unpruned model's own activations feed every layer. Only a layer's weights are in memory; the hidden states
of all tokens lie in a file between two layers, and so a run that was stopped goes on behind its last layer.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl import engine
from refimpl.errors import BadFile, Usage
from refimpl.files import source as model_files
from refimpl.files.hparams import Hparams
from refimpl.files.tokens import read_tokens
from refimpl.model.block import add_attention
from refimpl.model.cache import Cache
from refimpl.model.config import Conventions
from refimpl.model.glm import Glm, load
from refimpl.model.mlp import swiglu
from refimpl.model.moe import Routing, combine, route, run_chosen, run_expert, run_shared
from refimpl.model.norm import rms_norm
from refimpl.model.tokenizer import read_tokenizer
from refimpl.model.weights import Layer
from refimpl.reap import state
from refimpl.reap.presets import Preset, Router, weigh
from refimpl.reap.saliency import Saliency

Array = NDArray[Any]
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # token times layer done, and in all

BATCH = 2048  # tokens that are worth reading and laying an expert's weights out for


@dataclass(frozen=True)
class Text:
    """Tokens to score over, cut into sequences that do not see each other.

    name   : where they come from
    tokens : [T] int64
    """

    name: str
    tokens: Array

    def describe(self, length: int) -> dict[str, Any]:
        digest = sha256(np.ascontiguousarray(self.tokens, "<i8").tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest, "tokens": len(self.tokens), "sequence": length}


def read_texts(model: PathLike, tokens: Sequence[str], texts: Sequence[PathLike]) -> list[Text]:
    """Tokens from .npy files ([T], or [N, T]: rows that are sequences of their own) and lists, then from texts."""
    found: list[Text] = []
    for given in tokens:
        rows = read_tokens(given)
        found += [Text(given if len(rows) == 1 else f"{given}[{i}]", row) for i, row in enumerate(rows)]
    if texts:
        with closing(model_files.open(model)) as source:
            coder = read_tokenizer(source)
        for path in texts:
            try:
                ids = coder.encode(Path(path).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise BadFile(path, None, f"no UTF-8 text: {error}") from None
            found.append(Text(os.path.basename(path), np.array(ids, np.int64)))
    return found


def score(
    model: PathLike,
    texts: Sequence[Text],
    out: PathLike,
    preset: Preset,
    length: int = 2048,
    jobs: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> state.Run:
    """Write the statistics of every MoE layer of the trunk to `out`.

    length : most tokens of a sequence; attention and positions start anew with each
    jobs   : threads; the result does not depend on it

    A folder `<out>.work` holds what a resumed run needs, until `out` is written.
    Raises Usage where `out` exists (force replaces it), or where the folder is of another run.
    """
    if os.path.lexists(out) and not force:
        raise Usage(f"{os.fspath(out)} exists; --force replaces it")
    if length < 1 or not texts or any(len(text.tokens) == 0 for text in texts):
        raise Usage("there is nothing to score: give tokens, in sequences of at least one")
    glm = load(model)
    source = glm.weights.source
    try:
        run = state.Run(
            state.identify(source), preset.to_json(), tuple(text.describe(length) for text in texts)
        )
        spans = list(_cut(texts, length))
        work = _Work(
            Path(f"{os.fspath(out)}.work"), run, sum(len(span) for span in spans), glm.hp.hidden_size
        )
        first, hidden = work.open(lambda: (glm.embed(span) for span in spans))
        total = glm.hp.num_hidden_layers * len(hidden)
        for n in range(first, glm.hp.num_hidden_layers):
            following = work.next_hidden(n)
            saliency = _score_layer(glm, n, spans, hidden, following, preset, jobs, progress, total)
            hidden = work.close_layer(n, saliency, following)
        state.save(out, run, {n: work.read_layer(n, glm.hp) for n in run.model.layers})
    finally:
        source.close()
    shutil.rmtree(work.folder)
    return run


def _cut(texts: Sequence[Text], length: int) -> Iterator[Array]:
    """The sequences: pieces of `length` tokens, the last of each text as long as it comes."""
    for text in texts:
        for start in range(0, len(text.tokens), length):
            yield text.tokens[start : start + length]


def _batches(spans: list[Array]) -> Iterator[slice]:
    """Sequences that are sent through a layer's experts together: up to BATCH tokens, or a longer one alone."""
    start = count = 0
    for i, span in enumerate(spans):
        if count and count + len(span) > BATCH:
            yield slice(start, i)
            start, count = i, 0
        count += len(span)
    yield slice(start, len(spans))


def _score_layer(
    glm: Glm,
    n: int,
    spans: list[Array],
    hidden: Array,
    following: Array,
    preset: Preset,
    jobs: int | None,
    progress: Progress | None,
    total: int,
) -> Saliency | None:
    """Send every sequence through one layer; the statistics of its experts, None of a dense layer."""
    hp, conv, w = glm.hp, glm.conv, Layer(glm.weights, n)
    starts = [0, *np.cumsum([len(span) for span in spans]).tolist()]
    cos, sin = glm.turn(0, max(len(span) for span in spans))

    def run(batch: slice) -> Saliency | None:
        after = []
        for i in range(batch.start, batch.stop):
            h = hidden[starts[i] : starts[i + 1]]
            after.append(add_attention(h, w, n, Cache(conv), (cos[: len(h)], sin[: len(h)]), hp, conv)[0])
        h = np.concatenate(after)
        x = rms_norm(h, w.vector("ffn_norm"), hp.rms_norm_eps)
        seen = None
        if n < hp.first_k_dense_replace:
            out = swiglu(x, w["ffn_gate"], w["ffn_up"], w["ffn_down"], conv)
        else:
            routing = route(x, w, hp, conv)
            outputs = run_chosen(x, routing.chosen, w, conv)
            seen = _observe(x, routing, outputs, w, hp, conv, preset)
            if n == hp.num_hidden_layers - 1:
                return seen  # nobody reads the states behind the last layer
            out = combine(outputs, routing, conv) + run_shared(x, w, conv)
        following[starts[batch.start] : starts[batch.stop]] = h + out
        return seen

    saliency = None if n < hp.first_k_dense_replace else Saliency(hp.n_routed_experts, hp.hidden_size)
    for batch, seen in engine.map_units(_batches(spans), run, jobs):
        if saliency is not None and seen is not None:
            saliency.merge(seen)
        if progress is not None:
            progress(n * len(hidden) + starts[batch.stop], total)
    return saliency


def _observe(
    x: Array, routing: Routing, computed: Array, w: Layer, hp: Hparams, conv: Conventions, preset: Preset
) -> Saliency:  # [T, D], -, [T, K, D]
    """The statistics of some tokens, with the experts that the preset chooses and as it weighs them.

    Outputs that the model has computed are taken; only those that it did not choose are run anew.
    """
    router = Router(hp.num_experts_per_tok, True, hp.routed_scaling_factor)  # no other norm_topk_prob loads
    saliency, chosen = Saliency(hp.n_routed_experts, hp.hidden_size), routing.chosen
    saliency.tokens = len(x)
    picked, weights = weigh(routing.logits, chosen, router, preset)
    as_chosen = np.array_equal(picked, chosen)
    for e in np.unique(picked):
        tokens, slots = np.nonzero(picked == e)
        if as_chosen:
            outputs = computed[tokens, slots]
        else:
            outputs = np.empty((len(tokens), hp.hidden_size), np.float32)
            there = chosen[tokens] == e
            have = there.any(axis=1)
            outputs[have] = computed[tokens[have], there[have].argmax(axis=1)]
            if not have.all():
                outputs[~have] = run_expert(int(e), x[tokens[~have]], w, conv)
        saliency.add(int(e), outputs, weights[tokens, slots])
    return saliency


class _Work:
    """The folder of a run: its description, the finished layers' statistics, the states behind the last."""

    def __init__(self, folder: Path, run: state.Run, tokens: int, width: int) -> None:
        self.folder, self.shape = folder, (tokens, width)
        self._run = json.dumps(asdict(run), sort_keys=True)

    def open(self, embed: Callable[[], Iterator[Array]]) -> tuple[int, Array]:
        """The layer to go on with, and the hidden states before it."""
        self.folder.mkdir(exist_ok=True)
        mark = self.folder / "run.json"
        if mark.exists() and mark.read_text() != self._run:
            raise Usage(f"{self.folder} is of another run: finish that one, or remove the folder")
        mark.write_text(self._run)
        for path in self.folder.glob("*.part"):
            path.unlink()
        done = sorted(int(path.stem.removeprefix("hidden-")) for path in self.folder.glob("hidden-*.npy"))
        if done:
            return done[-1], np.load(
                self.folder / f"hidden-{done[-1]}.npy", mmap_mode="r", allow_pickle=False
            )
        hidden, at = self.next_hidden(-1), 0
        for rows in embed():
            hidden[at : at + len(rows)] = rows
            at += len(rows)
        return 0, self.close_layer(-1, None, hidden)

    def next_hidden(self, n: int) -> Array:
        """Room for the hidden states behind layer n."""
        return np.lib.format.open_memmap(self.folder / f"hidden-{n + 1}.part", "w+", np.float32, self.shape)

    def close_layer(self, n: int, saliency: Saliency | None, hidden: Array) -> Array:
        """Keep a layer's results; what they were computed from is no longer needed. Returns the states to go on."""
        if saliency is not None:
            with open(self.folder / "layer.part", "wb") as file:
                np.savez(file, tokens=np.array(saliency.tokens), **saliency.sums)  # type: ignore[arg-type]
            os.replace(self.folder / "layer.part", self.folder / f"layer-{n}.npz")
        assert isinstance(hidden, np.memmap)
        hidden.flush()
        place = self.folder / f"hidden-{n + 1}.npy"
        os.replace(self.folder / f"hidden-{n + 1}.part", place)
        (self.folder / f"hidden-{n}.npy").unlink(missing_ok=True)
        states: Array = np.load(place, mmap_mode="r", allow_pickle=False)
        return states

    def read_layer(self, n: int, hp: Hparams) -> Saliency:
        """A finished layer's statistics."""
        saliency = Saliency(hp.n_routed_experts, hp.hidden_size)
        with np.load(self.folder / f"layer-{n}.npz", allow_pickle=False) as values:
            saliency.tokens = int(values["tokens"])
            saliency.sums = {name: values[name] for name in saliency.sums}
        return saliency
