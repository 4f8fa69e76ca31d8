"""The stages of adsid: thin glue from a configuration and input artifacts to one artifact each.

    data ─► semantic_ids ─► prior ─► forecasts ─┬─► retrieval ─► report
      └──────────┴──────► two_tower ────────────┤                  ▲
                                                └─► ranker ────────┘

Every stage that measures something leaves ``rows.json``, the tidy rows of the report, in its artifact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file, save_file

from data.artifacts import Manifest, contents, fingerprint, make_directory, package_versions, to_plain
from data.errors import UserError
from data.log import Log, load_log
from data.prepare import prepare, source_content
from data.split import Span
from data.statistics import Row
from data.truth import TRUTH, Truth
from data.writer import untracked
from models.sharded import is_leader
from pipeline.config import AdsidConfig, made_by, run_directory
from pipeline.console import progress_bars
from pipeline.engine import Context, Stage, check_inputs
from pipeline.example import user_example
from pipeline.ranker_ablation import write_ablation
from pipeline.report import Curves, RunInfo, write_report
from priors.anchor import TunedAnchor
from priors.artifact import FOR_LISTS, PriorModel, load_base, load_interests, read_plain
from priors.base_model import why_random
from priors.baselines import fit_baselines
from priors.card import model_card
from priors.config import BaseModelConfig
from priors.evaluate import DatedScorer, evaluate_forecast, evaluated_rows
from priors.fit import fit_prior
from priors.forecast import Forecast, TableForecast
from priors.generate import generate_priors
from priors.judge import REQUESTS, save_requests
from priors.reward import fit_reward
from priors.table import PriorTable
from ranking.ablation import (
    ORACLE,
    TRUE_CHANCE,
    arms,
    compare,
    grid,
    predictions_of,
    run_ablation,
    trained_rankers,
)
from ranking.features import FeatureBuilder
from ranking.oracle import OracleForecast, true_chance
from ranking.ranker import VERSION as RANKER_VERSION
from ranking.ranker import Ranker, RankerSpans
from ranking.simulated_ab import Market, SimulatedAB, Stack, oracle_arm, run_ab
from retrieval.benchmark import PARTS, RetrievalBenchmark, bench_retrieval
from retrieval.evaluate import NONE, evaluate_retrieval
from retrieval.retriever import Retriever
from retrieval.tuning import Plan, tuning_span
from retrieval.two_tower import TrainedTwoTower, train_two_tower
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import PACKAGED_ENCODER
from semantic_ids.embeddings import text_embeddings
from semantic_ids.quality import quality_rows
from semantic_ids.tokenize import build_ids, precomputed_content

Work = Context[AdsidConfig]
T = TypeVar("T")

_NO_RESULT = "its forecasts are no result."
ROWS = "rows.json"
FACTS = "facts.json"
TEXT = "text_embeddings.safetensors"
LISTS = "lists"
"""Folder of the forecasts that serve retrieval, where another LM makes them than those that serve ranking."""
TOWERS = "towers"
RANKERS = "rankers"
REFIT = {"tuning": "towers_tuning", "evaluated": "towers_evaluated"}
"""Folders of the towers that were refit before the span that blends are chosen on, and before the evaluated one."""
TRAINED = ("seed", "model", "pairs", "trainer", "refit")
"""Keys of ``retrieval`` that the towers are trained by; all others can be swapped beside trained ones."""


def stages() -> list[Stage[AdsidConfig]]:
    """The stage graph, each after its inputs."""
    return [
        Stage(
            "data",
            (),
            lambda cfg: cfg.data,
            make_data,
            ("events", "ads", "advertisers"),
            version=2,
            outside=lambda cfg: source_content(cfg.data),
        ),
        Stage(
            "semantic_ids",
            ("data",),
            lambda cfg: {
                "data": cfg.data,
                "semantic_ids": cfg.semantic_ids,
                "precomputed": precomputed_content(cfg.semantic_ids.embedding),
            },
            make_semantic_ids,
            ("collision_rate", "entropy_ratio"),
            version=3,
            outside=lambda cfg: _model_files("encoder", cfg.semantic_ids.embedding.encoder.name),
        ),
        Stage(
            "prior",
            ("data", "semantic_ids"),
            lambda cfg: {"data": cfg.data, "prior": _fitting(cfg)},
            make_prior,
            ("prompts", "select_nll_by_part"),
            version=11,
            outside=lambda cfg: _model_files("prior.base", cfg.prior.base.name),
        ),
        Stage(
            "forecasts",
            ("data", "semantic_ids", "prior"),
            lambda cfg: {"data": cfg.data, "prior": cfg.prior, "evaluate": cfg.evaluate},
            make_forecasts,
            ("users", "forecasts_made", "users_per_hour"),
            version=5,
        ),
        Stage(
            "two_tower",
            ("data", "semantic_ids"),
            lambda cfg: {"data": cfg.data, "retrieval": _towers(cfg), "encoder": cfg.semantic_ids.embedding.encoder},
            make_two_tower,
            ("epochs", "val_recall"),
            version=3,
        ),
        Stage(
            "retrieval",
            ("data", "semantic_ids", "prior", "forecasts", "two_tower"),
            lambda cfg: {
                "data": cfg.data,
                "retrieval": cfg.retrieval,
                "panel": [cfg.prior.panel, cfg.prior.seed],
                "evaluate": cfg.evaluate,
            },
            make_retrieval,
            ("recall", "quotas"),
            version=3,
        ),
        Stage(
            "ranker",
            ("data", "semantic_ids", "prior", "forecasts"),
            lambda cfg: {
                "data": cfg.data,
                "ranker": {key: value for key, value in to_plain(cfg.ranker).items() if key != "ablation"},
                "panel": [cfg.prior.panel, cfg.prior.seed],
                "evaluate": cfg.evaluate,
            },
            make_ranker,
            ("auc", "rankers"),
            version=RANKER_VERSION,
        ),
        Stage(
            "report",
            ("data", "semantic_ids", "prior", "forecasts", "two_tower", "retrieval", "ranker"),
            lambda cfg: {key: value for key, value in to_plain(cfg).items() if key not in ("run", "auction")},
            make_report,
            ("rows",),
        ),
    ]


def ablations() -> list[Stage[AdsidConfig]]:
    """Stages that no run needs: each is asked for by name, after the stages it reads."""
    return [
        Stage(
            "ranker_ablation",
            ("data", "semantic_ids", "prior", "forecasts"),
            lambda cfg: {
                "data": cfg.data,
                "ranker": cfg.ranker,
                "panel": [cfg.prior.panel, cfg.prior.seed],
                "evaluate": cfg.evaluate,
            },
            make_ranker_ablation,
            ("rankers",),
            version=RANKER_VERSION,
        )
    ]


def make_data(context: Work) -> dict[str, Any]:
    """The five tables of the log."""
    bars = context.config.trainer.progress_bar
    return prepare(context.config.data, context.output, track=progress_bars(Console()) if bars else untracked)


def make_semantic_ids(context: Work) -> dict[str, Any]:
    """Embeddings, tokenizer, unique IDs and their quality."""
    cfg, log = context.config.semantic_ids, _log(context)
    built = build_ids(log, cfg, work_dir=context.work, cache_dir=context.work)
    built.save(context.output, log, cfg)
    texts = log.tables.advertisers["text"].fill_null("").to_list()
    text_AE = text_embeddings(texts, cfg.embedding.encoder, cache_dir=context.work)
    save_file({"text_AE": text_AE}, context.output / TEXT)
    _write_rows(context.output, quality_rows(built.report))
    return built.report


def make_prior(context: Work) -> dict[str, Any]:
    """The fine-tuned forecaster with its tuned anchor."""
    cfg, log = context.config.prior, _log(context)
    prior, metrics = fit_prior(log, _ids(context), cfg, work_dir=context.work)
    prior, metrics["reward"] = fit_reward(prior, log, cfg, work_dir=context.work / "reward")
    prior.save(context.output)
    shutil.copy2(context.work / REQUESTS, context.output)
    config = {"data": to_plain(context.config.data), "prior": _fitting(context.config)}
    card = model_card(config, metrics, package_versions(), read_plain(context.output), exported=False)
    (context.output / "README.md").write_text(card, encoding="utf-8")
    return metrics


def make_forecasts(context: Work) -> dict[str, Any]:
    """The panel's forecasts, and how good they are."""
    cfg, log = context.config.prior, _log(context)
    evaluated_rows(log, cfg)  # before any is made
    prior = _prior(context)
    metrics = generate_priors(prior, log, cfg, out_dir=context.output, work_dir=context.work)
    table = PriorTable.load(context.output, log)
    forecasts = {arm: TableForecast(table, prior.base, arm=arm, interests=prior.interests) for arm in ("anchor", "lm")}
    popularity = prior.base.anchor.popularity_alone()
    baselines, chosen = fit_baselines(
        log, popularity, cfg.baselines, seed=cfg.seed, work_dir=context.work / "baselines"
    )
    scorers: dict[str, DatedScorer] = {name: baseline.log_probs for name, baseline in baselines.items()}
    if prior.reward == FOR_LISTS:
        lists = _make_lists(context)
        scorers["lm, reward"] = lambda user_B, _, period_B: lists.log_probs(user_B, period_B)
    evaluation = evaluate_forecast(prior, forecasts, log, cfg, scorers)
    costs = [
        Row("cost", name, "lm", "all", None, float(metrics[name]), None, None, int(metrics["forecasts_made"]))
        for name in ("tokens_per_forecast", "seconds_per_forecast", "users_per_hour", "mass_in_list")
        if metrics[name] is not None
    ]
    _write_rows(context.output, [*evaluation.rows, *costs])
    _write_facts(context.output, {"curves": evaluation.curves})
    save_requests(evaluation.requests, context.output)
    return {**metrics, "baselines": chosen}


def _make_lists(context: Work) -> TableForecast:
    """The forecasts that serve retrieval, by the LM that was trained on the reward of its lists."""
    cfg, log, ids, base = context.config.prior, _log(context), _ids(context), _base(context)
    prior = PriorModel.load(context.inputs["prior"], log, ids, cfg, base=base, lists=True)
    directory = context.output / LISTS
    directory.mkdir()
    generate_priors(prior, log, cfg, out_dir=directory, work_dir=context.work / LISTS)
    return TableForecast(PriorTable.load(directory, log), base, arm="lm")


def make_two_tower(context: Work) -> dict[str, Any]:
    """The trained towers and the index of all ads, and those that were refit."""
    text_AE = load_file(context.inputs["semantic_ids"] / TEXT)["text_AE"]
    cfg, log = context.config.retrieval, _log(context)
    train = partial(train_two_tower, log, _ids(context).codes_AL, text_AE)
    towers, result = train(cfg, work_dir=context.work)
    towers.save(context.output / TOWERS)
    if cfg.refit:
        chosen = replace(cfg, trainer=replace(cfg.trainer, max_epochs=result.best_epoch + 1, patience=None))
        for asked, folder in REFIT.items():
            refit, _ = train(chosen, work_dir=context.work / folder, fit_span=_known(log, asked), select_span=None)
            refit.save(context.output / folder)
    return {"epochs": result.epochs, "steps": result.steps, "val_recall": result.best_score, "history": result.history}


def make_retrieval(context: Work) -> dict[str, Any]:
    """Retrieval in three arms at one budget."""
    cfg = context.config
    evaluation = evaluate_retrieval(
        _retriever(context), _list_forecasts(context), users=_panel(context), tuned=_tuned_retriever(context)
    )
    _write_rows(context.output, evaluation.rows)
    plans = {arm: plan.to_plain() for arm, plan in evaluation.plans.items()}
    _write_facts(context.output, {"plans": plans, "sweep": evaluation.sweep})
    recall = {
        row.arm: row.value
        for row in evaluation.rows
        if (row.metric, row.segment, row.k) == ("recall", "all", cfg.retrieval.budget)
    }
    return {"recall": recall, "quotas": {arm: plan.quota for arm, plan in evaluation.plans.items()}}


def make_ranker(context: Work) -> dict[str, Any]:
    """Rankers of all arms and seeds, and what sets the arms apart."""
    cfg = context.config.ranker
    _, spans = _ranker_spans(context)
    rankers = context.work / RANKERS
    rankers.mkdir(exist_ok=True)
    rows = run_ablation(spans, _forecasts(context), cfg, rankers)
    if not is_leader():
        return {}
    shutil.copytree(rankers, context.output / RANKERS, ignore=shutil.ignore_patterns(".*"))
    _write_rows(context.output, rows)
    auc = {row.arm: row.value for row in rows if (row.metric, row.segment) == ("auc", "all")}
    return {"auc": auc, "rankers": len(list((context.output / RANKERS).iterdir()))}


def make_ranker_ablation(context: Work) -> dict[str, Any]:
    """Arms, groups of prior features and models, each with every seed, as a page and as figures.

    The rankers stay beside the stage's own work directory, so that one more seed or model costs itself alone.
    """
    cfg, log, ids, forecasts = context.config.ranker, _log(context), _ids(context), dict(_forecasts(context))
    _, spans = _ranker_spans(context)
    truth = None
    if (context.inputs["data"] / TRUTH).exists():
        truth = Truth.load(context.inputs["data"] / TRUTH)
        top = context.config.prior.decode.beam
        forecasts[ORACLE] = OracleForecast(truth, log, ids, anchor=forecasts["anchor"], top=top)  # type: ignore[arg-type]
    variants, pairs = grid(spans, forecasts, cfg)
    rankers = context.work.parent / "ranker_ablation_rankers"
    make_directory(rankers)
    bars = cfg.trainer.progress_bar
    with (progress_bars(Console()) if bars else untracked)("rankers", len(variants) * len(cfg.seeds)) as advance:
        predictions = {}
        for variant in variants:
            predictions[variant.name] = predictions_of(variant, spans, cfg.seeds, rankers)
            advance(len(cfg.seeds))
    if truth is not None:
        predictions[TRUE_CHANCE] = [true_chance(truth, log, spans.evaluation.rows, tasks=cfg.tasks)] * len(cfg.seeds)
    rows = compare(spans, predictions, cfg, pairs=pairs)
    _write_rows(context.output, rows)
    write_ablation(rows, context.config, context.output)
    return {"rankers": len(variants) * len(cfg.seeds)}


def make_report(context: Work) -> dict[str, Any]:
    """``report.html`` and ``report.json`` of everything before."""
    cfg, log = context.config, _log(context)
    manifests = {name: Manifest.read(directory) for name, directory in context.inputs.items()}
    rows = [*_data_rows(log), *(row for directory in context.inputs.values() for row in read_rows(directory))]
    prior, retrieval = manifests["prior"].metrics, _read_facts(context.inputs["retrieval"])
    curves: Curves = {
        "learning": _learning(prior),
        "reliability": _read_facts(context.inputs["forecasts"])["curves"].get("reliability", {}),
        "quota_sweep": retrieval["sweep"],
        "code_usage": manifests["semantic_ids"].metrics["usage"],
    }
    run: RunInfo = {
        "config": to_plain(cfg),
        "versions": manifests["ranker"].versions,
        "stages": [
            {"name": name, "seconds": manifest.seconds, "peak_memory_mb": manifest.peak_memory_mb}
            for name, manifest in manifests.items()
        ],
        "dataset": cfg.data.source,
        "evaluate": cfg.evaluate,
        "command": made_by(run_directory(cfg)),
        "caveats": caveats(cfg.prior.base),
    }
    forecasts = _forecasts(context)
    example = user_example(
        log,
        prior=_prior(context),
        forecasts=forecasts,
        lists=_list_forecasts(context)["lm"],
        retriever=_retriever(context),
        plan=Plan.of(retrieval["plans"]["lm"]),
        ranker=Ranker.load(context.inputs["ranker"] / RANKERS / f"lm-{cfg.ranker.seeds[0]}"),
        builder=FeatureBuilder(log, _ids(context), cfg.ranker.features),
        users=_panel(context),
    )
    write_report(rows, run=run, example=example, curves=curves, out_dir=context.output)
    return {"rows": len(rows)}


def retrieval_bench(context: Work, parts: Sequence[str] = PARTS) -> RetrievalBenchmark:
    """Parts of the benchmark of the configured retrieval; forecasts are read only where a channel follows one."""
    cfg = context.config.retrieval
    arms: dict[str, Forecast | None] = _list_forecasts(context) if cfg.forecast_channels else {NONE: None}
    return bench_retrieval(
        _retriever(context), arms, users=_panel(context), tuned=_tuned_retriever(context), parts=parts
    )


def ab_bench(context: Work, rankers: Path) -> SimulatedAB:
    """The stacks of a run, its control, and stacks that know the truth, before the same simulated users.

    Args:
        context: with the artifacts of a finished run.
        rankers: folder for those that are trained on the exact forecast.

    Raises:
        UserError: the log is not a simulated one, or a ranker is missing or has no task ``label``.
    """
    cfg, log, ids = context.config, _log(context), _ids(context)
    if not (context.inputs["data"] / TRUTH).exists():
        raise UserError(
            f"a run on data={cfg.data.source}",
            expected="simulated data, whose true chance of a conversion is known",
            action="make a run with `adsid run data=simulator` and give its folder",
        )
    truth, forecasts = Truth.load(context.inputs["data"] / TRUTH), dict(_forecasts(context))
    anchor, top = forecasts["anchor"], cfg.prior.decode.beam
    for share in cfg.auction.oracle:
        forecasts[oracle_arm(share)] = OracleForecast(truth, log, ids, anchor=anchor, top=top, share=share)  # type: ignore[arg-type]
    builder, spans = _ranker_spans(context)
    market, retriever, lists = Market.of(log, truth, _panel(context)), _retriever(context), _list_forecasts(context)
    plans = {arm: Plan.of(plan) for arm, plan in _read_facts(context.inputs["retrieval"])["plans"].items()}
    stacks = {}
    for variant in arms(spans, forecasts, cfg.ranker):
        name = variant.name
        trained = (
            trained_rankers(variant, spans, cfg.ranker.seeds, rankers)
            if name.startswith(ORACLE)
            else [_ranker_of(context.inputs["ranker"], variant.slug, seed) for seed in cfg.ranker.seeds]
        )
        found = retriever.answers(market.requests, plans.get(name, plans["lm"]), lists.get(name, variant.forecast))
        stacks[name] = Stack(found, variant.forecast, trained)
    quotas = {arm: plan.quota for arm, plan in plans.items()}
    return run_ab(market, stacks, builder, cfg.auction, facts={"quotas": quotas})


@dataclass(frozen=True)
class OpenRanker:
    """A ranker of a run with what it reads.

    Attributes:
        ranker: the trained one.
        builder: of its features.
        forecast: of its arm; None for the arm without.
        log: what all are of.
    """

    ranker: Ranker
    builder: FeatureBuilder
    forecast: Forecast | None
    log: Log


def load_ranker(directory: Path, *, arm: str, seed: int) -> Ranker:
    """A ranker of a finished run, without what it reads.

    Args:
        directory: of the run.
        arm: ``none``, ``anchor`` or ``lm``.
        seed: that it was trained with.

    Raises:
        LineageError: a stage before it was made anew since.
        UserError: a stage is missing, or there is no ranker of this arm and seed.
    """
    for name in ("data", "semantic_ids", "prior", "forecasts", "ranker"):
        check_inputs(directory, name)
    return _ranker_of(directory / "ranker", arm, seed)


def _ranker_of(directory: Path, arm: str, seed: int) -> Ranker:
    """Of the ranker stage's artifact."""
    rankers = directory / RANKERS
    trained = sorted(path.name for path in rankers.iterdir())
    if f"{arm}-{seed}" not in trained:
        raise UserError(
            f"arm {arm} with seed {seed}", expected=f"one of {', '.join(trained)}", action="name one of these"
        )
    return Ranker.load(rankers / f"{arm}-{seed}")


def open_ranker(config: AdsidConfig, directory: Path, *, arm: str, seed: int) -> OpenRanker:
    """A ranker of a finished run, with what it reads.

    Args:
        config: of the run.
        directory, arm, seed: as of `load_ranker`.

    Raises:
        UserError: as of `load_ranker`.
    """
    ranker = load_ranker(directory, arm=arm, seed=seed)
    context = Context(config, {stage.name: directory / stage.name for stage in stages()}, directory, directory, {})
    log, forecast = _log(context), None if arm == "none" else _forecasts(context)[arm]
    return OpenRanker(ranker, FeatureBuilder(log, _ids(context), ranker.spec.config), forecast, log)


# --- what stages share -------------------------------------------------------------------------------------


def _fitting(cfg: AdsidConfig) -> dict[str, Any]:
    """The prior's config without what only decoding and evaluation read."""
    plain = to_plain(cfg.prior)
    return {
        key: value
        for key, value in plain.items()
        if key not in ("decode", "panel", "evaluation_prompts", "controls", "baselines")
    }


def _model_files(what: str, name: str) -> dict[str, str] | None:
    """Content of a model's files where its name is a directory's; None where that is gone, nothing of other names."""
    directory = Path(name).expanduser()
    if name == PACKAGED_ENCODER or not directory.is_dir():
        return None if name.startswith(("/", "~", ".")) else {}
    read = [path for path in sorted(directory.iterdir()) if path.suffix != ".md" and not path.name.startswith(".")]
    return {f"{what}/{name}": content for name, content in contents(read, whole=True).items()}


def _towers(cfg: AdsidConfig) -> dict[str, Any]:
    """The retrieval config that training reads; an index of another kind is made when the towers are loaded."""
    plain = to_plain(cfg.retrieval)
    return {key: plain[key] for key in TRAINED} | {"refit": cfg.evaluate if cfg.retrieval.refit else None}


def _once(context: Work, make: Callable[[], T], *inputs: str, settings: Any = None) -> T:
    """A value that stages of one process share: made again only for other inputs or settings."""
    hashes = [Manifest.read(context.inputs[name]).content_hash for name in inputs]
    key = (make.__qualname__, fingerprint([hashes, to_plain(settings)]))
    if key not in context.shared:
        for old in [old for old in context.shared if old[0] == make.__qualname__]:
            del context.shared[old]
        context.shared[key] = make()
    value: T = context.shared[key]
    return value


def _ranker_spans(context: Work) -> tuple[FeatureBuilder, RankerSpans]:
    """Features of the configured ranker, and the rows that it is trained and evaluated on."""
    cfg = context.config
    builder = FeatureBuilder(_log(context), _ids(context), cfg.ranker.features)
    return builder, RankerSpans.of(builder, _panel(context), evaluation=cfg.evaluate, tasks=cfg.ranker.tasks)


def _log(context: Work) -> Log:
    cfg = context.config

    def log() -> Log:
        entity = cfg.semantic_ids.entity
        return load_log(context.inputs["data"], cfg.data, evaluate=cfg.evaluate, entity=entity)

    return _once(context, log, "data", settings=[cfg.data, cfg.evaluate, cfg.semantic_ids.entity])


def _ids(context: Work) -> AdvertiserIds:
    return AdvertiserIds.load(context.inputs["semantic_ids"])


def _prior(context: Work) -> PriorModel:
    cfg = context.config

    def prior() -> PriorModel:
        return PriorModel.load(context.inputs["prior"], _log(context), _ids(context), cfg.prior, base=_base(context))

    return _once(context, prior, "data", "semantic_ids", "prior", settings=[cfg.data, cfg.prior, cfg.evaluate])


def _base(context: Work) -> TunedAnchor:
    """The tuned anchor, which most stages read without the LM."""

    def base() -> TunedAnchor:
        return load_base(context.inputs["prior"], _log(context), _ids(context))

    settings = [context.config.data, context.config.evaluate]
    return _once(context, base, "data", "semantic_ids", "prior", settings=settings)


def _forecasts(context: Work) -> dict[str, Forecast | None]:
    """The forecast of each arm."""

    def forecasts() -> dict[str, Forecast | None]:
        table, base = PriorTable.load(context.inputs["forecasts"], _log(context)), _base(context)
        interests = load_interests(context.inputs["prior"], _log(context))
        return {
            "none": None,
            "anchor": TableForecast(table, base, arm="anchor", interests=interests),
            "lm": TableForecast(table, base, arm="lm", interests=interests),
        }

    settings = [context.config.data, context.config.evaluate]
    return _once(context, forecasts, "data", "prior", "forecasts", settings=settings)


def _list_forecasts(context: Work) -> dict[str, Forecast | None]:
    """The forecast of each arm as retrieval reads it."""
    directory = context.inputs["forecasts"] / LISTS
    if not directory.exists():
        return _forecasts(context)

    def lists() -> Forecast:
        return TableForecast(PriorTable.load(directory, _log(context)), _base(context), arm="lm")

    settings = [context.config.data, context.config.evaluate]
    return _forecasts(context) | {"lm": _once(context, lists, "data", "prior", "forecasts", settings=settings)}


def _known(log: Log, asked: str) -> Span:
    """All before the span that towers of `REFIT` answer, which they learn from."""
    answered = tuning_span(log) if asked == "tuning" else log.split.span(log.evaluate, evaluate=log.evaluate)
    return log.split.prior_fit[0], answered[0] - 1


def _retriever(context: Work) -> Retriever:
    """Of the evaluated requests."""
    cfg = context.config

    def retriever() -> Retriever:
        return _retriever_of(context, "evaluated")

    settings = [cfg.data, cfg.retrieval, cfg.evaluate]
    return _once(context, retriever, "data", "semantic_ids", "two_tower", settings=settings)


def _tuned_retriever(context: Work) -> Retriever | None:
    """Of the requests that blends are chosen on; None where it is the same as of the evaluated ones."""
    return _retriever_of(context, "tuning") if context.config.retrieval.refit else None


def _retriever_of(context: Work, asked: str) -> Retriever:
    cfg, log = context.config.retrieval, _log(context)
    folder, counted = (REFIT[asked], _known(log, asked)) if cfg.refit else (TOWERS, "prior_fit")
    towers = TrainedTwoTower.load(context.inputs["two_tower"] / folder, cfg.index)
    return Retriever(log, towers, _ids(context).codes_AL, cfg, counted=counted)


def caveats(base: BaseModelConfig) -> list[str]:
    """What a reader must know of the LM before its figures."""
    why = why_random(base.name, base.random_weights)
    return [] if why is None else [f"The language model of this run has random weights ({why}): {_NO_RESULT}"]


def _panel(context: Work) -> NDArray[np.int32]:
    """Users with forecasts: what retrieval and ranking are measured on."""
    return _log(context).panel(context.config.prior.panel, context.config.prior.seed)


def _learning(metrics: dict[str, Any]) -> list[Any]:
    """NLL of LM and anchor on the selection prompts after each part of the training."""
    anchor, parts = metrics["select_nll_anchor"], metrics["select_nll_by_part"]
    per_part = metrics["prompts_a_part"]
    return [{"step": (part + 1) * per_part, "lm": lm, "anchor": anchor} for part, lm in enumerate(parts)]


def _data_rows(log: Log) -> list[Row]:
    """Sizes of the log, as far as the run may look."""
    targets = log.advertiser_targets(log.evaluate)
    new = log.is_new(targets.user[targets.row], targets.period[targets.row], targets.item)
    figures = {
        "users": len(log.user_ids),
        "advertisers": len(log.advertiser_ids),
        "ads": len(log.ad_ids),
        "markets": len(log.market_ids),
        "events": len(log.events),
        "purchases": int(log.is_purchase.sum()),
        "conversions": int(log.is_label.sum()),
        "user_periods": len(targets),
        "targets": len(targets.item),
        "new_advertiser_share": float(new.mean()) if len(new) else float("nan"),
    }
    evaluated = {"user_periods", "targets", "new_advertiser_share"}
    return [
        Row("data", name, "log", log.evaluate if name in evaluated else "all", None, float(value), None, None, 1)
        for name, value in figures.items()
    ]


def _write_rows(directory: Path, rows: Sequence[Row]) -> None:
    text = json.dumps([to_plain(row) for row in rows], indent=0, allow_nan=False)
    (directory / ROWS).write_text(text + "\n", encoding="utf-8")


def read_rows(directory: Path) -> list[Row]:
    """Figures that a stage left in its directory; none where it left none."""
    path = directory / ROWS
    if not path.exists():
        return []
    rows = [Row(**plain) for plain in json.loads(path.read_text(encoding="utf-8"))]
    nan = float("nan")
    return [row if row.value is not None else Row(**(to_plain(row) | {"value": nan})) for row in rows]


def _write_facts(directory: Path, facts: dict[str, Any]) -> None:
    (directory / FACTS).write_text(json.dumps(to_plain(facts), allow_nan=False) + "\n", encoding="utf-8")


def _read_facts(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return facts
