"""What can be proven of pruning and merging experts, and where a claim of the papers stops to hold."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.reap.prune import prune
from refimpl.reap.select import select
from tests.test_reap_prune import write_list
from tests.tiny_checkpoint import CONFIG, draw_weights, write_checkpoint

SEEDS = st.integers(0, 2**32)
E, K, D = 6, 3, 4


def gate(scores, choice, k=K):
    """Weights [E] of one token: the k best of `choice`, by their scores, divided by their sum."""
    chosen = sorted(np.argsort(-choice, kind="stable")[:k].tolist())
    weights = np.zeros(len(scores))
    weights[chosen] = scores[chosen] / scores[chosen].sum()
    return weights, chosen


def replace_one(scores, bias, j, k=K):
    """Prune expert j: the weights before and after, and the expert that takes its place (None: j was not chosen)."""
    before, chosen = gate(scores, scores + bias, k)
    without = np.where(np.arange(len(scores)) == j, -np.inf, scores + bias)
    after, now = gate(scores, without, k)
    return before, after, next(iter(set(now) - set(chosen)), None)


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.integers(0, E - 1))
def test_without_a_bias_the_replacement_weighs_no_more_than_what_it_replaces(seed, j):
    random = np.random.default_rng(seed)
    scores = random.uniform(0.01, 1, E)
    before, after, i = replace_one(scores, np.zeros(E), j)
    assume(i is not None)
    assert after[i] <= before[j]
    f = random.standard_normal((E, D))
    change = np.linalg.norm(before[j] * f[j] - after[i] * f[i])
    assert change <= before[j] * (np.linalg.norm(f[j]) + np.linalg.norm(f[i])) + 1e-12


def test_with_a_selection_bias_the_bound_fails():
    # expert 0 is chosen for its bias alone; the one that takes its place has three times its score
    scores, bias = np.array([0.2, 0.9, 0.6]), np.array([1.0, 0, 0])
    before, after, i = replace_one(scores, bias, 0, k=2)
    f = np.array([[1.0], [1], [-1]])
    assert (before[0], i) == (0.2 / 1.1, 2)
    assert after[2] == pytest.approx(0.6 / 1.5) and after[2] > before[0]
    change = np.linalg.norm(before[0] * f[0] - after[2] * f[2])
    assert change > before[0] * (np.linalg.norm(f[0]) + np.linalg.norm(f[2]))


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_merging_two_experts_costs_the_weighted_variance_of_their_ratio(seed):
    """With linear experts the loss at alpha is |f_i - f_j|^2 sum s^2 (r - alpha)^2, s = g_i + g_j, r = g_i / s."""
    random = np.random.default_rng(seed)
    g = random.uniform(0.05, 1, (40, 2))
    f = random.standard_normal((2, D))
    s = g.sum(axis=1)
    r, gap = g[:, 0] / s, np.sum((f[0] - f[1]) ** 2)

    def loss(alpha):
        merged = alpha * f[0] + (1 - alpha) * f[1]
        return np.mean(np.sum((g @ f - s[:, None] * merged) ** 2, axis=1))

    best = np.average(r, weights=s**2)  # not the plain mean of r
    variance = np.average((r - best) ** 2, weights=s**2)
    assert loss(best) == pytest.approx(gap * np.mean(s**2) * variance, rel=1e-9, abs=1e-15)
    assert loss(best) <= min(loss(best + 0.01), loss(best - 0.01), loss(r.mean())) + 1e-15


@pytest.mark.parametrize(
    ("g", "above"),
    [
        ([[0.1, 0.9], [0.9, 0.1], [1, 1], [1, 1]], True),  # they differ where they weigh little
        ([[0.01, 1], [1, 0.01], [0.1, 0.1], [0.1, 0.1]], False),  # they differ where they weigh much
    ],
)
def test_the_product_of_means_is_no_bound_on_the_merge_loss(g, above):
    g = np.array(g, float)
    s = g.sum(axis=1)
    r = g[:, 0] / s
    exact = np.mean(s**2 * (r - np.average(r, weights=s**2)) ** 2)
    assert (np.mean(s**2) * r.var() > exact) == above


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_the_score_that_is_lost_grows_with_the_ratio(seed):
    scores = {1: np.random.default_rng(seed).uniform(0, 1, 12)}
    lost = [scores[1].sum() - scores[1][select(scores, keep)[1]].sum() for keep in range(12, 0, -1)]
    assert lost == sorted(lost) and lost[0] == 0


def test_the_lowest_scores_are_not_always_the_best_to_prune():
    """Brute force over all subsets: REAP ranks experts alone, outputs add up; the gap is reported, not hidden."""
    random = np.random.default_rng(3)
    ratios = []
    for _ in range(20):
        f = random.standard_normal((E, 60, D))
        scores = random.uniform(0.05, 1, (60, E))
        full = np.stack([gate(row, row)[0] for row in scores])
        whole = np.einsum("te,etd->td", full, f)
        norms = np.linalg.norm(f, axis=2).T
        reap = (full * norms).sum(axis=0) / np.maximum((full > 0).sum(axis=0), 1)

        def loss(kept, scores=scores, f=f, whole=whole):
            inside = np.isin(np.arange(E), kept)
            pruned = np.stack([gate(row, np.where(inside, row, -np.inf))[0] for row in scores])
            return np.sum((np.einsum("te,etd->td", pruned, f) - whole) ** 2)

        chosen = select({1: reap}, 4)[1]
        ratios.append(loss(chosen) / min(loss(list(kept)) for kept in combinations(range(E), 4)))
    assert min(ratios) == 1 and max(ratios) > 1
    assert np.median(ratios) < 1.5


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory") / "parent"
    weights = draw_weights(CONFIG)
    for layer in (1, 2):  # nobody ever chooses expert 4
        weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][4] = -1000
    write_checkpoint(folder, weights=weights)
    return folder


def test_pruning_experts_that_no_token_reaches_changes_no_bit(parent, tmp_path):
    tokens = list(np.random.default_rng(0).integers(0, CONFIG["vocab_size"], 24))
    kept = {1: [0, 1, 2, 3, 5], 2: [0, 1, 2, 3, 5]}
    prune(parent, tmp_path / "child", write_list(tmp_path / "kept.json", parent, kept))
    before, after = refimpl.load(parent).logits(tokens), refimpl.load(tmp_path / "child").logits(tokens)
    np.testing.assert_array_equal(before.view(np.uint32), after.view(np.uint32))


def test_a_token_whose_experts_all_survive_keeps_its_bits_and_others_do_not(parent, tmp_path):
    tokens = list(np.random.default_rng(1).integers(0, CONFIG["vocab_size"], 40))
    kept = {1: [0, 1, 2, 5], 2: [0, 1, 2, 3]}
    prune(parent, tmp_path / "child", write_list(tmp_path / "kept.json", parent, kept))
    before, after = (refimpl.load(model).trace(tokens) for model in (parent, tmp_path / "child"))
    survive = np.isin(before["ffn_moe_topk-1"], kept[1]).all(axis=1)
    assert 0 < survive.sum() < len(tokens)
    same = (before["ffn_moe_out-1"] == after["ffn_moe_out-1"]).all(axis=1)
    np.testing.assert_array_equal(same, survive)


def test_a_pruned_router_is_a_router_with_the_others_masked(parent, tmp_path):
    tokens = list(np.random.default_rng(2).integers(0, CONFIG["vocab_size"], 40))
    kept = {1: [0, 2, 3, 5], 2: [1, 2, 3, 5]}
    prune(parent, tmp_path / "child", write_list(tmp_path / "kept.json", parent, kept))
    masked = draw_weights(CONFIG)
    for layer, experts in kept.items():
        bias = masked[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        bias[~np.isin(np.arange(6), experts)] = -1000
    write_checkpoint(tmp_path / "masked", weights=masked)
    a, b = refimpl.load(tmp_path / "child").logits(tokens), refimpl.load(tmp_path / "masked").logits(tokens)
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
