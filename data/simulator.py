"""A simulated ad log of any size, whose truth is known: see `data.truth` for what holds in it.

===================  =====================================================================================
advertiser           sells to a few tastes; its text are product words of theirs, its name is made up
ad                   one of an advertiser's, with some of its words; they all run at the same times
market               where a user lives
placement            a run of the ad in a market: one cycle of its schedule, from its launch on
impression           every ad shown, in its position (column ``display``)
click, conversions   as `Truth.conversion_probability` has them; a click conversion has a click before it
visit, search        what a user looks at and searches for: a taste, a product word (column ``category``)
organic, coupon      purchases without an ad: of an advertiser the user is loyal to, or of a taste
campaign             a mailing about a taste
===================  =====================================================================================

The log is made and written day by day, a day from random numbers of its own, so that neither the number of days
nor anything that acts later changes a byte of what was before.

Shapes: V visits of a day, S slots of a visit, I impressions, H happenings (visits and mailings), N events, A
advertisers, K tastes, W product words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.config import DataConfig
from data.errors import UserError
from data.tables import KINDS
from data.truth import (
    AGES,
    TRUTH,
    VALUE_SPREAD,
    Audience,
    Float,
    Int,
    Segments,
    SimulatorConfig,
    Truth,
    generator,
    pick_taste,
)
from data.writer import TableWriter

ORIGIN = datetime(2024, 1, 1)
"""Start of period 1 where the config names none: a Monday."""
PROFILE = ("age", "region")

_GOODS = {
    "coffee": "espresso beans filter roast grinder capsules crema mug arabica decaf percolator moka",
    "tea": "teapot chamomile matcha oolong infuser rooibos earl-grey jasmine chai peppermint kettle sencha",
    "bakery": "bread sourdough croissant baguette muffin rye bagel brioche flour yeast pretzel scone",
    "dairy": "milk cheese yogurt butter cream mozzarella kefir cheddar feta ricotta gouda custard",
    "snacks": "crisps popcorn nuts crackers chocolate granola raisins biscuits cookies toffee cashews wafers",
    "pets": "dog-food kibble leash catnip aquarium birdseed litter collar hamster cat-tree chew-toy kennel",
    "baby": "diapers stroller pacifier crib bib rattle onesie bottle high-chair wipes teether pram",
    "garden": "seeds lawnmower compost hedge-trimmer flowerpot fertiliser hose greenhouse tulips trellis rake mulch",
    "tools": "drill hammer screwdriver wrench sander toolbox pliers saw chisel clamp ladder spirit-level",
    "running": "sneakers treadmill stopwatch marathon insoles headband trail-vest shorts tracker gaiters socks jersey",
    "skincare": "moisturiser sunscreen cleanser serum toner exfoliant lip-balm face-mask retinol lotion eye-cream mist",
    "cleaning": "detergent sponge bleach mop dustpan vacuum descaler window-spray broom softener duster scourer",
    "books": "novel thriller cookbook poetry biography atlas comic dictionary paperback fairy-tales memoir bookmark",
    "games": "board-game puzzle console dice playing-cards joystick chess jigsaw headset domino arcade miniatures",
    "travel": "suitcase flight hostel passport cruise travel-guide backpack neck-pillow tent campsite ferry luggage",
    "music": "guitar piano headphones vinyl drumsticks microphone ukulele amplifier violin metronome turntable flute",
}
_STYLES = ("", "organic", "budget", "luxury", "vintage", "kids", "compact", "handmade")
_FORMS = ("", "set", "refill", "gift-box", "sample")
_ONSETS = tuple("bl br dr fl gl kl kr pl pr sk sl sn st tr v z n m l r".split(" "))  # noqa: SIM905
_VOWELS = "aeiou"
_CODAS = tuple("x lk rn mp sk th ff nd zz rg".split(" "))  # noqa: SIM905
_SCATTER = 618_033
"""Shares no factor with the number of names, so that neighbours differ and no two are the same."""
_EVENT = pl.Enum(KINDS)
_KIND = {kind: number for number, kind in enumerate(KINDS)}
_SECONDS_PER_DAY, _US = 86_400, 1_000_000
_LAST_VISIT = _SECONDS_PER_DAY - 1800
"""A visit begins before it, so that all it leads to is of the same day."""
_SLOT_SECONDS, _CLICK_SECONDS, _CONVERSION_SECONDS = 5, 4, (60, 1200)
_TIME_OF_DAY = (3.0, 2.0)
_NONE = -1


def read(cfg: DataConfig, out: TableWriter) -> None:
    """Simulate a log and write it, and its truth beside the tables.

    Args:
        cfg: ``simulator`` says what, ``seed`` which one; ``max_users`` caps the users.
        out: takes the tables, day by day.

    Raises:
        UserError: the config does not say where period 1 begins and the first day has no conversion to tell it.
    """
    simulator = cfg.simulator
    if cfg.max_users is not None:
        simulator = replace(simulator, users=min(simulator.users, cfg.max_users))
    calendar = cfg.calendar(ORIGIN)
    truth = Truth.draw(simulator, seed=cfg.seed, period_days=calendar.days)
    truth.save(out.directory / TRUTH)
    words = Words(simulator)
    ad_word_I = _write_catalogue(truth, words, out)
    out.write("users", _users(truth))
    _write_placements(truth, calendar.start(1), out)
    days = Days(truth, words, ad_word_I, calendar.origin_us)
    with out.track("simulating days", simulator.days) as advance:
        for day in range(simulator.days):
            events = days.simulate(day)
            if day == 0:
                _check_origin(cfg, events)
            out.write("events", events)
            advance(1)


def _check_origin(cfg: DataConfig, events: pl.DataFrame) -> None:
    """Without an origin in the config a reader of the tables takes the day of the first conversion for it."""
    if cfg.origin is None and cfg.split.origin is None and not events["kind"].is_in(list(cfg.label_kinds)).any():
        raise UserError(
            "data.origin=null and no conversion on the first simulated day",
            expected="a log whose first conversion is on the first day of period 1, or its date",
            action=f"set data.origin={ORIGIN:%Y-%m-%d}",
        )


class Words:
    """The vocabulary: names of tastes, and product words of each.

    Args:
        cfg: how many of both.

    Attributes:
        tastes: name of each taste.
        products: words of taste ``k`` are ``products[k * n : (k + 1) * n]``, n a taste.
        per_taste: n.
        categories: what the column ``category`` of the events holds: tastes, then products.
    """

    def __init__(self, cfg: SimulatorConfig) -> None:
        self.per_taste = cfg.words_per_taste
        self.tastes: list[str] = []
        self.products: list[str] = []
        for style, (taste, goods) in islice(((s, item) for s in _STYLES for item in _GOODS.items()), cfg.tastes):
            words = [good.replace("-", " ") for good in goods.split()]
            named = (f"{style} {word} {form}".strip() for form in _FORMS for word in words)
            self.tastes.append(f"{style} {taste}".strip())
            self.products += islice(named, cfg.words_per_taste)
        self.categories = pl.Enum(self.tastes + self.products)

    def draw(self, taste_N: NDArray[Any], uniform_N: Float) -> Int:
        """A product word of each taste."""
        return taste_N * self.per_taste + (uniform_N * self.per_taste).astype(np.int64)

    def texts(self, word_NW: Int) -> pl.Series:
        """Each row's words, without repetitions."""
        words = pl.Series(self.products).gather(word_NW.ravel()).reshape(word_NW.shape)
        return words.arr.to_list().list.unique(maintain_order=True).list.join(", ")


def made_up_name(number: int) -> str:
    """A name of two syllables no company would have, another one for each of the first million numbers."""
    syllables = len(_ONSETS) * len(_VOWELS) * len(_CODAS)
    rest, name = number * _SCATTER % (syllables * syllables), ""
    for _ in range(2):
        rest, syllable = divmod(rest, syllables)
        onset, tail = divmod(syllable, len(_VOWELS) * len(_CODAS))
        vowel, coda = divmod(tail, len(_CODAS))
        name += _ONSETS[onset] + _VOWELS[vowel] + _CODAS[coda]
    again = number // (syllables * syllables)
    return name.capitalize() + (f" {again + 1}" if again else "")


def _write_catalogue(truth: Truth, words: Words, out: TableWriter) -> Int:
    """Write advertisers and ads; the product word each ad stands for."""
    cfg, latents = truth.cfg, truth.latents
    rng = generator(truth.seed, "texts of advertisers")
    uniform_AW2 = rng.random((truth.n_advertisers, cfg.words_per_advertiser, 2))
    share_AT = latents.membership_AT / latents.membership_AT.sum(1, keepdims=True)
    taste_AW = pick_taste(latents.taste_AT.astype(np.int64), share_AT, uniform_AW2[:, :, 0])
    word_AW = words.draw(taste_AW, uniform_AW2[:, :, 1])
    out.write(
        "advertisers",
        pl.DataFrame(
            {
                "advertiser_id": np.arange(truth.n_advertisers, dtype=np.int32),
                "name": [made_up_name(number) for number in range(truth.n_advertisers)],
                "text": words.texts(word_AW),
            }
        ),
    )
    advertiser_I = np.repeat(np.arange(truth.n_advertisers), np.diff(latents.ad_ptr))
    key_IW = generator(truth.seed, "texts of ads").random((len(advertiser_I), cfg.words_per_advertiser))
    chosen_IW = np.argsort(key_IW, axis=1)[:, : cfg.words_per_ad]
    word_IW = word_AW[advertiser_I[:, None], chosen_IW]
    out.write(
        "ads",
        pl.DataFrame(
            {
                "ad_id": np.arange(len(advertiser_I), dtype=np.int32),
                "advertiser_id": advertiser_I.astype(np.int32),
                "text": words.texts(word_IW),
                "category": pl.Series(words.tastes).gather(latents.taste_AT[advertiser_I, 0]),
                "bid": latents.bid_A[advertiser_I].astype(np.float32),
            }
        ),
    )
    return word_IW[:, 0]


def _users(truth: Truth) -> pl.DataFrame:
    latents = truth.latents
    missing_U2 = generator(truth.seed, "missing profiles").random((truth.n_users, 2)) < truth.cfg.profile_missing
    regions = pl.Series([f"region {market + 1}" for market in range(truth.cfg.markets)])
    columns = (pl.Series(AGES).gather(latents.age_U), regions.gather(latents.market_U))
    profile = {
        name: pl.select(pl.when(pl.Series(~missing_U2[:, number])).then(values)).to_series()
        for number, (name, values) in enumerate(zip(PROFILE, columns, strict=True))
    }
    return pl.DataFrame({"user_id": np.arange(truth.n_users, dtype=np.int32), **profile})


def _write_placements(truth: Truth, origin: datetime, out: TableWriter) -> None:
    """Write the runs that begin in each period of the log; their end may lie after it."""
    latents, length = truth.latents, np.timedelta64(truth.period_days, "D")
    last = truth.period_of(truth.cfg.days - 1)
    first_moment = np.datetime64(origin, "us")
    with out.track("writing placements", last) as advance:
        for period in range(1, last + 1):
            position_AM = (period - 1 + latents.phase_AM) % latents.cycle_A[:, None]
            opens_A1 = (np.maximum(latents.launch_A, 1) == period)[:, None]
            market_R, advertiser_R = np.nonzero(truth.running(period) & ((position_AM == 0) | opens_A1).T)
            periods_R = latents.duty_A[advertiser_R] - position_AM[advertiser_R, market_R]
            ads_R = np.diff(latents.ad_ptr)[advertiser_R]
            run_P = np.repeat(np.arange(len(ads_R)), ads_R)
            ad_P = (
                np.arange(len(run_P)) - np.repeat(np.cumsum(ads_R) - ads_R, ads_R) + latents.ad_ptr[advertiser_R[run_P]]
            )
            start = first_moment + (period - 1) * length
            frame = pl.DataFrame(
                {
                    "ad_id": ad_P.astype(np.int32),
                    "market_id": market_R[run_P].astype(np.int32),
                    "start": np.full(len(run_P), start),
                    "end": start + periods_R[run_P] * length,
                }
            )
            out.write("placements", frame)
            advance(1)


@dataclass(frozen=True)
class Supply:
    """Where advertisers are drawn from in a period.

    Args:
        period: the period.
        advertiser_R: advertisers that run, market after market.
        broad: those of each market, as entries of ``advertiser_R``.
        interest: those of each market and taste, as entries of their tastes, ``(R, T)``.
        sellers: all that have launched, of each taste, as entries of the tastes of all, ``(A, T)``.
    """

    period: int
    advertiser_R: Int
    broad: Segments
    interest: Segments
    sellers: Segments

    @classmethod
    def of(cls, truth: Truth, period: int) -> Supply:
        """What there is in a period."""
        state, latents, n_tastes = truth.period(period), truth.latents, truth.cfg.tastes
        market_R, advertiser_R = np.nonzero(state.running_MA)
        share_R, taste_RT = state.share_MA[market_R, advertiser_R], latents.taste_AT[advertiser_R].astype(np.int64)
        sold_RT = share_R[:, None] * latents.membership_AT[advertiser_R]
        weight_AT = latents.membership_AT * (latents.size_A * (latents.launch_A <= period))[:, None]
        return cls(
            period=period,
            advertiser_R=advertiser_R,
            broad=Segments.of(market_R, share_R, truth.cfg.markets),
            interest=Segments.of(
                (market_R[:, None] * n_tastes + taste_RT).ravel(), sold_RT.ravel(), truth.cfg.markets * n_tastes
            ),
            sellers=Segments.of(latents.taste_AT.ravel(), weight_AT.ravel(), n_tastes),
        )


class _Day:
    """One day's visits and mailings, and its events, gathered kind by kind.

    Args:
        audience: user of each visit, then of each mailing.
        second_H: when each begins, seconds of the day.
        n_visits: how many of them are visits.
        supply: whose ads and goods there are.
    """

    def __init__(self, audience: Audience, second_H: Int, n_visits: int, supply: Supply) -> None:
        self.audience, self.second_H, self.n_visits, self.supply = audience, second_H, n_visits, supply
        self.columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _COLUMNS}

    def add(self, kind: str, happening_N: Int, **columns: NDArray[Any] | int) -> None:
        """Some events of one kind; a column that is not given is none.

        Args:
            kind: the kind.
            happening_N: the visit or mailing of each.
            columns: of ``_COLUMNS``.
        """
        for name, none in _COLUMNS.items():
            value = {"kind": _KIND[kind], "happening": happening_N, **columns}.get(name, none)
            self.columns[name].append(np.broadcast_to(np.asarray(value), happening_N.shape))


_COLUMNS: dict[str, float] = {
    **dict.fromkeys(("happening", "second", "order", "kind"), 0),
    **dict.fromkeys(("advertiser", "ad", "slot", "category"), _NONE),
    "value": np.nan,
}


class Days:
    """Simulates the events of a day.

    Args:
        truth: what holds.
        words: the vocabulary.
        ad_word_I: the product word each ad stands for.
        origin_us: start of day 0, microseconds since 1970.
    """

    def __init__(self, truth: Truth, words: Words, ad_word_I: Int, origin_us: int) -> None:
        self.truth, self.words, self.ad_word_I, self.origin_us = truth, words, ad_word_I, origin_us
        self.slots = pl.Enum([f"slot {slot + 1}" for slot in range(truth.cfg.slots)])
        self._cumulative_U = np.cumsum(truth.latents.visits_U)
        self._requests = 0
        self._supply: Supply | None = None

    def simulate(self, day: int) -> pl.DataFrame:
        """The events of a day, in order; days are asked for one after the other, as visits are numbered through.

        Args:
            day: from 0.
        """
        truth, period = self.truth, self.truth.period_of(day)
        if self._supply is None or self._supply.period != period:
            self._supply = Supply.of(truth, period)
        rng = generator(truth.seed, "visits", day)
        n_visits = rng.poisson(self._cumulative_U[-1])
        n_mailings = rng.poisson(truth.n_users * truth.cfg.campaigns_per_week / 7)
        visitor = np.searchsorted(self._cumulative_U, rng.random(n_visits) * self._cumulative_U[-1], side="right")
        mailed = (rng.random(n_mailings) * truth.n_users).astype(np.int64)
        user_H = np.concatenate([np.sort(visitor).clip(max=truth.n_users - 1), np.sort(mailed)])
        second_H = (rng.beta(*_TIME_OF_DAY, size=len(user_H)) * _LAST_VISIT).astype(np.int64)
        today = _Day(truth.audience(user_H, period), second_H, n_visits, self._supply)
        self._mail(today, generator(truth.seed, "mailings", day))
        self._browse(today, generator(truth.seed, "browsing", day))
        self._buy(today, generator(truth.seed, "purchases", day))
        self._show(today, generator(truth.seed, "slots", day))
        frame = self._frame(today, self.origin_us + day * _SECONDS_PER_DAY * _US)
        self._requests += n_visits
        return frame

    def _mail(self, day: _Day, rng: np.random.Generator) -> None:
        mailing_C = np.arange(day.n_visits, len(day.audience.user_B))
        tastes = day.audience.taste_BT[mailing_C], day.audience.theta_BT[mailing_C]
        day.add("campaign", mailing_C, category=pick_taste(*tastes, rng.random((len(mailing_C), 1)))[:, 0])

    def _browse(self, day: _Day, rng: np.random.Generator) -> None:
        """Each visit is to the page of a taste; in some the user searches."""
        n_visits, audience = day.n_visits, day.audience
        uniform_V4 = rng.random((n_visits, 4))
        taste_V2 = pick_taste(audience.taste_BT[:n_visits], audience.theta_BT[:n_visits], uniform_V4[:, :2])
        day.add("visit", np.arange(n_visits), category=taste_V2[:, 0])
        searches = np.flatnonzero(uniform_V4[:, 2] < self.truth.cfg.search_rate)
        word_N = self.words.draw(taste_V2[searches, 1], uniform_V4[searches, 3])
        day.add("search", searches, second=2, order=1, category=len(self.words.tastes) + word_N)

    def _buy(self, day: _Day, rng: np.random.Generator) -> None:
        """Purchases without an ad and coupons: of a loyal advertiser's, else by taste among all that have launched."""
        cfg, latents, audience = self.truth.cfg, self.truth.latents, day.audience
        for kind, rate, second, order in (("organic", cfg.organic_rate, 600, 2), ("coupon", cfg.coupon_rate, 900, 3)):
            visits = np.flatnonzero(rng.random(day.n_visits) < rate)
            uniform_N5, noise_N = rng.random((len(visits), 5)), rng.standard_normal(len(visits))
            loyal_NL = latents.loyal_UL[audience.user_B[visits]].astype(np.int64)
            loyal_NL = np.where((loyal_NL >= 0) & (latents.launch_A[loyal_NL] <= day.supply.period), loyal_NL, _NONE)
            loyal_N = _one_of(loyal_NL, uniform_N5[:, :1])[:, 0]
            taste_N = pick_taste(audience.taste_BT[visits], audience.theta_BT[visits], uniform_N5[:, 1:2])[:, 0]
            entry_N = day.supply.sellers.pick(taste_N, uniform_N5[:, 2])
            seller_N = np.where(entry_N >= 0, entry_N // latents.taste_AT.shape[1], _NONE)
            is_loyal_N = (uniform_N5[:, 3] < cfg.organic_loyal_share) & (loyal_N >= 0)
            advertiser_N = np.where(is_loyal_N, loyal_N, seller_N)
            there = advertiser_N >= 0
            visits, advertiser_N = visits[there], advertiser_N[there]
            ad_N = self._ad_of(advertiser_N, uniform_N5[there, 4])
            sold: dict[str, Any] = {
                "advertiser": advertiser_N,
                "category": self._product(ad_N),
                "second": second,
                "order": order,
            }
            if kind == "organic":
                sold |= {"ad": ad_N, "value": self._value(advertiser_N, noise_N[there])}
            day.add(kind, visits, **sold)

    def _show(self, day: _Day, rng: np.random.Generator) -> None:
        """Ads shown, and what comes of each."""
        truth, cfg = self.truth, self.truth.cfg
        uniform = rng.random((6, day.n_visits, cfg.slots))
        visit_V1 = np.arange(day.n_visits)[:, None]
        advertiser_VS = self._advertisers_shown(day, uniform[:4])
        chance_VS = truth.attention * truth.propensity(day.audience, visit_V1, advertiser_VS)
        outcome_VS = uniform[5]
        visit_I, slot_I = (x.ravel() for x in np.broadcast_arrays(visit_V1, np.arange(cfg.slots)))
        advertiser_I, chance_I, outcome_I = advertiser_VS.ravel(), chance_VS.ravel(), outcome_VS.ravel()
        ad_I = self._ad_of(advertiser_I, uniform[4].ravel())
        second_I, order_I = _SLOT_SECONDS * (1 + slot_I), 4 + 3 * slot_I

        def add(kind: str, rows: Int | slice, **columns: NDArray[Any]) -> None:
            seen = {"advertiser": advertiser_I[rows], "ad": ad_I[rows], "slot": slot_I[rows]}
            day.add(kind, visit_I[rows], **{**seen, **columns})

        add("impression", slice(None), second=second_I, order=order_I)
        clicks = np.flatnonzero(outcome_I < chance_I * cfg.click)
        add("click", clicks, second=second_I[clicks] + _CLICK_SECONDS, order=order_I[clicks] + 1)
        is_click_conversion = outcome_I < chance_I * cfg.click * cfg.click_conversion
        is_view = (outcome_I >= chance_I * cfg.click) & (outcome_I < chance_I * (cfg.click + cfg.view_conversion))
        for kind, converts in (("click_conversion", is_click_conversion), ("view_conversion", is_view)):
            rows = np.flatnonzero(converts)
            add(
                kind,
                rows,
                second=second_I[rows] + rng.integers(*_CONVERSION_SECONDS, size=len(rows)),
                order=order_I[rows] + 2,
                category=self._product(ad_I[rows]),
                value=self._value(advertiser_I[rows], rng.standard_normal(len(rows))),
            )

    def _advertisers_shown(self, day: _Day, uniform: Float) -> Int:
        """Advertisers drawn from S for each slot.

        Args:
            day: the visits.
            uniform: ``(4, V, S)``: the way a slot is filled, taste or throttle, loyal advertiser, advertiser.
        """
        truth, cfg, supply, audience = self.truth, self.truth.cfg, day.supply, day.audience
        way_VS, second_VS, loyal_VS, entry_VS = uniform
        n_visits = day.n_visits
        market_VS = np.broadcast_to(audience.market_B[:n_visits, None], way_VS.shape)
        advertiser_VS = np.full(way_VS.shape, _NONE)

        by_interest = (way_VS >= cfg.broad_share) & (way_VS < cfg.broad_share + cfg.interest_share)
        taste_VS = pick_taste(audience.taste_BT[:n_visits], audience.theta_BT[:n_visits], second_VS)
        segment_I = (market_VS * cfg.tastes + taste_VS)[by_interest]
        entry_I = supply.interest.pick(segment_I, entry_VS[by_interest])
        row_I = entry_I // truth.latents.taste_AT.shape[1]
        advertiser_VS[by_interest] = np.where(entry_I >= 0, supply.advertiser_R[row_I], _NONE)

        again_VS = _one_of(audience.loyal_BL[:n_visits], loyal_VS)
        takes_part = second_VS < truth.period(supply.period).throttle_MA[market_VS, again_VS]
        retargeted = (way_VS >= cfg.broad_share + cfg.interest_share) & (again_VS >= 0) & takes_part
        advertiser_VS[retargeted] = again_VS[retargeted]

        broad = advertiser_VS == _NONE
        advertiser_VS[broad] = supply.advertiser_R[supply.broad.pick(market_VS[broad], entry_VS[broad])]
        return advertiser_VS

    def _ad_of(self, advertiser_N: Int, uniform_N: Float) -> Int:
        """One of each advertiser's ads."""
        first_N, end_N = self.truth.latents.ad_ptr[advertiser_N], self.truth.latents.ad_ptr[advertiser_N + 1]
        return first_N + (uniform_N * (end_N - first_N)).astype(np.int64)

    def _product(self, ad_N: Int) -> Int:
        """Category code of what an ad sells."""
        return len(self.words.tastes) + self.ad_word_I[ad_N]

    def _value(self, advertiser_N: Int, noise_N: Float) -> Float:
        """Money spent, whole cents."""
        value_N = self.truth.latents.price_A[advertiser_N] * np.exp(VALUE_SPREAD * noise_N)
        return np.maximum(value_N.round(2), 0.01)

    def _frame(self, day: _Day, start_us: int) -> pl.DataFrame:
        """Events by time, of one time by user, visit and what comes first in it."""
        audience = day.audience
        columns = {name: np.concatenate(parts) for name, parts in day.columns.items()}
        happening_N = columns["happening"]
        second_N = day.second_H[happening_N] + columns["second"]
        order = np.argsort((second_N << 42) | (happening_N << 8) | columns["order"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        happening_N, in_visit_N = columns["happening"], columns["happening"] < day.n_visits
        request_N = np.where(in_visit_N, self._requests + happening_N, _NONE)
        value = pl.Series(columns["value"].astype(np.float32)).fill_nan(None)
        return pl.DataFrame(
            {
                "user_id": audience.user_B[happening_N].astype(np.int32),
                "timestamp": pl.Series(start_us + second_N[order] * _US).cast(pl.Datetime("us")),
                "kind": pl.Series(columns["kind"].astype(np.uint8)).cat.to(_EVENT),
                "ad_id": _nullable(columns["ad"], pl.Int32),
                "advertiser_id": _nullable(columns["advertiser"], pl.Int32),
                "value": value,
                "market_id": _nullable(np.where(in_visit_N, audience.market_B[happening_N], _NONE), pl.Int32),
                "sample_weight": np.ones(len(order), np.float32),
                "request_id": _nullable(request_N, pl.Int64),
                "display": _nullable(columns["slot"], pl.UInt32).cat.to(self.slots),
                "category": _nullable(columns["category"], pl.UInt32).cat.to(self.words.categories),
            }
        )


def _one_of(choice_VL: Int, uniform_VN: Float) -> Int:
    """One of each row's choices that are not -1, ``(V, N)``; -1 where there is none."""
    if not choice_VL.shape[1]:
        return np.full(uniform_VN.shape, _NONE)
    packed_VL = np.take_along_axis(choice_VL, np.argsort(choice_VL < 0, axis=1, kind="stable"), axis=1)
    count_V1 = (choice_VL >= 0).sum(1)[:, None]
    number_VN = (uniform_VN * count_V1).astype(np.int64)
    return np.take_along_axis(packed_VL, number_VN, axis=1).astype(np.int64)


def _nullable(values_N: NDArray[Any], dtype: type[pl.DataType]) -> pl.Series:
    """A column of whole numbers, null where they are negative."""
    values = pl.Series(values_N)
    return pl.select(pl.when(values >= 0).then(values)).to_series().cast(dtype)
