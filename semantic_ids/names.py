"""Names as words: what the tokenizer ``names`` spells an ID by.

    "Faber-Castell Premium 9000"  ──►  faber ─ castell ─ premium        one word a level, in the encoder's vectors
    "Crayola"                     ──►  crayola ─ (none) ─ (none)        a zero vector where there is no word

The vectors of a name's words stand side by side, each in columns of its own. So the nearest code of a level is that of
the very word, whatever the other levels say, and for a word that no level knows that of the word most like it, or of
none where none is like it.

Shapes: A names, L levels, V words of one level, H features of the encoder, D = L · H.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from semantic_ids.embeddings import Embeddings

_WORD = re.compile(r"\w+")


def spell(names: Sequence[str | None], n_levels: int) -> list[list[str]]:
    """The first words of names.

    A word is a run of letters, digits and underscores, in lower case: "Faber-Castell" has two.

    Args:
        names: any, None among them.
        n_levels: words of a name that are looked at.

    Returns:
        ``n_levels`` words a name, an empty one where it has no more.
    """
    words = [_WORD.findall((name or "").lower())[:n_levels] for name in names]
    return [[*found, *[""] * (n_levels - len(found))] for found in words]


def check_named(words: Sequence[Sequence[str]]) -> None:
    """Refuse names that spell nothing.

    Raises:
        UserError: no name has a word.
    """
    if not any(map(any, words)):
        raise UserError(
            f"semantic_ids.tokenizer=names for {len(words)} names without a word",
            expected="names, in the column name of the table advertisers",
            action="bring their names, or set semantic_ids=rqvae",
        )


def word_codebooks(embeddings: Embeddings) -> list[NDArray[np.float32]]:
    """The vectors of each level's words, in the columns of the level.

    Args:
        embeddings: one source a level.

    Returns:
        ``(V_l, D)`` a level: code 0, of zeros, says that there is no word; the words follow in the order of their
        vectors, which does not depend on the order of the names. Words of one vector share a code.
    """
    books, start = [], 0
    for dims in embeddings.source_dims:
        block_AH = embeddings.vectors_AD[:, start : start + dims]
        words_VH = np.unique(block_AH[block_AH.any(axis=1)], axis=0)
        book_VD = np.zeros((1 + len(words_VH), embeddings.vectors_AD.shape[1]), dtype=np.float32)
        book_VD[1:, start : start + dims] = words_VH
        books.append(book_VD)
        start += dims
    return books
