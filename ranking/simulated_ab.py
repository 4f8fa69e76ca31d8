"""A simulated A/B test: stacks that serve the same users through the same auctions, on the same budgets.

    visits of the evaluated span ─► each arm's candidates and predicted chances ─► `ranking.auction` ─► impressions
                                                                                                        │
    the simulator's true chance of each, and a conversion drawn from it ◄───────────────────────────────┘

The arms differ in candidates and predicted chances alone. Bids, budgets and pacing are the same, and what is drawn is
drawn with common random numbers: whether a user would convert with an advertiser in a visit does not depend on who
shows it. Conversions are counted twice: as expected by the true chance, without the luck of the draw, and as drawn.

Histories are the log's: what an arm shows changes nothing that is known of a user later on.

Shapes: U users with visits, V visits, R requests, A advertisers, N entrants, I impressions, K ranker seeds, J draws of
the market, D bootstrap draws, F totals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data.errors import UserError
from data.log import Log, Requests, Visits
from data.sampling import hash_ids
from data.statistics import Row, sample_and_draws
from data.truth import Truth, generator
from priors.forecast import Forecast
from ranking.ablation import ORACLE, SHUFFLED, TRUE_CHANCE
from ranking.auction import AuctionConfig, Entrants, Floats, Ints, Sold, best_of_advertisers, sell
from ranking.features import FeatureBuilder
from ranking.metrics import interval
from ranking.oracle import kinds_of_truth
from ranking.ranker import Ranker
from ranking.rows import Rows
from ranking.tasks import LABEL
from retrieval.blend import Blended
from retrieval.metrics import gini

SECTION = "ab"
_BLOCK = 512
"""Requests whose forecasts are held at once."""
FIRST_SLOT = "slot 1"
"""As the simulator names it."""
ALL_ADS = "true chance, all ads"
"""Beside `TRUE_CHANCE`, the arm without a forecast ranked by the true chance: the same over every ad that runs."""
TOTALS = (
    *("impressions", "spend", "conversions", "value", "drawn_conversions", "drawn_value", "predicted"),
    *("new_impressions", "offered_predicted", "offered_conversions", "agreements", "auctions"),
)
"""Sums over impressions; ``offered`` ones over all entrants, as if each had the first slot; and over auctions."""
RATIOS = {
    "cpa": ("spend", "conversions"),
    "roas": ("value", "spend"),
    "drawn_cpa": ("spend", "drawn_conversions"),
    "drawn_roas": ("drawn_value", "spend"),
    "calibration": ("predicted", "conversions"),
    "offered_calibration": ("offered_predicted", "offered_conversions"),
    "agreement": ("agreements", "auctions"),
    "new_share": ("new_impressions", "impressions"),
}
"""``calibration`` is predicted over true conversions of what was shown, ``offered_calibration`` of all entrants;
``agreement`` the mean correlation of predicted and true chance within an auction."""
FIGURES = ("impressions", "spend", "conversions", "value", "drawn_conversions", "drawn_value", *RATIOS)
CHANGES = (
    *("spend", "conversions", "value", "cpa", "roas"),
    *("drawn_conversions", "drawn_value", "drawn_cpa", "drawn_roas"),
)
"""Figures whose relative change is told as well, in a row ``<figure>_change``."""
RECOVERED = ("conversions", "value", "roas")
"""Figures of which a row ``<figure>_recovered`` tells the share of the true chance's gain that an arm brings."""


def oracle_arm(share: float) -> str:
    """Name of the arm whose forecast has a share of what the anchor lacks."""
    return ORACLE if share == 1 else f"{ORACLE} {share:g}"


def differences(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of arms that are compared."""
    known = list(arms)
    pairs = [("lm", "none"), ("anchor", "none"), ("lm", "anchor"), (SHUFFLED, "none")]
    pairs += [(arm, "none") for arm in known if arm.startswith(ORACLE)]
    pairs += [(TRUE_CHANCE, "none"), (ALL_ADS, "none")]
    return [(a, b) for a, b in pairs if a in known and b in known]


@dataclass(frozen=True)
class Market:
    """What all arms share.

    Attributes:
        log: of the simulated visits.
        truth: of the log.
        visits: in order of time.
        request_V: index of each visit's request.
        user_R, market_R, period_R: of each request, indexes of the log.
    """

    log: Log
    truth: Truth
    visits: Visits
    request_V: Ints
    user_R: Ints
    market_R: Ints
    period_R: Ints

    @classmethod
    def of(cls, log: Log, truth: Truth, users: NDArray[np.integer]) -> Market:
        """The visits of the evaluated span.

        Args:
            log: a simulated log.
            truth: of it.
            users: whose visits.
        """
        visits = log.visits(log.evaluate, users)
        keys = np.stack([visits.user, visits.period, visits.market]).astype(np.int64)
        asked, request_V = np.unique(keys, axis=1, return_inverse=True)
        return cls(log, truth, visits, request_V.reshape(-1), asked[0], asked[2], asked[1])

    @property
    def requests(self) -> Requests:
        """What is asked of retrieval."""
        return Requests(*(index_R.astype(np.int32) for index_R in (self.user_R, self.market_R, self.period_R)))

    @cached_property
    def users(self) -> NDArray[np.integer]:
        """Users with a visit, rising."""
        return np.unique(self.visits.user)

    @cached_property
    def running(self) -> list[NDArray[np.int32]]:
        """Advertisers that run in the market and period of each request."""
        where, row_R = np.unique(np.stack([self.market_R, self.period_R]), axis=1, return_inverse=True)
        known = [self.log.active_advertisers(int(market), int(period)) for market, period in where.T]
        return [known[row] for row in row_R.reshape(-1)]

    @cached_property
    def eligible(self) -> NDArray[np.int32]:
        """Advertisers that run where somebody came, rising."""
        return np.unique(np.concatenate([np.zeros(0, np.int32), *self.running]))

    @cached_property
    def value(self) -> Floats:
        """Mean money of a conversion, of each advertiser."""
        return self.truth.mean_value[self.log.advertiser_ids.astype(np.int64)]

    @cached_property
    def logged_conversions(self) -> Floats:
        """Conversions to be expected of each advertiser's part of the logged traffic in these visits."""
        times_R = np.bincount(self.request_V, minlength=len(self.user_R))
        sums_A = np.zeros(len(self.log.advertiser_ids))
        for request, times in enumerate(times_R):
            advertisers = self.running[request]
            user, advertiser, period = self.ids_of_truth(np.full(len(advertisers), request), advertisers)
            shown = self.truth.exposure(user, advertiser, period)
            sums_A[advertisers] += times * shown * self._chance(user, advertiser, period)
        return sums_A * self.truth.attention.sum()

    def bids(self, cfg: AuctionConfig, seed: int) -> Floats:
        """Money that each advertiser bids for a conversion, in one draw of the market."""
        low, high = cfg.bid_share
        return self.value * generator(seed, "bid shares").uniform(low, high, size=len(self.value))

    def true_chance(self, entrants: Entrants) -> Floats:
        """Of a conversion with each entrant in the first slot, ``(N,)``."""
        request_N = np.repeat(np.arange(len(self.user_R)), np.diff(entrants.ptr_R1))
        return self._chance(*self.ids_of_truth(request_N, entrants.advertiser_N))

    def ids_of_truth(self, request_N: Ints, advertiser_N: NDArray[np.integer]) -> tuple[Ints, Ints, Ints]:
        """User and advertiser of pairs as the truth counts them, and the period."""
        user_N = self.log.user_ids[self.user_R[request_N]].astype(np.int64)
        return user_N, self.log.advertiser_ids[advertiser_N].astype(np.int64), self.period_R[request_N]

    def _chance(self, user_N: Ints, advertiser_N: Ints, period_N: Ints) -> Floats:
        kinds = kinds_of_truth(self.log)
        return self.truth.conversion_probability(user_N, advertiser_N, 1, period_N, kinds=kinds)

    @cached_property
    def everybody(self) -> Entrants:
        """All advertisers that run, by the true chance."""
        ptr = np.concatenate([[0], np.cumsum([len(running) for running in self.running])]).astype(np.int64)
        advertiser = np.concatenate([np.zeros(0, np.int64), *self.running]).astype(np.int64)
        entrants = Entrants(ptr, advertiser, np.zeros(len(advertiser)))
        return Entrants(ptr, advertiser, self.true_chance(entrants))


@dataclass
class SimulatedAB:
    """Figures of a simulated A/B test.

    Attributes:
        rows: tidy rows of section ``ab``; their segment is ``all`` for the first budget, else ``budget <number>``.
        facts: what the figures are of.
    """

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """An arm at work.

    Attributes:
        candidates: of each request of the market.
        forecast: what its rankers read; None for the arm without.
        rankers: one a seed; what they say of the task ``label`` is bid with, whatever they rank by elsewhere.

    Raises:
        UserError: a ranker has no such task.
    """

    candidates: Sequence[Blended]
    forecast: Forecast | None
    rankers: Sequence[Ranker]

    def __post_init__(self) -> None:
        for ranker in self.rankers:
            if LABEL not in ranker.tasks:
                raise UserError(
                    f"rankers of ranker.tasks=[{', '.join(ranker.tasks)}]",
                    expected=f"{LABEL} among the tasks: advertisers bid for a conversion",
                    action=f"add {LABEL} to ranker.tasks and make the run again",
                )


def run_ab(
    market: Market,
    stacks: Mapping[str, Stack],
    builder: FeatureBuilder,
    cfg: AuctionConfig,
    *,
    facts: Mapping[str, Any],
) -> SimulatedAB:
    """The stacks, and two that rank by the true chance: over the candidates of the arm ``none``, and over all ads.

    Args:
        market: what the arms share.
        stacks: by arm, ``none`` among them.
        builder: of the rankers' features.
        cfg: the auctions.
        facts: told beside the figures.
    """
    arms = {arm: _entrants(market, stack, builder) for arm, stack in stacks.items()}
    everybody, best = market.everybody, arms["none"][0]
    arms |= {TRUE_CHANCE: [replace(best, chance_N=market.true_chance(best))], ALL_ADS: [everybody]}
    differ = {
        arm: float(
            np.mean([
                not np.array_equal(np.sort(one.ads), np.sort(other.ads))
                for one, other in zip(stack.candidates, stacks["none"].candidates, strict=True)
            ])
        )
        for arm, stack in stacks.items()
    }  # fmt: skip
    first, last = market.log.split.span(market.log.evaluate, evaluate=market.log.evaluate)
    told = {
        "users": len(market.users),
        "visits": len(market.visits.user),
        "slots": market.truth.cfg.slots,
        "advertisers": len(market.eligible),
        "entrants": len(best.advertiser_N) / max(len(market.user_R), 1),
        "running": len(everybody.advertiser_N) / max(len(market.user_R), 1),
        "periods": [first, last],
        "evaluate": market.log.evaluate,
        "ranker_seeds": max(len(stack.rankers) for stack in stacks.values()),
        "money": float(np.mean([market.logged_conversions @ market.bids(cfg, seed) for seed in cfg.seeds])),
        "other_candidates": differ,
    }
    said = {arm: stack.forecast for arm, stack in stacks.items() if stack.forecast is not None}
    return SimulatedAB([*compare_stacks(market, arms, cfg), *_divergence_rows(market, said, cfg)], {**told, **facts})


def _entrants(market: Market, stack: Stack, builder: FeatureBuilder) -> list[Entrants]:
    """Each ranker's entrants of every request; predicted as of the first slot, for slots differ by attention alone."""
    log, n_requests = market.log, len(market.user_R)
    asked = zip(stack.candidates, market.requests.user, market.requests.market, market.requests.period, strict=True)
    parts = [
        Rows.of_request(log, one.ads, user=int(user), market=int(place), period=int(period))
        for one, user, place, period in asked
    ]
    columns = {column.name: np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Rows)}
    rows = Rows(**columns | {"display": np.full(len(columns["ad"]), log.display_names.index(FIRST_SLOT), np.int16)})
    request_N = np.repeat(np.arange(n_requests), [len(one) for one in stack.candidates])
    features = builder.build(rows).with_prior(stack.forecast, builder.cfg.prior)
    found = []
    for ranker in stack.rankers:
        chance_N = ranker.probabilities(features, task=LABEL)
        best = best_of_advertisers(request_N, rows.advertiser, chance_N)
        ptr = np.searchsorted(request_N[best], np.arange(n_requests + 1))
        found.append(Entrants(ptr, rows.advertiser[best].astype(np.int64), chance_N[best]))
    return found


@dataclass(frozen=True)
class _Served:
    """An arm's impressions of every ranker seed and draw of the market, summed up.

    Attributes:
        totals_KJUF: by user.
        shown_KJ: impressions by user and eligible advertiser.
    """

    totals_KJUF: Floats
    shown_KJ: list[list[csr_array]]


def compare_stacks(market: Market, arms: Mapping[str, Sequence[Entrants]], cfg: AuctionConfig) -> list[Row]:
    """Serve all visits by every arm, on every budget.

    Args:
        market: what the arms share.
        arms: of each arm one set of entrants a ranker seed; an arm without a ranker has one.
        cfg: bids, budgets, pacing, draws.

    Returns:
        Every figure of every arm and of their `differences`, with intervals over users, ranker seeds and draws of the
        market.
    """
    true = {arm: [market.true_chance(entrants) for entrants in seeds] for arm, seeds in arms.items()}
    resampled = _Resampled.of(len(market.users), max(map(len, arms.values())), len(cfg.seeds), cfg.draws)
    found: list[Row] = []
    for number, budget in enumerate(cfg.budgets):
        segment = "all" if number == 0 else f"budget {budget:g}"
        served = {arm: _serve(market, seeds, true[arm], cfg, budget) for arm, seeds in arms.items()}
        figures = {arm: resampled.figures(one) for arm, one in served.items()}
        found += _rows(figures, segment, len(market.visits.user), resampled.n_rankers)
    return found


def divergences(market: Market, forecast: Forecast) -> Floats:
    """How far a forecast is from the truth among the advertisers that run.

    Returns:
        Kullback-Leibler divergence of each request in nats, ``(R,)``: the NLL that the exact forecast would save.
    """
    everybody, n_requests = market.everybody, len(market.user_R)
    advertiser_N, request_N = everybody.advertiser_N, np.repeat(np.arange(n_requests), np.diff(everybody.ptr_R1))
    true_N = market.truth.score(*market.ids_of_truth(request_N, advertiser_N))
    said_N = np.zeros(len(request_N))
    for start in range(0, n_requests, _BLOCK):
        rows = slice(*everybody.ptr_R1[[start, min(start + _BLOCK, n_requests)]])
        part = slice(start, start + _BLOCK)
        log_prob_BA = forecast.log_probs(market.user_R[part], market.period_R[part])
        said_N[rows] = np.exp(log_prob_BA[request_N[rows] - start, advertiser_N[rows]].astype(np.float64))
    true_N, said_N = (p_N / np.bincount(request_N, p_N, n_requests)[request_N] for p_N in (true_N, said_N))
    known = true_N > 0
    lost_N = true_N[known] * np.log(true_N[known] / said_N[known])
    return np.bincount(request_N[known], lost_N, n_requests).astype(np.float64)


def _divergence_rows(market: Market, forecasts: Mapping[str, Forecast], cfg: AuctionConfig) -> list[Row]:
    resampled, n_users = _Resampled.of(len(market.users), 1, 1, cfg.draws), len(market.users)
    times_R, user_R = np.bincount(market.request_V), np.searchsorted(market.users, market.user_R)
    visits_D = resampled.times_DU @ np.bincount(user_R, times_R, n_users)
    figures = {
        arm: resampled.times_DU @ np.bincount(user_R, times_R * divergences(market, forecast), n_users) / visits_D
        for arm, forecast in forecasts.items()
    }
    figures |= {f"{a} - {b}": figures[a] - figures[b] for a, b in differences(figures)}
    return [
        Row.of(interval(of_D, len(market.visits.user)), section=SECTION, metric="divergence", arm=arm)
        for arm, of_D in figures.items()
    ]


def _serve(
    market: Market, arm: Sequence[Entrants], true_K: Sequence[Floats], cfg: AuctionConfig, budget: float
) -> _Served:
    totals, shown = [], []
    for entrants, true_N in zip(arm, true_K, strict=True):
        of_draws = []
        for seed in cfg.seeds:
            bid_A = market.bids(cfg, seed)
            sold = sell(
                market.request_V,
                entrants,
                market.running,
                bid_A=bid_A,
                budget_A=budget * market.logged_conversions * bid_A,
                attention_S=market.truth.attention,
                pacing_rate=cfg.pacing_rate,
            )
            of_draws.append(_account(market, entrants, true_N, sold, seed))
        totals.append([totals_UF for totals_UF, _ in of_draws])
        shown.append([shown_UA for _, shown_UA in of_draws])
    return _Served(np.array(totals), shown)


def _account(market: Market, entrants: Entrants, true_N: Floats, sold: Sold, seed: int) -> tuple[Floats, csr_array]:
    """Totals by user, ``(U, F)``, and impressions by user and eligible advertiser."""
    users, visits = market.users, market.visits
    user_I = np.searchsorted(users, visits.user[sold.visit_I])
    advertiser_I = entrants.advertiser_N[sold.entrant_I]
    attention_I = market.truth.attention[sold.slot_I]
    chance_I = attention_I * true_N[sold.entrant_I]
    value_I = market.value[advertiser_I]
    pair_I = visits.request[sold.visit_I] * len(market.value) + advertiser_I
    converts_I = hash_ids(pair_I, seed=seed) / 2.0**64 < chance_I
    new_I = market.log.is_new(visits.user[sold.visit_I], visits.period[sold.visit_I], advertiser_I)
    of_impressions = {
        "impressions": np.ones(len(user_I)),
        "spend": sold.price_I,
        "conversions": chance_I,
        "value": chance_I * value_I,
        "drawn_conversions": converts_I,
        "drawn_value": converts_I * value_I,
        "predicted": attention_I * entrants.chance_N[sold.entrant_I],
        "new_impressions": new_I,
    }
    n_requests = len(market.user_R)
    times_R = np.bincount(market.request_V, minlength=n_requests)
    request_N = np.repeat(np.arange(n_requests), np.diff(entrants.ptr_R1))
    agreement_R = correlations(request_N, entrants.chance_N, true_N, n_requests)
    of_requests = {
        "offered_predicted": np.bincount(request_N, entrants.chance_N, n_requests),
        "offered_conversions": np.bincount(request_N, true_N, n_requests),
        "agreements": np.nan_to_num(agreement_R),
        "auctions": ~np.isnan(agreement_R),
    }
    sums = {name: np.bincount(user_I, values, len(users)) for name, values in of_impressions.items()}
    user_R = np.searchsorted(users, market.user_R)
    sums |= {name: np.bincount(user_R, times_R * values, len(users)) for name, values in of_requests.items()}
    shape, column_I = (len(users), len(market.eligible)), np.searchsorted(market.eligible, advertiser_I)
    shown_UA = csr_array((np.ones(len(user_I)), (user_I, column_I)), shape=shape)
    return np.stack([sums[name] for name in TOTALS], axis=1), shown_UA


def correlations(group_N: Ints, a_N: Floats, b_N: Floats, n: int) -> Floats:
    """Pearson's correlation of two numbers within each of ``n`` groups; NaN where one of them does not vary."""
    count_G = np.maximum(np.bincount(group_N, minlength=n), 1)

    def centred(values_N: Floats) -> Floats:
        return values_N - (np.bincount(group_N, values_N, n) / count_G)[group_N]

    a_N, b_N = centred(a_N), centred(b_N)
    covariance_G, a_G, b_G = (np.bincount(group_N, x_N, n).astype(np.float64) for x_N in (a_N * b_N, a_N**2, b_N**2))
    return _ratio(covariance_G, np.sqrt(a_G * b_G))


@dataclass(frozen=True)
class _Resampled:
    """How often each user, ranker seed and draw of the market counts; draw 0 is the data as it is.

    All arms are given the same draws, so that a difference within a draw is paired.
    """

    times_DU: Floats
    weight_DK: Floats
    weight_DJ: Floats

    @classmethod
    def of(cls, n_users: int, n_rankers: int, n_markets: int, draws: int) -> _Resampled:
        rng = np.random.default_rng(0)

        times_DU, times_DK, times_DJ = (sample_and_draws(n, draws, rng) for n in (n_users, n_rankers, n_markets))
        return cls(times_DU, times_DK / n_rankers, times_DJ / n_markets)

    @property
    def n_rankers(self) -> int:
        return self.weight_DK.shape[1]

    def figures(self, served: _Served) -> dict[str, Floats]:
        """Every figure of an arm, one number a draw."""
        totals_DF = self._mean(self.times_DU @ served.totals_KJUF)
        sums = dict(zip(TOTALS, totals_DF.T, strict=True))
        ratios = {name: _ratio(sums[above], sums[below]) for name, (above, below) in RATIOS.items()}
        concentration = np.array([[self._concentration(shown_UA) for shown_UA in of] for of in served.shown_KJ])
        gini_D, coverage_D = (_centred(figure_D) for figure_D in self._mean(concentration).T)
        return {**{name: (sums | ratios)[name] for name in FIGURES}, "gini": gini_D, "coverage": coverage_D}

    def _concentration(self, shown_UA: csr_array) -> Floats:
        """Gini and coverage of the eligible advertisers, ``(D, 2)``."""
        shown_DA = (shown_UA.T @ self.times_DU.T).T
        return np.stack([[gini(shown_A) for shown_A in shown_DA], (shown_DA > 0).mean(1)], axis=1)

    def _mean(self, of_KJDF: Floats) -> Floats:
        """Over ranker seeds and draws of the market, as often as each draw has them; one ranker stands for all."""
        weight_DK = self.weight_DK if len(of_KJDF) > 1 else np.ones((len(self.times_DU), 1))
        return np.einsum("kjdf,dk,dj->df", of_KJDF, weight_DK, self.weight_DJ)


def _rows(figures: Mapping[str, Mapping[str, Floats]], segment: str, n: int, n_rankers: int) -> list[Row]:
    def row(metric: str, arm: str, figure_D: Floats) -> Row:
        return Row.of(interval(figure_D, n), section=SECTION, metric=metric, arm=arm, segment=segment, seeds=n_rankers)

    found = [row(metric, arm, of_D) for arm, of_arm in figures.items() for metric, of_D in of_arm.items()]
    for a, b in differences(figures):
        name = f"{a} - {b}"
        found += [row(metric, name, figures[a][metric] - figures[b][metric]) for metric in figures[a]]
        found += [
            row(f"{metric}_change", name, _ratio(figures[a][metric], figures[b][metric]) - 1) for metric in CHANGES
        ]
        if TRUE_CHANCE in figures and b == "none" and a not in (TRUE_CHANCE, ALL_ADS):
            best = figures[TRUE_CHANCE]
            found += [
                row(
                    f"{metric}_recovered",
                    name,
                    _ratio(figures[a][metric] - figures[b][metric], best[metric] - figures[b][metric]),
                )
                for metric in RECOVERED
            ]
    return found


def _centred(figure_D: Floats) -> Floats:
    """Draws moved so that their mean is draw 0: one with fewer distinct users always looks more concentrated."""
    return np.append(figure_D[0], figure_D[1:] - figure_D[1:].mean() + figure_D[0])


def _ratio(above_D: Floats, below_D: Floats) -> Floats:
    return np.divide(above_D, below_D, out=np.full(len(above_D), np.nan), where=below_D != 0)
