"""The typed schema of ``configs/ranker/``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from data.errors import UserError
from data.rules import NOT_NEGATIVE, POSITIVE, SEED, Rule, broken
from models.dcn_v2 import DCNv2Config
from models.deepfm import DeepFMConfig
from models.dlrm import DLRMConfig
from models.mmoe import MMoEConfig
from models.shared_bottom import SharedBottomConfig
from models.training import TrainerConfig
from ranking.prior import GROUPS
from ranking.tasks import LABEL, TASKS

MODELS = ("dlrm", "dcn_v2", "deepfm", "logistic")
TASKS_SHARE = ("dlrm", "dcn_v2", "deepfm")
"""Models with a representation that several tasks can share."""
MULTI_TASK = ("shared_bottom", "mmoe")
SHARDED = "torchrec"
STRATEGIES = ("auto", SHARDED)


@dataclass
class FeatureConfig:
    """Which features a ranker reads.

    Attributes:
        sparse: names in ``ranking.features.SPARSE``, each an embedded id or bag of ids.
        dense: names in ``ranking.features.DENSE``, each a group of numbers.
        prior: names in ``ranking.prior.GROUPS``, each a group of numbers that a forecast gives.
        ad_columns: categorical columns of the ads table that are embedded and counted in ``own_columns``, out of
            those that ``data.ad_columns`` opens; None takes all of them.
        min_count: an id with fewer training rows shares the row of unseen ids.
        history_length: advertisers in the user's recent history.
        recent_periods: length of the window of the counts called recent.
        clip: standardised numbers are cut off at so many standard deviations.
    """

    sparse: list[str] = field(
        default_factory=lambda: [
            "user",
            "ad",
            "advertiser",
            "market",
            "display",
            "mailer",
            "semantic_id",
            "history",
        ]
    )
    dense: list[str] = field(
        default_factory=lambda: [
            "price",
            "own_advertiser",
            "own_ad",
            "own_columns",
            "ad_popularity",
            "advertiser_popularity",
            "activity",
            "plan",
            "browsing",
        ]
    )
    prior: list[str] = field(default_factory=lambda: list(GROUPS))
    ad_columns: list[str] | None = None
    min_count: int = 5
    history_length: int = 10
    recent_periods: int = 8
    clip: float = 8.0


@dataclass
class AblationConfig:
    """What `adsid ablate ranker` trains beside the arms of the ranker stage.

    Attributes:
        groups: the LM's arm without each group of ``features.prior``, and with it alone.
        models: other models, in three arms each; the ranker's own model is left out.
    """

    groups: bool = True
    models: list[str] = field(default_factory=lambda: list(MODELS))

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise _out_of_range("ablation.models", unknown, f"some of {', '.join(MODELS)}")


@dataclass
class RankerConfig:
    """The ranker, how it is trained and how its arms are compared.

    Attributes:
        model: one of `MODELS`; all learn by the same LightningModule from the same batches.
        dlrm, dcn_v2, deepfm: sizes of each; those of the chosen one count. A logistic regression has none.
        tasks: of `ranking.tasks.TASKS`; the first is what ads are ranked by and arms are compared by. One task has the
            model's own head.
        task_weights: of each task's loss in the sum; None weighs them all the same.
        multi_task: one of `MULTI_TASK`, the head of several tasks.
        shared_bottom, mmoe: sizes of each; those of the chosen one count.
        features: what it reads.
        trainer: epochs and early stopping, on the log loss of the span ``ranker_stop``.
        batch_size: rows of a step.
        learning_rate: of AdamW at the first step; it falls linearly to zero over ``trainer.max_epochs``.
        embedding_learning_rate: the same for embeddings, smaller, since ids of few rows are soon memorised.
        strategy: ``auto`` trains in one process, on one device; ``torchrec`` shards the tables over the
            processes that ``torchrun`` started (see `models.sharded`).
        sharded_learning_rate: of sharded tables, in place of the one above: row-wise Adagrad at the first step.
        weight_decay: of AdamW.
        seeds: one ranker is trained for each arm and seed.
        shuffled_control: also train on another user's forecast, which must show no gain.
        draws: bootstrap draws over users.
        ablation: what more `adsid ablate ranker` compares; the ranker stage does not look at it.
    """

    model: str = "dlrm"
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    dcn_v2: DCNv2Config = field(default_factory=DCNv2Config)
    deepfm: DeepFMConfig = field(default_factory=DeepFMConfig)
    tasks: list[str] = field(default_factory=lambda: [LABEL])
    task_weights: list[float] | None = None
    multi_task: str = MULTI_TASK[0]
    shared_bottom: SharedBottomConfig = field(default_factory=SharedBottomConfig)
    mmoe: MMoEConfig = field(default_factory=MMoEConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=5, patience=2))
    batch_size: int = 512
    learning_rate: float = 2e-3
    embedding_learning_rate: float = 2e-4
    strategy: str = "auto"
    sharded_learning_rate: float = 0.02
    weight_decay: float = 0.01
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    shuffled_control: bool = True
    draws: int = 300
    ablation: AblationConfig = field(default_factory=AblationConfig)

    def __post_init__(self) -> None:
        errors = []
        at_least_one = {
            "batch_size": self.batch_size,
            "draws": self.draws,
            "features.min_count": self.features.min_count,
            "features.history_length": self.features.history_length,
            "features.recent_periods": self.features.recent_periods,
            **{
                f"{model}.{name}": size
                for model in ("dlrm", "dcn_v2", "deepfm", *MULTI_TASK)
                for name, size in _sizes(getattr(self, model)).items()
            },
        }
        for name, value in at_least_one.items():
            if value < 1:
                errors.append(_out_of_range(name, value, "a whole number, at least 1"))
        for name, layers in (
            ("dlrm.over_layers", self.dlrm.over_layers),
            ("dcn_v2.over_layers", self.dcn_v2.over_layers),
            ("deepfm.deep_layers", self.deepfm.deep_layers),
            ("shared_bottom.bottom_layers", self.shared_bottom.bottom_layers),
            ("shared_bottom.tower_layers", self.shared_bottom.tower_layers),
            ("mmoe.expert_layers", self.mmoe.expert_layers),
            ("mmoe.tower_layers", self.mmoe.tower_layers),
        ):
            if not layers:
                errors.append(_out_of_range(name, [], "at least one width, e.g. [64, 32]"))
        if self.strategy not in STRATEGIES:
            errors.append(_out_of_range("strategy", self.strategy, f"one of {', '.join(STRATEGIES)}"))
        if self.model not in MODELS:
            errors.append(_out_of_range("model", self.model, f"one of {', '.join(MODELS)}"))
        errors += self._wrong_tasks()
        rates = ("learning_rate", "embedding_learning_rate", "sharded_learning_rate")
        rules: dict[str, Rule] = {"seeds": SEED.each(), **dict.fromkeys(rates, POSITIVE), "weight_decay": NOT_NEGATIVE}
        errors += broken(self, "ranker", rules) + broken(self.features, "ranker.features", {"clip": POSITIVE})
        if errors:
            raise UserError.collect(errors)

    def _wrong_tasks(self) -> list[UserError]:
        errors = []
        if not self.tasks or len(set(self.tasks)) != len(self.tasks) or set(self.tasks) - set(TASKS):
            errors.append(_out_of_range("tasks", self.tasks, f"some of {', '.join(TASKS)}, each named once"))
        weights = self.task_weights
        if weights is not None and (len(weights) != len(self.tasks) or min(weights) <= 0):
            expected = f"a positive number for each of {len(self.tasks)} tasks, or null"
            errors.append(_out_of_range("task_weights", weights, expected))
        if self.multi_task not in MULTI_TASK:
            errors.append(_out_of_range("multi_task", self.multi_task, f"one of {', '.join(MULTI_TASK)}"))
        if len(self.tasks) > 1 and self.model in MODELS and self.model not in TASKS_SHARE:
            expected = f"one of {', '.join(TASKS_SHARE)} with several tasks, which share its representation"
            errors.append(_out_of_range("model", self.model, expected))
        return errors


def _sizes(sizes: DLRMConfig | DCNv2Config | DeepFMConfig | SharedBottomConfig | MMoEConfig) -> dict[str, int]:
    """Every number of a model's sizes by its key."""
    found: dict[str, int] = {}
    for name, value in asdict(sizes).items():
        found |= {f"{name}[{n}]": width for n, width in enumerate(value)} if isinstance(value, list) else {name: value}
    return found


def _out_of_range(name: str, value: object, expected: str) -> UserError:
    return UserError(f"ranker.{name}={value}", expected=expected, action=f"set ranker.{name} to {expected}")
