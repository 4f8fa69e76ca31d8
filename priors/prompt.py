"""From a user's past to the token ids the LM reads.

    log ─► sections, each in at most its own budget, by priority ─► in their order, then the words before the forecast

    Month: May.                                           date
    Household: age 45-54, income 50-74K.                  profile
    Bought: yogurt, cheese x12 1w; soft drinks x3 2w;     advertisers
    Next:                                                 frame

Which sections there are, in which words, order and budget is configuration: `priors.prompt_config`; how each is
filled: `priors.sections`. Nothing of the period asked for, or later, is read. The same user and period give the same
tokens. Text of data is inert (`priors.pieces`), and ID tokens enter as numbers after the base model's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.log import Log
from priors.pieces import InertTokenizer
from priors.prompt_config import DateConfig, EventsConfig, ProfileConfig, PromptConfig, SectionConfig
from priors.sections import Catalogue, DateSection, EventsSection, ProfileSection, Section
from semantic_ids.advertiser_ids import AdvertiserIds

if TYPE_CHECKING:
    from priors.history import Categories

FRAME = "frame"
"""Name of the words before the forecast, in `Prompt.sections`."""


class HistoryReader(Protocol):
    """Gives history vectors; see `priors.history`."""

    decays: tuple[float, ...]
    categories: Categories
    size: int

    def __call__(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Those of users at the start of periods, ``(B, F)``."""
        ...


@dataclass(frozen=True)
class Prompt:
    """What the LM reads about one user at one time.

    Attributes:
        token_ids: of the base model, with ID tokens numbered after its vocabulary.
        sections: tokens of each section that is shown, in their order in the prompt.
        history_F: the history vector read beside it; None: the forecaster has none.
    """

    token_ids: NDArray[np.int64]
    sections: dict[str, int] = field(default_factory=dict)
    history_F: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


class PromptCompiler:
    """Writes prompts.

    ``sections`` holds those that the config shows, by name, in their order.

    Args:
        log: the events; only those of periods before the one asked for are read.
        ids: semantic IDs of the advertisers.
        tokenizer: of the base model.
        cfg: which sections, and the budgets.
        window: positions of the base model; prompt and ID must fit. None: not known.
        history: history vectors of users at the start of periods, ``(B, F)``; None: there are none.

    Raises:
        UserError: a budget has no room for the words of its section, or the prompt none in the model's window.
    """

    def __init__(
        self,
        log: Log,
        ids: AdvertiserIds,
        tokenizer: PreTrainedTokenizerBase,
        cfg: PromptConfig,
        *,
        window: int | None = None,
        history: HistoryReader | None = None,
    ) -> None:
        self.log, self.ids, self.tokenizer, self.cfg = log, ids, tokenizer, cfg
        self.history = history
        self.first_id_token = len(tokenizer)
        self._level_offset = np.concatenate([[0], np.cumsum(ids.level_sizes[:-1])])
        encode = InertTokenizer(tokenizer)
        catalogue = Catalogue(log, self.id_tokens)
        self._next = encode(cfg.next)
        shown = cfg.sections()
        self.sections = {name: _section(one, log, catalogue, encode) for name, one in shown.items()}
        self._limits = {name: one.max_tokens or cfg.max_tokens for name, one in shown.items()}
        self._by_priority = sorted(shown, key=lambda name: shown[name].priority)
        self._check_budgets(window)

    def compile(self, user: int, period: int) -> Prompt:
        """The prompt of a user at the start of a period.

        Args:
            user: user index.
            period: period whose start is the as-of time.

        Returns:
            Token ids, at most ``max_tokens`` of them, and the history vector.
        """
        left = self.cfg.max_tokens - len(self._next)
        found: dict[str, list[int]] = {}
        for name in self._by_priority:
            found[name] = self.sections[name].tokens(user, period, min(left, self._limits[name]))
            left -= len(found[name])
        parts = {name: found[name] for name in self.sections if found[name]} | {FRAME: self._next}
        token_ids = np.array([token for tokens in parts.values() for token in tokens], dtype=np.int64)
        history = None if self.history is None else self.history(np.array([user]), np.array([period]))[0]
        return Prompt(token_ids, {name: len(tokens) for name, tokens in parts.items()}, history)

    def text(self, prompt: Prompt) -> str:
        """The prompt as a person reads it."""
        words: list[str] = []
        run: list[int] = []
        for token in [*prompt.token_ids.tolist(), -1]:
            if 0 <= token < self.first_id_token:
                run.append(token)
                continue
            words.append(str(self.tokenizer.decode(run)))
            run = []
            if token >= 0:
                words.append(self.id_token(token))
        return "".join(words)

    def id_tokens(self, advertiser: int) -> list[int]:
        """Tokens of an advertiser's semantic ID."""
        tokens: list[int] = (self.first_id_token + self._level_offset + self.ids.codes_AL[advertiser]).tolist()
        return tokens

    def id_token(self, token: int) -> str:
        """Name of an ID token by its number, e.g. ``<adv_1_17>``: level from 1, then the code."""
        level = int(np.searchsorted(self._level_offset, token - self.first_id_token, side="right")) - 1
        return f"<adv_{level + 1}_{token - self.first_id_token - self._level_offset[level]}>"

    def _check_budgets(self, window: int | None) -> None:
        errors = []
        given, following = self.cfg.max_tokens, len(self.ids.level_sizes) - 1
        needed = len(self._next) + max((section.frame for section in self.sections.values()), default=0)
        if needed >= given:
            errors.append(
                UserError(
                    f"prior.prompt.max_tokens={given}",
                    expected=f"more than {needed}, the words before the forecast and those of the wordiest section",
                    action="raise prior.prompt.max_tokens, e.g. to 64, or shorten the words",
                )
            )
        if window is not None and given + following > window:
            errors.append(
                UserError(
                    f"prior.prompt.max_tokens={given} with a base model of {window} positions",
                    expected=f"at most {window - following}, so that prompt and semantic ID fit in the model's window",
                    action="lower prior.prompt.max_tokens, or take a base model with a longer window",
                )
            )
        for name, section in self.sections.items():
            if self._limits[name] <= section.frame < given:
                errors.append(
                    UserError(
                        f"prior.prompt.{name}.max_tokens={self._limits[name]}",
                        expected=f"more than {section.frame}, the tokens of the section's own words",
                        action=f"raise prior.prompt.{name}.max_tokens, or set prior.prompt.{name}.show=false",
                    )
                )
        if errors:
            raise UserError.collect(errors)


def _section(cfg: SectionConfig, log: Log, catalogue: Catalogue, encode: InertTokenizer) -> Section:
    if isinstance(cfg, DateConfig):
        return DateSection(log, encode, cfg)
    if isinstance(cfg, ProfileConfig):
        return ProfileSection(log, encode, cfg)
    assert isinstance(cfg, EventsConfig)
    return EventsSection(log, catalogue, encode, cfg)


class Wordless(PromptCompiler):
    """Prompts without words, for what reads none: fits and figures by counts and history alone.

    Args:
        history: gives the history vector beside each; None: there are none.
    """

    def __init__(self, history: HistoryReader | None = None) -> None:
        self.history, self._no_words = history, np.zeros(1, np.int64)

    def compile(self, user: int, period: int) -> Prompt:
        """One token, the same for all, and the user's history vector."""
        history = None if self.history is None else self.history(np.array([user]), np.array([period]))[0]
        return Prompt(self._no_words, history_F=history)
