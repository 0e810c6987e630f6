"""Token windows to learn from, and bits per byte on text that was held out."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import GlmMoeDsaForCausalLM

from tools import tiny_indexer

PREFIX = ("[gMASK]", "<sop>")
END = "<|endoftext|>"


class Stream:
    """All learned documents as one row of tokens; a batch depends on the seed and the step alone."""

    def __init__(self, tokenizer: Tokenizer, documents: Iterable[str], seed: int):
        end = tokenizer.token_to_id(END)
        self.ids = torch.tensor([i for e in tokenizer.encode_batch(list(documents)) for i in (*e.ids, end)])
        self.prefix = torch.tensor([tokenizer.token_to_id(t) for t in PREFIX])
        self.seed = seed

    def draw(self, step: int, batch: int, length: int) -> torch.Tensor:
        """Cut windows at random places; every second one begins with [gMASK]<sop>, as a prompt does.

        return : [batch, length] int64
        """
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.ids) - length, (batch,), generator=chance)
        windows = torch.stack([self.ids[s : s + length] for s in starts.tolist()])
        windows[::2, :2] = self.prefix
        return windows


@torch.no_grad()
def bits_per_byte(model: GlmMoeDsaForCausalLM, tokenizer: Tokenizer, text: str, context: int) -> float:
    """Held-out loss: windows of `context` tokens, each after its own [gMASK]<sop>, every token scored once.

    bpb = sum over tokens of -log2 p(token | window so far) / bytes of the text
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor(tokenizer.encode(text).ids)
    prefix = torch.tensor([tokenizer.token_to_id(t) for t in PREFIX])
    total = 0.0
    for start in range(0, len(ids), (context - 2) * 8):
        piece = ids[start : start + (context - 2) * 8]
        padded = F.pad(piece, (0, -len(piece) % (context - 2)), value=-100).unflatten(0, (-1, context - 2))
        inputs = torch.cat([prefix.expand(len(padded), 2), padded.clamp(min=0)], 1)
        logits = model(input_ids=inputs, use_cache=False).logits[:, 1:-1]
        total += F.cross_entropy(
            logits.flatten(0, 1), padded.flatten(), ignore_index=-100, reduction="sum"
        ).item()
    model.train(was_training)
    return total / math.log(2) / len(text.encode())


def measure(
    model: GlmMoeDsaForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], context: int
) -> dict[str, dict[str, float]]:
    """Bits per byte of each kind, attending to everything and with transformers' own sparse attention."""
    with tiny_indexer.dense(model):
        dense = _each(model, tokenizer, texts, context)
    return {"dense": dense, "sparse": _each(model, tokenizer, texts, context)}


@torch.no_grad()
def worth_of_bias(
    model: GlmMoeDsaForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], context: int
) -> dict[str, Any]:
    """Take the router's bias away: how many of its choices of an expert change, per layer, and what it costs.

    Balancing moves a token between experts that suit it about equally, so many choices may change at little cost.
    """
    first = model.config.first_k_dense_replace
    routers = [layer.mlp.gate for layer in model.model.layers[first:]]
    kept = [router.e_score_correction_bias.clone() for router in routers]
    changed = [torch.zeros(2) for _ in routers]
    hooks = [
        router.register_forward_hook(partial(_compare, bias, counts))
        for router, bias, counts in zip(routers, kept, changed, strict=True)
    ]
    for router in routers:
        router.e_score_correction_bias.zero_()
    figures = _each(model, tokenizer, texts, context)
    for router, bias, hook in zip(routers, kept, hooks, strict=True):
        router.e_score_correction_bias.copy_(bias)
        hook.remove()
    return {"choices_changed": [round((c[0] / c[1]).item(), 4) for c in changed], "bits_per_byte": figures}


def _compare(
    bias: torch.Tensor, counts: torch.Tensor, router: torch.nn.Module, inputs: tuple, out: tuple
) -> None:
    """Forward hook of a router without its bias: count the experts [tokens, 4] that it would not choose with it."""
    with_bias = (out[0].sigmoid() + bias).topk(out[2].shape[-1], -1).indices
    lost = (out[2].unsqueeze(2) != with_bias.unsqueeze(1)).all(-1)
    counts += torch.tensor([lost.sum(), lost.numel()])


def _each(model: GlmMoeDsaForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], context: int) -> dict:
    return {kind: round(bits_per_byte(model, tokenizer, text, context), 4) for kind, text in texts.items()}
