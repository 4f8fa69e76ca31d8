"""From a user's past to the token ids the LM reads.

    Month: May.                                           season
    Household: age 45-54, income 50-74K.                  profile, where the data config opens columns
    Bought: yogurt, cheese x12 1w; soft drinks x3 2w; …   past advertisers: what each sells, how often,
    Next:                                                   how many periods (weeks) ago last

Sections fill a budget of tokens in this order of right: frame, season, profile, then advertisers, the
weightiest first, as long as one more fits whole. Nothing of the period asked for is read.

Text that comes from data is inert: it is tokenised as plain characters, so a title that contains a
chat marker, an end-of-text token or ``<adv_1_17>`` is only those letters. ID tokens enter as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.log import Log
from priors.config import PromptConfig
from semantic_ids.advertiser_ids import AdvertiserIds


@dataclass(frozen=True)
class Prompt:
    """What the LM reads about one user at one time.

    Attributes:
        token_ids: of the base model, with ID tokens numbered after its vocabulary.
        sections: tokens used by each section, in order.
    """

    token_ids: NDArray[np.int64]
    sections: dict[str, int]


class PromptCompiler:
    """Writes prompts.

    Args:
        log: the events; only those of periods before the one asked for are read.
        ids: semantic IDs of the advertisers.
        tokenizer: of the base model.
        cfg: which sections, and the budget.

    Raises:
        UserError: the budget has no room for the frame.
    """

    def __init__(self, log: Log, ids: AdvertiserIds, tokenizer: PreTrainedTokenizerBase, cfg: PromptConfig) -> None:
        self.log, self.ids, self.tokenizer, self.cfg = log, ids, tokenizer, cfg
        self.first_id_token = len(tokenizer)
        self._level_offset = np.concatenate([[0], np.cumsum(ids.level_sizes[:-1])])
        self._labels: dict[int, list[int]] = {}
        self._text = log.tables.advertisers.select(pl.col("text").fill_null("")).to_series().to_list()
        events = log.events
        bought = (events.advertiser >= 0) & log.is_purchase
        self._user = events.user[bought].astype(np.int64)
        self._period = events.period[bought].astype(np.int64)
        self._advertiser = events.advertiser[bought].astype(np.int64)
        self._user_ptr = np.searchsorted(self._user, np.arange(len(log.user_ids) + 1))
        self._head, self._tail = self._encode("Bought:"), self._encode("\nNext:")
        needed = len(self._head) + len(self._tail)
        if needed >= cfg.max_tokens:
            raise UserError(
                f"prior.prompt.max_tokens={cfg.max_tokens}",
                expected=f"more than {needed}, the tokens of an empty prompt",
                action="raise prior.prompt.max_tokens, e.g. to 64",
            )

    def compile(self, user: int, period: int) -> Prompt:
        """The prompt of a user at the start of a period.

        Args:
            user: user index.
            period: period whose start is the as-of time.

        Returns:
            Token ids, at most ``max_tokens`` of them.
        """
        left = self.cfg.max_tokens - len(self._head) - len(self._tail)
        sections: list[tuple[str, list[int]]] = []
        for name, text in (("season", self._season(period)), ("profile", self._profile(user))):
            tokens = self._encode(text) if text else []
            if tokens and len(tokens) <= left:
                sections.append((name, tokens))
                left -= len(tokens)
        shown: list[int] = []
        for piece in self._advertisers(user, period):
            if len(piece) > left:
                break
            shown += piece
            left -= len(piece)
        sections += [
            ("advertisers", self._head + (shown or self._encode(" nothing yet"))),
            ("frame", self._tail),
        ]
        token_ids = np.array([token for _, tokens in sections for token in tokens], dtype=np.int64)
        return Prompt(token_ids[-self.cfg.max_tokens :], {name: len(tokens) for name, tokens in sections})

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

    def id_token(self, token: int) -> str:
        """Name of an ID token by its number, e.g. ``<adv_1_17>``: level from 1, then the code."""
        level = int(np.searchsorted(self._level_offset, token - self.first_id_token, side="right")) - 1
        return f"<adv_{level + 1}_{token - self.first_id_token - self._level_offset[level]}>"

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _season(self, period: int) -> str:
        if not self.cfg.season:
            return ""
        return f"Month: {self.log.calendar.start(period):%B}.\n"

    def _profile(self, user: int) -> str:
        if not self.cfg.profile:
            return ""
        known = [
            f"{column.replace('_', ' ')} {self.log.user_vocabularies[column][code]}"
            for column, codes in self.log.user_features.items()
            if (code := int(codes[user])) > 0
        ]
        return f"Household: {', '.join(known)}.\n" if known else ""

    def _advertisers(self, user: int, period: int) -> list[list[int]]:
        rows = slice(self._user_ptr[user], self._user_ptr[user + 1])
        stop = rows.start + int(np.searchsorted(self._period[rows], period))
        advertiser_E, ago_E = self._advertiser[rows.start : stop], period - self._period[rows.start : stop]
        if not len(advertiser_E):
            return []
        advertisers, inverse, counts = np.unique(advertiser_E, return_inverse=True, return_counts=True)
        weight = np.bincount(inverse, self.cfg.recency_decay**ago_E)
        last = np.full(len(advertisers), np.iinfo(np.int64).max)
        np.minimum.at(last, inverse, ago_E)
        best = np.lexsort((advertisers, -weight))[: self.cfg.advertisers]
        return [self._label(int(advertisers[i])) + self._encode(f" x{counts[i]} {last[i]}w;") for i in best]

    def _label(self, advertiser: int) -> list[int]:
        """Tokens that name an advertiser: its ID, by config, and the first words of what it sells."""
        if advertiser not in self._labels:
            tokens: list[int] = []
            if self.cfg.advertiser_ids:
                codes = self.ids.codes_AL[advertiser]
                tokens += (self.first_id_token + self._level_offset + codes).tolist()
            phrases = [phrase.strip() for phrase in self._text[advertiser].split(",")]
            words = ", ".join(phrase for phrase in phrases[: self.cfg.advertiser_words] if phrase)
            if words:
                tokens += self._encode(f" {words}")
            self._labels[advertiser] = tokens
        return self._labels[advertiser]
