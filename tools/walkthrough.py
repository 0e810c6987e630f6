"""GLM-5.1 and its quantization on one page of numbers: every number is computed by the code that the text names.

    python -m tools.walkthrough [FOLDER]     # prints the text; with a FOLDER writes its plots there (extra `plot`)

CI runs it. The checks in it are assertions: where text and code part, it stops.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import refimpl
from refimpl.files.golden import tiny_model
from refimpl.model import dsa, moe
from refimpl.model.glm import Glm
from refimpl.model.mlp import swiglu
from refimpl.quants.formats import Q4_K
from refimpl.quants.q4_k import unpack_codes, unpack_scales
from refimpl.reap.saliency import Saliency, derive

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness"
SAID: list[str] = []


def say(text: str) -> None:
    """Print a paragraph, and keep it for the test."""
    SAID.append(text)
    print(text, end="\n\n")


def decode_a_block(file: Path) -> None:
    """One Q4_K block by hand."""
    with refimpl.open(file) as f:
        raw = f.read("blk.1.ffn_gate_exps.weight", slice(0, 1))[:, : Q4_K.block.itemsize]
    block = raw.reshape(-1).view(Q4_K.block)
    scales, mins = unpack_scales(block["scales"])
    codes, d, dmin = unpack_codes(block["qs"])[0], np.float32(block["d"][0]), np.float32(block["dmin"][0])
    i = int(np.flatnonzero(codes)[0])
    scale, low, code = int(scales[0, i // 32]), int(mins[0, i // 32]), int(codes[i])
    by_hand = d * np.float32(scale) * np.float32(code) - dmin * np.float32(low)
    each = np.arange(Q4_K.weights) // 32  # the sub-block of each weight
    whole = d * scales[0, each].astype(np.float32) * codes.astype(np.float32)
    whole -= dmin * mins[0, each].astype(np.float32)
    decoded = refimpl.dequantize(raw, "q4_k")[0]
    say(
        f"1. A Q4_K block is {Q4_K.block.itemsize} bytes for {Q4_K.weights} weights, {Q4_K.bits} bits each: two "
        f"fp16 numbers, d = {d:.7g} and dmin = {dmin:.7g}; eight 6-bit scales and eight 6-bit mins; 256 codes of "
        f"4 bits. Weight {i} has the code {code} in a sub-block of scale {scale} and min {low}, so it is "
        f"d * {scale} * {code} - dmin * {low} = {by_hand:.7g}. The decoder says {decoded[i]:.7g}."
    )
    assert by_hand == decoded[i] and np.array_equal(whole, decoded), "all 256, to the bit"


def follow_a_weight(checkpoint: Path) -> np.ndarray[Any, Any]:
    """One row from BF16 to codes and back; returns its errors."""
    with refimpl.open(checkpoint) as source:
        bits = source.read("model.layers.1.mlp.experts.3.up_proj.weight", slice(0, 1)).view(np.uint16)
    x = (bits.astype(np.uint32) << 16).view(np.float32)
    raw = refimpl.quantize(x, "q4_k")
    y = refimpl.dequantize(raw, "q4_k")
    code = int(unpack_codes(raw.reshape(-1).view(Q4_K.block)["qs"])[0, 0])
    say(
        f"2. A weight of the checkpoint is stored as the 16 bits {int(bits[0, 0]):#06x}, which are {x[0, 0]:.7g}. The "
        f"encoder looks for the eight scales and mins under which its 256 weights lose least, and writes the code "
        f"{code}; it comes back as {y[0, 0]:.7g}, off by {y[0, 0] - x[0, 0]:+.2g}. Over the block the error is "
        f"{np.sqrt(((y - x) ** 2).mean() / (x**2).mean()):.1%} of the weights' size: what 4.5 bits cost."
    )
    again = refimpl.quantize(x, "q4_k", reference=True)
    assert np.array_equal(raw, again), "reference and kernel write the same bytes"
    return np.asarray((y - x)[0])


def route_a_token(model: Glm, trace: dict[str, Any], tokens: list[int]) -> None:
    """The router's choice for the last token, and what REAP thinks of the experts."""
    x, w = trace["ffn_norm-1"], model.layer[1]
    routing = moe.route(x[-1:], w, model.hp, model.conv)
    bias = w.vector("exp_probs_b")
    chosen, p = routing.chosen[0], routing.probs[0]
    plain = np.argsort(-p, kind="stable")[: len(chosen)]
    say(
        f"3. The router gives the last token a probability for each of {model.hp.n_routed_experts} experts, "
        f"sigmoid(logit), adds a bias to choose, and takes the {len(chosen)} largest: {chosen.tolist()}. By "
        f"probability alone it would be {plain.tolist()}. The weights leave the bias out: "
        f"{', '.join(f'{v:.4f}' for v in p[chosen])} divided by their sum {p[chosen].sum():.4f}, times "
        f"{model.hp.routed_scaling_factor}, are {', '.join(f'{v:.4f}' for v in routing.weights[0])}."
    )
    assert np.array_equal(np.sort(chosen), np.sort(np.argsort(-(p + bias), kind="stable")[: len(chosen)]))
    whole = moe.route(x, w, model.hp, model.conv)
    e = int(np.bincount(whole.chosen.reshape(-1), minlength=len(p)).argmax())
    at, slot = np.nonzero(whole.chosen == e)
    outputs = moe.run_expert(e, x[at], w, model.conv)
    norms = np.linalg.norm(outputs.astype(np.float64), axis=1)
    weights = whole.weights[at, slot]
    say(
        f"   REAP scores an expert by how much it adds to the tokens that it gets: the mean of weight times output "
        f"norm. Expert {e} gets {len(at)} of {len(tokens)} tokens; its outputs have norms around {norms.mean():.3f}, "
        f"weighted they come to {(weights * norms).mean():.4f}."
    )
    saliency = Saliency(model.hp.n_routed_experts, x.shape[1])
    saliency.add(e, outputs, weights.astype(np.float64))
    assert np.isclose(derive(saliency.sums)["reap"][e], (weights * norms).mean(), rtol=1e-6)
    one = swiglu(x[at[:1]], *(w.expert(f"ffn_{m}_exps", e) for m in ("gate", "up", "down")), model.conv)
    assert np.array_equal(one, trace["ffn_moe_down-1"][at[0], slot[0]][None])


def select_keys(model: Glm, trace: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What the last query looks at; returns its scores."""
    scores, mask = trace["indexer_score-1"][-1], trace["top_k-1"][-1]
    q, k, weights = trace["indexer_q-1"][-1], trace["indexer_k-1"], trace["indexer_weights-1"][-1]
    best = int(scores.argmax())
    dots = np.maximum(q.astype(np.float64) @ k[best], 0)
    say(
        f"4. The indexer of layer 1 scores {len(scores)} keys for the last query, keeps {int(mask.sum())}. Key "
        f"{best} scores highest: {int((dots > 0).sum())} of {len(dots)} heads have a positive dot product with it, and "
        f"their weighted sum is {dots @ weights:.5f} (recorded: {scores[best]:.5f}). The last one kept scores "
        f"{scores[mask].min():.5f}, the first one dropped {scores[~mask].max():.5f}; equal scores would go to the "
        f"lower index. The key's own rotary part was turned by its position, neighbours (0, 1), (2, 3), … together."
    )
    assert np.isclose(dots @ weights, scores[best], rtol=1e-4)
    assert np.array_equal(
        np.flatnonzero(mask), dsa.select_topk(scores[None], len(scores) - 1, model.hp.index_topk)[0]
    )
    return np.asarray(scores)


def plot(
    folder: Path, errors: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]
) -> None:
    """Two pictures: a block's errors, a query's selection."""
    from refimpl.report.plots import FINE, WRONG, open_figure

    figure, axes = open_figure(folder / "block.png", 1, 1, 9, 3)
    axes[0][0].bar(np.arange(len(errors)), errors, color=FINE, width=1)
    axes[0][0].set(xlabel="weight", ylabel="error", title="what Q4_K costs one block: decoded minus stored")
    figure.savefig(folder / "block.png", dpi=110)
    figure, axes = open_figure(folder / "selection.png", 1, 1, 9, 3)
    axes[0][0].scatter(np.flatnonzero(mask), scores[mask], color=FINE, s=12, label="looked at")
    axes[0][0].scatter(np.flatnonzero(~mask), scores[~mask], color=WRONG, s=12, marker="x", label="left out")
    axes[0][0].set(xlabel="key", ylabel="score", title="which keys the last query looks at, layer 1")
    axes[0][0].legend()
    figure.savefig(folder / "selection.png", dpi=110)


def main(folder: Path | None) -> None:
    """All four parts."""
    from refimpl.model.tokenizer import read_tokenizer

    tiny = tiny_model()
    decode_a_block(tiny / "stock.gguf")
    errors = follow_a_weight(tiny)
    model = refimpl.load(tiny)
    tokenizer = read_tokenizer(model.weights.source)
    tokens = [*tokenizer.prefix, *tokenizer.encode(TEXT + " was upon the face of the deep. " + TEXT)]
    trace = model.trace(tokens)
    route_a_token(model, trace, tokens)
    scores = select_keys(model, trace)
    if folder is not None:
        plot(folder, errors, scores, trace["top_k-1"][-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
