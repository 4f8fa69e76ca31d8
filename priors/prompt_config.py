"""The typed schema of ``prior.prompt``: the sections of a prompt, their words, and the tokens each may take.

A *pattern* is text with fields in braces, e.g. ``" {words} x{count} {ago}w;"``. Fields parted by a bar stand for the
first of them that is known: ``{title|category}``. A word of the pattern (what lies between two blanks) with a field
that is not known is left out. All words that are not data stand in these patterns, so that another language or
another kind of log needs a YAML file and no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import UserError
from data.tables import KINDS

FIELD = re.compile(r"\{([^{}]*)\}")
DATE_FIELDS = ("day", "month", "season", "year")
PROFILE_FIELDS = ("column", "value")
TEXT_FIELDS = ("category", "id", "market", "name", "title", "words")
NUMBER_FIELDS = ("ago", "count", "days")
GROUPS = ("event", "advertiser", "ad", "category", "market")
ORDERS = ("newest", "weight")
ROLES = ("conversion", "purchase")
"""Kinds by what they are in this log: its labels; its labels and organic purchases."""


@dataclass
class SectionConfig:
    """What every section has.

    Attributes:
        show: whether it is there.
        max_tokens: budget of the section with its frame; null: what the prompt has left.
        order: sections stand in the prompt by rising order.
        priority: sections take their tokens by rising priority.
    """

    show: bool = False
    max_tokens: int | None = None
    order: int = 0
    priority: int = 0


@dataclass
class DateConfig(SectionConfig):
    """The as-of time.

    Attributes:
        text: pattern with the fields ``day``, ``month``, ``season`` and ``year``.
        months: names of the twelve months.
        seasons: names of the four seasons, from the one of December on.
    """

    text: str = "Month: {month}.\n"
    months: list[str] = field(
        default_factory=lambda: [
            *("January", "February", "March", "April", "May", "June"),
            *("July", "August", "September", "October", "November", "December"),
        ]
    )
    seasons: list[str] = field(default_factory=lambda: ["winter", "spring", "summer", "autumn"])


@dataclass
class ProfileConfig(SectionConfig):
    """Columns of ``users`` that ``data.profile_columns`` opens.

    Attributes:
        head: words before the columns.
        entry: pattern of a column, with the fields ``column`` and ``value``.
        separator: between columns.
        tail: words after them.
        names: what a column is called, where it is not its own name.
        text_tokens: tokens of one value, at the most.
    """

    head: str = "Household:"
    entry: str = " {column} {value}"
    separator: str = ","
    tail: str = ".\n"
    names: dict[str, str] = field(default_factory=dict)
    text_tokens: int = 24


@dataclass
class EventsConfig(SectionConfig):
    """Events of a user's past, one by one or gathered.

    Attributes:
        kinds: what is shown: kinds of events, ``conversion`` (the kinds in ``data.label_kinds``) or ``purchase``
            (these and organic ones).
        visits: count visits instead of events; events of a request are one visit.
        group: what an entry is: an ``event``, or all events of an ``advertiser``, ``ad``, ``category`` or ``market``.
        first: which entries come first, and so survive: the ``newest``, or those of the most ``weight``.
        decay: weight of an event falls by this factor a period.
        entries: at most so many.
        periods: only events of so many periods before the as-of time; null: all.
        head: pattern before the entries, with the fields ``count``, ``ago`` and ``days`` of all events together.
        entry: pattern of an entry. Of an entry with several events, the fields are those of the newest: ``name`` and
            ``words`` (what it sells; its name where nothing is known) of the advertiser, ``id``, its semantic ID as
            tokens, ``title`` of the ad, ``category``, ``market``, ``count`` of events, ``ago`` in periods from the
            newest to the as-of time, ``days`` in days.
        separator: between entries.
        tail: words after the entries.
        empty: the section of a user without such events.
        ids: fill in ``id``.
        phrases: of the texts that list phrases by commas, at most so many; 0: the text as it is.
        text_tokens: tokens of one text, at the most.
    """

    kinds: list[str] = field(default_factory=lambda: ["purchase"])
    visits: bool = False
    group: str = "event"
    first: str = "newest"
    decay: float = 0.8
    entries: int = 8
    periods: int | None = None
    head: str = ""
    entry: str = ""
    separator: str = ""
    tail: str = "\n"
    empty: str = ""
    ids: bool = False
    phrases: int = 2
    text_tokens: int = 24


@dataclass
class PromptConfig:
    """What the LM reads about a user.

    Attributes:
        max_tokens: budget of the whole prompt, in tokens of the base model.
        next: the words before the forecast.
        date: the as-of time.
        profile: who the user is.
        visits: how often and where the user came.
        search: what was searched for.
        views: pages and products that were looked at.
        campaigns: mailings received lately.
        coupons: coupons redeemed.
        categories: what was bought, by category, with or without an advertiser.
        conversions: the last purchases one by one, in words.
        advertisers: past advertisers, the weightiest first: what each sells, how often, and when last.
    """

    max_tokens: int = 64
    next: str = "Next:"
    date: DateConfig = field(default_factory=lambda: DateConfig(show=True, max_tokens=16, order=10, priority=10))
    profile: ProfileConfig = field(default_factory=lambda: ProfileConfig(show=True, order=20, priority=20))
    visits: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=24,
            order=30,
            priority=30,
            kinds=["purchase", "click", "search", "visit"],
            visits=True,
            group="market",
            entries=2,
            periods=8,
            head="Came {count} times, last {ago}w; places",
            entry=" {market} x{count};",
        )
    )
    search: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=24,
            order=40,
            priority=40,
            kinds=["search"],
            group="category",
            head="Searched:",
            entry=" {category|title|words} {ago}w;",
        )
    )
    views: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=24,
            order=50,
            priority=50,
            kinds=["visit"],
            head="Looked at:",
            entry=" {title|category|words} {ago}w;",
        )
    )
    campaigns: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=16,
            order=60,
            priority=60,
            kinds=["campaign"],
            entries=2,
            periods=8,
            head="Mailed:",
            entry=" {category|title|words} {ago}w;",
        )
    )
    coupons: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=16,
            order=70,
            priority=70,
            kinds=["coupon"],
            group="advertiser",
            entries=3,
            head="Coupons:",
            entry="{id} {words} x{count} {ago}w;",
        )
    )
    categories: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=48,
            order=80,
            priority=80,
            group="category",
            first="weight",
            head="Basket:",
            entry=" {category} x{count} {ago}w;",
        )
    )
    conversions: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            max_tokens=48,
            order=90,
            priority=90,
            head="Last:",
            entry=" {title|category|words} {ago}w;",
            phrases=1,
        )
    )
    advertisers: EventsConfig = field(
        default_factory=lambda: EventsConfig(
            show=True,
            order=100,
            priority=100,
            group="advertiser",
            first="weight",
            head="Bought:",
            entry="{id} {words} x{count} {ago}w;",
            empty="Bought: nothing yet\n",
        )
    )

    def __post_init__(self) -> None:
        errors = [*self._problems()]
        if errors:
            raise UserError.collect(errors)

    def sections(self) -> dict[str, SectionConfig]:
        """The sections that are shown, by rising order; of one order, as they are declared."""
        sections = {part.name: getattr(self, part.name) for part in fields(self)}
        shown = {name: one for name, one in sections.items() if isinstance(one, SectionConfig) and one.show}
        return dict(sorted(shown.items(), key=lambda pair: pair[1].order))

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> PromptConfig:
        """A configuration from plain types, as an artifact keeps them.

        Raises:
            UserError: it is of another adsid, whose prompts had other parts.
        """
        try:
            made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))
        except OmegaConfBaseException as error:
            raise UserError(
                f"a prompt configuration with {error.full_key or 'other keys'}: {str(error).splitlines()[0]}",
                expected="the keys of prior.prompt of this adsid",
                action="fit the prior again: train.py stage=prior",
            ) from error
        assert isinstance(made, PromptConfig)
        return made

    def _problems(self) -> Iterator[UserError]:
        if self.max_tokens < 1:
            yield _wrong("max_tokens", self.max_tokens, "a whole number, at least 1")
        if not self.next:
            yield _wrong("next", self.next, "words before the forecast, e.g. 'Next:'")
        for part in fields(self):
            section = getattr(self, part.name)
            if not isinstance(section, SectionConfig):
                continue
            if section.max_tokens is not None and section.max_tokens < 1:
                yield _wrong(f"{part.name}.max_tokens", section.max_tokens, "a whole number, at least 1, or null")
            if isinstance(section, DateConfig):
                yield from _pattern(f"{part.name}.text", section.text, DATE_FIELDS)
                for name, count in (("months", 12), ("seasons", 4)):
                    if len(getattr(section, name)) != count:
                        yield _wrong(f"{part.name}.{name}", getattr(section, name), f"{count} names")
            elif isinstance(section, ProfileConfig):
                yield from _pattern(f"{part.name}.entry", section.entry, PROFILE_FIELDS)
                if section.text_tokens < 1:
                    yield _wrong(f"{part.name}.text_tokens", section.text_tokens, "a whole number, at least 1")
            elif isinstance(section, EventsConfig):
                yield from _problems_of_events(part.name, section)


def _problems_of_events(name: str, section: EventsConfig) -> Iterator[UserError]:
    known = (*ROLES, *KINDS)
    if not section.kinds or set(section.kinds) - set(known):
        yield _wrong(f"{name}.kinds", list(section.kinds), f"some of {', '.join(known)}")
    if section.group not in GROUPS:
        yield _wrong(f"{name}.group", section.group, f"one of {', '.join(GROUPS)}")
    if section.first not in ORDERS:
        yield _wrong(f"{name}.first", section.first, f"one of {', '.join(ORDERS)}")
    if not 0 < section.decay <= 1:
        yield _wrong(f"{name}.decay", section.decay, "a number above 0, at most 1")
    for key, least in (("entries", 1), ("phrases", 0), ("text_tokens", 1)):
        if getattr(section, key) < least:
            yield _wrong(f"{name}.{key}", getattr(section, key), f"a whole number, at least {least}")
    if section.periods is not None and section.periods < 1:
        yield _wrong(f"{name}.periods", section.periods, "a whole number, at least 1, or null for all")
    yield from _pattern(f"{name}.head", section.head, NUMBER_FIELDS)
    if not FIELD.search(section.entry):
        yield _wrong(f"{name}.entry", section.entry, "a pattern with at least one field, e.g. ' {words} {ago}w;'")
    yield from _pattern(f"{name}.entry", section.entry, (*TEXT_FIELDS, *NUMBER_FIELDS))


def _pattern(key: str, pattern: str, known: tuple[str, ...]) -> Iterator[UserError]:
    names = [name for names in FIELD.findall(pattern) for name in names.split("|")]
    unknown = [name for name in names if name not in known]
    alone = "id" not in names or all("id" not in found.split("|") or found == "id" for found in FIELD.findall(pattern))
    if unknown or set(FIELD.sub("", pattern)) & set("{}") or not alone:
        yield _wrong(key, pattern, f"text with fields among {', '.join(f'{{{name}}}' for name in known)}")


def _wrong(key: str, given: object, expected: str) -> UserError:
    return UserError(
        f"prior.prompt.{key}={given!r}", expected=expected, action=f"set prior.prompt.{key} to such a value"
    )
