"""The typed schema of ``configs/retrieval/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from data.errors import UserError
from data.rules import NOT_NEGATIVE, POSITIVE_SHARE, SEED, SHARE, at_least, broken, check
from models.training import TrainerConfig
from models.two_tower import TwoTowerConfig
from retrieval.index import IndexConfig

TWO_TOWER, OWN, POPULARITY, ITEM_KNN = "two_tower", "own", "popularity", "item_knn"
ADVERTISER, FORECAST, SEEDED = "advertiser", "forecast", "seeded"
FORECASTING = (FORECAST, SEEDED)
CHANNELS = (TWO_TOWER, OWN, POPULARITY, ITEM_KNN, ADVERTISER, *FORECASTING)
BLENDS = ("quota", "rrf", "calibrated")


@dataclass
class PopularityConfig:
    """How conversions of ads are counted: by the channel ``popularity``, and for the two-tower's bias.

    Attributes:
        decay: weight that a conversion keeps from one period to the next.
        market_weight: how many conversions elsewhere one in the visited market is worth, beyond itself.
    """

    decay: float = 0.9
    market_weight: float = 10.0

    def __post_init__(self) -> None:
        check(self, "popularity", {"decay": POSITIVE_SHARE, "market_weight": NOT_NEGATIVE})


@dataclass
class PairsConfig:
    """Training requests of the two-tower.

    Attributes:
        history: items of a history, the latest bought first.
        window: purchases looked through for them; the same ad bought again counts once.
        targets_per_request: converted ads of a request used in one epoch, drawn anew in the next.
        batch_size: requests a batch.
        sampled_negatives: ads a batch draws from its own placements, beside the batch's targets.
        requests_per_epoch: an epoch's share of the requests of the fit span; None is all of them.
        validation_requests: requests of the selection span that the best epoch is chosen by.
        recall_at: list length of the recall that it is chosen by; half of the active ads where that is less.
        popularity: how the two-tower's bias counts conversions; the channel of that name has its own.
    """

    history: int = 64
    window: int = 192
    targets_per_request: int = 6
    batch_size: int = 256
    sampled_negatives: int = 1024
    requests_per_epoch: int | None = None
    validation_requests: int = 1024
    recall_at: int = 100
    popularity: PopularityConfig = field(default_factory=PopularityConfig)

    def __post_init__(self) -> None:
        one = at_least(1)
        sizes = ("history", "window", "targets_per_request", "batch_size", "sampled_negatives")
        rules = {**dict.fromkeys(sizes, one), "requests_per_epoch": one.or_null(), "validation_requests": one}
        errors = broken(self, "retrieval.pairs", {**rules, "recall_at": one})
        if self.window < self.history:
            errors.append(
                UserError(
                    f"retrieval.pairs.window={self.window} below history={self.history}",
                    expected="a window of at least the history's length",
                    action="raise retrieval.pairs.window.",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass
class OwnConfig:
    """The channel ``own``.

    Attributes:
        decay: weight that a purchase keeps from one period to the next.
        advertiser_weight: of the user's purchases from an ad's advertiser beside those of the ad itself; 0 takes
            the very ads bought before only.
    """

    decay: float = 0.97
    advertiser_weight: float = 0.3

    def __post_init__(self) -> None:
        check(self, "retrieval.own", {"decay": POSITIVE_SHARE, "advertiser_weight": NOT_NEGATIVE})


@dataclass
class ItemKnnConfig:
    """The channel ``item_knn``.

    Attributes:
        neighbours: of an ad, at the most.
        shrinkage: added to the cosine's denominator; it keeps down pairs that few users speak for.
        per_user: latest distinct ads of a user that neighbours are counted from.
        history: latest purchases of a user whose neighbours are candidates.
        decay: weight that a purchase keeps from one period to the next.
    """

    neighbours: int = 50
    shrinkage: float = 10.0
    per_user: int = 256
    history: int = 128
    decay: float = 0.97

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("neighbours", "per_user", "history"), at_least(1))
        check(self, "retrieval.item_knn", {**sizes, "shrinkage": NOT_NEGATIVE, "decay": POSITIVE_SHARE})


@dataclass
class BlendConfig:
    """How the channels' lists become one.

    Attributes:
        kind: ``quota``, ``rrf`` or ``calibrated``; see `retrieval.blend`.
        shares: of the channels that follow no forecast, by name; none given, they are tuned. They are the weights
            of ``rrf``, and ``calibrated``, which learns its own, reads none.
        rrf_constant: of reciprocal-rank fusion.
        per_advertiser: most candidates of one advertiser; null for any number.
    """

    kind: str = "quota"
    shares: dict[str, float] = field(default_factory=dict)
    rrf_constant: float = 60.0
    per_advertiser: int | None = None

    def __post_init__(self) -> None:
        errors = []
        if self.kind not in BLENDS:
            errors.append(
                UserError(
                    f"retrieval.blend.kind={self.kind}", expected=f"one of {', '.join(BLENDS)}", action="choose one."
                )
            )
        if self.shares and (min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0):
            errors.append(
                UserError(
                    f"retrieval.blend.shares={dict(self.shares)}",
                    expected="shares of at least 0, not all 0",
                    action="correct them, or give none to have them tuned.",
                )
            )
        if self.rrf_constant <= 0:
            errors.append(
                UserError(f"retrieval.blend.rrf_constant={self.rrf_constant}", expected="above 0", action="raise it.")
            )
        if self.per_advertiser is not None and self.per_advertiser < 1:
            errors.append(
                UserError(
                    f"retrieval.blend.per_advertiser={self.per_advertiser}",
                    expected="at least 1, or null",
                    action="raise it.",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass
class ForecastChannelConfig:
    """The channels that follow a forecast.

    Attributes:
        advertisers: the forecast's first so many advertisers among those active in the market.
        prior_weights: weights of the forecast in the score of its ads, the best is chosen with the quota; 0 is
            the paper's rule, by two-tower score alone.
        seed_advertisers: the first so many of them seed the channel ``seeded``.
        seed_prefix_levels: it looks among ads whose advertiser shares so many codes of its ID with a seed; 0 looks
            among all, by vector alone.
        seeded_share: share of the forecast's places that goes to that channel.
    """

    advertisers: int = 300
    prior_weights: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6])
    seed_advertisers: int = 20
    seed_prefix_levels: int = 0
    seeded_share: float = 0.1

    def __post_init__(self) -> None:
        errors = broken(self, "retrieval.forecast", {"seeded_share": SHARE})
        for name in ("advertisers", "seed_advertisers"):
            if getattr(self, name) < 1:
                errors.append(
                    UserError(
                        f"retrieval.forecast.{name}={getattr(self, name)}",
                        expected="a positive whole number",
                        action="raise it.",
                    )
                )
        if self.seed_prefix_levels < 0:
            errors.append(
                UserError(
                    f"retrieval.forecast.seed_prefix_levels={self.seed_prefix_levels}",
                    expected="a whole number, at least 0",
                    action="raise it.",
                )
            )
        if not self.prior_weights or min(self.prior_weights) < 0:
            errors.append(
                UserError(
                    f"retrieval.forecast.prior_weights={list(self.prior_weights)}",
                    expected="at least one number, none below 0",
                    action="give the weights to choose from, e.g. [0.0,0.3].",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass
class AdvertiserChannelConfig:
    """The channel ``advertiser``.

    Attributes:
        advertisers: the advertiser tower's first so many among those active in the market.
        prior_weight: of its probabilities in the score of their ads; 0 goes by two-tower score alone.
    """

    advertisers: int = 300
    prior_weight: float = 0.3

    def __post_init__(self) -> None:
        check(self, "retrieval.advertiser", {"advertisers": at_least(1), "prior_weight": NOT_NEGATIVE})


@dataclass
class RetrievalConfig:
    """Two-tower, index, channels and their evaluation.

    Attributes:
        seed: of initialisation, order, negatives and bootstrap.
        model: size of the towers.
        pairs: training requests.
        trainer: epochs and device.
        index: the ad index.
        refit: train the towers again before each span that they answer, on all that came before it and for as many
            epochs as the fit span chose, and count item-kNN's neighbours anew; false answers every span by what the fit
            span taught, which is older than the counts that a forecast reads.
        channels: those in use, in any order, out of `CHANNELS`; the ones of `FORECASTING` have nothing to say in the
            arm without a forecast. Popularity fills what they leave free, named or not. ``advertiser`` needs
            ``model.advertiser_weight``.
        popularity, own, item_knn, advertiser, forecast: settings of the channels.
        blend: makes one list of theirs.
        budget: candidates of a request, whatever the channels.
        ks: list lengths reported; none above the budget.
        quotas: shares of the budget that the forecast channels may get; see `retrieval.tuning` for which is chosen.
        quota_requests: requests that quotas and shares are chosen on, at the most.
        sparse_quantile: users whose purchases before the evaluated span are in this lowest part are "sparse users",
            those in as large a highest part "busy users".
    """

    seed: int = 0
    model: TwoTowerConfig = field(default_factory=TwoTowerConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    refit: bool = False
    channels: list[str] = field(default_factory=lambda: [name for name in CHANNELS if name != ADVERTISER])
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    own: OwnConfig = field(default_factory=OwnConfig)
    item_knn: ItemKnnConfig = field(default_factory=ItemKnnConfig)
    advertiser: AdvertiserChannelConfig = field(default_factory=AdvertiserChannelConfig)
    forecast: ForecastChannelConfig = field(default_factory=ForecastChannelConfig)
    blend: BlendConfig = field(default_factory=BlendConfig)
    budget: int = 100
    ks: list[int] = field(default_factory=lambda: [10, 20, 50, 100])
    quotas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 1.0])
    quota_requests: int = 400
    sparse_quantile: float = 0.33

    def __post_init__(self) -> None:
        errors = [*self._channel_errors(), *broken(self, "retrieval", {"seed": SEED, "sparse_quantile": SHARE})]
        if self.budget < 1:
            errors.append(
                UserError(f"retrieval.budget={self.budget}", expected="a positive whole number", action="raise it.")
            )
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.budget:
            errors.append(
                UserError(
                    f"retrieval.ks={list(self.ks)}",
                    expected=f"list lengths from 1 to the budget of {self.budget}",
                    action="drop the others or raise retrieval.budget.",
                )
            )
        if self.quota_requests < 1:
            errors.append(
                UserError(
                    f"retrieval.quota_requests={self.quota_requests}",
                    expected="a positive whole number",
                    action="raise it.",
                )
            )
        if not self.quotas or not all(0 <= quota <= 1 for quota in self.quotas):
            errors.append(
                UserError(
                    f"retrieval.quotas={list(self.quotas)}",
                    expected="at least one share between 0 and 1",
                    action="give the quotas to choose from.",
                )
            )
        if errors:
            raise UserError.collect(errors)

    @property
    def base_channels(self) -> list[str]:
        """Channels in use that follow no forecast."""
        return [name for name in self.channels if name not in FORECASTING]

    @property
    def forecast_channels(self) -> list[str]:
        """Channels in use that follow a forecast."""
        return [name for name in self.channels if name in FORECASTING]

    def _channel_errors(self) -> Iterator[UserError]:
        valid = ", ".join(CHANNELS)
        unknown = [name for name in self.channels if name not in CHANNELS]
        if unknown or len(set(self.channels)) < len(self.channels):
            yield UserError(
                f"retrieval.channels={list(self.channels)}",
                expected=f"distinct names out of {valid}",
                action=f"correct {', '.join(unknown) or 'the one named twice'}.",
            )
        elif not self.base_channels:
            yield UserError(
                f"retrieval.channels={list(self.channels)}",
                expected="at least one channel that follows no forecast, for the arm without",
                action=f"add one of {', '.join(name for name in CHANNELS if name not in FORECASTING)}.",
            )
        if ADVERTISER in self.channels and self.model.advertiser_weight is None:
            yield UserError(
                f"retrieval.channels with {ADVERTISER} and retrieval.model.advertiser_weight=null",
                expected="an advertiser tower, trained with the others",
                action="take retrieval=advertiser_tower, set the weight, or leave the channel out.",
            )
        strange = [name for name in self.blend.shares if name not in self.base_channels]
        if strange:
            yield UserError(
                f"retrieval.blend.shares of {', '.join(strange)}",
                expected=f"shares of channels in use that follow no forecast: {', '.join(self.base_channels)}",
                action="take them out, or add the channel to retrieval.channels.",
            )
