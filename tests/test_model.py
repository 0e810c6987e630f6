"""GLM-5.1 on the embedded model: both attentions, decode and prefill, pruning, conventions."""

from dataclasses import fields
from pathlib import Path

import models
import numpy as np
import pytest
import tiny_checkpoint

import refimpl
from refimpl.dots import matmul_each
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files.gguf import GGUFValueType as T
from refimpl.files.golden import tiny_model
from refimpl.model import dsa, mla, moe, rope
from refimpl.model.cache import Cache
from refimpl.model.config import ENGINES, Conventions, conventions

TINY = tiny_model()
IDS = np.random.default_rng(0).integers(0, 1256, 90).tolist()


@pytest.fixture(scope="module")
def model():
    return refimpl.load(TINY)


@pytest.fixture(scope="module")
def logits(model):
    return model.logits(IDS)


def share(got, want):
    return np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()


def test_float64_is_the_truth_that_float32_is_near(model, logits):
    truth = model.logits(IDS, float64=True)
    assert truth.dtype == np.float64 and logits.dtype == np.float32
    assert 0 < share(logits, truth) < 1e-6


def test_absorbed_and_expanded_attention_are_the_same_in_exact_arithmetic(model):
    one, two = (
        refimpl.load(TINY, attention=kind).logits(IDS, float64=True) for kind in ("absorbed", "expanded")
    )
    assert 0 < share(one, two) < 1e-12


def test_token_by_token_is_as_in_one_batch(model, logits):
    cache = Cache(model.conv)
    steps = np.concatenate([model.step([token], cache) for token in IDS])
    assert np.array_equal(steps, logits)


def test_a_prompt_may_come_in_pieces(model, logits):
    cache = Cache(model.conv)
    pieces = [model.step(IDS[a:b], cache) for a, b in ((0, 40), (40, 41), (41, 90))]
    assert np.array_equal(np.concatenate(pieces), logits)


@pytest.mark.parametrize("file", ["stock", "protected", "imatrix-quantized"])
def test_a_quantized_file_says_nearly_what_the_checkpoint_says(logits, file):
    got = refimpl.load(TINY / f"{file}.gguf").logits(IDS)
    assert 0 < np.abs(got - logits).mean() < 0.25
    assert (got.argmax(1) == logits.argmax(1)).mean() > 0.8


def test_weights_are_kept_as_the_file_has_them():
    """After a pass over all layers: the file's own bytes, and of float32 the norms' and biases' alone."""
    model = refimpl.load(TINY / "stock.gguf")
    model.logits(IDS)
    layers, tensors = (model.top, *model.layer.values()), model.weights.source.tensors.values()
    assert sum(m.raw.nbytes for layer in layers for m in layer._kept.values()) == sum(
        t.nbytes for t in tensors
    )
    floats = [v.nbytes for layer in layers for v in layer._vectors.values()]
    assert 0 < sum(floats) < 20_000 < sum(t.nbytes for t in tensors) / 100


def test_a_model_with_all_experts_named_is_the_whole_model(logits):
    assert np.array_equal(refimpl.load(TINY, experts=range(16)).logits(IDS), logits)


def test_pruned_in_place_only_kept_experts_are_chosen(model):
    kept = [1, 2, 3, 5, 8, 13]
    child, parent = refimpl.load(TINY, experts=kept).trace(IDS[:20]), model.trace(IDS[:20])
    assert child["ffn_moe_logits-1"].shape == (20, 6)
    assert np.array_equal(child["ffn_moe_logits-1"], parent["ffn_moe_logits-1"][:, kept])
    assert not np.array_equal(child["l_out-1"], parent["l_out-1"])


def test_a_slice_runs_from_hidden_states_to_hidden_states(model):
    whole = model.trace(IDS)
    part = refimpl.load(TINY, layers=(1, 2)).trace(hidden=whole["l_out-0"])
    assert np.array_equal(part["l_out-1"], whole["l_out-1"])
    assert not any(name.endswith(("-0", "-2")) for name in part)


def test_every_engine_differs_from_refimpl_but_not_much(model, logits):
    for engine in set(ENGINES) - {"refimpl"}:
        off = np.abs(refimpl.load(TINY, engine=engine).logits(IDS) - logits)
        assert 0 < np.median(off) < 0.2, engine


def test_dense_attention_changes_nothing_until_the_selection_is_full(model, logits):
    dense = refimpl.load(TINY, dense=True).logits(IDS)
    assert np.array_equal(dense[:64], logits[:64])
    assert not np.array_equal(dense[64:], logits[64:])


def test_equal_scores_go_to_the_lower_index():
    scores = np.array([[0.0, 2, 0, 0, 1, 0, 9]], np.float32)
    (chosen,) = dsa.select_topk(scores, first=5, count=4)
    assert chosen.tolist() == [0, 1, 2, 4]  # 2 and 1, then the first two zeros; 6 is not yet there


def test_the_bias_steers_the_choice_and_not_the_weights(model):
    x = model.trace(IDS[:8])["ffn_norm-1"]
    routing = moe.route(x, model.layer[1], model.hp, model.conv)
    chosen = np.take_along_axis(routing.probs, routing.chosen, 1)
    assert np.allclose(routing.weights, 2.5 * chosen / chosen.sum(1, keepdims=True), rtol=1e-6)
    bias = model.layer[1].vector("exp_probs_b")
    assert np.array_equal(
        np.sort(routing.chosen), np.sort(np.argsort(-(routing.probs + bias), kind="stable")[:, :4])
    )


def test_neighbours_are_turned_by_hand():
    turn = rope.angles(np.array([0, 1]), 4, 100.0)  # frequencies 1 and 100^(-1/2) = 0.1
    x = np.array([[1, 0, 1, 0], [1, 0, 1, 0]], np.float64)
    want = [[1, 0, 1, 0], [np.cos(1), np.sin(1), np.cos(0.1), np.sin(0.1)]]
    assert np.allclose(rope.rotate(x, turn), want, rtol=1e-15)
    assert not np.allclose(rope.rotate(x, turn, halves=True), want)


def test_hadamard_leaves_dot_products_alone():
    a, b = np.random.default_rng(3).standard_normal((2, 5, 128))
    assert np.allclose(dsa.hadamard(a) @ dsa.hadamard(b).T, a @ b.T, rtol=1e-12, atol=1e-12)
    assert np.allclose(dsa.hadamard(np.eye(2)), np.array([[1, 1], [1, -1]]) / np.sqrt(2))


def test_what_makes_no_sense_is_said(model):
    for wrong in ([], [-1], [1280]):
        with pytest.raises(Usage, match="tokens must be"):
            model.logits(wrong)
    with pytest.raises(Usage, match="no engine"):
        conventions("vllm")
    for layers in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(Usage, match="layers"):
            refimpl.load(TINY, layers=layers)
    with pytest.raises(Usage, match="experts"):
        refimpl.load(TINY, experts=[0, 1, 2])
    with pytest.raises(Usage, match="some layers only"):
        refimpl.load(TINY, layers=(0, 1)).logits([1])


def test_a_missing_tensor_is_named(tmp_path):
    weights = tiny_checkpoint.draw_weights(tiny_checkpoint.CONFIG)
    del weights["model.layers.1.self_attn.o_proj.weight"]
    tiny_checkpoint.write_checkpoint(tmp_path, weights=weights)
    with pytest.raises(BadFile, match=r"blk\.1\.attn_output\.weight is missing"):
        refimpl.load(tmp_path).logits([1, 2])


@pytest.mark.parametrize("value, kind", [(False, T.BOOL), (0, T.UINT32), (1, T.UINT32)])
def test_weights_of_experts_that_are_not_normalised_are_not_ours(tmp_path, value, kind):
    keys = models.metadata(models.TINY)
    keys["glm-dsa.expert_weights_norm"] = (kind, value)
    with pytest.raises(Unsupported, match="expert_weights_norm is not true"):
        refimpl.load(models.write(tmp_path / "m.gguf", keys=keys))
    keys["glm-dsa.expert_weights_norm"] = (T.BOOL, True)
    assert refimpl.load(models.write(tmp_path / "m.gguf", keys=keys)).hp.num_hidden_layers == 3


@pytest.mark.parametrize("order", ["generic", "generic-fma", "avx2", "tiled"])
@pytest.mark.parametrize(
    "fmt, activation", [("q8_0", "q8_0"), ("q4_k", "q8_k"), ("bf16", "f32"), ("q6_k", "f32")]
)
def test_many_heads_multiply_to_the_bits_of_each_alone(fmt, activation, order, monkeypatch):
    monkeypatch.setattr("refimpl.engine.ENOUGH", 1)  # two threads, however small the work is
    random = np.random.default_rng(5)
    w, x = (
        random.standard_normal((3, 5, 256)).astype(np.float32),
        random.standard_normal((3, 9, 256)).astype(np.float32),
    )
    raw, order = refimpl.quantize(w, fmt), "generic" if activation == "f32" else order
    for jobs in (1, 2):
        together = matmul_each(raw, fmt, x, activation, order, jobs)
        for h in range(3):
            assert np.array_equal(together[h], refimpl.matmul(raw[h], fmt, x[h], activation, order))


def test_the_readme_s_table_of_conventions_is_the_code_s():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"| convention | {' | '.join(ENGINES)} |" in readme
    for field in fields(Conventions):
        if field.name != "jobs":
            values = (getattr(engine, field.name) for engine in ENGINES.values())
            row = " | ".join("rms_norm_eps" if v is None else str(v) for v in values)
            assert f"| {field.name} | {row} |" in readme


def test_keys_that_are_not_selected_cost_nothing(model, monkeypatch):
    """Attention never sees more than index_topk keys of a query, however long the context."""
    counts = []
    original = mla.mix

    def count(q, keys, *rest):
        counts.append(len(keys))
        return original(q, keys, *rest)

    monkeypatch.setattr(mla, "mix", count)
    chosen, together = [], mla.mix_chosen
    monkeypatch.setattr(
        mla, "mix_chosen", lambda *given: (chosen.append(given[3].shape), together(*given))[1]
    )
    cache = Cache(model.conv)
    model.step(IDS, cache)
    assert max(counts) == model.hp.index_topk < len(IDS)
    assert chosen == [(len(IDS) - model.hp.index_topk, model.hp.index_topk)] * 3
    counts.clear()
    model.step([1], cache)
    assert counts == [model.hp.index_topk] * 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_long_prompt_in_parts_and_each_query_alone_give_the_same_bits(logits, monkeypatch, jobs):
    model = refimpl.load(TINY, jobs=jobs)
    monkeypatch.setattr("refimpl.engine.ENOUGH", 1)  # two threads, however small the work is
    monkeypatch.setattr(dsa, "QUERIES", 20)
    monkeypatch.setattr(dsa, "AT_ONCE", 7 * 32 * 90)
    monkeypatch.setattr(mla, "CHOSEN", 5 * 2 * 64)
    together, original = [], mla.mix_chosen
    monkeypatch.setattr(mla, "mix_chosen", lambda q, *rest: (together.append(len(q)), original(q, *rest))[1])
    assert np.array_equal(model.logits(IDS), logits)
    assert together == [5, 5, 5, 5, 5] * 3
    monkeypatch.setattr(mla, "CHOSEN", 0)  # none together
    assert np.array_equal(model.logits(IDS), logits)
    assert len(together) == 15
