"""Decoding against brute force: every advertiser of every prompt by a sequence of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomModel

from data.errors import UserError
from priors.anchor_tree import AnchorTree
from priors.dataset import Example, TreeCollator
from priors.evaluate import exact_log_prob
from priors.flat_trie import ActiveSets, FlatTrie
from priors.prompt import Prompt
from priors.tree_reader import CopyReader, TreeReader
from semantic_ids.trie import Trie
from tests.priors.worlds import N_PERIODS, N_USERS, World, brute_force, world

ATOL = 1e-4  # the bar of log-probabilities in fp32


def codes_of(n: int, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    chosen = np.random.default_rng(seed).choice(int(np.prod(sizes)), n, replace=False)
    return np.stack(np.unravel_index(chosen, sizes), axis=1)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    n = draw(st.integers(1, min(60, int(np.prod(sizes)))))
    lengths = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    seed = draw(st.integers(0, 10_000))
    return world(codes_of(n, sizes, seed), sizes, seed=seed, lengths=lengths)


def assert_top(one: Any, truth_A: np.ndarray, top_k: int) -> None:
    """The list holds the most probable of all; advertisers of equal probability may stand for each other."""
    best = np.sort(truth_A[np.isfinite(truth_A)])[::-1][:top_k]
    np.testing.assert_allclose(one.log_prob_K, best, atol=ATOL)


@given(worlds(), st.integers(1, 5), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_a_beam_is_exact_about_all_it_says(w: World, beam: int, top_k: int) -> None:
    truth_BA, trie = brute_force(w), w.base.trie
    np.testing.assert_allclose(np.exp(truth_BA).sum(1), 1.0, atol=1e-5)
    for truth_A, one in zip(
        truth_BA, w.decoder(beam=beam, top_k=top_k, frontier_floor=1e-12).decode(*w.asked), strict=True
    ):
        assert len(set(one.advertiser_K)) == len(one.advertiser_K) <= min(top_k, w.n_advertisers)
        np.testing.assert_allclose(one.log_prob_K, truth_A[one.advertiser_K], atol=ATOL)
        level1 = trie.node_mass(np.exp(truth_A)[None], 1)[0]
        np.testing.assert_allclose(np.exp(one.level1_log_prob_N), level1, atol=ATOL)
        for depth, node, log_prob in zip(
            one.frontier_depth_F, one.frontier_node_F, one.frontier_log_prob_F, strict=True
        ):
            mass = trie.node_mass(np.exp(truth_A)[None], int(depth))[0, node]
            np.testing.assert_allclose(log_prob, np.log(mass), atol=ATOL)
        proven = int((one.log_prob_K >= one.bound).sum())
        certain = np.sort(truth_A)[::-1][:proven]
        np.testing.assert_allclose(one.log_prob_K[:proven], certain, atol=ATOL)
        if one.certified:
            assert_top(one, truth_A, top_k)


@given(worlds(), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_exact_lists_are_those_of_brute_force(w: World, beam: int, top_k: int) -> None:
    decoded = w.decoder(beam=beam, top_k=top_k, exact=True).decode(*w.asked)
    for truth_A, one in zip(brute_force(w), decoded, strict=True):
        assert one.certified
        assert_top(one, truth_A, top_k)
        np.testing.assert_allclose(one.log_prob_K, truth_A[one.advertiser_K], atol=ATOL)


@given(worlds(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_given_pairs_are_scored_as_by_brute_force_among_active_advertisers_too(
    w: World, restricted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    active = rng.random((len(w.prompts), w.n_advertisers)) < 0.5 if restricted else None
    if active is not None:
        active[:, rng.integers(w.n_advertisers)] = True
    truth_BA = brute_force(w, active)
    asked = [rng.permutation(w.n_advertisers)[: rng.integers(0, 8)] for _ in w.prompts]
    scored = w.decoder().score(*w.asked, asked, active_GA=active)
    base = replace(w, calibration=type(w.calibration)((0.0,) * w.base.trie.n_levels, (1.0,) * w.base.trie.n_levels))
    anchor_BA = brute_force(base, active)
    for row, (wanted, (ours, anchors)) in enumerate(zip(asked, scored, strict=True)):
        np.testing.assert_allclose(ours, truth_BA[row, wanted], atol=ATOL)
        np.testing.assert_allclose(anchors, anchor_BA[row, wanted], atol=ATOL)


@given(worlds(), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_active_advertisers_restrict_the_trie(w: World, beam: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((2, w.n_advertisers)) < 0.4
    masks[:, rng.integers(w.n_advertisers)] = True
    group = rng.integers(0, 2, len(w.prompts))
    decoder = w.decoder(beam=beam, top_k=6, exact=True)
    decoded = decoder.decode(*w.asked, active_GA=masks, group_B=group)
    for row, (truth_A, one) in enumerate(zip(brute_force(w, masks[group]), decoded, strict=True)):
        assert masks[group[row], one.advertiser_K].all()
        assert_top(one, truth_A, 6)
    # Without it, the same decoder forecasts all again.
    for truth_A, one in zip(brute_force(w), decoder.decode(*w.asked), strict=True):
        assert_top(one, truth_A, 6)


@given(worlds(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_sparse_anchor_is_the_dense_one(w: World, dense: bool) -> None:
    """At every node of every user, with and without a history, before and after all counts."""
    user_B, period_B = (x.reshape(-1) for x in np.meshgrid(np.arange(N_USERS), np.arange(N_PERIODS + 3)))
    flat = FlatTrie.of(w.base.trie, torch.device("cpu"))
    tree = AnchorTree(w.base, flat, repeats=True)
    assert tree.sparse
    tree.sparse = not dense
    opened = tree.open(user_B, period_B, ActiveSets(flat, None, None, len(user_B)))
    expected = zip(w.base.child_scores(user_B, period_B), w.base.repeat_shares(user_B, period_B), strict=True)
    for depth, (scores_BN, repeat_BN) in enumerate(expected):
        row_E = torch.arange(len(user_B)).repeat_interleave(w.base.trie.n_nodes(depth))
        node_E = torch.arange(flat.offset[depth], flat.offset[depth + 1]).repeat(len(user_B))
        entry_M, child_M = flat.children(node_E)
        ours, repeats = opened.scores(row_E, node_E, entry_M, child_M)
        np.testing.assert_allclose(ours.numpy().reshape(len(user_B), -1), scores_BN, rtol=1e-9, atol=1e-12)
        assert repeats is not None
        np.testing.assert_allclose(repeats.numpy().reshape(len(user_B), -1), repeat_BN, rtol=1e-9, atol=1e-12)


EDGES = {
    "one advertiser": (np.zeros((1, 3), int), (4, 4, 4)),
    "a single path above the last level": (np.stack([[1] * 4, [2] * 4, np.arange(4)], axis=1), (3, 3, 4)),
    "one level": (np.arange(5)[:, None], (5,)),
    "ids that differ at the first level": (np.stack([np.arange(4)] * 3, axis=1), (4, 4, 4)),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("exact", [False, True])
def test_narrow_tries_and_lists_longer_than_the_advertisers(case: str, exact: bool) -> None:
    w = world(*EDGES[case])
    for truth_A, one in zip(brute_force(w), w.decoder(beam=3, top_k=99, exact=exact).decode(*w.asked), strict=True):
        assert sorted(one.advertiser_K) == list(range(w.n_advertisers))
        np.testing.assert_allclose(one.log_prob_K, truth_A[one.advertiser_K], atol=ATOL)
        assert one.certified
        assert one.mass == pytest.approx(1.0, abs=1e-6)


def test_prompts_of_very_different_lengths_are_what_each_is_alone() -> None:
    w = world(codes_of(40, (4, 4, 4)), (4, 4, 4), lengths=(1, 200, 3, 60))
    together = w.decoder(beam=4).decode(*w.asked)
    for row, one in enumerate(together):
        alone = w.decoder(beam=4).decode([w.prompts[row]], w.user_B[[row]], w.period_B[[row]])[0]
        np.testing.assert_array_equal(alone.advertiser_K, one.advertiser_K)
        np.testing.assert_allclose(alone.log_prob_K, one.log_prob_K, atol=ATOL)
        assert alone.tokens == one.tokens >= len(w.prompts[row])


def test_a_beginning_read_once_for_all_changes_nothing() -> None:
    w = world(codes_of(40, (4, 4, 4)), (4, 4, 4), lengths=(4, 9, 2))
    common = np.arange(7)
    prompts = [replace(prompt, token_ids=np.concatenate([common, prompt.token_ids])) for prompt in w.prompts]
    plain, sharing = w.decoder(beam=4, exact=True), w.decoder(beam=4, exact=True)
    sharing.reader.share(common)
    for asked in (
        prompts,
        w.prompts,
        [replace(prompts[0], token_ids=common), *w.prompts[1:]],
    ):  # with it, without it, and one that is no longer than it
        for one, other in zip(
            plain.decode(asked, w.user_B, w.period_B), sharing.decode(asked, w.user_B, w.period_B), strict=True
        ):
            np.testing.assert_array_equal(one.advertiser_K, other.advertiser_K)
            np.testing.assert_allclose(one.log_prob_K, other.log_prob_K, atol=ATOL)


def test_a_model_without_a_tree_mask_reads_copies_and_is_exact() -> None:
    """Bloom's positions come from ALiBi over the columns, whatever the mask says."""
    torch.manual_seed(0)
    bloom = BloomModel(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).eval()
    w = world(codes_of(40, (4, 4, 4)), (4, 4, 4), decoder=bloom)
    assert isinstance(w.decoder().reader, CopyReader)
    assert isinstance(world(codes_of(9, (3, 3)), (3, 3)).decoder().reader, TreeReader)
    for exact in (False, True):
        for truth_A, one in zip(brute_force(w), w.decoder(beam=3, top_k=9, exact=exact).decode(*w.asked), strict=True):
            np.testing.assert_allclose(one.log_prob_K, truth_A[one.advertiser_K], atol=ATOL)
            if exact:
                assert_top(one, truth_A, 9)


@pytest.mark.parametrize("reader", [TreeReader, CopyReader])
def test_prompts_that_no_head_reads_cost_nothing_and_change_nothing(
    reader: type[TreeReader | CopyReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the LM was trained to say was not kept: anchor and history vectors forecast, exactly as it would with it."""
    w = world(codes_of(40, (4, 4, 4)), (4, 4, 4))
    for weight in [*w.model.head.projections, *w.model.head.rows.values()]:
        torch.nn.init.zeros_(weight)
    truth = brute_force(w)
    asked = [np.array([3, 0, 39]) for _ in w.prompts]
    examples = [
        Example(int(user), int(period), prompt.token_ids, asked[0], prompt.history_F)
        for prompt, user, period in zip(*w.asked, strict=True)
    ]
    batch = TreeCollator(w.base, first_id_token=w.model.first_id_token, repeats=True)(examples)
    decoder = w.decoder(beam=4, top_k=9)
    decoder.reader = reader(w.model)
    monkeypatch.setattr(w.model, "run_decoder", Mock(side_effect=AssertionError("the LM ran")))
    decoder.reader.share(np.arange(3))
    for row, one in enumerate(decoder.decode(*w.asked)):
        np.testing.assert_allclose(one.log_prob_K, truth[row][one.advertiser_K], atol=ATOL)
        assert one.tokens == 0
    for row, (ours, _) in enumerate(decoder.score(*w.asked, asked)):
        np.testing.assert_allclose(ours, truth[row][asked[row]], atol=ATOL)
    np.testing.assert_allclose(exact_log_prob(w.model, [batch], w.calibration), truth[:, asked[0]].ravel(), atol=ATOL)


def test_ten_thousand_users_get_no_invalid_and_no_duplicate_advertiser() -> None:
    sizes, n_users = (8, 8, 8), 10_000
    w = world(codes_of(300, sizes), sizes, lengths=(3,) * 500)
    decoder, seen, certified = w.decoder(beam=8, top_k=20), 0, 0
    for start in range(0, n_users, 500):
        prompts = [Prompt(tokens) for tokens in w.rng.integers(0, 1000, (500, 3))]
        user = w.rng.integers(0, N_USERS, 500)
        for one in decoder.decode(prompts, user, np.full(500, start % N_PERIODS)):
            assert len(np.unique(one.advertiser_K)) == 20
            assert 0 <= one.advertiser_K.min() <= one.advertiser_K.max() < 300
            assert (np.diff(one.log_prob_K) <= 0).all()
            assert one.mass <= 1 + 1e-6
            seen, certified = seen + 1, certified + one.certified
    assert seen == n_users
    assert 0 < certified < n_users


def test_bad_requests_are_told() -> None:
    w = world(codes_of(20, (3, 3, 3)), (3, 3, 3))
    decoder, everyone = w.decoder(), np.ones((3, 20), bool)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"active_GA": everyone[:, :19]}, "masks of shape"),
        ({"active_GA": everyone[:2]}, "masks of shape"),
        ({"active_GA": everyone[:2], "group_B": np.array([0, 1, 2])}, "masks of shape"),
        ({"active_GA": np.array([[True] * 20, [False] * 20]), "group_B": np.array([0, 0, 1])}, "for prompt 2"),
    ]
    for options, message in bad:
        with pytest.raises(UserError, match=message):
            decoder.decode(*w.asked, **options)
    with pytest.raises(UserError, match="between 0 and 20"):
        decoder.score(*w.asked, [np.array([20]), np.array([0]), np.array([1])])
    with pytest.raises(UserError, match="1 lists of advertisers for 3 prompts"):
        decoder.score(*w.asked, [np.array([0])])
    assert decoder.score([], np.zeros(0, int), np.zeros(0, int), []) == []


def test_a_nan_below_the_first_level_is_told_with_its_prompt() -> None:
    w = world(codes_of(27, (3, 3, 3)), (3, 3, 3))
    w.model.head.rows["2"].data.fill_(torch.nan)
    for exact in (False, True):
        with pytest.raises(FloatingPointError, match="prompt 0 of the batch at level 3"):
            w.decoder(beam=2, exact=exact).decode(*w.asked)


def test_the_flat_trie_is_the_trie() -> None:
    trie = Trie.from_codes(codes_of(50, (5, 6, 7)), (5, 6, 7))
    flat = FlatTrie.of(trie, torch.device("cpu"))
    entry_M, child_M = flat.children(torch.arange(flat.n_nodes))
    np.testing.assert_array_equal(flat.parent_N[child_M], entry_M)
    np.testing.assert_array_equal(np.sort(child_M), np.arange(1, flat.n_nodes))
    depth_M, number_M = flat.within_depth(child_M)
    for depth in range(3):
        here = depth_M == depth + 1
        np.testing.assert_array_equal(flat.code_N[child_M[here]], trie.child_code[depth][number_M[here]])
    np.testing.assert_array_equal(flat.advertiser_A[flat.leaf_N[flat.path_nodes(np.arange(50))[:, -1]]], np.arange(50))
