"""Text as tokens, a word of a pattern at a time, so that each is tokenised once.

    pattern   "{id} {words} x{count} {ago}w;"
    words     "{id}" · " {words}" · " x{count}" · " {ago}w;"
    tokens    17 3 40 · yogurt , cheese · x 12 · 1 w ;            each piece kept by its text

A piece begins with its blank, where tokenizers cut anyway. Text of data is *inert*: whatever it spells, it becomes
the tokens of plain characters, never one that was added to the vocabulary (chat markers, end of text, ID tokens).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from priors.prompt_config import FIELD, NUMBER_FIELDS

_WORDS = re.compile(r"\{id\}|\s*(?:\{(?!id\})[^{}]*\}|[^\s{}])+|\s+")


class InertTokenizer:
    """Tokenises text that nobody vouches for.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        unknown = tokenizer.unk_token_id
        self._forbidden = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids} - {unknown}
        self._unknown: tuple[int, str] | None = None if unknown is None else (unknown, str(tokenizer.unk_token))
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text as plain characters; kept, so do not change the list.

        A tokenizer that finds an added token in the text all the same is given the text in halves, until the token is
        cut. A single character that is an added token is left out.
        """
        tokens = self._known.get(text)
        if tokens is None:
            tokens = self._known[text] = self._encode(text)
        return tokens

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not self._means_something(text, tokens):
            return tokens
        if len(text) == 1:
            return []
        half = len(text) // 2
        return self._encode(text[:half]) + self._encode(text[half:])

    def _means_something(self, text: str, tokens: list[int]) -> bool:
        """Whether there is an added token; the one for unknown characters may come of them, but not of its name."""
        if self._unknown is not None and self._unknown[1] in text and self._unknown[0] in tokens:
            return True
        return not self._forbidden.isdisjoint(tokens)

    def shortened(self, text: str, n: int) -> str:
        """A beginning of a text that takes at most ``n`` tokens: whole words, or of one too long some characters."""
        words = text.split(" ")[:n]  # a word takes a token at least
        while len(words) > 1 and len(self._encode(" ".join(words))) > n:
            words.pop()
        short = " ".join(words)
        while len(self._encode(short)) > n:
            short = short[: len(short) // 2]
        return short


def one_line(text: str | None) -> str:
    """Text of data without line breaks, which part the sections of a prompt, and without blanks at its ends."""
    return " ".join((text or "").split())


@dataclass(frozen=True)
class _Word:
    """A word of a pattern: literals and, between them, the alternatives of each field."""

    literals: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...]


class Pattern:
    """A pattern, ready to be filled in.

    Args:
        text: the pattern; see `priors.prompt_config`.
        encode: text to tokens.
    """

    def __init__(self, text: str, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._words = [
            _Word(tuple(parts[::2]), tuple(tuple(names.split("|")) for names in parts[1::2]))
            for parts in (FIELD.split(word) for word in _WORDS.findall(text))
        ]
        self._has_text = any(self._is_text(word) for word in self._words)

    def tokens(self, value: Callable[[str], str], id_tokens: Callable[[], list[int]] = list) -> list[int]:
        """The pattern filled in.

        Args:
            value: text of a field, ``""`` where it is not known.
            id_tokens: what stands for ``{id}``.

        Returns:
            Tokens; none where the pattern has fields of text and none of them is known.
        """
        tokens: list[int] = []
        told = not self._has_text
        for word in self._words:
            if word.fields == (("id",),):
                found = id_tokens()
                told |= bool(found)
                tokens += found
                continue
            parts = [word.literals[0]]
            for names, literal in zip(word.fields, word.literals[1:], strict=True):
                text = next(filter(None, map(value, names)), "")
                if not text:
                    break
                parts += [text, literal]
            else:
                told |= self._is_text(word)
                tokens += self._encode("".join(parts))
        return tokens if told else []

    @staticmethod
    def _is_text(word: _Word) -> bool:
        return any(name not in NUMBER_FIELDS for names in word.fields for name in names)
