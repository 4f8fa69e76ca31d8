"""What a forecast adds to the ranker: variants x seeds, the same rows, the same draws of users.

A variant is a forecast and a ranker's config. The *arms* differ in the forecast alone: ``none``, ``anchor``, ``lm``,
as a control ``shuffled prior``, the LM's forecast of *another* user, which must show no gain, and on simulated data
the ``oracle``. Rows, features, shapes, initial weights and order of the batches are those of the seed. Beside the
arms, a grid takes away or leaves alone one group of prior features at a time, and swaps the model:

    arms      none, anchor, lm, shuffled prior, oracle
    groups    lm, without <group>      lm, only <group>
    models    <model>, none            <model>, anchor            <model>, lm

The figure of a variant is the mean over its seeds of the figure of one ranker. A bootstrap draw draws users and,
where there are several, seeds, the same ones for all variants; the difference of two is taken draw by draw. So
an interval tells how far other users and other training runs would have moved the figure.

Shapes: N rows, T tasks, D bootstrap draws (draw 0 is the data as it is), S seeds, U users.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.artifacts import fingerprint
from data.errors import UserError
from data.statistics import TIERS, Row, activity_tiers
from priors.forecast import Forecast
from ranking.config import TASKS_SHARE, RankerConfig
from ranking.metrics import METRICS, Sample, evaluate, interval
from ranking.prior import GROUPS
from ranking.ranker import ArmRows, Ranker, RankerSpans, predict, train_ranker

SHUFFLED, ORACLE, TRUE_CHANCE = "shuffled prior", "oracle", "true chance"
DIFFERENCES = (
    ("lm", "anchor"),
    ("lm", "none"),
    ("anchor", "none"),
    ("lm", SHUFFLED),
    (SHUFFLED, "none"),
    (ORACLE, "none"),
    (ORACLE, "lm"),
    (TRUE_CHANCE, "lm"),
)
"""Pairs of arms that are compared where both were trained."""
SEASONS = ("winter", "spring", "summer", "autumn")
"""Of the northern half; December begins the first."""


@dataclass(frozen=True)
class Variant:
    """One way to train a ranker.

    Attributes:
        name: of its figures.
        forecast: that its prior features are of; None leaves them unknown.
        cfg: model, features and training.
    """

    name: str
    forecast: Forecast | None
    cfg: RankerConfig

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return re.sub(r"[^a-z0-9_]+", "_", self.name)


class ShuffledForecast:
    """Another user's forecast: what is left of a gain is not the user's own.

    Args:
        forecast: of everybody.
        users: users among whom the forecasts change hands, at least two; none keeps its own.
        seed: of the shuffle.

    Raises:
        ValueError: fewer than two users.
    """

    def __init__(self, forecast: Forecast, users: NDArray[np.integer], *, seed: int = 0) -> None:
        circle = np.random.default_rng(seed).permutation(np.unique(users))
        if len(circle) < 2:
            raise ValueError(f"{len(circle)} user; expected at least two to give one the forecast of the other")
        order = np.argsort(circle)
        self._user_U, self._other_U = circle[order], np.roll(circle, 1)[order]
        self.forecast = forecast

    @property
    def n_advertisers(self) -> int:
        """Advertisers of the forecast."""
        return self.forecast.n_advertisers

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Log-probabilities of the other user's forecast, ``(B, A)``."""
        return self.forecast.log_probs(self.other(user_B), period_B)

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        """Prior features of the other user's forecast, ``(N,)`` each."""
        return self.forecast.features(self.other(user_N), period_N, advertiser_N)

    @property
    def has_interests(self) -> bool:
        """Whether the forecast has interests."""
        return self.forecast.has_interests

    def interest_match(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], ad_N: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Each ad's category among the other user's interests, ``(N,)``."""
        return self.forecast.interest_match(self.other(user_N), period_N, ad_N)

    def other(self, user_N: NDArray[np.integer]) -> NDArray[np.integer]:
        """Whose forecast each user is given.

        Raises:
            ValueError: a user is not among those that the shuffle was made for.
        """
        place = np.minimum(np.searchsorted(self._user_U, user_N), len(self._user_U) - 1)
        if (self._user_U[place] != user_N).any():
            raise ValueError("a user is not among those whose forecasts were shuffled")
        return self._other_U[place]


class RememberedForecast:
    """A forecast whose prior features are asked for once a set of rows: many variants read the same ones.

    Args:
        forecast: whose answers are kept.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self._features: dict[str, dict[str, NDArray[np.float32]]] = {}
        self._interests: dict[str, NDArray[np.float32]] = {}

    @property
    def n_advertisers(self) -> int:
        """Advertisers of the forecast."""
        return self.forecast.n_advertisers

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Log-probabilities of the forecast, ``(B, A)``."""
        return self.forecast.log_probs(user_B, period_B)

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        """Prior features of the forecast, ``(N,)`` each."""
        key = fingerprint([user_N, period_N, advertiser_N])
        if key not in self._features:
            self._features[key] = self.forecast.features(user_N, period_N, advertiser_N)
        return self._features[key]

    @property
    def has_interests(self) -> bool:
        """Whether the forecast has interests."""
        return self.forecast.has_interests

    def interest_match(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], ad_N: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Each ad's category among the user's interests, ``(N,)``."""
        key = fingerprint([user_N, period_N, ad_N])
        if key not in self._interests:
            self._interests[key] = self.forecast.interest_match(user_N, period_N, ad_N)
        return self._interests[key]


def arms(spans: RankerSpans, forecasts: Mapping[str, Forecast | None], cfg: RankerConfig) -> list[Variant]:
    """The variants that differ in the forecast alone, the shuffled control among them.

    Args:
        spans: features of the log.
        forecasts: forecast of each arm, None for ``none``.
        cfg: ranker, and whether there is a control.
    """
    remembered = {
        arm: None if forecast is None else RememberedForecast(forecast) for arm, forecast in forecasts.items()
    }
    lm = remembered.get("lm")
    if cfg.shuffled_control and lm is not None:
        everybody = np.concatenate([part.rows.user for part in (spans.fit, spans.stop, spans.evaluation)])
        if len(np.unique(everybody)) < 2:
            raise UserError(
                "rows of one user, and a control that gives each user another's forecast",
                expected="at least two users",
                action="raise prior.panel, or set ranker.shuffled_control=false",
            )
        remembered[SHUFFLED] = RememberedForecast(ShuffledForecast(lm, everybody))
    return [Variant(arm, forecast, cfg) for arm, forecast in remembered.items()]


def grid(
    spans: RankerSpans, forecasts: Mapping[str, Forecast | None], cfg: RankerConfig
) -> tuple[list[Variant], list[tuple[str, str]]]:
    """All that ``cfg.ablation`` asks for.

    Args:
        spans: features of the log.
        forecasts: forecast of each arm, None for ``none``; with ``none`` and ``lm`` among them.
        cfg: ranker, seeds, and what to compare.

    Returns:
        The variants, and the pairs whose difference is taken.
    """
    of_arms, pairs = arms(spans, forecasts, cfg), list(DIFFERENCES)
    variants = list(of_arms)
    if cfg.ablation.groups:
        lm = next(variant for variant in of_arms if variant.name == "lm")
        of_groups, more = group_variants(lm)
        variants, pairs = [*variants, *of_groups], [*pairs, *more]
    models = [model for model in cfg.ablation.models if len(cfg.tasks) == 1 or model in TASKS_SHARE]
    others = {model: replace(cfg, model=model) for model in models if model != cfg.model}
    of_models, more = model_variants(of_arms, others)
    return [*variants, *of_models], [*pairs, *more]


def group_variants(lm: Variant) -> tuple[list[Variant], list[tuple[str, str]]]:
    """The LM's arm without each of its groups of prior features, and with it alone, but for groups that say nothing.

    Returns:
        The variants, and the pairs to be compared: what a group adds to the others, and by itself to none.
    """
    said = set(lm.cfg.features.prior)
    if lm.forecast is None or not lm.forecast.has_interests:
        said -= {"interests"}
    given = [group for group in GROUPS if group in said]
    variants, pairs = [], []
    for group in given if len(given) > 1 else []:
        without, only = f"{lm.name}, without {group}", f"{lm.name}, only {group}"
        variants += [
            Variant(name, lm.forecast, replace(lm.cfg, features=replace(lm.cfg.features, prior=prior)))
            for name, prior in ((without, [other for other in given if other != group]), (only, [group]))
        ]
        pairs += [(lm.name, without), (only, "none")]
    return variants, pairs


def model_variants(
    arms: Sequence[Variant], models: Mapping[str, RankerConfig]
) -> tuple[list[Variant], list[tuple[str, str]]]:
    """The three arms of other models.

    Args:
        arms: of the first model.
        models: config of each other model, by name.

    Returns:
        The variants, and the pairs to be compared: the arms within a model, and the models within an arm.
    """
    variants = [
        Variant(f"{model}, {arm.name}", arm.forecast, cfg)
        for model, cfg in models.items()
        for arm in arms
        if arm.name in ("none", "anchor", "lm")
    ]
    pairs = [(f"{model}, lm", f"{model}, {arm}") for model in models for arm in ("anchor", "none")]
    pairs += [(f"{model}, {arm}", arm) for model in models for arm in ("none", "lm")]
    return variants, pairs


def run_ablation(
    spans: RankerSpans, forecasts: Mapping[str, Forecast | None], cfg: RankerConfig, work_dir: Path
) -> list[Row]:
    """Trains every arm with every seed and compares them.

    Args:
        spans: features of the log.
        forecasts: forecast of each arm, None for ``none``.
        cfg: ranker, seeds, draws.
        work_dir: where rankers go, ``<arm>-<seed>`` each.

    Returns:
        Rows of section ``ranking``: every metric of every arm and of the `DIFFERENCES`, on all rows and by segment.

    Raises:
        UserError: training rows of one class, or features that cannot be used.
    """
    predictions = {
        variant.name: predictions_of(variant, spans, cfg.seeds, work_dir) for variant in arms(spans, forecasts, cfg)
    }
    return compare(spans, predictions, cfg)


def predictions_of(
    variant: Variant, spans: RankerSpans, seeds: Sequence[int], work_dir: Path
) -> list[NDArray[np.float64]]:
    """Probabilities of the evaluated rows by a variant's rankers, one array ``(N, T)`` a seed.

    Each ranker is an artifact of its own in ``work_dir``: what was finished before a crash is not trained again.

    Args:
        variant: forecast and config.
        spans: features of the log.
        seeds: one ranker each.
        work_dir: where rankers go, ``<variant>-<seed>`` each.

    Raises:
        UserError: training rows of one class, or features that cannot be used.
    """
    rows = ArmRows.of(spans, variant.forecast, variant.cfg)
    return [predict(ranker.module, rows.evaluation) for ranker in _trained(variant, rows, seeds, work_dir)]


def trained_rankers(variant: Variant, spans: RankerSpans, seeds: Sequence[int], work_dir: Path) -> list[Ranker]:
    """The rankers behind `predictions_of`; arguments and errors as there."""
    return list(_trained(variant, ArmRows.of(spans, variant.forecast, variant.cfg), seeds, work_dir))


def _trained(variant: Variant, rows: ArmRows, seeds: Sequence[int], work_dir: Path) -> Iterator[Ranker]:
    for seed in seeds:
        yield train_ranker(rows, seed=seed, cfg=variant.cfg, directory=work_dir / f"{variant.slug}-{seed}")


def compare(
    spans: RankerSpans,
    predictions: Mapping[str, Sequence[NDArray[np.float64]]],
    cfg: RankerConfig,
    *,
    pairs: Sequence[tuple[str, str]] = DIFFERENCES,
) -> list[Row]:
    """Every metric of every variant and of their differences.

    Args:
        spans: features of the log; the predictions are of ``spans.evaluation``.
        predictions: of each variant one array of probabilities ``(N, T)`` a seed.
        cfg: tasks and number of draws.
        pairs: variants whose difference is taken, where both are given.

    Returns:
        Rows of section ``ranking``: of the first task by segment, of each other one its own segment, all rows.
    """
    rows = spans.evaluation.rows
    parts = [(segment, mask_N, 0) for segment, mask_N in segments(spans).items()]
    parts += [(task, np.ones(len(rows), np.bool_), number) for number, task in enumerate(cfg.tasks) if number]
    found: list[Row] = []
    for segment, mask_N, task in parts:
        label_N = rows.label_NT[:, task]
        mask_N = mask_N & ~np.isnan(label_N)
        if not mask_N.any():
            continue
        whole = Sample.of(np.nan_to_num(label_N), rows.weight, rows.user, draws=cfg.draws, seed=0)
        sample, n, seeds = whole.part(mask_N), int(mask_N.sum()), len(cfg.seeds)
        figures = {
            arm: _mean_over_seeds([evaluate(sample, probability_NT[mask_N, task]) for probability_NT in of_seeds])
            for arm, of_seeds in predictions.items()
        }
        compared = {f"{a} - {b}": (a, b) for a, b in pairs if a in figures and b in figures}
        for metric in METRICS:
            levels = {arm: figures[arm][metric] for arm in figures}
            levels |= {name: figures[a][metric] - figures[b][metric] for name, (a, b) in compared.items()}
            found += [
                Row.of(interval(figures_D, n), section="ranking", metric=metric, arm=arm, segment=segment, seeds=seeds)
                for arm, figures_D in levels.items()
            ]
    return found


def segments(spans: RankerSpans) -> dict[str, NDArray[np.bool_]]:
    """Rows of the evaluated span by segment.

    Returns:
        ``all``; ``new``: the user never bought from the advertiser before; ``sparse users``: the third of the *users*
        with the fewest purchases before the span, all of a user's rows (the forecast sorts user-periods); ``cold
        advertisers``: nobody bought from them in the weeks that the forecaster learned from; and by season of the
        visit, e.g. ``winter``, where the span has several.
    """
    rows, builder = spans.evaluation.rows, spans.builder
    users, user_N = np.unique(rows.user, return_inverse=True)
    first = np.full(len(users), rows.period.min())
    tier_U = activity_tiers(builder.history("user").count(users, first))
    learned = np.full(len(rows), spans.log.split.prior_fit[1] + 1)
    periods, period_N = np.unique(rows.period, return_inverse=True)
    season_N = np.array([spans.log.calendar.season(int(period)) for period in periods])[period_N]
    seasons = {name: season_N == number for number, name in enumerate(SEASONS)}
    return {
        "all": np.ones(len(rows), np.bool_),
        "new": (rows.advertiser >= 0) & spans.log.is_new(rows.user, rows.period, rows.advertiser),
        TIERS[0]: (tier_U == 0)[user_N.reshape(-1)],
        "cold advertisers": (rows.advertiser >= 0)
        & (builder.history("advertiser").count(builder.key("advertiser", rows), learned) == 0),
        **(seasons if len(np.unique(season_N)) > 1 else {}),
    }


def _mean_over_seeds(of_seeds: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Draw 0 is the mean over all seeds, every other draw the mean over as many drawn with replacement."""
    n_seeds, n_draws = len(of_seeds), len(next(iter(of_seeds[0].values())))
    drawn_DS = np.random.default_rng(0).integers(n_seeds, size=(n_draws, n_seeds))
    drawn_DS[0] = np.arange(n_seeds)
    figures_SD = {metric: np.stack([figures[metric] for figures in of_seeds]) for metric in METRICS}
    return {metric: figures[drawn_DS, np.arange(n_draws)[:, None]].mean(1) for metric, figures in figures_SD.items()}
