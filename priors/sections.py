"""The sections of a prompt: each turns a user and a period into tokens that fit the room it is given.

    date      Month: May.                                          as-of time
    profile   Household: age 45-54, income 50-74K.                 columns that the data config opens
    events    Bought: yogurt, cheese x12 1w; soft drinks x3 2w;    head, entries as long as they fit, tail

The section that lists events is one class: visits, searches, mailings, purchases and advertisers differ in their
configuration alone. Only events of periods before the one asked for are read.

Shapes: E events of one user before the as-of time, G entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.log import Log
from data.tables import KINDS
from priors.pieces import InertTokenizer, Pattern, one_line
from priors.prompt_config import NUMBER_FIELDS, DateConfig, EventsConfig, ProfileConfig

_US_PER_DAY = 86_400_000_000
_COLUMN = {"name": "advertiser", "words": "advertiser", "title": "ad", "category": "category", "market": "market"}
"""Where a field of text comes from."""


class Section(Protocol):
    """A part of the prompt."""

    frame: int
    """Tokens of its own words, without which nothing is shown."""

    def tokens(self, user: int, period: int, room: int) -> list[int]:
        """What is said of a user at the start of a period, in at most ``room`` tokens; none where nothing fits."""
        ...


class DateSection:
    """The as-of time; whole or not at all."""

    def __init__(self, log: Log, encode: InertTokenizer, cfg: DateConfig) -> None:
        self._calendar, self._cfg = log.calendar, cfg
        self._pattern = Pattern(cfg.text, encode)
        self.frame = len(self.tokens(0, 1, 1 << 30)) - 1

    def tokens(self, user: int, period: int, room: int) -> list[int]:
        start = self._calendar.start(period)
        values = {
            "day": str(start.day),
            "month": self._cfg.months[start.month - 1],
            "season": self._cfg.seasons[self._calendar.season(period)],
            "year": str(start.year),
        }
        tokens = self._pattern.tokens(values.__getitem__)
        return tokens if len(tokens) <= room else []


class ProfileSection:
    """Known columns of the user, in the config's order, as long as one more fits."""

    def __init__(self, log: Log, encode: InertTokenizer, cfg: ProfileConfig) -> None:
        self._features, self._cfg = log.user_features, cfg
        self._values = {
            column: [encode.shortened(one_line(value), cfg.text_tokens) for value in names]
            for column, names in log.user_vocabularies.items()
        }
        self._pattern = Pattern(cfg.entry, encode)
        self._head, self._between, self._tail = (encode(text) for text in (cfg.head, cfg.separator, cfg.tail))
        self.frame = len(self._head) + len(self._tail)

    def tokens(self, user: int, period: int, room: int) -> list[int]:
        known = ((column, int(codes[user])) for column, codes in self._features.items())
        entries = (self._entry(column, code) for column, code in known if code > 0)
        return _framed(self._head, entries, self._between, self._tail, room)

    def _entry(self, column: str, code: int) -> list[int]:
        name = one_line(self._cfg.names.get(column, column.replace("_", " ")))
        return self._pattern.tokens({"column": name, "value": self._values[column][code]}.__getitem__)


class Catalogue:
    """Words of advertisers, ads, categories and markets, and the tokens of semantic IDs.

    Args:
        log: whose tables hold the words.
        id_tokens: the ID tokens of an advertiser.
    """

    def __init__(self, log: Log, id_tokens: Callable[[int], list[int]]) -> None:
        self.id_tokens = id_tokens
        self.names = _column(log.tables.advertisers, "name")
        self.sells = _column(log.tables.advertisers, "text")
        self.titles = _column(log.tables.ads, "text")
        self.categories, self.markets = log.category_names, log.market_ids


class _Entry(NamedTuple):
    """The newest event of an entry, by its row in the log, how many there are, and the period that is asked for."""

    row: int
    events: int
    period: int


class EventsSection:
    """Events of some kinds, one by one or gathered, as long as one more entry fits.

    Args:
        log: the events.
        catalogue: words for them.
        encode: text to tokens.
        cfg: which events, how they are gathered, and the words.
    """

    def __init__(self, log: Log, catalogue: Catalogue, encode: InertTokenizer, cfg: EventsConfig) -> None:
        self._catalogue, self._encode, self._cfg, self._calendar = catalogue, encode, cfg, log.calendar
        self._events, self._rows = log.events, _rows(log, cfg)
        self._user_ptr = np.searchsorted(log.events.user[self._rows], np.arange(len(log.user_ids) + 1))
        self._head, self._entry = Pattern(cfg.head, encode), Pattern(cfg.entry, encode)
        self._between, self._tail, self._empty = (encode(text) for text in (cfg.separator, cfg.tail, cfg.empty))
        self._texts: dict[tuple[str, int], str] = {}
        self.frame = len(self._head.tokens(lambda name: "1")) + len(self._tail)

    def tokens(self, user: int, period: int, room: int) -> list[int]:
        row_E = self._rows[self._user_ptr[user] : self._user_ptr[user + 1]]
        ago_E = period - self._events.period[row_E].astype(np.int64)  # falls along the user's events
        first = 0 if self._cfg.periods is None else np.searchsorted(-ago_E, -self._cfg.periods)
        past = slice(first, np.searchsorted(-ago_E, 0))
        row_E, ago_E = row_E[past], ago_E[past]
        if not len(row_E):
            return self._empty if len(self._empty) <= room else []
        head = self._head.tokens(partial(self._number, _Entry(int(row_E[-1]), len(row_E), period)))
        entries = filter(None, map(self._words, self._entries(row_E, ago_E, period)))
        return _framed(head, islice(entries, self._cfg.entries), self._between, self._tail, room)

    def _entries(self, row_E: NDArray[np.int64], ago_E: NDArray[np.int64], period: int) -> Iterator[_Entry]:
        """Events of one user in order of time, gathered; what comes first at the front."""
        cfg = self._cfg
        if cfg.group == "event":  # the decayed weight falls with time, so both orders are one
            return (_Entry(int(row), 1, period) for row in row_E[::-1])
        code_E = getattr(self._events, cfg.group)[row_E[::-1]]
        code_G, newest_G, group_E, count_G = np.unique(
            code_E, return_index=True, return_inverse=True, return_counts=True
        )
        if cfg.first == "newest":
            order_G = np.argsort(newest_G)
        else:
            order_G = np.lexsort((code_G, -np.bincount(group_E, cfg.decay ** ago_E[::-1])))
        return (_Entry(int(row_E[-1 - newest_G[g]]), int(count_G[g]), period) for g in order_G)

    def _words(self, entry: _Entry) -> list[int]:
        return self._entry.tokens(partial(self._value, entry), partial(self._id, entry))

    def _id(self, entry: _Entry) -> list[int]:
        advertiser = int(self._events.advertiser[entry.row])
        return self._catalogue.id_tokens(advertiser) if self._cfg.ids and advertiser >= 0 else []

    def _number(self, entry: _Entry, name: str) -> str:
        if name == "count":
            return str(entry.events)
        if name == "ago":
            return str(entry.period - int(self._events.period[entry.row]))
        start_us = self._calendar.origin_us + (entry.period - 1) * self._calendar.length_us
        return str((start_us - int(self._events.timestamp[entry.row])) // _US_PER_DAY)

    def _value(self, entry: _Entry, name: str) -> str:
        """Text of a field, ``""`` where it is not known."""
        if name in NUMBER_FIELDS:
            return self._number(entry, name)
        code = int(getattr(self._events, _COLUMN[name])[entry.row])
        text = self._texts.get((name, code))
        if text is None:
            text = self._texts[name, code] = self._text(name, code)
        return text

    def _text(self, name: str, code: int) -> str:
        catalogue = self._catalogue
        if name == "category":
            return self._encode.shortened(one_line(catalogue.categories[code]), self._cfg.text_tokens)
        if code < 0:
            return ""
        if name == "market":
            return self._encode.shortened(one_line(str(catalogue.markets[code])), self._cfg.text_tokens)
        if name == "name":
            return self._encode.shortened(catalogue.names[code], self._cfg.text_tokens)
        text = catalogue.sells[code] or catalogue.names[code] if name == "words" else catalogue.titles[code]
        if self._cfg.phrases:
            phrases = [phrase.strip() for phrase in text.split(",")]
            text = ", ".join(phrase for phrase in phrases[: self._cfg.phrases] if phrase)
        return self._encode.shortened(text, self._cfg.text_tokens)


def _framed(head: list[int], entries: Iterable[list[int]], between: list[int], tail: list[int], room: int) -> list[int]:
    """Head, entries and tail in at most ``room`` tokens.

    The first entry that does not fit ends the list, so that what is shown is what comes first.

    Returns:
        Tokens; none where not even one entry fits.
    """
    tokens, limit = list(head), room - len(tail)
    shown = 0
    for entry in entries:
        more = between + entry if shown else entry
        if len(tokens) + len(more) > limit:
            break
        tokens += more
        shown += 1
    return tokens + tail if shown else []


def _rows(log: Log, cfg: EventsConfig) -> NDArray[np.int64]:
    """Events of the section's kinds that can be an entry, in order of user and time; of a visit its last one."""
    events, labels = log.events, set(log.label_kinds)
    kinds = {KINDS.index(kind) for kind in cfg.kinds if kind in KINDS}
    kinds |= labels if "conversion" in cfg.kinds else set()
    kinds |= set(log.purchase_kinds) if "purchase" in cfg.kinds else set()
    wanted = np.isin(events.kind, sorted(kinds))
    if cfg.group != "event":
        wanted &= getattr(events, cfg.group) >= (1 if cfg.group == "category" else 0)
    rows = np.flatnonzero(wanted)
    if not cfg.visits or not len(rows):
        return rows
    # Events without a request are one visit where they share a moment.
    request, market = events.request[rows], events.market[rows]
    moment = np.where(request < 0, events.timestamp[rows], 0)
    key = np.stack([events.user[rows].astype(np.int64), events.period[rows], market, request, moment])
    order = np.lexsort((rows, *key[::-1]))
    last = np.append((key[:, order][:, 1:] != key[:, order][:, :-1]).any(0), True)
    return np.sort(rows[order[last]])


def _column(table: pl.DataFrame, name: str) -> list[str]:
    return [one_line(text) for text in table[name]]
