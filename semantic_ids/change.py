"""What became of an ID table: only what grew keeps the meaning of its codes.

Shapes: A entities, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semantic_ids.advertiser_ids import AdvertiserIds


@dataclass(frozen=True)
class Comparison:
    """An ID table beside an earlier one.

    Attributes:
        n_old: entities of the earlier table.
        n_added: entities of the later one alone.
        n_gone: entities of the earlier one alone.
        n_changed: entities of both whose codes differ.
        example: one of those that changed, or else of those that are gone, in words.
        books_changed: levels, from 1, whose codebooks differ in size or in any vector.
        kinds: what has the IDs, before and after, e.g. ``("advertiser", "advertiser")``.
    """

    n_old: int
    n_added: int
    n_gone: int
    n_changed: int
    example: str
    books_changed: tuple[int, ...]
    kinds: tuple[str, str]

    @property
    def only_grew(self) -> bool:
        """Every old entity has its old codes, and codes mean what they did."""
        return not (self.n_gone or self.n_changed or self.books_changed or self.kinds[0] != self.kinds[1])

    def in_words(self) -> str:
        """What is different, with an example."""
        parts = []
        if self.n_changed:
            parts.append(f"{self.n_changed:,} of {self.n_old:,} existing IDs changed")
        if self.n_gone:
            parts.append(f"{self.n_gone:,} of {self.n_old:,} entities are gone")
        if self.example:
            parts[-1] += f", e.g. {self.example}"
        if self.books_changed:
            parts.append(f"other codebooks at level {', '.join(map(str, self.books_changed))}")
        if self.kinds[0] != self.kinds[1]:
            parts.append(f"IDs of {self.kinds[0]}s became those of {self.kinds[1]}s")
        return "; ".join(parts) or f"{self.n_added:,} new entities, nothing else"


def compare(old: AdvertiserIds, new: AdvertiserIds) -> Comparison:
    """What became of the entities of an ID table."""
    row_of = {id_: row for row, id_ in enumerate(new.advertiser_ids.tolist())}
    row_A = np.array([row_of.get(id_, -1) for id_ in old.advertiser_ids.tolist()], dtype=np.int64)
    stayed = np.flatnonzero(row_A >= 0)
    levels = min(old.codes_AL.shape[1], new.codes_AL.shape[1])
    differs = (old.codes_AL[stayed, :levels] != new.codes_AL[row_A[stayed], :levels]).any(1)
    if old.codes_AL.shape[1] != new.codes_AL.shape[1]:
        differs[:] = True
    example = ""
    if len(gone := np.flatnonzero(row_A < 0)):
        example = f"{old.advertiser_ids[gone[0]]} with {' '.join(old.tokens(int(gone[0])))}"
    elif differs.any():
        before = int(stayed[np.argmax(differs)])
        after = int(row_A[before])
        example = f"{old.advertiser_ids[before]} from {' '.join(old.tokens(before))} to {' '.join(new.tokens(after))}"
    books = range(max(len(old.codebooks), len(new.codebooks)))
    return Comparison(
        n_old=len(old),
        n_added=len(new) - len(stayed),
        n_gone=len(gone),
        n_changed=int(differs.sum()),
        example=example,
        books_changed=tuple(level + 1 for level in books if not _same_book(old.codebooks, new.codebooks, level)),
        kinds=(old.entity, new.entity),
    )


def _same_book(old: Sequence[NDArray[np.float32]], new: Sequence[NDArray[np.float32]], level: int) -> bool:
    return level < min(len(old), len(new)) and np.array_equal(old[level], new[level])
