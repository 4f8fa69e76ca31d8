"""The world behind the simulator, and what is true in it: its parameters, and exact probabilities.

A user has a few tastes, an advertiser sells to a few, and everything latent is constant within a period (the
label window), so that the truth of a period is one formula. A visit of user ``u`` to the home market ``m`` has
slots that are filled independently of each other:

    S(a | u, t) = w_broad · E(a) + w_interest · Σ_k θ_k E(a) g_k(a) / G_k + w_retarget · τ(a) [a ∈ L] / |L|

    E(a)    what advertisers have of a market's broad traffic: ∝ size · bid · τ over those that run there
    τ(a)    how often the budget lets it take part, between 0 and 1
    θ       the user's tastes in that period: drifted or not, times the season, summing to 1
    g_k(a)  how much a sells to taste k, 1 for its main taste;  G_k = Σ_a E(a) g_k(a)
    L       the advertisers the user is loyal to that run in the market

What no advertiser can take (a taste without one, a loyal one without budget) goes to broad traffic, so that S sums
to 1. Of an impression in position j then comes

    e_j · r(u, a, t),   r = base + affinity · quality(a) · Σ_k θ_k g_k(a) + loyalty · [a ∈ L],   e_j = j^-bias

times ``click`` (a conversion follows on ``click_conversion`` of them) or ``view_conversion``. Position and kind are
factors of their own, so whatever kinds are labels, the advertiser of a label is distributed as

    P(a | u, t) = S(a | u, t) · r(u, a, t) / Z(u, t)

and Z follows from G_k and Σ_a E(a) g_k(a) g_l(a) quality(a), a sum over the user's tastes and loyalties alone.

Shapes: U users, A advertisers, M markets, K tastes, T tastes of one user or advertiser, L loyalties, B pairs or
rows asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.errors import UserError

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

TRUTH = "truth.safetensors"
MAX_CELLS = 10_000_000
"""Cells of the largest dense table of probabilities."""
AGES = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
MAX_TASTES, MAX_WORDS, MAX_SLOTS = 128, 60, 50
"""As many tastes and words as can be named, as many slots as a visit's events are numbered for."""
DAYS_PER_YEAR = 365.0

_BLOCK = 1 << 16
_TASTE_SPREAD = 0.5
_MINOR_TASTE = (0.1, 0.5)
_QUALITY = (4.0, 2.0)
_BID_MEDIAN, _BID_SPREAD = 5.0, 0.4
_BUDGET_SPREAD = 0.7
_PRICE_MEDIAN, _PRICE_SPREAD = 20.0, 0.8
VALUE_SPREAD = 0.3
"""Standard deviation of the logarithm of what is spent in one purchase at an advertiser."""
_THROTTLE_FLOOR = 0.01
_THROTTLE_STEPS, _THROTTLE_EXCESS = 100, 0.005
_CACHED_PERIODS = 4
_SHARES = (
    *("market_reach", "cold_share", "broad_share", "interest_share", "affinity", "loyalty", "click"),
    *("click_conversion", "view_conversion", "organic_rate", "organic_loyal_share", "search_rate"),
    *("coupon_rate", "drift_share", "profile_missing"),
)


@dataclass
class SimulatorConfig:
    """A simulated ad log: how large, and what is true in it. A share is a number from 0 to 1.

    Args:
        users: number of users.
        advertisers: number of advertisers.
        days: days of the log.
        markets: number of markets; a user has one, and the first are larger.
        market_reach: share of the markets an advertiser runs in.
        tastes: number of tastes.
        words_per_taste: product words of each taste.
        tastes_per_user: tastes a user has.
        taste_concentration: of the Dirichlet distribution of a user's tastes; the smaller, the more one rules.
        tastes_per_advertiser: tastes an advertiser sells to, the main one included.
        words_per_advertiser: product words in an advertiser's text.
        words_per_ad: product words in an ad's text.
        ads_per_advertiser: mean number of ads.
        popularity_skew: exponent of Zipf's law of the advertisers' sizes; 0: all alike.
        budget: median budget of a period, over what the advertiser would spend if all ran everywhere all the time; the
            lower, the more advertisers are throttled.
        flight_periods: shortest and longest cycle of running and pausing, in periods.
        flight_duty: smallest and largest share of a cycle in which an advertiser runs.
        cold_share: share of the advertisers that launch late.
        cold_periods: first and last period in which these launch.
        visits_per_week: mean visits of a user in seven days.
        activity_shape: of the gamma distribution of the users' visits; the smaller, the more unequal they are.
        slots: ads shown in a visit.
        broad_share: share of the slots filled by broad traffic.
        interest_share: share filled by a taste of the user; the rest is retargeting of loyal users.
        loyalties: advertisers a user is loyal to, at the most.
        base: propensity of anybody towards anything.
        affinity: propensity added where all the user's tastes are the advertiser's, at quality 1.
        loyalty: propensity that loyalty adds.
        position_bias: exponent by which attention falls with the position.
        click: share of the propensity that clicks.
        click_conversion: share of these clicks that convert.
        view_conversion: share of the propensity that converts without a click.
        organic_rate: chance of a purchase without an ad, in a visit.
        organic_loyal_share: share of these that are of an advertiser the user is loyal to.
        search_rate: chance of a search, in a visit.
        coupon_rate: chance that a coupon is redeemed, in a visit.
        campaigns_per_week: mailings a user receives in seven days, on average.
        seasonality: by how much a taste rises and falls in a year.
        drift_day: day on which tastes drift, from 0; acts with the first period that begins on it or later.
        drift_share: share of the users that get other tastes then.
        profile_signal: by how much the log-odds of tastes differ between ages; 0: the profile tells nothing.
        profile_missing: share of the profile's values that are missing.

    Raises:
        UserError: a value is out of range. All problems are told at once.
    """

    users: int = 5000
    advertisers: int = 600
    days: int = 182
    markets: int = 8
    market_reach: float = 0.7
    tastes: int = 16
    words_per_taste: int = 12
    tastes_per_user: int = 3
    taste_concentration: float = 1.0
    tastes_per_advertiser: int = 2
    words_per_advertiser: int = 6
    words_per_ad: int = 3
    ads_per_advertiser: float = 3.0
    popularity_skew: float = 0.5
    budget: float = 4.0
    flight_periods: list[int] = field(default_factory=lambda: [3, 8])
    flight_duty: list[float] = field(default_factory=lambda: [0.5, 1.0])
    cold_share: float = 0.15
    cold_periods: list[int] = field(default_factory=lambda: [8, 26])
    visits_per_week: float = 1.2
    activity_shape: float = 1.5
    slots: int = 5
    broad_share: float = 0.3
    interest_share: float = 0.5
    loyalties: int = 4
    base: float = 0.01
    affinity: float = 0.6
    loyalty: float = 0.3
    position_bias: float = 0.5
    click: float = 0.5
    click_conversion: float = 0.4
    view_conversion: float = 0.15
    organic_rate: float = 0.15
    organic_loyal_share: float = 0.5
    search_rate: float = 0.3
    coupon_rate: float = 0.02
    campaigns_per_week: float = 0.1
    seasonality: float = 0.5
    drift_day: int = 84
    drift_share: float = 0.3
    profile_signal: float = 0.7
    profile_missing: float = 0.3

    def __post_init__(self) -> None:
        errors: list[UserError] = []
        whole: dict[str, tuple[int, int | None]] = {
            **dict.fromkeys(("users", "advertisers", "days", "markets"), (1, None)),
            **dict.fromkeys(("words_per_advertiser", "words_per_ad"), (1, None)),
            **dict.fromkeys(("loyalties", "drift_day"), (0, None)),
            **dict.fromkeys(("tastes_per_user", "tastes_per_advertiser"), (1, self.tastes)),
            **{"tastes": (1, MAX_TASTES), "words_per_taste": (1, MAX_WORDS), "slots": (1, MAX_SLOTS)},
        }
        for name, (least, most) in whole.items():
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                errors.append(_out_of_range(name, value, f"a whole number, {_between(least, most)}", least))
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                errors.append(_out_of_range(name, getattr(self, name), "a share, from 0 to 1", 0.3))
        for name in ("taste_concentration", "visits_per_week", "activity_shape", "budget", "base"):
            if not 0 < getattr(self, name) < np.inf:
                errors.append(_out_of_range(name, getattr(self, name), "a positive number", 1.0))
        for name in ("popularity_skew", "position_bias", "profile_signal", "campaigns_per_week"):
            if not 0 <= getattr(self, name) < np.inf:
                errors.append(_out_of_range(name, getattr(self, name), "a number, at least 0", 0.5))
        if not 1 <= self.ads_per_advertiser < np.inf:
            errors.append(_out_of_range("ads_per_advertiser", self.ads_per_advertiser, "a number, at least 1", 3.0))
        if not 0 <= self.seasonality < 1:
            errors.append(_out_of_range("seasonality", self.seasonality, "at least 0 and below 1", 0.5))
        for name, low, high in (("flight_periods", 1, None), ("flight_duty", 0, 1), ("cold_periods", 1, None)):
            pair = list(getattr(self, name))
            if len(pair) != 2 or not low <= pair[0] <= pair[1] or (high is not None and pair[1] > high):
                expected = f"[smallest, largest], {_between(low, high)}, smallest not above largest"
                errors.append(_out_of_range(name, pair, expected, "such a pair"))
        for names, what in (
            (("broad_share", "interest_share"), "shares of the slots"),
            (("base", "affinity", "loyalty"), "parts of one propensity"),
            (("click", "view_conversion"), "outcomes of one impression"),
        ):
            total = sum(getattr(self, name) for name in names)
            if total > 1 + 1e-12:
                given = ", ".join(f"data.simulator.{name}={getattr(self, name)}" for name in names)
                errors.append(
                    UserError(
                        given, expected=f"{what}, together at most 1", action=f"lower one of them by {total - 1:.3g}"
                    )
                )
        if errors:
            raise UserError.collect(errors)


def _between(low: float, high: float | None) -> str:
    return f"at least {low}" if high is None else f"from {low} to {high}"


def _out_of_range(name: str, value: object, expected: str, example: object) -> UserError:
    return UserError(
        f"data.simulator.{name}={value}", expected=expected, action=f"set data.simulator.{name}, e.g. to {example}"
    )


@dataclass(frozen=True)
class Latents:
    """What is drawn once: everything of users and advertisers that no table tells.

    Args:
        season_K: phase of each taste's season, as a share of a year.
        taste_AT: tastes of each advertiser, the main one first.
        membership_AT: g, how much it sells to each of them; 1 for the main one.
        size_A: weight in broad traffic and among organic purchases.
        quality_A: share of the affinity that it can win, between 0 and 1.
        bid_A: money per thousand impressions.
        budget_A: money per period, in all markets.
        price_A: median money of a purchase.
        launch_A: first period in which it runs ads and sells.
        cycle_A, duty_A: its cycle of running and pausing and the periods of it that it runs, in periods.
        phase_AM: periods by which the cycle is ahead in each market, -1 where it never runs.
        ad_ptr: ads of advertiser ``a`` are ``ad_ptr[a]:ad_ptr[a + 1]``.
        market_U: home market.
        visits_U: expected visits a day.
        age_U: index in ``AGES``.
        taste_UT, theta_UT: tastes and their weights before the drift; rows of the latter sum to 1.
        later_taste_UT, later_theta_UT: the same from the drift on.
        loyal_UL: advertisers the user is loyal to, distinct, -1 for none.
    """

    season_K: Float
    taste_AT: NDArray[np.int16]
    membership_AT: Float
    size_A: Float
    quality_A: Float
    bid_A: Float
    budget_A: Float
    price_A: Float
    launch_A: NDArray[np.int32]
    cycle_A: NDArray[np.int32]
    duty_A: NDArray[np.int32]
    phase_AM: NDArray[np.int32]
    ad_ptr: Int
    market_U: NDArray[np.int16]
    visits_U: Float
    age_U: NDArray[np.int8]
    taste_UT: NDArray[np.int16]
    theta_UT: NDArray[np.float32]
    later_taste_UT: NDArray[np.int16]
    later_theta_UT: NDArray[np.float32]
    loyal_UL: NDArray[np.int32]


@dataclass(frozen=True)
class Period:
    """The state of all markets in one period.

    Args:
        number: the period, from 1.
        drifted: the tastes have drifted.
        season_K: factor of each taste.
        running_MA: True where an advertiser runs ads.
        share_MA: E, rows sum to 1; 0 where an advertiser does not run.
        throttle_MA: τ, 0 where an advertiser does not run.
        taste_MK: G, the share of each taste.
        worth_MK: Σ_a E(a) g_k(a) quality(a).
        worth_MKK: Σ_a E(a) g_k(a) g_l(a) quality(a).
    """

    number: int
    drifted: bool
    season_K: Float
    running_MA: Bool
    share_MA: Float
    throttle_MA: Float
    taste_MK: Float
    worth_MK: Float
    worth_MKK: Float


@dataclass(frozen=True)
class Audience:
    """Users in a period.

    Args:
        period: the state of their markets.
        user_B, market_B: the users and their markets.
        taste_BT, theta_BT: tastes and weights, the latter summing to 1.
        theta_BK: the same over all tastes.
        loyal_BL: advertisers the user is loyal to that run in the market, -1 for none.
    """

    period: Period
    user_B: Int
    market_B: Int
    taste_BT: Int
    theta_BT: Float
    theta_BK: Float
    loyal_BL: Int


@dataclass(frozen=True)
class _Traffic:
    """The parts of S of an audience: factor of E, factor of E · g a taste, and what each loyal advertiser adds."""

    broad_B: Float
    interest_BK: Float
    retarget_BL: Float


@dataclass(frozen=True)
class Truth:
    """A simulated world with exact probabilities; index ``i`` of users and advertisers is also their id.

    Args:
        cfg: its parameters.
        seed: of all its draws.
        period_days: length of a period in days.
        latents: what was drawn.
    """

    cfg: SimulatorConfig
    seed: int
    period_days: int
    latents: Latents = field(repr=False)
    _periods: dict[int, Period] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def draw(cls, cfg: SimulatorConfig, *, seed: int, period_days: int) -> Truth:
        """Draw a world. More users are more rows at the end of each users' array: the first ones stay."""
        return cls(cfg, seed, period_days, _draw(cfg, seed, period_days))

    def save(self, path: Path) -> None:
        """Write one safetensors file; the same world gives the same bytes."""
        plain = {"config": asdict(self.cfg), "seed": self.seed, "period_days": self.period_days}
        arrays = {column.name: np.ascontiguousarray(getattr(self.latents, column.name)) for column in fields(Latents)}
        save_file(arrays, path, metadata={"truth": json.dumps(plain)})

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, or it is no truth.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                plain = json.loads(file.metadata()["truth"])
                arrays = {column.name: file.get_tensor(column.name) for column in fields(Latents)}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the truth in {path}: {error}",
                expected=f"the {TRUTH} that a simulated log has beside its tables",
                action="prepare the data with data=simulator and give the file it wrote",
            ) from error
        return cls(SimulatorConfig(**plain["config"]), plain["seed"], plain["period_days"], Latents(**arrays))

    @property
    def n_users(self) -> int:
        return len(self.latents.market_U)

    @property
    def n_advertisers(self) -> int:
        return len(self.latents.size_A)

    @property
    def attention(self) -> Float:
        """e, the attention of each position, ``(slots,)``; 1 for the first."""
        return np.arange(1, self.cfg.slots + 1, dtype=np.float64) ** -self.cfg.position_bias

    @property
    def mean_value(self) -> Float:
        """Mean money of a purchase at each advertiser, the rounding to cents aside, ``(A,)``."""
        return self.latents.price_A * np.exp(VALUE_SPREAD**2 / 2)

    def period_of(self, day: int) -> int:
        """The period of a day, which counts from 0."""
        return day // self.period_days + 1

    def score(self, users: ArrayLike, advertisers: ArrayLike, period: ArrayLike) -> Float:
        """P(a | u, t): the advertiser of a label conversion of the user in the period.

        It is also the share of the user's expected label conversions that are with the advertiser. Of a period with
        several, a forecaster's prior is about one drawn from the *distinct* advertisers: as good as the same while
        conversions are few (on the default log .0002 nat better).

        Args:
            users: indexes of users.
            advertisers: indexes of advertisers.
            period: periods, from 1; past the end of the log, too. The three are broadcast against each other: users
                ``(B, 1)`` with advertisers ``(A,)`` and one period give ``(B, A)``.

        Returns:
            Probabilities; over all advertisers they sum to 1. 0 where an advertiser does not run in the user's market.

        Raises:
            UserError: an index or period does not exist.
        """

        def score(audience: Audience, row: Int, advertiser: Int) -> Float:
            traffic = self._traffic(audience)
            shown = self._shown(audience, traffic, row, advertiser)
            return shown * self.propensity(audience, row, advertiser) / self._norm(audience, traffic)[row]

        return self._pairs(users, advertisers, period, score)

    def score_all(self, users: ArrayLike, period: ArrayLike) -> Float:
        """`score` over all advertisers.

        Args:
            users: indexes of users, ``(B,)``.
            period: one period, or that of each user.

        Returns:
            ``(B, A)``; rows sum to 1.

        Raises:
            UserError: the table would have more than ``MAX_CELLS`` cells.
        """
        users_B = np.atleast_1d(np.asarray(users, np.int64))
        cells = len(users_B) * self.n_advertisers
        if cells > MAX_CELLS:
            raise UserError(
                f"{len(users_B)} users and {self.n_advertisers} advertisers, {cells:,} probabilities",
                expected=f"a dense table of at most {MAX_CELLS:,} cells",
                action="ask for fewer users at once, or for chosen advertisers with Truth.score",
            )
        period_B = np.broadcast_to(np.asarray(period), users_B.shape)
        return self.score(users_B[:, None], np.arange(self.n_advertisers), period_B[:, None])

    def exposure(self, users: ArrayLike, advertisers: ArrayLike, period: ArrayLike) -> Float:
        """S(a | u, t): the advertiser of a slot of the user's visit; arguments and errors as of `score`."""

        def shown(audience: Audience, row: Int, advertiser: Int) -> Float:
            return self._shown(audience, self._traffic(audience), row, advertiser)

        return self._pairs(users, advertisers, period, shown)

    def conversion_probability(
        self,
        users: ArrayLike,
        advertisers: ArrayLike,
        positions: ArrayLike,
        period: ArrayLike,
        *,
        kinds: tuple[str, ...] = ("click_conversion", "view_conversion"),
    ) -> Float:
        """The chance that an impression ends in an event of some kinds.

        Args:
            users, advertisers, period: of the impression, as in `score`.
            positions: slot of the impression, from 1; broadcast with the others.
            kinds: some of ``click`` (with or without a conversion), ``click_conversion`` and ``view_conversion``.

        Raises:
            UserError: an index, position, period or kind does not exist.
        """
        cfg, positions = self.cfg, np.asarray(positions, np.int64)
        if positions.size and not 1 <= positions.min() <= positions.max() <= cfg.slots:
            raise UserError(
                f"positions from {positions.min()} to {positions.max()}",
                expected=f"whole numbers from 1 to {cfg.slots}",
                action="give the number in the column display of the events",
            )
        clicks = {"click_conversion": cfg.click * cfg.click_conversion, "click": cfg.click}
        chance = {**clicks, "view_conversion": cfg.view_conversion}
        unknown = sorted(set(kinds) - set(chance))
        if unknown or not kinds:
            raise UserError(
                f"kinds {', '.join(unknown) or 'none'}", expected=f"some of {', '.join(chance)}", action="name these"
            )
        if "click" in kinds:  # a click conversion is a click as well
            kinds = tuple(kind for kind in kinds if kind != "click_conversion")
        outcome = sum(chance[kind] for kind in set(kinds))
        propensity = self._pairs(users, advertisers, period, self.propensity)
        return self.attention[positions - 1] * propensity * outcome

    def audience(self, users: NDArray[Any], period: int) -> Audience:
        """Some users, ``(B,)``, in a period."""
        latents, state = self.latents, self.period(period)
        taste_BT, theta_BT = self._tastes(users, period)
        theta_BK = np.zeros((len(taste_BT), self.cfg.tastes))
        np.put_along_axis(theta_BK, taste_BT, theta_BT, axis=1)
        loyal_BL = np.where(self._loyal_running(users, state.running_MA), latents.loyal_UL[users], -1)
        market_B = latents.market_U[users].astype(np.int64)
        return Audience(
            state, np.asarray(users, np.int64), market_B, taste_BT, theta_BT, theta_BK, loyal_BL.astype(np.int64)
        )

    def propensity(self, audience: Audience, row: Int, advertiser: Int) -> Float:
        """r of pairs of a row of an audience and an advertiser; the two are broadcast."""
        cfg, latents = self.cfg, self.latents
        fit: Any = 0.0
        for number in range(latents.taste_AT.shape[1]):
            theta = audience.theta_BK[row, latents.taste_AT[advertiser, number]]
            fit = fit + theta * latents.membership_AT[advertiser, number]
        propensity = cfg.base + cfg.affinity * latents.quality_A[advertiser] * fit
        for number in range(audience.loyal_BL.shape[1]):
            propensity = propensity + cfg.loyalty * (audience.loyal_BL[row, number] == advertiser)
        return propensity

    def running(self, period: int) -> Bool:
        """True where an advertiser runs ads, ``(M, A)``; a function of the latents and the period alone."""
        latents = self.latents
        on_AM = (period - 1 + latents.phase_AM) % latents.cycle_A[:, None] < latents.duty_A[:, None]
        return np.ascontiguousarray((on_AM & (latents.phase_AM >= 0) & (latents.launch_A <= period)[:, None]).T)

    def period(self, number: int) -> Period:
        """The state of all markets in a period; the last few are kept."""
        if number not in self._periods:
            while len(self._periods) >= _CACHED_PERIODS:
                del self._periods[next(iter(self._periods))]
            self._periods[number] = self._open_period(number)
        return self._periods[number]

    def _tastes(self, users: NDArray[Any], period: int) -> tuple[Int, Float]:
        """θ of some users in a period: tastes and weights, ``(B, T)``; weights sum to 1."""
        latents, (drifted, season_K) = self.latents, self._timing(period)
        taste_UT = latents.later_taste_UT if drifted else latents.taste_UT
        theta_UT = latents.later_theta_UT if drifted else latents.theta_UT
        taste_BT = taste_UT[users].astype(np.int64)
        weight_BT = theta_UT[users] * season_K[taste_BT]
        return taste_BT, weight_BT / weight_BT.sum(1, keepdims=True)

    def _loyal_running(self, users: NDArray[Any], running_MA: Bool) -> Bool:
        """True for loyalties that run in the user's market, ``(B, L)``."""
        loyal_BL = self.latents.loyal_UL[users]
        return running_MA[self.latents.market_U[users][:, None], loyal_BL] & (loyal_BL >= 0)

    def _timing(self, number: int) -> tuple[bool, Float]:
        """Whether tastes have drifted, and the season of each."""
        first_day = (number - 1) * self.period_days
        middle = (first_day + self.period_days / 2) / DAYS_PER_YEAR
        season_K = 1 + self.cfg.seasonality * np.cos(2 * np.pi * (middle - self.latents.season_K))
        return first_day >= self.cfg.drift_day, season_K

    def _open_period(self, number: int) -> Period:
        cfg, latents, n_tastes = self.cfg, self.latents, self.cfg.tastes
        drifted, season_K = self._timing(number)
        running_MA = self.running(number)
        visits_M, demand_MK, retarget_MA = self._demand(number, running_MA)
        impressions_M = visits_M * cfg.slots * self.period_days
        reached_A = np.where(latents.phase_AM >= 0, visits_M, 0.0).sum(1)
        share_MA, throttle_MA = np.zeros(running_MA.shape), np.zeros(running_MA.shape)
        taste_MK, worth_MK = np.zeros((cfg.markets, n_tastes)), np.zeros((cfg.markets, n_tastes))
        worth_MKK = np.zeros((cfg.markets, n_tastes, n_tastes))
        for market in range(cfg.markets):
            runs_N = np.flatnonzero(running_MA[market])
            budget_N = latents.budget_A[runs_N] * visits_M[market] / np.maximum(reached_A[runs_N], 1e-300)
            cost_N = latents.bid_A[runs_N] / 1000 * impressions_M[market]
            share_N, throttle_N = self._auction(
                runs_N, demand_MK[market], retarget_MA[market, runs_N], cost_N=cost_N, budget_N=budget_N
            )
            share_MA[market, runs_N], throttle_MA[market, runs_N] = share_N, throttle_N
            taste_NT, membership_NT = latents.taste_AT[runs_N].astype(np.int64), latents.membership_AT[runs_N]
            sold_NT = share_N[:, None] * membership_NT
            worth_NT = sold_NT * latents.quality_A[runs_N, None]
            taste_MK[market] = np.bincount(taste_NT.ravel(), sold_NT.ravel(), minlength=n_tastes)
            worth_MK[market] = np.bincount(taste_NT.ravel(), worth_NT.ravel(), minlength=n_tastes)
            pair_NTT = taste_NT[:, :, None] * n_tastes + taste_NT[:, None, :]
            worth_NTT = worth_NT[:, :, None] * membership_NT[:, None, :]
            pairs = np.bincount(pair_NTT.ravel(), worth_NTT.ravel(), minlength=n_tastes**2)
            worth_MKK[market] = pairs.reshape(n_tastes, n_tastes)
        return Period(number, drifted, season_K, running_MA, share_MA, throttle_MA, taste_MK, worth_MK, worth_MKK)

    def _demand(self, number: int, running_MA: Bool) -> tuple[Float, Float, Float]:
        """Visits a day of each market, and what share of them wants each taste and each advertiser again."""
        cfg, latents = self.cfg, self.latents
        visits_M = np.bincount(latents.market_U, latents.visits_U, minlength=cfg.markets).astype(np.float64)
        demand_C, retarget_C = np.zeros(cfg.markets * cfg.tastes), np.zeros(running_MA.size)
        for start in range(0, self.n_users, _BLOCK):
            users = np.arange(start, min(start + _BLOCK, self.n_users))
            market_B1, visits_B1 = latents.market_U[users].astype(np.int64)[:, None], latents.visits_U[users, None]
            taste_BT, theta_BT = self._tastes(users, number)
            cell_BT = market_B1 * cfg.tastes + taste_BT
            demand_C += np.bincount(cell_BT.ravel(), (visits_B1 * theta_BT).ravel(), minlength=len(demand_C))
            runs_BL = self._loyal_running(users, running_MA)
            each_BL = np.where(runs_BL, visits_B1 / np.maximum(runs_BL.sum(1, keepdims=True), 1), 0.0)
            cell_BL = np.where(runs_BL, market_B1 * self.n_advertisers + latents.loyal_UL[users], 0)
            np.add.at(retarget_C, cell_BL.ravel(), each_BL.ravel())
        safe_M1 = np.maximum(visits_M, 1e-300)[:, None]
        return visits_M, demand_C.reshape(cfg.markets, -1) / safe_M1, retarget_C.reshape(running_MA.shape) / safe_M1

    def _auction(
        self, runs_N: Int, demand_K: Float, retarget_N: Float, *, cost_N: Float, budget_N: Float
    ) -> tuple[Float, Float]:
        """Shares of broad traffic and throttles at which the expected spend keeps to the budgets, to half a percent.

        Each step scales the throttles by budget over spend, never above 1 and never below a hundredth: where all
        budgets together do not buy a market's slots, somebody has to overspend.

        Args:
            runs_N: advertisers that run.
            demand_K: share of the market's visits that want each taste.
            retarget_N: share of its visits that are retargeted by each.
            cost_N: spend if all the market's slots were the advertiser's, money.
            budget_N: budget for the market, money.
        """
        cfg, latents = self.cfg, self.latents
        weight_N = latents.size_A[runs_N] * latents.bid_A[runs_N]
        taste_NT, membership_NT = latents.taste_AT[runs_N], latents.membership_AT[runs_N]
        throttle_N = np.ones(len(runs_N))
        for step in range(_THROTTLE_STEPS + 1):
            share_N = weight_N * throttle_N
            share_N /= share_N.sum()
            sold_K = np.bincount(taste_NT.ravel(), (share_N[:, None] * membership_NT).ravel(), minlength=len(demand_K))
            wanted_K = np.divide(demand_K, sold_K, out=np.zeros_like(demand_K), where=sold_K > 0)
            broad = cfg.broad_share + cfg.interest_share * demand_K[sold_K == 0].sum()
            broad += self._retarget_share * (1 - (throttle_N * retarget_N).sum())
            slots_N = share_N * (broad + cfg.interest_share * (membership_NT * wanted_K[taste_NT]).sum(1))
            slots_N += self._retarget_share * throttle_N * retarget_N
            excess_N = slots_N * cost_N / np.maximum(budget_N, 1e-300)
            over, under = excess_N[throttle_N > _THROTTLE_FLOOR], excess_N[throttle_N < 1]
            settled = over.max(initial=0.0) <= 1 + _THROTTLE_EXCESS and under.min(initial=1.0) >= 1 - _THROTTLE_EXCESS
            if settled or step == _THROTTLE_STEPS:
                break
            throttle_N = np.clip(throttle_N / np.maximum(excess_N, 1e-300), _THROTTLE_FLOOR, 1.0)
        return share_N, throttle_N

    @property
    def _retarget_share(self) -> float:
        return max(0.0, 1 - self.cfg.broad_share - self.cfg.interest_share)

    def _traffic(self, audience: Audience) -> _Traffic:
        """What of broad, interest and retargeted slots goes where."""
        cfg, state, market_B = self.cfg, audience.period, audience.market_B
        sold_BK, theta_BK, is_loyal_BL = state.taste_MK[market_B], audience.theta_BK, audience.loyal_BL >= 0
        taken_BL = is_loyal_BL * state.throttle_MA[market_B[:, None], audience.loyal_BL]
        taken_BL = taken_BL / np.maximum(is_loyal_BL.sum(1, keepdims=True), 1)
        interest_BK = np.divide(theta_BK, sold_BK, out=np.zeros_like(theta_BK), where=sold_BK > 0)
        broad_B = cfg.broad_share + cfg.interest_share * np.where(sold_BK > 0, 0.0, theta_BK).sum(1)
        broad_B += self._retarget_share * (1 - taken_BL.sum(1))
        return _Traffic(broad_B, cfg.interest_share * interest_BK, self._retarget_share * taken_BL)

    def _shown(self, audience: Audience, traffic: _Traffic, row: Int, advertiser: Int) -> Float:
        """S of pairs of a row and an advertiser; the two are broadcast."""
        latents = self.latents
        part: Any = traffic.broad_B[row]
        for number in range(latents.taste_AT.shape[1]):
            interest = traffic.interest_BK[row, latents.taste_AT[advertiser, number]]
            part = part + interest * latents.membership_AT[advertiser, number]
        shown = audience.period.share_MA[audience.market_B[row], advertiser] * part
        for number in range(audience.loyal_BL.shape[1]):
            is_loyal = audience.loyal_BL[row, number] == advertiser
            shown = shown + traffic.retarget_BL[row, number] * is_loyal
        return shown

    def _norm(self, audience: Audience, traffic: _Traffic) -> Float:
        """Z of each row: Σ_a S(a) r(a) without a sum over all advertisers.

        ``base`` is in r wherever a slot is; affinity meets broad and interest traffic in sums that the period has; what
        is left are retargeted slots, and the loyalty of whatever slot a loyal advertiser has.
        """
        cfg, state, market_B = self.cfg, audience.period, audience.market_B
        taste_BT, theta_BT = audience.taste_BT, audience.theta_BT
        interest_BT = np.take_along_axis(traffic.interest_BK, taste_BT, axis=1)
        worth_BTT = state.worth_MKK[market_B[:, None, None], taste_BT[:, :, None], taste_BT[:, None, :]]
        worth_B = traffic.broad_B * (audience.theta_BK * state.worth_MK[market_B]).sum(1)
        worth_B += (interest_BT[:, :, None] * worth_BTT * theta_BT[:, None, :]).sum((1, 2))
        row_B1 = np.arange(len(market_B))[:, None]
        fit_BL = self.propensity(audience, row_B1, audience.loyal_BL) - cfg.base - cfg.loyalty
        shown_BL = self._shown(audience, traffic, row_B1, audience.loyal_BL)
        loyal_BL = traffic.retarget_BL * fit_BL + cfg.loyalty * shown_BL
        return cfg.base + cfg.affinity * worth_B + np.where(audience.loyal_BL >= 0, loyal_BL, 0.0).sum(1)

    def _pairs(
        self,
        users: ArrayLike,
        advertisers: ArrayLike,
        period: ArrayLike,
        value: Callable[[Audience, Int, Int], Float],
    ) -> Float:
        """A function of pairs of a user in a period and an advertiser; users are looked up before being broadcast."""
        users_, advertisers_, period_ = (np.asarray(x, np.int64) for x in (users, advertisers, period))
        self._check(users_, advertisers_, period_)
        users_, period_ = np.broadcast_arrays(users_, period_)
        row = np.arange(users_.size).reshape(users_.shape)
        row, advertisers_ = np.broadcast_arrays(row, advertisers_)
        shape, row_P, advertiser_P = row.shape, row.ravel(), advertisers_.ravel()
        user_R, period_R = users_.ravel(), period_.ravel()
        result_P = np.zeros(len(row_P))
        for number in np.unique(period_R).tolist():
            pairs = np.flatnonzero(period_R[row_P] == number)
            for start in range(0, len(pairs), _BLOCK):
                chunk = pairs[start : start + _BLOCK]
                needed, row_C = np.unique(row_P[chunk], return_inverse=True)
                audience = self.audience(user_R[needed], number)
                result_P[chunk] = value(audience, row_C, advertiser_P[chunk])
        return result_P.reshape(shape)

    def _check(self, users: Int, advertisers: Int, period: Int) -> None:
        errors = [
            UserError(
                f"{name} from {values.min()} to {values.max()}",
                expected=f"whole numbers {_between(low, high)}",
                action=f"give indexes of this world's {name}" if high is not None else "count periods from 1",
            )
            for name, values, low, high in (
                ("users", users, 0, self.n_users - 1),
                ("advertisers", advertisers, 0, self.n_advertisers - 1),
                ("periods", period, 1, None),
            )
            if values.size and (values.min() < low or (high is not None and values.max() > high))
        ]
        if errors:
            raise UserError.collect(errors)


def generator(seed: int, stream: str, number: int = 0) -> np.random.Generator:
    """Random numbers of one purpose: streams of other names or numbers are independent of it.

    Args:
        seed: of the world.
        stream: what is drawn.
        number: e.g. the day.
    """
    name = int.from_bytes(blake2b(f"{stream} {number}".encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed % (1 << 64), name], np.uint64)))


def _draw(cfg: SimulatorConfig, seed: int, period_days: int) -> Latents:
    def rng(stream: str) -> np.random.Generator:
        return generator(seed, stream)

    n_users, n_advertisers, n_tastes = cfg.users, cfg.advertisers, cfg.tastes
    liking_K = _TASTE_SPREAD * rng("popularity of tastes").standard_normal(n_tastes)
    taste_AT = _distinct_tastes(
        rng("tastes of advertisers"), np.zeros(n_advertisers, np.int8), liking_K[None], cfg.tastes_per_advertiser
    )
    membership_AT = rng("memberships").uniform(*_MINOR_TASTE, size=taste_AT.shape)
    membership_AT[:, 0] = 1.0
    size_A = (1 - rng("sizes").random(n_advertisers)) ** -cfg.popularity_skew
    bid_A = _BID_MEDIAN * np.exp(_BID_SPREAD * rng("bids").standard_normal(n_advertisers))
    bid_A = np.maximum(bid_A.round(2), 0.01)
    impressions = n_users * cfg.visits_per_week / 7 * period_days * cfg.slots
    everywhere_A = impressions * size_A * bid_A / (size_A * bid_A).sum() * bid_A / 1000
    spread_A = np.exp(_BUDGET_SPREAD * rng("budgets").standard_normal(n_advertisers))

    first, last = cfg.cold_periods
    late_A = first + (rng("launches").random(n_advertisers) * (last - first + 1)).astype(np.int32)
    launch_A = np.where(rng("cold").random(n_advertisers) < cfg.cold_share, late_A, 1).astype(np.int32)
    shortest, longest = cfg.flight_periods
    cycle_A = (shortest + rng("cycles").random(n_advertisers) * (longest - shortest + 1)).astype(np.int32)
    duty_A = np.ceil(cycle_A * rng("duties").uniform(cfg.flight_duty[0], cfg.flight_duty[1], n_advertisers)).astype(
        np.int32
    )
    duty_A = duty_A.clip(1, cycle_A)
    phase_AM = (rng("phases").random((n_advertisers, cfg.markets)) * cycle_A[:, None]).astype(np.int32)
    phase_AM[rng("reach").random(phase_AM.shape) >= cfg.market_reach] = -1
    for market in range(cfg.markets):  # one that always runs, so that no market is ever empty
        advertiser = market % n_advertisers
        phase_AM[advertiser, market] = max(phase_AM[advertiser, market], 0)
        launch_A[advertiser], duty_A[advertiser] = 1, cycle_A[advertiser]

    tilt_GK = liking_K + cfg.profile_signal * rng("ages' tastes").standard_normal((len(AGES), n_tastes))
    age_U = rng("ages").integers(0, len(AGES), n_users).astype(np.int8)
    taste_UT, theta_UT = _tastes(cfg, rng, "", age_U, tilt_GK)
    other_taste_UT, other_theta_UT = _tastes(cfg, rng, " after the drift", age_U, tilt_GK)
    drifts_U1 = (rng("who drifts").random(n_users) < cfg.drift_share)[:, None]
    weight_M = np.arange(1, cfg.markets + 1) ** -0.5
    market_U = np.searchsorted(np.cumsum(weight_M / weight_M.sum())[:-1], rng("markets").random(n_users), side="right")
    activity_U = rng("activity").standard_gamma(cfg.activity_shape, n_users) / cfg.activity_shape
    return Latents(
        season_K=rng("seasons").random(n_tastes),
        taste_AT=taste_AT,
        membership_AT=membership_AT,
        size_A=size_A,
        quality_A=rng("qualities").beta(*_QUALITY, size=n_advertisers),
        bid_A=bid_A,
        budget_A=cfg.budget * everywhere_A * spread_A,
        price_A=_PRICE_MEDIAN * np.exp(_PRICE_SPREAD * rng("prices").standard_normal(n_advertisers)),
        launch_A=launch_A,
        cycle_A=cycle_A,
        duty_A=duty_A,
        phase_AM=phase_AM,
        ad_ptr=np.cumsum(
            np.append(0, 1 + rng("ads").poisson(cfg.ads_per_advertiser - 1, n_advertisers)), dtype=np.int64
        ),
        market_U=market_U.astype(np.int16),
        visits_U=activity_U * cfg.visits_per_week / 7,
        age_U=age_U,
        taste_UT=taste_UT,
        theta_UT=theta_UT,
        later_taste_UT=np.where(drifts_U1, other_taste_UT, taste_UT),
        later_theta_UT=np.where(drifts_U1, other_theta_UT, theta_UT),
        loyal_UL=_loyalties(cfg, rng("loyalties"), taste_UT, theta_UT, taste_AT, membership_AT * size_A[:, None]),
    )


def _distinct_tastes(
    rng: np.random.Generator, group_N: NDArray[np.int8], log_weight_GK: Float, n_chosen: int
) -> NDArray[np.int16]:
    """Tastes drawn one after the other without replacement (the Gumbel trick), ``(N, n_chosen)``."""
    chosen = [np.zeros((0, n_chosen), np.int16)]
    for start in range(0, len(group_N), _BLOCK):
        key_BK = log_weight_GK[group_N[start : start + _BLOCK]]
        key_BK += rng.gumbel(size=key_BK.shape)
        chosen.append(np.argsort(-key_BK, axis=1, kind="stable")[:, :n_chosen].astype(np.int16))
    return np.concatenate(chosen)


def _tastes(
    cfg: SimulatorConfig, rng: Callable[[str], np.random.Generator], when: str, age_U: NDArray[np.int8], tilt_GK: Float
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Tastes of all users and their weights, Dirichlet."""
    taste_UT = _distinct_tastes(rng(f"tastes of users{when}"), age_U, tilt_GK, cfg.tastes_per_user)
    weight_UT = rng(f"weights of tastes{when}").standard_gamma(cfg.taste_concentration, taste_UT.shape) + 1e-9
    return taste_UT, (weight_UT / weight_UT.sum(1, keepdims=True)).astype(np.float32)


def _loyalties(
    cfg: SimulatorConfig,
    rng: np.random.Generator,
    taste_UT: NDArray[np.int16],
    theta_UT: NDArray[np.float32],
    taste_AT: NDArray[np.int16],
    weight_AT: Float,
) -> NDArray[np.int32]:
    """Advertisers drawn by taste, then by size; one drawn again counts once."""
    sellers = Segments.of(taste_AT.ravel(), weight_AT.ravel(), cfg.tastes)
    loyal_UL = np.full((len(taste_UT), cfg.loyalties), -1, np.int32)
    for start in range(0, len(taste_UT), _BLOCK):
        rows = slice(start, start + _BLOCK)
        uniform_BL2 = rng.random((len(taste_UT[rows]), cfg.loyalties, 2))
        taste_BL = pick_taste(taste_UT[rows].astype(np.int64), theta_UT[rows].astype(np.float64), uniform_BL2[:, :, 0])
        seller_BL = sellers.pick(taste_BL.ravel(), uniform_BL2[:, :, 1].ravel()).reshape(taste_BL.shape)
        loyal_BL = np.where(seller_BL >= 0, seller_BL // taste_AT.shape[1], -1)
        for number in range(1, cfg.loyalties):
            again = (loyal_BL[:, :number] == loyal_BL[:, number, None]).any(1)
            loyal_BL[again, number] = -1
        loyal_UL[rows] = loyal_BL
    return loyal_UL


def pick_taste(taste_BT: Int, theta_BT: Float, uniform_BN: Float) -> Int:
    """Tastes drawn from each row's weights, ``(B, N)``.

    Args:
        taste_BT, theta_BT: tastes and weights of each row, summing to 1.
        uniform_BN: a number in [0, 1) a draw.
    """
    below_BT = np.cumsum(theta_BT, axis=1)[:, :-1]
    number_BN = np.zeros(uniform_BN.shape, np.int64)
    for number in range(below_BT.shape[1]):
        number_BN += uniform_BN >= below_BT[:, number, None]
    return np.take_along_axis(taste_BT, number_BN, axis=1)


@dataclass(frozen=True)
class Segments:
    """Distributions over the entries of segments, drawn from by bisection.

    Args:
        entry_E: entries, segment after segment.
        cumulative_E: rises from ``i`` to ``i + 1`` over segment ``i``.
        ptr: segment ``i`` is ``ptr[i]:ptr[i + 1]``.
    """

    entry_E: Int
    cumulative_E: Float
    ptr: Int

    @classmethod
    def of(cls, segment_N: NDArray[Any], weight_N: Float, n_segments: int) -> Segments:
        """Gather entries by segment.

        Args:
            segment_N: segment of each entry.
            weight_N: weight of each entry in its segment; entries without any are left out.
            n_segments: number of segments; one may be empty.
        """
        entry_E = np.flatnonzero(weight_N > 0)
        entry_E = entry_E[np.argsort(segment_N[entry_E], kind="stable")]
        segment_E, weight_E = segment_N[entry_E].astype(np.int64), weight_N[entry_E]
        ptr = np.searchsorted(segment_E, np.arange(n_segments + 1))
        total_E = np.bincount(segment_E, weight_E, minlength=n_segments)[segment_E]
        running_E = np.cumsum(weight_E / total_E)  # about i + 1 after all of segment i, if none is empty
        before = np.append(0.0, running_E)[ptr[:-1]]
        return cls(entry_E, segment_E + running_E - before[segment_E], ptr)

    def pick(self, segment_D: Int, uniform_D: Float) -> Int:
        """An entry of each draw's segment, -1 where the segment is empty.

        Args:
            segment_D: segments.
            uniform_D: a number in [0, 1) a draw.
        """
        if not len(self.entry_E):
            return np.full(len(segment_D), -1, np.int64)
        first_D, end_D = self.ptr[segment_D], self.ptr[segment_D + 1]
        position_D = np.searchsorted(self.cumulative_E, segment_D + uniform_D, side="right")
        entry_D = self.entry_E[np.clip(position_D, first_D, np.maximum(end_D - 1, 0)).clip(max=len(self.entry_E) - 1)]
        return np.where(end_D > first_D, entry_D, -1)
