"""The benchmark's rows for `reap score`: the tiny model, on as many threads as there are cores, against torch.

    python -m tools.bench --topic reap                  # 102,400 tokens a row, some 5 minutes on two cores
    python -m tools.bench --topic reap --only 512       # sequences of 512 tokens alone

Both sides are whole: from tokens through every layer to the statistics of all experts. Torch's side is
transformers' forward pass (eager weights in float32, no cache, no head) and tools/reap_torch.py behind it, which runs
every expert on every token, as the released programs do. Ours is the command, its files on disk included.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GlmMoeDsaForCausalLM
from transformers.utils import logging

from refimpl.engine import cores
from refimpl.model.glm import load
from refimpl.reap import state
from refimpl.reap.presets import find_preset
from refimpl.reap.saliency import Saliency, derive
from refimpl.reap.score import Text, score
from tools import reap_torch
from tools.bench_rows import Differ, Row

TINY = Path(__file__).resolve().parent.parent / "golden" / "tiny-glm-dsa"
TOKENS, TURNS, PRESET = 102_400, 5, "model"  # a turn's sequences are as many for each of two threads

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """Sequences of the command's default length, and of the length at which attention still weighs little."""
    for length in (2048, 512):
        yield lambda length=length: score_row(length)


def score_row(length: int, tokens: int = TOKENS) -> Row:
    """Score that many tokens of the held-out texts, repeated, a fifth in each turn.

    Both sides agree within 1e-6 on two sequences, given the same inputs of the MoE blocks. (With hidden states of
    their own they do not: a key that only one of them selects, by a difference in the last place, moves a token.)
    """
    logging.disable_progress_bar()
    model = GlmMoeDsaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    torch.set_num_threads(cores())
    coder = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    texts = [
        coder.encode((TINY / f"held-out-{n}.txt").read_text(encoding="utf-8")).ids for n in ("code", "text")
    ]
    ids = np.resize(np.concatenate(texts), tokens)
    turns = [iter(np.split(ids, TURNS)) for _ in range(2)]

    def run(some: Ids) -> dict[int, Saliency]:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "s.safetensors"
            score(TINY, [Text("held out", some)], out, find_preset(PRESET), length)
            return state.load(out)[1]

    def run_torch(some: Ids) -> dict[int, dict[str, torch.Tensor]]:
        return reap_torch.score(model, torch.from_numpy(some), length, PRESET)

    @torch.no_grad()
    def check() -> None:
        sequences, glm = ids[: 2 * length].reshape(2, length), load(TINY)
        traces = [glm.trace(sequence) for sequence in sequences]
        for layer, found in run(ids[: 2 * length]).items():
            inputs = [torch.from_numpy(seen[f"ffn_norm-{layer}"]) for seen in traces]
            want = reap_torch.observe(PRESET, model.model.layers[layer].mlp, inputs, model.config)
            ours = found.sums | derive(found.sums)
            off = max(float(np.abs(ours[k] / v.numpy() - 1).max()) for k, v in want.items())
            if not off < 1e-6:
                raise Differ(f"layer {layer} is {off:.1e} off")

    name = f"REAP scores of the tiny model, {tokens:,} tokens in sequences of {length:,}, {cores()} threads"
    mine, theirs = lambda: run(next(turns[0])), lambda: run_torch(next(turns[1]))
    return Row(
        name,
        f"torch {torch.__version__}",
        3.0,
        tokens // TURNS,
        check,
        mine,
        theirs,
        unit="tok/s",
        turns=TURNS,
    )
