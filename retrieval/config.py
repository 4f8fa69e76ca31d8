"""The typed schema of ``configs/retrieval/``."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.errors import UserError
from models.training import TrainerConfig
from models.two_tower import TwoTowerConfig
from retrieval.index import IndexConfig


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
    """

    history: int = 64
    window: int = 192
    targets_per_request: int = 6
    batch_size: int = 256
    sampled_negatives: int = 1024
    requests_per_epoch: int | None = None
    validation_requests: int = 1024

    def __post_init__(self) -> None:
        _check_positive(self, "retrieval.pairs")
        if self.window < self.history:
            raise UserError(
                f"retrieval.pairs.window={self.window} below history={self.history}",
                expected="a window of at least the history's length",
                action="raise retrieval.pairs.window.",
            )


@dataclass
class ForecastChannelConfig:
    """The channels that follow a forecast.

    Attributes:
        advertisers: the forecast's first so many advertisers among those active in the market.
        prior_weights: weights of the forecast in the score of its ads, the best is chosen with the quota; 0 is
            the paper's rule, by two-tower score alone.
        seed_advertisers: the first so many of them seed a search with their own vectors.
        seeded_share: share of the forecast's places that goes to that search.
    """

    advertisers: int = 300
    prior_weights: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6])
    seed_advertisers: int = 20
    seeded_share: float = 0.1

    def __post_init__(self) -> None:
        errors = []
        for name in ("advertisers", "seed_advertisers"):
            if getattr(self, name) < 1:
                errors.append(
                    UserError(
                        f"retrieval.forecast.{name}={getattr(self, name)}",
                        expected="a positive whole number",
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
        _check_share(self.seeded_share, "retrieval.forecast.seeded_share")


@dataclass
class RetrievalConfig:
    """Two-tower, index, channels and their evaluation.

    Attributes:
        seed: of initialisation, order, negatives and bootstrap.
        model: size of the towers.
        pairs: training requests.
        trainer: epochs and device.
        index: the ad index.
        forecast: the forecast channels.
        budget: candidates of a request, whatever the channels.
        ks: list lengths reported; none above the budget.
        quotas: shares of the budget that the forecast channels may get; the best is chosen on the ranker's
            spans, which the towers and the forecast have not learned from.
        quota_requests: requests of those spans that it is chosen on, at the most.
        sparse_quantile: users whose number of earlier purchases is in this lowest part are "sparse".
    """

    seed: int = 0
    model: TwoTowerConfig = field(default_factory=TwoTowerConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    forecast: ForecastChannelConfig = field(default_factory=ForecastChannelConfig)
    budget: int = 100
    ks: list[int] = field(default_factory=lambda: [10, 20, 50, 100])
    quotas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 1.0])
    quota_requests: int = 400
    sparse_quantile: float = 0.33

    def __post_init__(self) -> None:
        errors = []
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
        try:
            _check_share(self.sparse_quantile, "retrieval.sparse_quantile")
        except UserError as error:
            errors.append(error)
        if errors:
            raise UserError.collect(errors)


def _check_positive(cfg: PairsConfig, group: str) -> None:
    errors = [
        UserError(f"{group}.{name}={value}", expected="a positive whole number", action="raise it.")
        for name, value in vars(cfg).items()
        if value is not None and value < 1
    ]
    if errors:
        raise UserError.collect(errors)


def _check_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value}", expected="a share between 0 and 1", action="correct it.")
