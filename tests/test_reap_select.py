"""Selecting experts: ranking, ties, budgets, and demands that cannot be met."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.errors import Usage
from refimpl.reap.compare import compare_choice
from refimpl.reap.saliency import Saliency
from refimpl.reap.select import (
    are_nested,
    count_kept,
    find_cuts,
    find_super_experts,
    select,
)

SCORES = hnp.arrays(np.float64, (3, 12), elements=st.floats(0, 8, width=16))  # ties are frequent


def by_layer(values):
    return {layer + 1: row for layer, row in enumerate(values)}


def test_the_highest_scores_stay_and_of_equal_ones_the_lower_index():
    assert select({3: np.array([1.0, 5, 2, 5, 2, 0])}, 3) == {3: [1, 2, 3]}


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.25, 192), (0.375, 160), (0.4, 154), (0, 256), (0.001, 256), (0.999, 1)]
)
def test_a_ratio_prunes_the_whole_number_below_it(ratio, kept):
    assert count_kept(256, None, ratio) == kept


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(1, 12))
def test_no_pruned_expert_scores_above_a_kept_one(values, keep):
    for layer, kept in select(by_layer(values), keep).items():
        row = values[layer - 1]
        gone = sorted(set(range(12)) - set(kept))
        assert len(kept) == keep
        for e in gone:
            assert all(row[k] > row[e] or (row[k] == row[e] and k < e) for k in kept)


@settings(max_examples=50, deadline=None)
@given(SCORES)
def test_cuts_are_nested(values):
    cuts = [select(by_layer(values), keep) for keep in (2, 5, 6, 11, 12)]
    assert are_nested(cuts)
    assert not are_nested([cuts[1], cuts[0]])


@settings(max_examples=50, deadline=None)
@given(SCORES, st.permutations(range(12)))
def test_renaming_experts_renames_the_selection(values, order):
    values = values + np.arange(12) * 1e-9  # ties would go by name
    order = np.array(order)
    mine = select(by_layer(values), 5)
    theirs = select(by_layer(values[:, order]), 5)
    for layer in mine:
        assert sorted(order[theirs[layer]].tolist()) == mine[layer]


def test_preserved_experts_stay_and_count():
    scores = {1: np.arange(6.0)}
    assert select(scores, 3, preserve={1: [0]}) == {1: [0, 4, 5]}
    with pytest.raises(Usage, match="4 experts are preserved, 3 can stay"):
        select(scores, 3, preserve={1: [0, 1, 2, 3]})


def test_groups_keep_alike():
    assert select({1: np.arange(8.0)}, 4, groups=2) == {1: [2, 3, 6, 7]}
    with pytest.raises(Usage, match="equal groups"):
        select({1: np.arange(8.0)}, 3, groups=2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"keep": 3, "top_k": 4}, "a token needs 4"),
        ({"keep": 9}, "there are 8"),
        ({"keep": 4, "scope": "model"}, "scope"),
        ({"keep": 4, "preserve": {1: [8]}}, "cannot be preserved"),
        ({"keep": 4, "preserve": {7: [0]}}, "were not scored"),
        ({"keep": 4, "scope": "global", "min_per_layer": 5}, "between"),
    ],
)
def test_what_cannot_be_is_an_error(options, word):
    with pytest.raises(Usage, match=word):
        select({1: np.arange(8.0)}, **options)


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(Usage, match="not finite"):
        select({1: np.array([1.0, np.nan])}, 1)


def test_one_ranking_over_all_layers_takes_from_the_layer_that_loses_least():
    scores = {1: np.array([8.0, 1, 0.5, 0.5]), 2: np.array([100.0, 100, 100, 100])}
    assert select(scores, 3, scope="global") == {1: [0, 1], 2: [0, 1, 2, 3]}
    assert select(scores, 3, scope="global", min_per_layer=3) == {1: [0, 1, 2], 2: [0, 1, 2]}
    assert select(scores, 2, scope="global", preserve={1: [2, 3]}) == {1: [0, 2, 3], 2: [0]}


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(2, 12), st.integers(1, 2))
def test_a_global_budget_is_spent_whole(values, keep, least):
    kept = select(by_layer(values), keep, scope="global", min_per_layer=least)
    assert sum(map(len, kept.values())) == 3 * keep
    assert min(map(len, kept.values())) >= least


def test_near_ties_are_flagged_with_their_margin():
    scores = {1: np.array([4.0, 2, 1.999, 1]), 2: np.array([4.0, 2, 1, 0])}
    first, second = find_cuts(scores, select(scores, 2))
    assert (first.kept, first.pruned, first.near_tie) == (1, 2, True)
    assert first.margin == pytest.approx(0.0005)
    assert (second.margin, second.near_tie) == (0.5, False)


def test_super_experts_stand_out_in_the_first_three_quarters():
    maxima = {layer: np.full(64, 1.0) for layer in range(3, 7)}
    maxima[3][5] = maxima[6][9] = 1000.0
    assert find_super_experts(maxima) == {3: [5], 4: [], 5: []}
    assert find_super_experts(maxima, 1.0)[6] == [9]
    maxima[3][6] = 99.0  # above the percentile, below a tenth of the greatest
    assert find_super_experts(maxima)[3] == [5]


def test_a_kept_set_is_held_against_every_criterion():
    saliency = Saliency(4, 2)
    saliency.sums["frequency"][:] = [4, 3, 2, 1]
    saliency.sums["weighted_ean_sum"][:] = [4, 6, 6, 4]  # means 1, 2, 3, 4
    found = {one.criterion: one for one in compare_choice({1: [2, 3]}, {1: saliency})}
    reap, frequency = found["reap"], found["frequency"]
    assert (reap.same, reap.overlap, reap.regret) == (True, 1, 0)
    assert reap.lost == pytest.approx(0.3)
    assert (frequency.same, frequency.overlap, frequency.lost) == (False, 0, 0.7)
    assert frequency.regret == pytest.approx(4 / 7)
    assert reap.layers[0].tau > 0 > frequency.layers[0].tau
