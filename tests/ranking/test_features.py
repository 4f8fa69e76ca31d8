"""Features: counted by hand, blind to the row's own period, fitted on training rows alone, clear about bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import LineageError, UserError
from data.log import Log, load_log
from data.split import SplitConfig
from data.tables import KINDS
from data.writer import write_tables
from priors.anchor import Counts
from ranking.config import FeatureConfig
from ranking.features import DENSE, SPARSE, FeatureBuilder
from ranking.prior import GROUPS, columns_of_groups
from ranking.ranker import ArmRows, build_module, predict
from ranking.rows import Bags, Features, Rows, prior_columns
from ranking.spec import FeatureSpec
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.logs import tiny_config, tiny_log, tiny_tables
from tests.ranking.common import KnownForecast, tastes, tiny_ids, tiny_ranker

CFG = tiny_ranker().features
PRIOR = columns_of_groups(GROUPS, levels=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def builder(log: Log) -> FeatureBuilder:
    return FeatureBuilder(log, tiny_ids(log), CFG)


@pytest.fixture(scope="module")
def features(log: Log, builder: FeatureBuilder) -> Features:
    return builder.build(Rows.of_span(log, "ranker_fit")).with_prior(tastes(log), GROUPS)


def bags_of(bags: Bags) -> list[list[int]]:
    values, lengths = bags.of_rows(np.arange(len(bags.bag_N)))
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def test_bags_of_rows_in_any_order_and_more_than_once() -> None:
    bags = Bags(np.array([7, 8, 9]), np.array([0, 2, 2, 3]), np.array([0, 2, 1, 0]))
    assert bags_of(bags) == [[7, 8], [9], [], [7, 8]]
    values, lengths = bags.of_rows(np.array([2, 1, 0, 1]))
    assert (values.tolist(), lengths.tolist()) == ([9, 7, 8, 9], [0, 1, 2, 1])
    assert bags.counts(10).tolist() == [0] * 7 + [2, 2, 1]
    assert bags_of(Bags.single(np.array([4, -1, 2]))) == [[4], [], [2]]


def test_own_counts_equal_counting_by_hand(log: Log, features: Features) -> None:
    events, rows = log.events, features.rows
    for n in np.random.default_rng(0).choice(len(rows), 40, replace=False):
        before = log.is_purchase & (events.user == rows.user[n]) & (events.period < rows.period[n])
        advertiser = before & (events.advertiser == rows.advertiser[n])
        category = log.ad_features["category"]
        same = before & (category[events.ad] == category[rows.ad[n]])
        since = rows.period[n] - events.period[advertiser].max(initial=0)
        expected = {
            "own_advertiser_purchases": np.log1p(advertiser.sum()),
            "own_advertiser_recent": np.log1p((advertiser & (events.period >= rows.period[n] - 3)).sum()),
            "own_advertiser_conversions": np.log1p((advertiser & log.is_label).sum()),
            "own_advertiser_share": np.log1p(100 * advertiser.sum() / max(before.sum(), 1)),
            "own_advertiser_freshness": 1 / since if advertiser.any() else 0.0,
            "own_ad_purchases": np.log1p((before & (events.ad == rows.ad[n])).sum()),
            "own_category_purchases": np.log1p(same.sum()),
            "user_purchases": np.log1p(before.sum()),
        }
        for name, value in expected.items():
            assert features.dense[name][n] == pytest.approx(value, rel=1e-6), name


def test_the_plan_of_a_period_is_counted_over_all_markets(log: Log, features: Features) -> None:
    rows, dense = features.rows, features.dense

    def running(advertiser: int, period: int) -> int:
        placed = [log.active_ads(market, period).ad for market in range(len(log.market_ids))]
        return sum(int((log.ad_advertiser[ads] == advertiser).sum()) for ads in placed)

    for n in np.random.default_rng(3).choice(len(rows), 20, replace=False):
        advertiser, period = int(rows.advertiser[n]), int(rows.period[n])
        usual = np.mean([running(advertiser, before) for before in range(1, period)])
        now = running(advertiser, period)
        assert dense["advertiser_running"][n] == pytest.approx(np.log1p(now), rel=1e-6)
        assert dense["advertiser_plan"][n] == pytest.approx(np.log((now + 1) / (usual + 1)), rel=1e-5, abs=1e-6)


def test_a_log_whose_ads_always_run_has_no_features_of_a_plan(log: Log, features: Features) -> None:
    always = replace(
        log.placements,
        market_ptr=np.arange(2),
        first=np.zeros(1, log.placements.first.dtype),
        ptr=np.array([0, len(log.ad_ids)]),
        ad=np.arange(len(log.ad_ids), dtype=log.placements.ad.dtype),
    )
    built = FeatureBuilder(replace(log, placements=always), tiny_ids(log), CFG).build(features.rows)
    assert {"advertiser_plan", "advertiser_running"} == {*features.dense} - {*built.dense} - {*PRIOR}


def test_browsing_of_the_ads_category_is_counted_before_the_period(log: Log, features: Features) -> None:
    events, rows, column = log.events, features.rows, log.ad_features["category"]
    names = ("", *reversed(log.ad_vocabularies["category"][1:]), "unknown to ads")
    looked = (events.kind == KINDS.index("impression")) & (events.request % 2 == 0)
    kind = np.where(looked, KINDS.index("search"), events.kind).astype(events.kind.dtype)
    category = np.where(events.ad >= 0, len(names) - 1 - column[events.ad], 0)
    category = np.where(events.request % 6 == 0, len(names) - 1, category)
    changed = replace(events, kind=kind, category=category.astype(np.int32))
    seen = replace(log, events=changed, category_names=names)
    dense = FeatureBuilder(seen, tiny_ids(log), CFG).build(rows).dense
    looked, checked = seen.is_browsing & (events.ad >= 0), 0
    for n in np.random.default_rng(4).choice(len(rows), 40, replace=False):
        before = looked & (events.user == rows.user[n]) & (events.period < rows.period[n])
        known = before & (events.request % 6 != 0) & (column[events.ad] > 0)
        same = known & (column[events.ad] == column[rows.ad[n]])
        assert dense["browsed_category"][n] == pytest.approx(np.log1p(same.sum()), rel=1e-6)
        recent = same & (events.period >= rows.period[n] - CFG.recent_periods)
        assert dense["browsed_category_recent"][n] == pytest.approx(np.log1p(recent.sum()), rel=1e-6)
        assert dense["browsed_category_share"][n] == pytest.approx(same.sum() / max(known.sum(), 1), rel=1e-6)
        checked += int(same.any())
    assert checked > 5
    nameless = FeatureBuilder(replace(seen, category_names=("", *("none of any ad's",) * 5)), tiny_ids(log), CFG)
    assert not [name for name in nameless.build(rows).dense if name.startswith("browsed_")]


def test_price_is_that_of_the_last_purchase_before_by_anybody(log: Log, features: Features) -> None:
    events, rows, dense = log.events, features.rows, features.dense
    for n in np.random.default_rng(1).choice(len(rows), 40, replace=False):
        bought = log.is_purchase & (events.ad == rows.ad[n]) & (events.period < rows.period[n])
        assert dense["price_missing"][n] == (not bought.any())
        if bought.any():
            last = np.flatnonzero(bought)[events.timestamp[bought].argmax()]
            assert dense["price"][n] == pytest.approx(np.log1p(events.value[last] / events.quantity[last]), rel=1e-5)
            assert dense["discount"][n] == pytest.approx(1 / 11, rel=1e-4)  # the tiny log takes off a tenth
            assert dense["price_age"][n] == pytest.approx(np.log1p(rows.period[n] - events.period[last]))
        else:
            assert np.isnan(dense["price"][n])


def test_history_is_the_last_advertisers_once_each_latest_first(log: Log, features: Features) -> None:
    events, rows = log.events, features.rows
    histories = bags_of(features.sparse["history"].bags)
    for n in np.random.default_rng(2).choice(len(rows), 40, replace=False):
        before = log.is_purchase & (events.user == rows.user[n]) & (events.period < rows.period[n])
        latest = events.advertiser[np.flatnonzero(before)[::-1]]
        assert histories[n] == list(dict.fromkeys(latest.tolist()))[: CFG.history_length]


def test_semantic_ids_are_all_prefixes(log: Log, builder: FeatureBuilder, features: Features) -> None:
    feature, codes_AL = features.sparse["semantic_id"], builder.ids.codes_AL
    prefixes = [[feature.ids[value] for value in bag] for bag in bags_of(feature.bags)]
    for n in (0, 5, 50):
        first, second = codes_AL[features.rows.advertiser[n]].tolist()
        assert prefixes[n] == [first, 10 + first * builder.ids.level_sizes[1] + second]


def test_an_ad_of_no_advertiser_has_empty_bags_and_no_prior(builder: FeatureBuilder, features: Features) -> None:
    orphan = replace(features.rows, advertiser=np.full(len(features.rows), -1, np.int32))
    built = builder.build(orphan).with_prior(tastes(builder.log), GROUPS)
    for name in ("advertiser", "semantic_id"):
        assert not any(bags_of(built.sparse[name].bags))
    for name in ("own_advertiser_purchases", "advertiser_running", "advertiser_plan"):
        assert (built.dense[name] == 0).all(), name
    assert (built.dense["prior_missing"] == 1).all()


@pytest.mark.parametrize("period", [7, 8])
def test_nothing_of_a_period_or_later_changes_its_features(log: Log, period: int) -> None:
    rows = Rows.of_span(log, (period, period))
    earlier = np.flatnonzero(log.events.period < period)
    cut_events = log.events.select(earlier)
    cut = replace(log, events=cut_events, user_ptr=np.searchsorted(cut_events.user, np.arange(len(log.user_ids) + 1)))
    whole = FeatureBuilder(log, tiny_ids(log), CFG).build(rows)
    blind = FeatureBuilder(cut, tiny_ids(log), CFG).build(rows)
    for name, column in whole.dense.items():
        np.testing.assert_array_equal(column, blind.dense[name], err_msg=name)
    for name, feature in whole.sparse.items():
        assert bags_of(feature.bags) == bags_of(blind.sparse[name].bags), name


def test_a_request_has_the_features_of_the_same_impression(
    log: Log, builder: FeatureBuilder, features: Features
) -> None:
    rows = features.rows
    user, market, period = (int(x[0]) for x in (rows.user, rows.market, rows.period))
    visit = np.flatnonzero((rows.user == user) & (rows.market == market) & (rows.period == period))
    request = builder.build(Rows.of_request(log, rows.ad[visit], user=user, market=market, period=period))
    for name, column in request.dense.items():
        np.testing.assert_array_equal(column, features.dense[name][visit], err_msg=name)
    for name in ("display", "ad", "history"):
        expected = bags_of(features.sparse[name].bags)
        assert bags_of(request.sparse[name].bags) == [expected[n] for n in visit], name


def test_the_arms_differ_in_the_values_of_the_prior_features_alone(log: Log, builder: FeatureBuilder) -> None:
    base = builder.build(Rows.of_span(log, "ranker_fit"))
    none, some = base.with_prior(None, GROUPS), base.with_prior(tastes(log), GROUPS)
    assert list(none.dense) == list(some.dense)
    assert set(none.dense) - set(base.dense) == set(PRIOR)
    specs = [FeatureSpec.fit(part, CFG, semantic_ids="v") for part in (none, some)]
    designs = [spec.apply(part) for spec, part in zip(specs, (none, some), strict=True)]
    assert specs[0].sparse_tables() == specs[1].sparse_tables()
    prior = np.isin(specs[0].dense, PRIOR)
    np.testing.assert_array_equal(designs[0].dense_NF[:, ~prior], designs[1].dense_NF[:, ~prior])
    assert (designs[0].dense_NF[:, prior] == 0).all()
    assert (designs[1].dense_NF[:, prior] != 0).any()


def test_a_prior_that_covers_no_user_is_the_arm_without(log: Log, builder: FeatureBuilder) -> None:
    base = builder.build(Rows.of_span(log, "ranker_fit"))
    nobody = KnownForecast(tastes(log).log_prob_UA, covered=np.zeros(len(log.user_ids), bool))
    for name, column in prior_columns(base.rows, nobody, PRIOR).items():
        np.testing.assert_array_equal(column, prior_columns(base.rows, None, PRIOR)[name])


def test_a_ranker_without_numbers_is_told(features: Features) -> None:
    with pytest.raises(UserError, match=r"(?s)without any dense feature.*ranker\.features\.dense"):
        FeatureSpec.fit(replace(features, dense={}), CFG, semantic_ids="v")


def test_an_uncovered_user_gets_the_training_mean_and_a_flag(log: Log, builder: FeatureBuilder) -> None:
    base = builder.build(Rows.of_span(log, "ranker_fit"))
    covered = np.arange(len(log.user_ids)) % 2 == 0
    spec_features = base.with_prior(KnownForecast(tastes(log).log_prob_UA, covered=covered), GROUPS)
    spec = FeatureSpec.fit(spec_features, CFG, semantic_ids="v")
    dense = spec.apply(spec_features).dense_NF
    uncovered = ~covered[base.rows.user]
    assert (dense[uncovered, spec.dense.index("prior_log_prob")] == 0).all()
    assert (dense[uncovered, spec.dense.index("prior_missing")] > 0).all()
    assert (dense[~uncovered, spec.dense.index("prior_missing")] < 0).all()


def test_dense_features_are_standardised_on_the_training_rows(features: Features) -> None:
    spec = FeatureSpec.fit(features, FeatureConfig(clip=1e6), semantic_ids="v")
    dense = spec.apply(features).dense_NF
    moving = np.array(spec.scale) > 0
    np.testing.assert_allclose(dense[:, moving].mean(0), 0.0, atol=1e-3)
    known = ~np.isnan(features.dense["price"])
    assert dense[known, spec.dense.index("price")].std() == pytest.approx(1.0, abs=1e-3)
    assert np.isfinite(dense).all()


def test_fitting_looks_at_training_rows_alone(log: Log, builder: FeatureBuilder, features: Features) -> None:
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    later = builder.build(Rows.of_span(log, "validation")).with_prior(tastes(log), GROUPS)
    spec.apply(later)
    assert FeatureSpec.fit(features, CFG, semantic_ids="v") == spec
    trained = set(log.ad_ids[features.rows.ad].tolist())
    assert set(spec.tables["ad"]) <= trained


def test_unseen_and_rare_ids_share_row_0(log: Log, features: Features) -> None:
    spec = FeatureSpec.fit(features, replace(CFG, min_count=12), semantic_ids="v")
    counts = np.bincount(features.rows.ad, minlength=len(log.ad_ids))
    rows_of_ads = np.array([bag[0] for bag in bags_of(spec.apply(features).bags["ad"])])
    assert ((rows_of_ads == 0) == (counts[features.rows.ad] < 12)).all()
    stranger = replace(features.sparse["user"], ids=[-1] * len(features.sparse["user"].ids))
    strangers = replace(features, sparse={**features.sparse, "user": stranger})
    assert {bag[0] for bag in bags_of(spec.apply(strangers).bags["user"])} == {0}


def test_the_ranker_knows_users_by_a_hash(log: Log, features: Features) -> None:
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    assert len(spec.tables["user"]) == len(np.unique(features.rows.user))
    assert not set(map(str, log.user_ids.tolist())) & set(map(str, spec.tables["user"]))


def test_a_spec_survives_json_and_gives_the_same_input(features: Features) -> None:
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    again = FeatureSpec.from_json(spec.to_json())
    assert again == spec
    np.testing.assert_array_equal(again.apply(features).dense_NF, spec.apply(features).dense_NF)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_constant_column_is_silent_whatever_comes_later(features: Features, value: float) -> None:
    constant = np.full(len(features.rows), value, np.float32)
    still = replace(features, dense={**features.dense, "user_purchases": constant})
    spec = FeatureSpec.fit(still, CFG, semantic_ids="v")
    moved = replace(features, dense={**features.dense, "user_purchases": constant + 100})
    assert (spec.apply(moved).dense_NF[:, spec.dense.index("user_purchases")] == 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user_purchases", np.nan),
        ("user_purchases", np.inf),
        ("price", np.inf),
        ("prior_log_prob", -np.inf),
        ("prior_log_prob", np.nan),
        ("prior_missing", np.nan),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(features: Features, name: str, value: float) -> None:
    column = features.dense[name].copy()
    column[3] = value
    broken = replace(features, dense={**features.dense, name: column})
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    for use in (lambda: FeatureSpec.fit(broken, CFG, semantic_ids="v"), lambda: spec.apply(broken)):
        with pytest.raises(UserError, match=f"feature {name}: 1 values .* in row 3"):
            use()


@pytest.mark.parametrize(
    ("column", "given"),
    [
        (np.array(["cheap", "dear"]), "type <U5, e.g. .'cheap'"),
        (np.array(["cheap", None], object), "type object, e.g. .'cheap'"),
        (np.array([1, 2]), "type int64, e.g. .1"),
        (np.array([True, False]), "type bool, e.g. .True"),
    ],
)
def test_a_dense_feature_of_another_type_is_refused_by_name(features: Features, column: np.ndarray, given: str) -> None:
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    wrong = replace(features, dense={**features.dense, "price": np.resize(column, len(features.rows))})
    for use in (lambda: FeatureSpec.fit(wrong, CFG, semantic_ids="v"), lambda: spec.apply(wrong)):
        with pytest.raises(UserError, match=f"feature price of {given}.*\nexpected: floating-point numbers"):
            use()


@pytest.mark.parametrize(("kind", "name"), [("dense", "price"), ("sparse", "ad"), ("dense", "prior_log_prob")])
def test_features_missing_in_the_data_are_named(features: Features, kind: str, name: str) -> None:
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    dense = {key: column for key, column in features.dense.items() if (kind, key) != ("dense", name)}
    sparse = {key: feature for key, feature in features.sparse.items() if (kind, key) != ("sparse", name)}
    fewer = replace(features, dense=dense, sparse=sparse)
    with pytest.raises(UserError, match=f"features without {name}"):
        spec.apply(fewer)
    with pytest.raises(UserError, match=f"with {name} beyond"):
        FeatureSpec.fit(fewer, CFG, semantic_ids="v").apply(features)


@pytest.mark.parametrize("text", ["", "{}", '{"config": {"no_such": 1}}', "[1, 2"])
def test_a_damaged_spec_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="feature spec that cannot be understood"):
        FeatureSpec.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message", "choices"),
    [
        ({"sparse": ["advertizer"]}, "sparse names advertizer", SPARSE),
        ({"dense": ["prices", "age"]}, "dense names prices, age", DENSE),
        ({"ad_columns": ["colour"]}, "ad_columns names colour", ["category"]),
        ({"sparse": [], "ad_columns": []}, "without a sparse feature", SPARSE),
        ({"prior": ["probabilities"]}, "prior names probabilities", GROUPS),
    ],
)
def test_unknown_features_list_the_choices(log: Log, changes: dict, message: str, choices: list[str]) -> None:
    with pytest.raises(UserError, match=message) as error:
        FeatureBuilder(log, tiny_ids(log), replace(CFG, **changes))
    assert all(choice in str(error.value) for choice in choices)


def test_semantic_ids_of_other_advertisers_are_refused(log: Log) -> None:
    ids = tiny_ids(log)
    others = AdvertiserIds(ids.advertiser_ids + 1, ids.codes_AL, ids.codebooks)
    with pytest.raises(LineageError, match="semantic IDs of 30 advertisers"):
        FeatureBuilder(log, others, CFG)


def test_a_forecast_without_a_feature_is_refused(log: Log, features: Features) -> None:
    class Partial(KnownForecast):
        def features(self, *args: object) -> dict:
            columns = super().features(*args)  # type: ignore[arg-type]
            del columns["prior_entropy"]
            return columns

    with pytest.raises(UserError, match="a forecast without prior_entropy"):
        prior_columns(features.rows, Partial(tastes(log).log_prob_UA), PRIOR)


def test_users_without_an_impression_are_an_error_that_says_so(log: Log) -> None:
    with pytest.raises(UserError, match="without an impression of the chosen users"):
        Rows.of_span(log, "ranker_fit", np.array([], dtype=np.int32))


def test_prices_are_unknown_where_the_log_has_none(log: Log, tmp_path: Path) -> None:
    nothing = np.full(len(log.events), np.nan, np.float32)
    poor = replace(log, events=replace(log.events, value=nothing, quantity=nothing, discount=nothing))
    built = FeatureBuilder(poor, tiny_ids(log), CFG).build(Rows.of_span(poor, "ranker_fit"))
    assert np.isnan(built.dense["price"]).all()
    assert (built.dense["price_missing"] == 1).all()
    assert np.isfinite(FeatureSpec.fit(built, CFG, semantic_ids="v").apply(built).dense_NF).all()


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_prior_features_is_switched_off_by_name(log: Log, builder: FeatureBuilder, group: str) -> None:
    base = builder.build(Rows.of_span(log, "ranker_fit"))
    others = [other for other in GROUPS if other != group]
    whole, without = base.with_prior(tastes(log), GROUPS), base.with_prior(tastes(log), others)
    gone = set(columns_of_groups([group], levels=2)) - {"prior_missing"}
    assert gone
    assert set(whole.dense) - set(without.dense) == gone
    assert set(base.with_prior(tastes(log), [group]).dense) - set(base.dense) == {*gone, "prior_missing"}


def test_without_groups_there_is_no_prior_feature_and_no_flag(log: Log, builder: FeatureBuilder) -> None:
    base = builder.build(Rows.of_span(log, "ranker_fit"))
    assert base.with_prior(tastes(log), []) == base


def test_every_level_but_the_last_has_a_prefix() -> None:
    assert columns_of_groups(["prefixes"], levels=4) == (
        "prior_prefix_log_prob",
        "prior_prefix_2_log_prob",
        "prior_prefix_3_log_prob",
        "prior_missing",
    )


def test_ids_of_another_type_are_refused(features: Features) -> None:
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    ad = features.sparse["ad"]
    renamed = replace(features, sparse={**features.sparse, "ad": replace(ad, ids=[f"ad {name}" for name in ad.ids])})
    with pytest.raises(UserError, match="ids of table ad like 'ad 1000', of type str"):
        spec.apply(renamed)


@pytest.mark.parametrize("beyond", [1, 2**40, -(10**6)])
def test_an_id_outside_its_table_is_refused(features: Features, beyond: int) -> None:
    """`FeatureSpec.apply` makes none; rows that were made otherwise are refused by all that reads them."""
    spec = FeatureSpec.fit(features, CFG, semantic_ids="v")
    design, n_rows = spec.apply(features), spec.rows_of()["ad"]
    wrong = replace(
        design,
        bags={**design.bags, "ad": replace(design.bags["ad"], value_V=design.bags["ad"].value_V + n_rows - 1 + beyond)},
    )
    module = build_module(spec, tiny_ranker(), base_rates=[0.1], seed=0)
    for use in (lambda: predict(module, wrong), lambda: ArmRows(spec, design, design, wrong)):
        with pytest.raises(UserError, match=rf"feature ad: row -?\d+ of a table of {n_rows}\n"):
            use()


@pytest.mark.parametrize("position", [-1, 10**6])
def test_a_position_outside_a_features_ids_is_refused(features: Features, position: int) -> None:
    spec, ad = FeatureSpec.fit(features, CFG, semantic_ids="v"), features.sparse["ad"]
    bags = replace(ad.bags, value_V=np.full_like(ad.bags.value_V, position))
    wrong = replace(features, sparse={**features.sparse, "ad": replace(ad, bags=bags)})
    for use in (lambda: FeatureSpec.fit(wrong, CFG, semantic_ids="v"), lambda: spec.apply(wrong)):
        with pytest.raises(UserError, match=f"feature ad: position {position} in a list of 200 ids"):
            use()


def test_interests_are_of_the_ad_and_unknown_without_them(log: Log, builder: FeatureBuilder) -> None:
    base, known = builder.build(Rows.of_span(log, "ranker_fit")), tastes(log)
    rows = base.rows
    given = base.with_prior(known, ["interests"]).dense["prior_interests"]
    assert known.interest_UI is not None
    np.testing.assert_array_equal(given, known.interest_UI[rows.user, rows.ad])
    covered = np.arange(len(log.user_ids)) % 2 == 0
    some = KnownForecast(known.log_prob_UA, covered=covered, interest_UI=known.interest_UI)
    partly = base.with_prior(some, ["interests"]).dense
    np.testing.assert_array_equal(np.isnan(partly["prior_interests"]), ~covered[rows.user])
    bare = base.with_prior(KnownForecast(known.log_prob_UA), GROUPS)
    assert np.isnan(bare.dense["prior_interests"]).all()
    column = FeatureSpec.fit(bare, CFG, semantic_ids="v")
    assert not column.apply(bare).dense_NF[:, column.dense.index("prior_interests")].any()


# Purchases before the calendar's origin


def moved_by_four_weeks(directory: Path) -> Log:
    """The tiny log with period 1 in its fifth week, so that what was before lies in periods below 1."""
    write_tables(tiny_tables(), directory)
    split = SplitConfig(
        prior_fit=(1, 1), prior_select=(2, 2), ranker_fit=(3, 4), ranker_stop=(5, 5), validation=(6, 7), test=(8, 8)
    )
    log = load_log(directory, tiny_config(origin="2024-01-29", split=split), evaluate="validation")
    assert log.events.period.min() == -3
    return log


def test_rankers_and_anchor_know_the_same_purchases_before_the_origin(tmp_path: Path) -> None:
    log = moved_by_four_weeks(tmp_path)
    rows, counts = Rows.of_span(log, (1, 7)), Counts.of(log)
    builder = FeatureBuilder(log, tiny_ids(log), replace(CFG, history_length=99))
    row_R, index_R, _ = counts.history(rows.user, rows.period)
    known = np.zeros((len(rows), len(log.advertiser_ids)))
    np.add.at(known, (row_R, counts.advertiser_R[index_R]), counts.count_R[index_R])
    own = builder.history("user+advertiser").count(builder.key("user+advertiser", rows), rows.period)
    np.testing.assert_array_equal(own, known[np.arange(len(rows)), rows.advertiser])
    assert own[rows.period == 1].any(), "in the first period, of purchases before the calendar alone"
    np.testing.assert_array_equal(builder.history("user").count(rows.user, rows.period), known.sum(1))
    bags = bags_of(builder.build(rows).sparse["history"].bags)
    assert [set(bag) for bag in bags] == [set(np.flatnonzero(row).tolist()) for row in known]
    new = log.is_new(rows.user, rows.period, rows.advertiser)
    np.testing.assert_array_equal(new, own == 0)


def test_what_was_ever_counted_does_not_depend_on_the_origin(log: Log, builder: FeatureBuilder, tmp_path: Path) -> None:
    """Prices, counts and visits of all time; those of a window, and ages, are measured from the calendar's start on."""
    moved = moved_by_four_weeks(tmp_path)
    features = builder.build(Rows.of_span(log, (7, 11))).dense
    others = FeatureBuilder(moved, tiny_ids(moved), CFG).build(Rows.of_span(moved, (3, 7))).dense
    names = [name for name in features if not re.search("recent|fresh|age|plan|running", name)]
    assert {"price", "discount", "user_purchases", "user_visits_here", "own_ad_conversions", "ad_purchases"} <= {*names}
    for name in names:
        np.testing.assert_array_equal(features[name], others[name], err_msg=name)
