"""One user's prompt, as ``adsid priors prompt`` shows it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import transformers
from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.errors import UserError
from data.log import Log, load_log
from data.split import Calendar
from pipeline.config import CONFIG_FILE, load
from pipeline.dataset import KIND as DATA
from pipeline.ids import ids_directory
from priors.base_model import load_base_model
from priors.prompt import FRAME, PromptCompiler
from semantic_ids.advertiser_ids import AdvertiserIds

_EXAMPLES = 5


@dataclass(frozen=True)
class SectionUse:
    """What a section took.

    Attributes:
        name: of the section, or `priors.prompt.FRAME`.
        tokens: it takes; 0 where the user has nothing to show or nothing fits.
        wanted: it would take if there were no budget.
        budget: it may take.
    """

    name: str
    tokens: int
    wanted: int
    budget: int


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and how it came about.

    Attributes:
        user: id of the user.
        period: period that is asked for.
        as_of: start of it; nothing from then on is read.
        events: of the user before it.
        text: the prompt as a person reads it.
        token_ids: the prompt as the model reads it.
        tokens: how many.
        max_tokens: budget of the whole.
        window: positions of the base model, None where it does not say.
        base_model: name of the base model, whose tokens these are.
        sections: those the config shows, in order, and the frame.
    """

    user: str
    period: int
    as_of: str
    events: int
    text: str
    token_ids: list[int]
    tokens: int
    max_tokens: int
    window: int | None
    base_model: str
    sections: list[SectionUse]


def prompt_of(run: Path, user: str, as_of: str, overrides: Sequence[str] = ()) -> ShownPrompt:
    """The prompt of a user of a run.

    Args:
        run: its directory; the stages data and semantic_ids are done.
        user: the id.
        as_of: an ISO date or the number of a period. Of a date, the last start of a period up to it is meant.
        overrides: of single keys, beside the run's config.

    Raises:
        UserError: no such run, user or time, or a prompt configuration that has no room.
    """
    config = load(run / CONFIG_FILE, overrides, read=("prior.prompt.", "evaluate"))
    if not (run / DATA).is_dir():
        raise UserError(
            f"{run}, without tables",
            expected="a run whose stage data is done",
            action="adsid run run.until=semantic_ids",
        )
    log = load_log(run / DATA, config.data, evaluate=config.evaluate, entity=config.semantic_ids.entity)
    index, period = user_of(log, user), period_of(log, as_of)
    ids = AdvertiserIds.load(ids_directory(run))
    transformers.utils.logging.disable_progress_bar()
    base_model = load_base_model(config.prior.base)
    cfg = config.prior.prompt
    compiler = PromptCompiler(log, ids, base_model.tokenizer, cfg, window=base_model.window)
    prompt = compiler.compile(index, period)
    past = log.history(index, period)
    uses = [
        SectionUse(
            name,
            prompt.sections.get(name, 0),
            len(compiler.sections[name].tokens(index, period, sys.maxsize)),
            one.max_tokens or cfg.max_tokens,
        )
        for name, one in cfg.sections().items()
    ]
    frame = prompt.sections[FRAME]
    return ShownPrompt(
        user=user,
        period=period,
        as_of=f"{log.calendar.start(period):%Y-%m-%d}",
        events=past.stop - past.start,
        text=compiler.text(prompt),
        token_ids=prompt.token_ids.tolist(),
        tokens=len(prompt.token_ids),
        max_tokens=cfg.max_tokens,
        window=base_model.window,
        base_model=base_model.reference,
        sections=[*uses, SectionUse(FRAME, frame, frame, cfg.max_tokens)],
    )


def user_of(log: Log, user: str) -> int:
    """Index of a user by id.

    Raises:
        UserError: there is none.
    """
    names = log.user_ids.astype(str)
    found = np.flatnonzero(names == user)
    if not len(found):
        raise UserError(
            f"--user {user}",
            expected=f"the id of one of the {len(names)} users of the run, e.g. {', '.join(names[:_EXAMPLES])}",
            action="give one of these ids",
        )
    return int(found[0])


def period_of(log: Log, as_of: str) -> int:
    """Period of an as-of time: a number as it is, or the period a date lies in.

    Raises:
        UserError: it is neither a date nor a number, or the log does not reach there.
    """
    last = log.last_period + 1
    period = _period(log.calendar, as_of)
    if period is None or not 1 <= period <= last:
        begins = [f"{log.calendar.start(one):%Y-%m-%d}" for one in (1, last)]
        closed = "; later ones need a run with evaluate=test" if log.evaluate != "test" else ""
        raise UserError(
            f"--as-of {as_of}",
            expected=f"a period from 1 to {last}, or a date in one of them: the first begins on {begins[0]}, the last "
            f"on {begins[1]}",
            action=f"give such a time{closed}",
        )
    return period


def _period(calendar: Calendar, as_of: str) -> int | None:
    if re.fullmatch(r"-?\d{1,6}", as_of):
        return int(as_of)
    try:
        moment = datetime.fromisoformat(as_of).replace(tzinfo=None)
    except ValueError:
        return None
    return int(calendar.period(np.array([np.datetime64(moment, "us").astype(np.int64)]))[0])


def to_console(shown: ShownPrompt) -> Group:
    """The prompt for people."""
    table = Table(
        "section", "tokens", "wanted", "budget", title=f"{shown.tokens} of {shown.max_tokens} tokens", title_style=""
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for use in shown.sections:
        table.add_row(use.name, *(str(number) if number else "-" for number in (use.tokens, use.wanted, use.budget)))
    window = f", {shown.window} positions" if shown.window else ""
    past = f"{shown.events} events before it" if shown.events else "no event before it"
    return Group(
        Text(f"user {shown.user}, as of {shown.as_of} (start of period {shown.period}), {past}"),
        Text(f"tokens of {shown.base_model}{window}\n"),
        Text(shown.text),
        Text(""),
        table,
        Text("\ntoken ids: " + " ".join(map(str, shown.token_ids))),
    )
