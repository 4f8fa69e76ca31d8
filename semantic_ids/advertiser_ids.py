"""``AdvertiserIds``: the unique semantic ID of every advertiser, as an artifact.

    codes.parquet             advertiser_id, c1, …, cL
    codebooks.safetensors     level_1 (V_1, E), …
    ids.json                  format, level sizes, version, extra level, entity

Items can have IDs too (``entity``); they stand in the same columns. Where collisions took an extra level, it is
the last one, and its codebook vectors are zero: its codes tell entities apart and mean nothing.

Shapes: A advertisers, L levels, V codes of a level, E features of a code's vector.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from data.errors import UserError
from data.tables import ENTITIES
from semantic_ids.unique import n_shared

FORMAT_VERSION = 2
"""2: with ``extra_level`` and ``entity``, which the version covers."""
_AGAIN = "make the IDs again: train.py stage=semantic_ids"


@dataclass(frozen=True)
class AdvertiserIds:
    """Semantic IDs in the order of the log's advertisers.

    Attributes:
        advertiser_ids: the tables' ids, ``(A,)``.
        codes_AL: int64; no two rows are equal.
        codebooks: float32 ``(V_l, E)``, one a level.
        extra_level: the last level only tells apart those that collide; its vectors are zero.
        entity: what has the IDs, ``advertiser`` or ``item``.

    Raises:
        UserError: two advertisers share an ID, a code has no vector, or an extra level has vectors.
    """

    advertiser_ids: NDArray[Any]
    codes_AL: NDArray[np.int64]
    codebooks: list[NDArray[np.float32]]
    extra_level: bool = False
    entity: str = "advertiser"

    def __post_init__(self) -> None:
        codes, again = self.codes_AL, _AGAIN
        if self.entity not in ENTITIES:
            raise UserError(f"IDs of entity {self.entity!r}", expected=f"one of {', '.join(ENTITIES)}", action=again)
        if codes.shape != (len(self.advertiser_ids), len(self.codebooks)):
            raise UserError(
                f"codes of shape {codes.shape} for {len(self.advertiser_ids)} {self.entity}s",
                expected=f"one row an {self.entity}, {len(self.codebooks)} levels",
                action=again,
            )
        if (codes < 0).any() or (codes >= np.array(self.level_sizes)).any():
            raise UserError("codes outside their codebooks", expected=f"codes below {self.level_sizes}", action=again)
        shared = n_shared(codes)
        if shared:
            raise UserError(
                f"{shared} {self.entity}s with the ID of another", expected="unique semantic IDs", action=again
            )
        if self.extra_level and (len(self.codebooks) < 2 or self.codebooks[-1].any()):
            raise UserError(
                "an extra level that quantises, or is the only one",
                expected="a last codebook of zero vectors after those that quantise",
                action=again,
            )

    def __len__(self) -> int:
        return len(self.advertiser_ids)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def n_quantised(self) -> int:
        """Levels that quantise: all but the extra one."""
        return len(self.codebooks) - int(self.extra_level)

    @property
    def code_vectors(self) -> list[NDArray[np.float32]]:
        """What a model reads of the codebooks: each without the columns in which all its codes are zero.

        Words of names have columns of their own at each level. An extra level has no others and keeps them.
        """
        return [book[:, book.any(axis=0)] if book.any() else book for book in self.codebooks]

    @cached_property
    def version(self) -> str:
        """Hash of all that :meth:`save` writes."""
        digest = hashlib.sha256(f"{self.entity}\0{int(self.extra_level)}\0{self.level_sizes}\0".encode())
        digest.update("\0".join(map(str, self.advertiser_ids.tolist())).encode())
        digest.update(np.ascontiguousarray(self.codes_AL, dtype="<i8").tobytes())
        for codebook in self.codebooks:
            digest.update(np.ascontiguousarray(codebook, dtype="<f4").tobytes())
        return digest.hexdigest()

    def tokens(self, advertiser: int) -> list[str]:
        """The ID as tokens, e.g. ``["<adv_1_17>", "<adv_2_3>", "<adv_3_40>"]``: level from 1, then the code."""
        return [f"<adv_{level}_{code}>" for level, code in enumerate(self.codes_AL[advertiser].tolist(), 1)]

    def save(self, directory: Path) -> None:
        """Write the artifact into an existing directory."""
        columns = {f"c{level + 1}": self.codes_AL[:, level].astype(np.int32) for level in range(len(self.codebooks))}
        pl.DataFrame({"advertiser_id": self.advertiser_ids, **columns}).write_parquet(directory / "codes.parquet")
        books = {f"level_{level}": np.ascontiguousarray(book) for level, book in enumerate(self.codebooks, 1)}
        save_file(books, directory / "codebooks.safetensors")
        facts = {
            "format": FORMAT_VERSION,
            "level_sizes": list(self.level_sizes),
            "version": self.version,
            "extra_level": self.extra_level,
            "entity": self.entity,
        }
        (directory / "ids.json").write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> AdvertiserIds:
        """Read the artifact.

        Raises:
            UserError: files are missing or damaged, of another format, or do not belong together.
        """
        try:
            facts = json.loads((directory / "ids.json").read_text())
            if facts["format"] != FORMAT_VERSION:
                raise UserError(
                    f"advertiser IDs of format {facts['format']} in {directory}",
                    expected=f"format {FORMAT_VERSION}",
                    action=_AGAIN,
                )
            codes = pl.read_parquet(directory / "codes.parquet")
            books = load_file(directory / "codebooks.safetensors")
            levels = range(1, len(facts["level_sizes"]) + 1)
            ids = cls(
                advertiser_ids=codes["advertiser_id"].to_numpy(),
                codes_AL=codes.select(f"c{level}" for level in levels).to_numpy().astype(np.int64),
                codebooks=[books[f"level_{level}"] for level in levels],
                extra_level=facts["extra_level"],
                entity=facts["entity"],
            )
        except UserError:
            raise
        except Exception as error:  # each of the three readers has errors of its own
            raise UserError(
                f"advertiser IDs in {directory} ({error})",
                expected="ids.json, codes.parquet and codebooks.safetensors as they were written",
                action=_AGAIN,
            ) from error
        if ids.version != facts["version"]:
            raise UserError(
                f"advertiser IDs in {directory} with version {ids.version[:12]}",
                expected=f"version {facts['version'][:12]}, as ids.json says",
                action=_AGAIN,
            )
        return ids
