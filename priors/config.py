"""The typed schema of ``configs/prior/``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from data.errors import UserError
from data.rules import DROPOUT, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, SEED, at_least, broken
from data.split import Span
from models.prior_lm import HeadConfig, LoraSettings
from models.prior_reward import PAID
from models.sasrec import SasRecConfig
from models.training import TrainerConfig
from priors.prompt_config import PromptConfig

ANCHOR_GRID = (
    "own_weight", "co_weight", "own_decay", "own_shrinkage", "co_decay", "co_shrinkage", "popularity_decay",
    "smoothing", "plan_exponent", "repeat_factor", "bias_penalty",
)  # fmt: skip
"""Keys of ``prior.anchor`` that hold values to choose from."""
ANCHORS = ("none", "popularity", "popularity+history", "popularity+history+cooccurrence")
AUTO_ANCHOR = "auto"
AUTO_ANCHORS = ("popularity+history", "popularity+history+cooccurrence")
"""What ``prior.anchor.kind=auto`` chooses from."""


@dataclass
class BaseModelConfig:
    """The causal LM that is fine-tuned.

    Attributes:
        name: ``packaged:smollm2``, ``packaged:tiny`` (random weights, for tests), or any path or hub name
            that ``transformers.AutoModel`` loads.
        dtype: of the decoder's weights: ``float32``, ``bfloat16``, or ``auto``: float32 where they are trained;
            frozen ones are bfloat16 on a GPU and on a CPU with AVX512-BF16 or AMX, else float32, where bfloat16
            would be emulated.
        random_weights: the same architecture with weights drawn by ``prior.seed``, to tell what pretraining adds.
        id_rows: where the ID tokens' input rows start: ``words``, the mean word embedding of what the advertisers under
            a code sell, or ``words+codebook``, and the code's vector in random directions beside it.
        train_input_rows: let the ID tokens' input rows learn; the gradient then goes through all layers.
        appended_layer: append a layer that looks at the whole prompt evenly and is trained, see `models.block`.
        gradient_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.
    """

    name: str = "packaged:smollm2"
    dtype: str = "auto"
    random_weights: bool = False
    id_rows: str = "words"
    train_input_rows: bool = False
    appended_layer: bool = False
    gradient_checkpointing: bool = False


@dataclass
class ProbeConfig:
    """How the head is fitted on hidden states of the frozen base model, before the adapters are trained.

    Attributes:
        prompts: training prompts that are read, at the most; 0 starts from a head of zeros.
        epochs: passes over their hidden states, at the most; each level of the head keeps its best one.
        weight_decay: AdamW's.
        batch_size: decisions a step.
    """

    prompts: int = 0
    epochs: int = 10
    weight_decay: float = 0.01
    batch_size: int = 64

    def __post_init__(self) -> None:
        errors = _too_small(self, "probe", {"prompts": 0, "epochs": 1, "batch_size": 1}, without="the probe")
        errors += broken(self, "prior.probe", {"weight_decay": NOT_NEGATIVE})
        if errors:
            raise UserError.collect(errors)


def _too_small(settings: object, section: str, least: dict[str, int], *, without: str | None = None) -> list[UserError]:
    """Whole numbers of a part of the fit that are below what they have to be.

    Args:
        settings: of the part.
        section: its name below ``prior``.
        least: the smallest value of each number.
        without: what is left out with no prompts, in words; None where nothing is.
    """
    left_out = "" if without is None else f"; prior.{section}.prompts=0 leaves {without} out"
    return [
        UserError(
            f"prior.{section}.{name}={getattr(settings, name)}",
            expected=f"a whole number, at least {minimum}",
            action=f"raise prior.{section}.{name}{left_out}",
        )
        for name, minimum in least.items()
        if getattr(settings, name) < minimum
    ]


@dataclass
class HistoryConfig:
    """The history vector beside the prompt: all that a user bought, see `priors.history`.

    Attributes:
        prompts: user-periods of the fit span that its weights are fitted on, at the most; 0 leaves the vector out.
        decays: by which a purchase's weight falls a period; of several values, e.g. [0.5, 0.97], each gives a vector of
            its own, so that what was bought last and what was ever bought are told apart.
        categories: tell the categories of purchases too, where the log has any, beside each mean.
        browsing: tell the categories of visits, searches, clicks and coupons too, where the log has any.
        repeats: learn apart what the vector says of advertisers that the user bought from before, and of new ones.
        epochs: passes over them, at the most; each level keeps its best one, and stops where three brought no gain.
        learning_rate, weight_decay: AdamW's.
        dropout: share of the vector's features that are hidden from the head while they are fitted.
        batch_size: decisions a step.
    """

    prompts: int = 30_000
    decays: list[float] = field(default_factory=lambda: [0.97])
    categories: bool = False
    browsing: bool = False
    repeats: bool = True
    epochs: int = 40
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.3
    batch_size: int = 1024

    def __post_init__(self) -> None:
        errors = _too_small(self, "history", {"prompts": 0, "epochs": 1, "batch_size": 1}, without="the history vector")
        if not self.decays or not all(0 < decay <= 1 for decay in self.decays):
            errors.append(
                UserError(
                    f"prior.history.decays={list(self.decays)}",
                    expected="at least one, all above 0, at most 1: the part of a weight that a period leaves",
                    action="set prior.history.decays, e.g. to [0.97]",
                )
            )
        errors += broken(
            self, "prior.history", {"learning_rate": POSITIVE, "weight_decay": NOT_NEGATIVE, "dropout": DROPOUT}
        )
        if errors:
            raise UserError.collect(errors)


AUTO = "auto"
CONTROLS = ("other_prompt", "constant_hidden", "history_alone")
"""What the forecast may be compared with beside its anchor: see `priors.evaluate`."""


@dataclass
class InterestConfig:
    """The second thing that the forecaster is asked: categories of the conversions to come.

    Attributes:
        column: categorical column of the ads, one of ``data.ad_columns``; ``auto``: ``category`` where the data has it,
            else none; null: none.
        weight: of the interests' NLL beside the advertisers'; 0 trains no head, and the interests are their anchor's.
    """

    column: str | None = AUTO
    weight: float = 0.2

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise UserError(
                f"prior.interests.weight={self.weight}",
                expected="zero or a positive number",
                action="set prior.interests.weight, e.g. to 0.2; prior.interests.column=null leaves interests out",
            )


@dataclass
class AnchorConfig:
    """The counting model under the LM, and the grid its constants are chosen from.

    Attributes:
        kind: its terms: ``none`` (uniform over the legal children), ``popularity``, ``popularity+history``,
            ``popularity+history+cooccurrence``, or ``auto``: the last two, whichever the selection rows ask for, the
            last only where its gain is certain.
        own_weight: values of λ, the weight of the user's own history against popularity.
        co_weight: values of μ, the weight of co-conversions with what the user bought.
        own_decay: values of δ, by which a purchase's weight falls a period.
        own_shrinkage: values of ν, purchases at which own history has half of its weight; 0: it has all with the first.
        co_decay: the same as ``own_decay`` for what a purchase says of others.
        co_shrinkage: values of κ, conversions that an advertiser must have been followed by to be believed.
        popularity_decay: values of ρ, the same for popularity.
        smoothing: values of s, added to every advertiser's count.
        plan_exponent: values of γ: how much the ads that run in a period, against those that used to run, raise an
            advertiser's share; 0 leaves the plan of campaigns out.
        repeat_factor: values of ω, what the mass of all that a user bought before is multiplied by; below 1 where
            hardly anybody buys a thing twice. ``popularity`` knows nothing of the user and leaves it out.
        bias_penalty: values of the L2 penalty on the bias a code; the bias is fitted on the LM's own prompts.
        select_rows: user-periods of the selection span that the constants are chosen on, at the most.
    """

    kind: str = AUTO_ANCHOR
    own_weight: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    co_weight: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    own_decay: list[float] = field(default_factory=lambda: [0.94, 0.97, 0.99, 1.0])
    own_shrinkage: list[float] = field(default_factory=lambda: [0.0, 10.0, 30.0, 100.0, 300.0])
    co_decay: list[float] = field(default_factory=lambda: [0.94, 0.97])
    co_shrinkage: list[float] = field(default_factory=lambda: [1.0, 10.0, 100.0])
    popularity_decay: list[float] = field(default_factory=lambda: [0.65, 0.8, 0.9, 0.97, 1.0])
    smoothing: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0, 3.0])
    plan_exponent: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.75, 1.0])
    repeat_factor: list[float] = field(default_factory=lambda: [1.0])
    bias_penalty: list[float] = field(default_factory=lambda: [0.003, 0.03, 0.3])
    select_rows: int = 2000

    def __post_init__(self) -> None:
        errors = []
        if self.kind not in (kinds := (AUTO_ANCHOR, *ANCHORS)):
            errors.append(
                UserError(
                    f"prior.anchor.kind={self.kind}",
                    expected=f"one of {', '.join(kinds)}",
                    action="set prior.anchor.kind to one of them",
                )
            )
        for name in ANCHOR_GRID:
            values = list(getattr(self, name))
            if not values:
                expected = "at least one value to choose from"
            elif name.endswith("_decay") and not all(0 < value <= 1 for value in values):
                expected = "values above 0, at most 1: the part of a weight that a period leaves"
            elif name == "smoothing" and min(values) <= 0:
                expected = "values above 0: what keeps an advertiser that nobody bought from possible"
            elif name == "repeat_factor" and min(values) <= 0:
                expected = "values above 0: what keeps buying again possible"
            elif min(values) < 0:
                expected = "values of at least 0"
            else:
                continue
            errors.append(
                UserError(
                    f"prior.anchor.{name}={values}",
                    expected=expected,
                    action=f"give prior.anchor.{name} a list of such values",
                )
            )
        errors += _too_small(self, "anchor", {"select_rows": 1})
        if self.own_weight and self.co_weight and min(self.own_weight) + min(self.co_weight) >= 1:
            errors.append(
                UserError(
                    f"prior.anchor.own_weight={list(self.own_weight)}, prior.anchor.co_weight={list(self.co_weight)}",
                    expected="at least one pair that leaves popularity a weight above 0",
                    action="lower the values of one of them",
                )
            )
        if errors:
            raise UserError.collect(errors)


BASELINES = ("own", "ease", "item_knn", "sasrec")


@dataclass
class BaselineConfig:
    """What the forecast is compared with, beside anchor and popularity; see `priors.baselines`.

    Attributes:
        names: some of ``own``, ``ease``, ``item_knn``, ``sasrec``; the last one is trained for minutes.
        ease_penalty: values of λ that EASE chooses from.
        neighbours: values of K that item-kNN chooses from.
        own_count: values that both choose from of what an own purchase adds to the advertiser's score.
        select_rows: user-periods of the selection span that they are chosen on, at the most.
        sasrec: size and training of SASRec.
    """

    names: list[str] = field(default_factory=lambda: ["own", "ease", "item_knn"])
    ease_penalty: list[float] = field(default_factory=lambda: [50.0, 200.0, 1000.0])
    neighbours: list[int] = field(default_factory=lambda: [20, 100, 500])
    own_count: list[float] = field(default_factory=lambda: [0.0, 0.03, 0.2, 1.0])
    select_rows: int = 2000
    sasrec: SasRecConfig = field(default_factory=SasRecConfig)

    def __post_init__(self) -> None:
        errors = []
        unknown = [name for name in self.names if name not in BASELINES]
        if unknown or len(set(self.names)) < len(self.names):
            errors.append(
                UserError(
                    f"prior.baselines.names={list(self.names)}",
                    expected=f"some of {', '.join(BASELINES)}, each once",
                    action="correct prior.baselines.names; [] compares with anchor and popularity alone",
                )
            )
        for name, values in (("ease_penalty", self.ease_penalty), ("neighbours", self.neighbours)):
            if not values or min(values) <= 0:
                errors.append(
                    UserError(
                        f"prior.baselines.{name}={list(values)}",
                        expected="at least one value, all above 0",
                        action=f"give prior.baselines.{name} values to choose from",
                    )
                )
        if not self.own_count or min(self.own_count) < 0:
            errors.append(
                UserError(
                    f"prior.baselines.own_count={list(self.own_count)}",
                    expected="at least one value, none below 0",
                    action="give prior.baselines.own_count values to choose from, e.g. [0]",
                )
            )
        errors += _too_small(self, "baselines", {"select_rows": 1})
        if errors:
            raise UserError.collect(errors)


@dataclass
class DecodeConfig:
    """How priors are decoded.

    Attributes:
        beam: prefixes of each level that are followed.
        top_k: advertisers stored for every user.
        frontier_floor: pruned prefixes above this probability are stored by themselves.
        exact: widen each list until it is proven to hold the most probable advertisers of all.
        merge_adapter: in batch jobs, add LoRA's weights into the base weights: a fifth less work, at the cost of
            one more rounding where the base is bfloat16.
        batch_size: prompts decoded at once.
        shard_users: users of one file of the table.
        every: periods between two forecasts of a user; a request takes the newest one at or before it. The evaluated
            span begins with new ones.
    """

    beam: int = 16
    top_k: int = 50
    frontier_floor: float = 1e-4
    exact: bool = False
    merge_adapter: bool = False
    batch_size: int = 16
    shard_users: int = 10_000
    every: int = 1

    def __post_init__(self) -> None:
        errors = _too_small(self, "decode", dict.fromkeys(("beam", "top_k", "batch_size", "shard_users", "every"), 1))
        errors += broken(self, "prior.decode", {"frontier_floor": POSITIVE_SHARE})
        if errors:
            raise UserError.collect(errors)


ID_WORDS = r"(.*)\{id\}(.*?)(\s*)\{words\}"
"""What `WarmUpConfig.to_text` looks like: words before the ID, words after it, a blank, the words asked for."""


@dataclass
class WarmUpConfig:
    """How words and IDs of advertisers are aligned before the fine-tuning (`priors.warm_up`).

    Attributes:
        prompts: advertisers shown, each both ways, one after the other and then again; 0 leaves the warm-up out.
        text_weight: weight of ID → words against words → ID.
        max_tokens: of an advertiser's words, at the most.
        held_out: advertisers that both losses are reported on, at the most half of all.
        batch_size: advertisers of a step.
        to_id: pattern of words → ID, with ``{words}``.
        to_text: pattern of ID → words, with ``{id}`` and, at its end, ``{words}``. It begins with a line break, since
            an LM that has to attend to a first token that says something reads the rest badly.
    """

    prompts: int = 0
    text_weight: float = 0.5
    max_tokens: int = 24
    held_out: int = 128
    batch_size: int = 16
    to_id: str = "Sells {words}.\nAdvertiser:"
    to_text: str = "\nAdvertiser{id} sells {words}"

    def __post_init__(self) -> None:
        errors = _too_small(
            self, "warm_up", {"prompts": 0, "max_tokens": 1, "held_out": 1, "batch_size": 1}, without="the warm-up"
        )
        errors += broken(self, "prior.warm_up", {"text_weight": NOT_NEGATIVE})
        if self.to_id.count("{words}") != 1 or self.to_id.endswith("{words}"):
            errors.append(
                UserError(
                    f"prior.warm_up.to_id={self.to_id!r}",
                    expected="{words} once, and words after it, whose end the ID follows",
                    action='write prior.warm_up.to_id like "Sells {words}. Advertiser:"',
                )
            )
        if not re.fullmatch(ID_WORDS, self.to_text, re.DOTALL) or self.to_text.count("{") != 2:
            errors.append(
                UserError(
                    f"prior.warm_up.to_text={self.to_text!r}",
                    expected="{id} and, at the end, {words}",
                    action='write prior.warm_up.to_text like "Advertiser{id} sells {words}"',
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass
class RewardConfig:
    """How the forecaster is trained on the reward of its own lists, after the fine-tuning (`priors.reward`).

    Attributes:
        prompts: prompts of the fit span that lists are drawn for; 0 leaves the stage out.
        lists: lists of each, which are compared with one another.
        length: advertisers of a list.
        batch_size: prompts of a step.
        kl_weight: of the KL to the fine-tuned forecaster.
        lora_learning_rate: of the decoder's trained weights.
        head_learning_rate: of the head.
    """

    prompts: int = 0
    lists: int = 8
    length: int = 20
    batch_size: int = 4
    kl_weight: float = 0.05
    lora_learning_rate: float = 5e-5
    head_learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        errors = _too_small(
            self, "reward", {"prompts": 0, "lists": 2, "length": 1, "batch_size": 1}, without="the stage"
        )
        if self.length > PAID:
            errors.append(
                UserError(
                    f"prior.reward.length={self.length}",
                    expected=f"at most {PAID}: places after that earn nothing",
                    action="lower prior.reward.length",
                )
            )
        errors += broken(
            self,
            "prior.reward",
            dict.fromkeys(("kl_weight", "lora_learning_rate", "head_learning_rate"), NOT_NEGATIVE),
        )
        if errors:
            raise UserError.collect(errors)


@dataclass
class PriorConfig:
    """The forecaster: base model, prompts, anchor, fine-tuning, decoding.

    Attributes:
        panel: number of users that get forecasts, chosen by a hash of their id; None for all.
        prompts: training prompts, each seen once.
        first_period: first period of the fit span that prompts are made for, since before it histories are short;
            null: a quarter of the span is left out.
        max_targets: targets of a training prompt; of more, so many are drawn.
        select_prompts: prompts of the selection span, for stopping and calibrating.
        evaluation_prompts: prompts of the evaluated span whose exact likelihood is computed, with controls.
        controls: which controls the evaluation computes, out of `CONTROLS`; each is a further reading of its prompts.
        batch_size: prompts of a training batch, on average, and of a batch of evaluation.
        batch_tokens: the most tokens of a training batch, padding included; null: ``batch_size`` times the mean
            length, and at least the longest.
        train: ``lora`` trains adapters (or the head alone, with ``lora.rank=0``), ``full`` all weights.
        trainer: ``max_epochs`` is the number of parts that the training prompts are cut in; each part ends
            with a checkpoint and a look at the selection span.
        seed: of the choice of prompts and of training.
    """

    base: BaseModelConfig = field(default_factory=BaseModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    interests: InterestConfig = field(default_factory=InterestConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=4, patience=None))
    panel: int | None = 250
    prompts: int = 8000
    first_period: int | None = None
    max_targets: int = 8
    select_prompts: int = 256
    evaluation_prompts: int = 512
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    batch_size: int = 8
    batch_tokens: int | None = None
    train: str = "lora"
    seed: int = 0

    def __post_init__(self) -> None:
        one = at_least(1)
        errors = broken(
            self,
            "prior",
            {
                "panel": one.or_null(),
                "prompts": one,
                "first_period": one.or_null(),
                "max_targets": one,
                "select_prompts": one,
                "evaluation_prompts": one,
                "batch_size": one,
                "batch_tokens": one.or_null(),
                "seed": SEED,
            },
        )
        if self.base.dtype not in ("auto", "float32", "bfloat16"):
            errors.append(
                UserError(
                    f"prior.base.dtype={self.base.dtype}",
                    expected="auto, float32 or bfloat16",
                    action="set prior.base.dtype to one of them",
                )
            )
        if self.base.id_rows not in ("words", "words+codebook"):
            errors.append(
                UserError(
                    f"prior.base.id_rows={self.base.id_rows}",
                    expected="words or words+codebook",
                    action="set prior.base.id_rows to one of them",
                )
            )
        if unknown := [name for name in self.controls if name not in CONTROLS]:
            errors.append(
                UserError(
                    f"prior.controls={list(self.controls)}",
                    expected=f"none, or some of {', '.join(CONTROLS)}",
                    action=f"correct {', '.join(unknown)}",
                )
            )
        if self.train not in ("lora", "full"):
            errors.append(
                UserError(f"prior.train={self.train}", expected="lora or full", action="set prior.train to one of them")
            )
        if self.train == "full" and self.base.dtype == "bfloat16":
            errors.append(
                UserError(
                    "prior.train=full with prior.base.dtype=bfloat16",
                    expected="weights in float32, where small steps are not rounded away",
                    action="set prior.base.dtype=float32; prior.trainer.precision=bf16-mixed multiplies in bfloat16",
                )
            )
        if self.warm_up.prompts and self.train == "lora" and not self.lora.rank and not self.base.train_input_rows:
            errors.append(
                UserError(
                    f"prior.warm_up.prompts={self.warm_up.prompts} with prior.lora.rank=0",
                    expected="something below the head that it can train",
                    action="raise prior.lora.rank, set prior.base.train_input_rows=true, or prior.warm_up.prompts=0",
                )
            )
        if errors:
            raise UserError.collect(errors)

    def prompt_span(self, prior_fit: Span) -> Span:
        """First and last period of the training prompts.

        Args:
            prior_fit: the fit span.
        """
        first, last = prior_fit
        if self.first_period is not None:
            return max(first, self.first_period), last
        return min(first + math.ceil((last - first + 1) / 4), last), last
