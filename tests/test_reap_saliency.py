"""Scores: the worked example, the identities that must hold, and what tells the presets apart."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refimpl.errors import BadFile, Usage
from refimpl.reap import state
from refimpl.reap.presets import EPSILON, Router, find_preset, presets, weigh
from refimpl.reap.saliency import Saliency, derive

E, K, D, T = 8, 3, 5, 40
SEEDS = st.integers(0, 2**32)


def draw(seed, tokens=T):
    """Router logits, a biased choice, and every expert's output for every token."""
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((tokens, E)) * 2).astype(np.float32)
    biased = 1 / (1 + np.exp(-logits)) + random.uniform(0, 0.5, E)
    chosen = np.argsort(-biased, axis=1)[:, :K]
    return logits, chosen, random.standard_normal((E, tokens, D)).astype(np.float32)


def score(logits, chosen, outputs, preset, norm=True, factor=2.5):
    saliency = Saliency(E, D)
    picked, weights = weigh(logits, chosen, Router(K, norm, factor), find_preset(preset))
    saliency.tokens = len(logits)
    for e in range(E):
        tokens, slots = np.nonzero(picked == e)
        saliency.add(e, outputs[e, tokens], weights[tokens, slots])
    return saliency


def test_two_experts_by_hand():
    # outputs (3, 4) and (5, 12): norms 5 and 13; one token each, weights 0.75 and 0.5
    saliency = Saliency(2, 2)
    saliency.add(0, np.float32([[3, 4], [5, 12]]), np.array([0.75, 0.5]))
    sums, means = saliency.sums, derive(saliency.sums)
    assert (sums["ean_sum"][0], means["ean_mean"][0], sums["frequency"][0]) == (18, 9, 2)
    assert means["reap"][0] == (0.75 * 5 + 0.5 * 13) / 2
    assert (sums["max_activations"][0], sums["max_abs"][0]) == (12, 12)
    assert means["ean_ca"][0] == np.hypot(4, 8)
    assert {name: values[1] for name, values in means.items()} == {"reap": 0, "ean_mean": 0, "ean_ca": 0}


def test_the_signed_maximum_misses_what_is_large_and_negative():
    saliency = Saliency(1, 2)
    saliency.add(0, np.float32([[-7, -1]]), np.ones(1))
    assert (saliency.sums["max_activations"][0], saliency.sums["max_abs"][0]) == (0, 7)


@pytest.mark.parametrize("preset", presets)
@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_sums_means_and_counts_agree(preset, seed):
    saliency = score(*draw(seed), preset)
    sums, means = saliency.sums, derive(saliency.sums)
    assert sums["frequency"].sum() == T * K
    np.testing.assert_allclose(means["reap"] * sums["frequency"], sums["weighted_ean_sum"], rtol=1e-12)
    np.testing.assert_allclose(means["ean_mean"] * sums["frequency"], sums["ean_sum"], rtol=1e-12)
    total = sums["weighted_frequency_sum"].sum()
    assert total == pytest.approx(T * (2.5 if preset == "llm-compressor" else 1), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, T - 1))
def test_two_parts_merge_to_the_whole_in_either_order(seed, cut):
    logits, chosen, outputs = draw(seed)
    whole = score(logits, chosen, outputs, "model")
    for first, second in ((slice(0, cut), slice(cut, T)), (slice(cut, T), slice(0, cut))):
        merged = score(logits[first], chosen[first], outputs[:, first], "model")
        merged.merge(score(logits[second], chosen[second], outputs[:, second], "model"))
        assert merged.tokens == T
        for name, values in whole.sums.items():
            np.testing.assert_allclose(merged.sums[name], values, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.permutations(range(E)), st.floats(0.125, 8))
def test_experts_may_be_renamed_and_scaled(seed, order, scale):
    logits, chosen, outputs = draw(seed)
    order = np.array(order)
    place = np.argsort(order)
    base = derive(score(logits, chosen, outputs, "model").sums)["reap"]
    renamed = derive(score(logits[:, order], place[chosen], outputs[order], "model").sums)["reap"]
    np.testing.assert_allclose(renamed, base[order], rtol=1e-12)
    outputs = outputs.copy()
    outputs[2] *= np.float32(scale)
    scaled = derive(score(logits, chosen, outputs, "model").sums)["reap"]
    want = base * np.where(np.arange(E) == 2, np.float32(scale), 1)
    np.testing.assert_allclose(scaled, want, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(-3, 3))
def test_a_common_shift_of_the_logits_changes_sigmoid_weights_only(seed, shift):
    logits, chosen, _ = draw(seed)
    shifted = (logits.astype(np.float64) + shift).astype(np.float32)
    _, before = weigh(logits, chosen, Router(K), find_preset("paper", selection="model"))
    _, after = weigh(shifted, chosen, Router(K), find_preset("paper", selection="model"))
    np.testing.assert_allclose(before, after, rtol=1e-5)
    if abs(shift) > 0.5:
        _, before = weigh(logits, chosen, Router(K), find_preset("model", normalise="never"))
        _, after = weigh(shifted, chosen, Router(K), find_preset("model", normalise="never"))
        assert not np.allclose(before, after, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_softmax_divided_by_the_chosen_is_a_softmax_over_the_chosen(seed):
    logits, chosen, _ = draw(seed)
    picked, weights = weigh(logits, chosen, Router(K), presets["paper"])
    some = np.take_along_axis(logits.astype(np.float64), picked, 1)
    powers = np.exp(some - some.max(axis=1, keepdims=True))
    np.testing.assert_allclose(weights, powers / powers.sum(axis=1, keepdims=True), rtol=1e-12)


def test_with_one_chosen_expert_a_divided_weight_is_one_and_reap_is_the_mean_norm():
    logits, chosen, outputs = draw(1)
    saliency = Saliency(E, D)
    picked, weights = weigh(logits, chosen[:, :1], Router(1), presets["paper"])
    assert (weights == 1).all()
    for e in range(E):
        saliency.add(e, outputs[e, picked[:, 0] == e], weights[picked == e])
    means = derive(saliency.sums)
    np.testing.assert_array_equal(means["reap"], means["ean_mean"])


def test_tokens_of_other_experts_change_the_frequency_and_not_the_score():
    logits, chosen, outputs = draw(3)
    away = (chosen != 0).all(axis=1)
    assert away.any()
    twice = np.concatenate([np.arange(T), np.flatnonzero(away)])
    once = score(logits, chosen, outputs, "model")
    again = score(logits[twice], chosen[twice], outputs[:, twice], "model")
    assert derive(once.sums)["reap"][0] == pytest.approx(derive(again.sums)["reap"][0], rel=1e-12)
    assert once.sums["frequency"][0] / once.tokens > again.sums["frequency"][0] / again.tokens


def test_the_presets_differ_where_they_say_so():
    logits, chosen, _ = draw(5)
    router = Router(K, norm_topk_prob=False, scaling_factor=2.5)
    found = {name: weigh(logits, chosen, router, preset) for name, preset in presets.items()}
    by_logits = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    for name in ("paper", "cerebras", "cerebras-layerwise"):
        assert (found[name][0] == by_logits).all()
    for name in ("model", "llm-compressor"):
        assert (found[name][0] == chosen).all()
    assert (by_logits != chosen).any()
    np.testing.assert_array_equal(found["paper"][1], found["cerebras-layerwise"][1])
    assert found["paper"][1].sum() == pytest.approx(T)
    assert found["cerebras"][1].sum() < T  # the config says that weights are not divided
    np.testing.assert_allclose(found["llm-compressor"][1], 2.5 * found["model"][1], rtol=1e-15)


def test_the_floor_shows_only_where_a_weight_is_smaller():
    logits = np.float32([[60, 30, 0, -30]])
    _, floored = weigh(logits, np.zeros((1, 2), int), Router(2), presets["cerebras"])
    _, free = weigh(logits, np.zeros((1, 2), int), Router(2), presets["paper"])
    assert floored[0, 1] == EPSILON > free[0, 1] > 0


def test_a_switch_set_otherwise_is_another_preset():
    assert find_preset("paper", router="softmax") is presets["paper"]
    other = find_preset("paper", router="sigmoid")
    assert other.name == "paper:router=sigmoid" and other.router == "sigmoid"
    for wrong in ({"name": "papers"}, {"name": "paper", "router": "relu"}, {"name": "paper", "floor": 2.0}):
        with pytest.raises(Usage):
            find_preset(**wrong)


def make_run(preset="paper", fingerprint="ab"):
    model = state.Identity(E, K, (1, 2), fingerprint)
    return state.Run(model, find_preset(preset).to_json(), ({"name": "x", "sha256": "0", "tokens": T},))


@pytest.fixture
def saved(tmp_path):
    layers = {1: score(*draw(1), "paper"), 2: score(*draw(2), "paper")}
    state.save(tmp_path / "s.safetensors", make_run(), layers)
    return tmp_path / "s.safetensors", layers


def test_what_is_saved_is_read_again(saved):
    path, layers = saved
    run, read = state.load(path)
    assert run == make_run()
    for layer, saliency in layers.items():
        assert read[layer].tokens == T
        for name, values in saliency.sums.items():
            np.testing.assert_array_equal(read[layer].sums[name], values)
    assert load_file(path)["layers.2.reap"].shape == (E,)


def test_states_of_two_presets_or_models_do_not_add_up(saved):
    path, _ = saved
    mine = state.load(path)
    run, layers = state.merge([mine, state.load(path)])
    assert (run.tokens, layers[1].tokens) == (2 * T, 2 * T)
    for run, word in ((make_run("model"), "two presets"), (make_run(fingerprint="cd"), "two models")):
        with pytest.raises(Usage, match=word):
            state.merge([state.load(path), (run, layers)])


def edit(path, name=None, value=None, header=None):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if name is not None:
        tensors[name] = value
        if value is None:
            del tensors[name]
    if header is not None:
        metadata[state.KEY] = json.dumps(json.loads(metadata[state.KEY]) | header)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "layers.1.ean_sum", "value": None}, "layers.1.ean_sum is missing"),
        ({"name": "layers.1.ean_sum", "value": np.zeros(E - 1)}, "missing or not float64"),
        ({"name": "layers.1.ean_sum", "value": np.full(E, np.nan)}, "NaN"),
        ({"name": "layers.1.tokens", "value": np.array(T + 1)}, "routed to experts"),
        ({"header": {"version": 9}}, "version 9"),
        ({"header": {"model": {"experts": E}}}, "incomplete"),
    ],
)
def test_a_broken_state_is_a_bad_file(saved, change, word):
    path, _ = saved
    edit(path, **change)
    with pytest.raises(BadFile, match=word):
        state.load(path)


def test_another_safetensors_is_no_state(tmp_path):
    save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match="no REAP statistics"):
        state.load(tmp_path / "x.safetensors")
