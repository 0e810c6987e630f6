"""Give the indexer a gradient: transformers runs it under no_grad, so nothing would teach it what to select.

As in DeepSeek-V3.2's report, the indexer learns to predict where the main attention looks. The target p[t] is
the attention summed over heads and normalised; softmax makes a distribution of the indexer's scores I[t]; the
loss is KL(p[t] || softmax(I[t])): over all earlier tokens while attention is dense, then over the selected.
Inputs and target are detached: the indexer does not pull at the model and the model not at the indexer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, GlmMoeDsaIndexer

Rope = tuple[torch.Tensor, torch.Tensor]


def score(
    indexer: GlmMoeDsaIndexer, x: torch.Tensor, q_latent: torch.Tensor, cos_sin: Rope, rows: torch.Tensor
) -> torch.Tensor:
    """Score every token s for the tokens t in rows: the formula of the module's own forward, with gradients.

    I[t, s] = sum_h w[t, h] * 32^-0.5 * relu(128^-0.5 * q[t, h] . k[s])

    x : [B, T, D] normed hidden state, q_latent : [B, T, 256], cos_sin : two of [1, T, 64], rows : [R] int64
    return : [B, R, T] float32, -inf where s > t
    """
    rope = indexer.qk_rope_head_dim
    cos, sin = (a[..., : rope // 2] for a in cos_sin)
    q = indexer.wq_b(q_latent[:, rows]).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    q = torch.cat([_rotate(q[..., :rope], cos[:, rows, None], sin[:, rows, None]), q[..., rope:]], -1)
    k = indexer.k_norm(indexer.wk(x))
    k = torch.cat([_rotate(k[..., :rope], cos, sin), k[..., rope:]], -1)
    w = indexer.weights_proj(x[:, rows]) * (indexer.n_heads * indexer.head_dim) ** -0.5
    dots = torch.relu(q.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, q.shape[1:3])
    scores = torch.einsum("brh,brhs->brs", w, dots)
    return scores.masked_fill(torch.arange(x.shape[1]) > rows[:, None], float("-inf"))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (2i, 2i+1); evens come out first, in q and k alike, so dot products are unchanged."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Lesson:
    """Watches one attention layer during a forward pass and holds the indexer's loss afterwards.

    A random part of the query rows is enough for the gradient, and the scores of 32 heads are what costs.
    """

    def __init__(self, attention: GlmMoeDsaAttention, sparse: bool, rows: torch.Tensor):
        self.indexer = attention.indexer
        self.sparse = sparse
        self.rows = rows
        self.loss = torch.zeros(())

    def select(self, x, q_latent, cos_sin, *rest, **named) -> torch.Tensor:
        """Stand in for GlmMoeDsaIndexer.forward: keep the scores; select as it does, or everything if dense.

        Twice as fast as the original, whose product copies the keys for every row.
        """
        with torch.enable_grad():
            self.scores = score(self.indexer, x.detach(), q_latent.detach(), cos_sin, self.rows)
        if not self.sparse:
            return everything(x)
        with torch.no_grad():
            every = score(self.indexer, x, q_latent, cos_sin, torch.arange(x.shape[1]))
            chosen = every.topk(min(self.indexer.index_topk, x.shape[1]), -1).indices
        others = torch.ones_like(self.scores, dtype=torch.bool).scatter(-1, chosen[:, self.rows], False)
        with torch.enable_grad():
            self.scores = self.scores.masked_fill(others, float("-inf"))
        return chosen.to(torch.int32)

    def compare(self, module, args, output) -> None:
        """Forward hook of the attention layer: output[1] is the attention [B, H, T, S] after softmax."""
        # every head sums to one, so the mean is the normalised sum
        self.target = output[1].detach()[:, :, self.rows].mean(1)
        with torch.enable_grad():
            log_q = self.scores.log_softmax(-1)
            # the target is exactly 0 where log_q is -inf; leave those out instead of multiplying 0 by inf
            kl = torch.xlogy(self.target, self.target) - self.target * log_q.masked_fill(self.target == 0, 0)
            self.loss = kl.sum(-1).mean()


def everything(x: torch.Tensor) -> torch.Tensor:
    """Select all positions: dense attention, the causal mask still applies."""
    return torch.arange(x.shape[1], dtype=torch.int32).expand(x.shape[0], x.shape[1], -1)


@contextmanager
def dense(model: GlmMoeDsaForCausalLM) -> Iterator[None]:
    """Attend to everything without running the indexers at all."""
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    for indexer in indexers:
        indexer.forward = lambda x, *rest, **named: everything(x)
    try:
        yield
    finally:
        for indexer in indexers:
            del indexer.forward


@contextmanager
def lessons(model: GlmMoeDsaForCausalLM, sparse: bool, rows: torch.Tensor) -> Iterator[list[Lesson]]:
    """Attach a lesson to every layer; attention must be eager, which is the one that returns its weights."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = [layer.self_attn for layer in model.model.layers]
    attached = [Lesson(attention, sparse, rows) for attention in attentions]
    hooks = []
    for attention, lesson in zip(attentions, attached, strict=True):
        attention.indexer.forward = lesson.select
        hooks.append(attention.register_forward_hook(lesson.compare))
    try:
        yield attached
    finally:
        for attention, hook in zip(attentions, hooks, strict=True):
            del attention.indexer.forward
            hook.remove()
        model.set_attn_implementation(implementation)


@torch.no_grad()
def recall(model: GlmMoeDsaForCausalLM, ids: torch.Tensor) -> tuple[float, float]:
    """Share of dense attention's mass that the indexers' choice holds, and the best choice could hold.

    ids : [B, T] with T > index_topk; only rows that must leave something out count
    """
    topk = model.config.index_topk
    with lessons(model, False, torch.arange(topk, ids.shape[1])) as attached:
        model(input_ids=ids, use_cache=False)
    chosen = [lesson.target.gather(-1, lesson.scores.topk(topk, -1).indices).sum(-1) for lesson in attached]
    best = [lesson.target.topk(topk, -1).values.sum(-1) for lesson in attached]
    return torch.stack(chosen).mean().item(), torch.stack(best).mean().item()
