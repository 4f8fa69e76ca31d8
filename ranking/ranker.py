"""Training, saving and loading of one ranker: weights as safetensors, its feature spec as JSON.

    <ranker>/weights.safetensors    state of the model
    <ranker>/feature_spec.json      `ranking.spec.FeatureSpec`
    <ranker>/manifest.json          model and its sizes, key, metrics

A ranker that is finished under the same key is loaded instead of trained. While it is trained, its
checkpoints lie beside it under a name that holds the key, so that only the very same training resumes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data.artifacts import Manifest, atomic_directory, fingerprint, hash_directory, package_versions, to_plain
from data.errors import LineageError, UserError
from data.log import Log
from data.split import Span
from models.dcn_v2 import DCNv2, DCNv2Config
from models.deepfm import DeepFM, DeepFMConfig
from models.dlrm import DLRM, DLRMConfig
from models.logistic import LogisticRegression
from models.mmoe import MMoE, MMoEConfig
from models.pointwise import Heads, PointwiseModule, denormals_as_zero, level_shift, rows_of_features
from models.sharded import TorchRecStrategy, as_leader_says, is_leader, join_processes, read_checkpoint
from models.shared_bottom import SharedBottom, SharedBottomConfig
from models.training import fit, wait_for_all
from priors.forecast import Forecast
from ranking.config import SHARDED, RankerConfig
from ranking.datamodule import RankerData, batches
from ranking.features import FeatureBuilder
from ranking.rows import Design, Features, Rows
from ranking.spec import FeatureSpec
from ranking.tasks import LABEL, check_tasks

KIND = "ranker"
VERSION = 4
"""Raised when the training code gives other weights for the same rows and configuration; of the stages too."""
TRAINING_ROWS = "rows.parquet"
WEIGHTS, SPEC = "weights.safetensors", "feature_spec.json"


@dataclass(frozen=True)
class RankerSpans:
    """Features of the three spans that a ranker is made and judged on, without those of a forecast.

    Attributes:
        builder: what built them.
        fit, stop, evaluation: training rows, rows for early stopping, rows that figures are of.
    """

    builder: FeatureBuilder
    fit: Features
    stop: Features
    evaluation: Features

    @classmethod
    def of(
        cls,
        builder: FeatureBuilder,
        users: NDArray[np.integer] | None,
        *,
        evaluation: str | Span = "validation",
        tasks: Sequence[str] = (LABEL,),
    ) -> RankerSpans:
        """The spans of a log.

        Args:
            builder: of the log.
            users: the panel; None takes all users.
            evaluation: span that figures are of.
            tasks: what the labels are of.

        Raises:
            UserError: a span has no impressions of the panel, or is closed, or the log lacks a task.
        """
        log = builder.log
        check_tasks(tasks, log)
        spans = (log.split.ranker_fit, log.split.ranker_stop, evaluation)
        return cls(builder, *(builder.build(Rows.of_span(log, span, users, tasks=tasks)) for span in spans))

    @property
    def log(self) -> Log:
        """The log that the features are of."""
        return self.builder.log


@dataclass(frozen=True)
class ArmRows:
    """Rows of the three spans as the rankers of one arm read them; the same for all seeds.

    Attributes:
        spec: fitted on the training rows.
        fit, stop, evaluation: as in `RankerSpans`.

    Raises:
        UserError: an id is outside its table.
    """

    spec: FeatureSpec
    fit: Design
    stop: Design
    evaluation: Design

    def __post_init__(self) -> None:
        for design in (self.fit, self.stop, self.evaluation):
            design.check_ids(self.spec.rows_of())

    @classmethod
    def of(cls, spans: RankerSpans, forecast: Forecast | None, cfg: RankerConfig) -> ArmRows:
        """The rows of an arm.

        Args:
            spans: features of the log.
            forecast: of the arm; None for the arm without.
            cfg: which features.

        Raises:
            UserError: the features cannot be used.
        """
        given = [part.with_prior(forecast, cfg.features.prior) for part in (spans.fit, spans.stop, spans.evaluation)]
        spec = FeatureSpec.fit(given[0], cfg.features, semantic_ids=spans.builder.ids.version)
        return cls(spec, *(spec.apply(features) for features in given))

    @cached_property
    def fingerprint(self) -> str:
        """Of the spec, the training rows and those that stop it."""
        rows = [
            (design.dense_NF, design.label_NT, design.weight_N, [asdict(bags) for bags in design.bags.values()])
            for design in (self.fit, self.stop)
        ]
        return fingerprint((asdict(self.spec), rows))


@dataclass(frozen=True)
class Ranker:
    """A trained ranker.

    Attributes:
        module: the model, in evaluation mode.
        spec: how its features are built and scaled.
        model: its name, one of `ranking.config.MODELS`.
        tasks: what it predicts; it ranks by the first.
    """

    module: PointwiseModule
    spec: FeatureSpec
    model: str
    tasks: tuple[str, ...] = (LABEL,)

    def probabilities(self, features: Features, *, task: str | None = None) -> NDArray[np.float64]:
        """Chance of each row by one task.

        Args:
            features: built with ``spec.config``, with the prior features of the ranker's arm.
            task: one of ``tasks``; None for the first, by which requests are ranked.

        Returns:
            Probabilities, shape ``(N,)``.

        Raises:
            UserError: the features are not those of the spec.
        """
        column = 0 if task is None else self.tasks.index(task)
        return predict(self.module, self.spec.apply(features))[:, column]

    def write(self, directory: Path) -> None:
        """Weights and spec into an existing directory."""
        state = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
        save_file(state, directory / WEIGHTS)
        (directory / SPEC).write_text(self.spec.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Ranker:
        """The ranker that `train_ranker` left in a directory.

        Raises:
            UserError: there is none, or a file of it is damaged.
            LineageError: its weights and feature spec were not trained together.
        """
        manifest = Manifest.read(directory)
        if manifest.kind != KIND:
            raise UserError(
                f"{directory}, which holds {manifest.kind}", expected="a ranker", action="give a ranker's folder"
            )
        try:
            spec = FeatureSpec.from_json((directory / SPEC).read_text(encoding="utf-8"))
            weights = load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{directory} cannot be read ({error})",
                expected=f"{WEIGHTS} and {SPEC} as the ranker stage wrote them",
                action="remove the folder and train the ranker again",
            ) from error
        if hash_directory(directory) != manifest.content_hash:
            raise LineageError(
                f"{directory}, whose {WEIGHTS} and {SPEC} are not those that its manifest was written with",
                expected="weights with the very feature spec that they were trained with",
                action="keep the files of one ranker together and as they are, or train the ranker again",
            )
        cfg = _architecture(manifest.config)
        module = build_module(spec, cfg, base_rates=[0.5] * len(cfg.tasks), seed=0)
        module.load_state_dict(weights)
        return cls(module.eval(), spec, cfg.model, tuple(cfg.tasks))


def build_module(spec: FeatureSpec, cfg: RankerConfig, *, base_rates: Sequence[float], seed: int) -> PointwiseModule:
    """An untrained ranker whose weights depend on the seed, the tasks' base rates and the shapes alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker = _network(spec, cfg, base_rates)
    return PointwiseModule(
        ranker,
        learning_rate=cfg.learning_rate,
        embedding_learning_rate=cfg.embedding_learning_rate,
        weight_decay=cfg.weight_decay,
        task_weights=_task_weights(cfg),
    )


def _task_weights(cfg: RankerConfig) -> list[float]:
    return [1.0] * len(cfg.tasks) if cfg.task_weights is None else cfg.task_weights


def _heads(cfg: RankerConfig, base_rates: Sequence[float]) -> Heads | None:
    """The heads of several tasks; one task has the model's own."""
    if len(cfg.tasks) == 1:
        return None
    if cfg.multi_task == "mmoe":
        return partial(MMoE, cfg=cfg.mmoe, base_rates=base_rates)
    return partial(SharedBottom, cfg=cfg.shared_bottom, base_rates=base_rates)


def _network(spec: FeatureSpec, cfg: RankerConfig, base_rates: Sequence[float]) -> nn.Module:
    tables, n_dense, base_rate, heads = spec.sparse_tables(), len(spec.dense), base_rates[0], _heads(cfg, base_rates)
    match cfg.model:
        case "dlrm":
            return DLRM(tables, n_dense=n_dense, cfg=cfg.dlrm, base_rate=base_rate, heads=heads)
        case "dcn_v2":
            return DCNv2(tables, n_dense=n_dense, cfg=cfg.dcn_v2, base_rate=base_rate, heads=heads)
        case "deepfm":
            return DeepFM(tables, n_dense=n_dense, cfg=cfg.deepfm, base_rate=base_rate, heads=heads)
    return LogisticRegression(tables, n_dense=n_dense, base_rate=base_rate)


def _architecture(plain: Mapping[str, Any]) -> RankerConfig:
    """What of a manifest's config the shapes of the weights depend on."""
    return RankerConfig(
        model=plain["model"],
        dlrm=DLRMConfig(**plain["dlrm"]),
        dcn_v2=DCNv2Config(**plain["dcn_v2"]),
        deepfm=DeepFMConfig(**plain["deepfm"]),
        tasks=plain["tasks"],
        multi_task=plain["multi_task"],
        shared_bottom=SharedBottomConfig(**plain["shared_bottom"]),
        mmoe=MMoEConfig(**plain["mmoe"]),
    )


def predict(module: PointwiseModule, design: Design) -> NDArray[np.float64]:
    """Chance of each row of a design by each task, shape ``(N, T)``.

    Raises:
        UserError: an id is outside its table.
    """
    design.check_ids(rows_of_features(module.ranker))
    return torch.sigmoid(_logits(module, design)).numpy()


def _logits(module: PointwiseModule, design: Design) -> torch.Tensor:
    module.eval()
    with torch.inference_mode():
        return torch.cat([module(batch.to(module.device)).double().cpu() for batch in batches(design)])


def train_ranker(rows: ArmRows, *, seed: int, cfg: RankerConfig, directory: Path) -> Ranker:
    """Trains the ranker of one arm and seed, or loads it where it is finished.

    Args:
        rows: of the arm.
        seed: of the initial weights and the order of the rows.
        cfg: model and training.
        directory: the artifact; made whole or not at all. Checkpoints lie beside it meanwhile.

    Returns:
        The ranker at its best epoch by the loss on ``ranker_stop``, its level set to that span's.

    Raises:
        UserError: the training rows of a task are of one class, or several devices without processes that share tables.
    """
    started = time.monotonic()
    sharded = cfg.strategy == SHARDED
    if cfg.trainer.devices > 1 and not sharded:
        raise UserError(
            f"ranker.trainer.devices={cfg.trainer.devices} with strategy={cfg.strategy}",
            expected="one device, or the processes of torchrun, which share tables and rows",
            action=f"torchrun --nproc-per-node {cfg.trainer.devices} train.py stage=ranker strategy={SHARDED} "
            "<overrides>, or set ranker.trainer.devices=1",
        )
    if sharded:
        join_processes(cfg.trainer.accelerator)
    key = _key(rows, seed, cfg)
    if as_leader_says(directory.exists() and Manifest.read(directory).key == key):
        return Ranker.load(directory)
    work = directory.parent / f".{directory.name}.fit-{key[:16]}"
    if is_leader():
        for stale in directory.parent.glob(f".{directory.name}.fit-*"):
            if stale != work:
                shutil.rmtree(stale)
    data = RankerData(
        rows.fit, rows.stop, batch_size=cfg.batch_size, seed=seed, path=work / TRAINING_ROWS, tasks=cfg.tasks
    )
    rates = [_base_rate(label_N, rows.fit.weight_N) for label_N in rows.fit.label_NT.T]
    module = build_module(rows.spec, cfg, base_rates=rates, seed=seed)
    with denormals_as_zero():
        result = fit(
            module,
            data.train_dataloader(),
            data.val_dataloader(),
            cfg.trainer,
            work_dir=work,
            seed=seed,
            monitor="val_loss",
            strategy=TorchRecStrategy(table_learning_rate=cfg.sharded_learning_rate) if sharded else None,
        )
    if sharded:
        module = build_module(rows.spec, cfg, base_rates=rates, seed=seed)
        read_checkpoint(module, result.checkpoint)
    module.cpu()
    logit_NT, label_NT = _logits(module, rows.stop), torch.from_numpy(rows.stop.label_NT)
    weight_N = torch.from_numpy(rows.stop.weight_N)
    shifts = [level_shift(*task, weight_N) for task in zip(logit_NT.T, label_NT.T, strict=True)]
    module.intercept.copy_(torch.tensor(shifts))
    ranker = Ranker(module.eval(), rows.spec, cfg.model, tuple(cfg.tasks))
    wait_for_all()  # the others have read the checkpoint
    if is_leader():
        with atomic_directory(directory) as unfinished:
            ranker.write(unfinished)
            Manifest(
                kind=KIND,
                key=key,
                config=to_plain(cfg) | {"seed": seed},
                content_hash=hash_directory(unfinished),
                versions=package_versions(),
                metrics={"val_loss": result.best_score, "best_epoch": result.best_epoch, "epochs": result.epochs},
                seconds=time.monotonic() - started,
            ).write(unfinished)
        shutil.rmtree(work)
    wait_for_all()
    return ranker


def _base_rate(label_N: NDArray[np.float32], weight_N: NDArray[np.float32]) -> float:
    known_N = ~np.isnan(label_N)
    return float(np.average(label_N[known_N], weights=weight_N[known_N]))


def _key(rows: ArmRows, seed: int, cfg: RankerConfig) -> str:
    """Fingerprint of all that the weights depend on: the very rows, the model and its training."""
    trainer = {name: value for name, value in asdict(cfg.trainer).items() if name != "progress_bar"}
    table_rate = (SHARDED, cfg.sharded_learning_rate) if cfg.strategy == SHARDED else cfg.embedding_learning_rate
    training = (cfg.batch_size, cfg.learning_rate, table_rate, cfg.weight_decay, trainer)
    sizes = asdict(getattr(cfg, cfg.model)) if hasattr(cfg, cfg.model) else {}
    several = len(cfg.tasks) > 1
    heads = (cfg.multi_task, asdict(getattr(cfg, cfg.multi_task)), _task_weights(cfg)) if several else ()
    return fingerprint((VERSION, rows.fingerprint, cfg.model, sizes, cfg.tasks, heads, training, seed))
