"""Three ways to make one list of several: shares, places, caps and provenance."""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import UserError
from data.log import Targets
from retrieval.blend import Blend, CalibratedBlend, FusionBlend, Limits, QuotaBlend, blend_of, merge
from retrieval.config import BlendConfig, RetrievalConfig
from retrieval.tuning import choose_shares, fit_calibrated, mean_recall


def ads(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


LONG = {"a": ads(*range(0, 20)), "b": ads(*range(100, 120)), "c": ads(*range(10, 30))}
BLENDS: list[Blend] = [
    QuotaBlend({"a": 0.6, "b": 0.3, "c": 0.1}),
    FusionBlend({"a": 1.0, "b": 0.5, "c": 1.0}, 10.0),
    CalibratedBlend({"a": 2.0, "b": 1.0, "c": 0.5}, {"a": -1.0, "b": -0.2, "c": -0.3}),
]


@pytest.mark.parametrize("blend", BLENDS)
def test_a_shorter_budget_is_a_prefix(blend: Blend) -> None:
    whole = merge(LONG, blend, Limits(30))
    assert len(whole) == len(set(whole.ads.tolist())) == 30
    for budget in range(1, 30):
        assert merge(LONG, blend, Limits(budget)).ads.tolist() == whole.ads[:budget].tolist()


@pytest.mark.parametrize("blend", BLENDS)
def test_a_cap_holds_for_every_advertiser_and_costs_no_place(blend: Blend) -> None:
    owner = (np.arange(200) // 10).astype(np.int32)
    owner[100:105] = -1  # of no advertiser: not capped
    found = merge(LONG, blend, Limits(12, None, 2, owner))
    counts = np.bincount(owner[found.ads[owner[found.ads] >= 0]])
    assert counts.max() == 2
    assert len(found) == min(12, 2 * 3 + 5 + 2 * 2)


@pytest.mark.parametrize("blend", BLENDS)
def test_a_blend_survives_being_written(blend: Blend) -> None:
    again = blend_of(blend.to_plain())
    assert again == blend
    assert merge(LONG, again, Limits(9)).ads.tolist() == merge(LONG, blend, Limits(9)).ads.tolist()


@pytest.mark.parametrize("blend", BLENDS)
def test_provenance_is_kept(blend: Blend) -> None:
    found = merge(LONG, blend, Limits(25))
    for ad, source, names in zip(found.ads, found.source, found.found_by, strict=True):
        assert source in names
        assert all(ad in LONG[name] for name in names)


def test_quotas_deal_places_by_share() -> None:
    assert merge(LONG, QuotaBlend({"a": 0.7, "b": 0.3}), Limits(10)).source.count("b") == 3


def test_a_duplicate_frees_a_place_and_is_kept_with_both_names() -> None:
    found = merge({"a": ads(1, 2, 3, 4), "b": ads(2, 1, 9, 8)}, QuotaBlend({"a": 0.5, "b": 0.5}), Limits(6))
    assert sorted(found.ads.tolist()) == [1, 2, 3, 4, 8, 9]
    by = dict(zip(found.ads.tolist(), found.found_by, strict=True))
    assert by[1] == ("a", "b")
    assert by[9] == ("b",)


def test_dry_channels_are_filled_from_the_others_then_the_fallback() -> None:
    lists = {"a": ads(1), "b": ads(5, 6), "p": ads(1, 7, 8, 9)}
    found = merge(lists, QuotaBlend({"a": 0.5, "b": 0.5}), Limits(5, "p"))
    assert found.ads.tolist() == [1, 5, 6, 7, 8]
    assert found.source[3:] == ("p", "p")


def test_fusion_adds_reciprocal_places() -> None:
    lists = {"a": ads(1, 2, 3), "b": ads(3, 1)}
    score = {1: 1 / 61 + 0.5 / 62, 2: 1 / 62, 3: 1 / 63 + 0.5 / 61}
    found = merge(lists, FusionBlend({"a": 1.0, "b": 0.5}, 60.0), Limits(3))
    assert found.ads.tolist() == sorted(score, key=lambda ad: -score[ad])


def targets_of(*wanted: list[int]) -> Targets:
    n = len(wanted)
    ptr = np.concatenate([[0], np.cumsum([len(one) for one in wanted])])
    items = np.concatenate(wanted).astype(np.int32)
    zeros, ones = np.zeros(n, np.int32), np.ones(len(items), np.float32)
    return Targets(np.arange(n, dtype=np.int32), zeros, zeros, ptr, items, ones, ones)


def lists_of(rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    return [{name: rng.permutation(60)[:12].astype(np.int32) for name in ("good", "bad")} for _ in range(60)]


def test_calibration_finds_which_places_are_worth_something() -> None:
    rng = np.random.default_rng(0)
    lists = lists_of(rng)
    targets = targets_of(*[np.sort(one["good"][:3]).tolist() for one in lists])
    blend = fit_calibrated(lists, targets, ["good", "bad"])
    assert mean_recall(lists, targets, blend, Limits(3)) == 1.0
    assert blend.found["good"] > blend.found["bad"]
    assert blend.per_log_place["good"] < -1
    assert abs(blend.per_log_place["bad"]) < 1


def test_tuned_shares_find_the_good_channel() -> None:
    rng = np.random.default_rng(1)
    lists = [
        {"own": one["good"], "item_knn": one["bad"], "popularity": rng.permutation(60)[:12].astype(np.int32)}
        for one in lists_of(rng)
    ]
    targets = targets_of(*[np.sort(one["own"][4:6]).tolist() for one in lists])
    cfg = RetrievalConfig(channels=["own", "item_knn", "popularity"], budget=6, ks=[6])
    shares = choose_shares(lists, targets, cfg, Limits(6))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares, key=lambda name: shares[name]) == "own"
    equal = QuotaBlend(dict.fromkeys(shares, 1 / 3))
    assert mean_recall(lists, targets, QuotaBlend(shares), Limits(6)) > mean_recall(lists, targets, equal, Limits(6))


def test_given_shares_are_taken_as_they_are() -> None:
    cfg = RetrievalConfig(channels=["own", "popularity"], blend=BlendConfig(shares={"own": 3.0, "popularity": 1.0}))
    assert choose_shares([], targets_of([1]), cfg, Limits(5)) == {"own": 0.75, "popularity": 0.25}


BAD = [
    (lambda: merge({"a": ads(1)}, QuotaBlend({"c": 1.0}), Limits(2)), "no list of channel c"),
    (lambda: merge({"a": ads(1)}, QuotaBlend({"a": 1.0}), Limits(2, "p")), "no list of channel p"),
    (lambda: merge({"a": ads(1)}, QuotaBlend({"a": 1.0}), Limits(2, None, 1)), "advertiser of every ad"),
    (lambda: QuotaBlend({"a": 0.5}), "add up to 1"),
    (lambda: QuotaBlend({"a": 1.5, "b": -0.5}), "must not be negative"),
    (lambda: FusionBlend({"a": -1.0}, 60.0), "must not be negative"),
    (lambda: BlendConfig(kind="mix"), "kind=mix"),
    (lambda: BlendConfig(rrf_constant=0.0, per_advertiser=0), "(?s)rrf_constant=0.*per_advertiser=0"),
    (lambda: BlendConfig(shares={"own": -1.0}), "shares of at least 0"),
    (lambda: RetrievalConfig(blend=BlendConfig(shares={"forecast": 1.0})), "shares of forecast"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_mistakes_are_told(make: object, message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        make()  # type: ignore[operator]
