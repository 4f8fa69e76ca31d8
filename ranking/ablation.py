"""What a forecast adds to the ranker: arms x seeds, the same rows, the same draws of users.

An arm is a forecast: ``none``, ``anchor``, ``lm``, and as a control ``shuffled prior``, the LM's forecast of
*another* user, which must show no gain. Arms differ in nothing else: rows, features, shapes, initial
weights and order of the batches are those of the seed.

The figure of an arm is the mean over its seeds of the figure of one ranker. A bootstrap draw draws users and,
where there are several, seeds, the same ones for all arms; the difference of two arms is taken draw by draw. So
an interval tells how far other users and other training runs would have moved the figure.

Shapes: N rows, D bootstrap draws (draw 0 is the data as it is), S seeds, U users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.statistics import Row
from priors.forecast import Forecast
from ranking.config import RankerConfig
from ranking.metrics import METRICS, Sample, evaluate, interval
from ranking.ranker import RankerSpans, train_ranker

SHUFFLED = "shuffled prior"
DIFFERENCES = (("lm", "anchor"), ("lm", "none"), ("anchor", "none"), ("lm", SHUFFLED), (SHUFFLED, "none"))
"""Pairs of arms that are compared where both were trained."""
SPARSE_SHARE = 1 / 3
"""Users in the lowest third by purchases are the segment of sparse users, as for the forecast."""


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

    def other(self, user_N: NDArray[np.integer]) -> NDArray[np.integer]:
        """Whose forecast each user is given.

        Raises:
            ValueError: a user is not among those that the shuffle was made for.
        """
        place = np.minimum(np.searchsorted(self._user_U, user_N), len(self._user_U) - 1)
        if (self._user_U[place] != user_N).any():
            raise ValueError("a user is not among those whose forecasts were shuffled")
        return self._other_U[place]


def run_ablation(
    spans: RankerSpans, forecasts: Mapping[str, Forecast | None], cfg: RankerConfig, work_dir: Path
) -> list[Row]:
    """Trains every arm with every seed and compares them.

    Each ranker is an artifact of its own in ``work_dir``: what was finished before a crash is not trained again.

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
    arms: dict[str, Forecast | None] = dict(forecasts)
    if cfg.shuffled_control and arms.get("lm") is not None:
        everybody = np.concatenate([part.rows.user for part in (spans.fit, spans.stop, spans.evaluation)])
        arms[SHUFFLED] = ShuffledForecast(arms["lm"], everybody)  # type: ignore[arg-type]
    predictions = {}
    for arm, forecast in arms.items():
        evaluation = spans.evaluation.with_prior(forecast)
        predictions[arm] = [
            train_ranker(
                spans, forecast, seed=seed, cfg=cfg, directory=work_dir / f"{arm.replace(' ', '_')}-{seed}"
            ).probabilities(evaluation)
            for seed in cfg.seeds
        ]
    return compare(spans, predictions, cfg)


def compare(
    spans: RankerSpans, predictions: Mapping[str, Sequence[NDArray[np.float64]]], cfg: RankerConfig
) -> list[Row]:
    """Every metric of every arm and of the `DIFFERENCES`.

    Args:
        spans: features of the log; the predictions are of ``spans.evaluation``.
        predictions: of each arm one array of probabilities a seed.
        cfg: number of draws.

    Returns:
        Rows of section ``ranking``.
    """
    rows = spans.evaluation.rows
    whole = Sample.of(rows.label, rows.weight, rows.user, draws=cfg.draws, seed=0)
    found: list[Row] = []
    for segment, mask_N in segments(spans).items():
        if not mask_N.any():
            continue
        sample, n, seeds = whole.part(mask_N), int(mask_N.sum()), len(cfg.seeds)
        figures = {
            arm: _mean_over_seeds([evaluate(sample, probability_N[mask_N]) for probability_N in of_seeds])
            for arm, of_seeds in predictions.items()
        }
        compared = {f"{a} - {b}": (a, b) for a, b in DIFFERENCES if a in figures and b in figures}
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
        ``all``; ``new``: the user never bought from the advertiser before; ``sparse users``: the third of the users
        with the fewest purchases before the span.
    """
    rows, builder = spans.evaluation.rows, spans.builder
    users, user_N = np.unique(rows.user, return_inverse=True)
    first = np.full(len(users), rows.period.min())
    purchases_U = builder.history("user").count(users, first)
    sparse_U = purchases_U <= np.quantile(purchases_U, SPARSE_SHARE)
    return {
        "all": np.ones(len(rows), np.bool_),
        "new": (rows.advertiser >= 0) & spans.log.is_new(rows.user, rows.period, rows.advertiser),
        "sparse users": sparse_U[user_N.reshape(-1)],
    }


def _mean_over_seeds(of_seeds: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Draw 0 is the mean over all seeds, every other draw the mean over as many drawn with replacement."""
    n_seeds, n_draws = len(of_seeds), len(next(iter(of_seeds[0].values())))
    drawn_DS = np.random.default_rng(0).integers(n_seeds, size=(n_draws, n_seeds))
    drawn_DS[0] = np.arange(n_seeds)
    figures_SD = {metric: np.stack([figures[metric] for figures in of_seeds]) for metric in METRICS}
    return {metric: figures[drawn_DS, np.arange(n_draws)[:, None]].mean(1) for metric, figures in figures_SD.items()}
