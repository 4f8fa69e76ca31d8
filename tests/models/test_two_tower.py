"""Training the two-tower: it learns, it resumes, its artifact is itself, and its histories end in time."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from data.errors import LineageError, UserError
from data.log import Log
from models.training import TrainerConfig
from models.two_tower import (
    Batch,
    Candidates,
    ItemEncoder,
    RowAdam,
    RowsAndLayers,
    TwoTower,
    TwoTowerConfig,
    TwoTowerModule,
    TwoTowerShape,
    ValidationBatch,
    clip_gradients,
    sampled_softmax,
)
from retrieval.config import ForecastChannelConfig, PairsConfig, RetrievalConfig
from retrieval.index import IndexConfig
from retrieval.two_tower import TrainedTwoTower, train_two_tower
from retrieval.two_tower_data import TrainingBatches, UserInputs, ValidationBatches, log_popularity
from tests.logs import tiny_log
from tests.priors.conftest import random_ids
from tests.retrieval.common import tiny_retrieval, train_tiny


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("log"))


def test_training_beats_chance(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval(trainer=TrainerConfig(max_epochs=6, patience=None, progress_bar=False))
    _, result = train_tiny(log, cfg, tmp_path)
    active = np.mean([len(log.active_ads(market, 6).ad) for market in range(3)])
    assert result.best_score > 1.3 * cfg.budget / active  # type: ignore[operator]


SILENT: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Beside(SingleDeviceStrategy):
    """One of several processes, the others' sums in hand."""

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__("cpu")
        self.others, self.summed = others, []  # type: ignore[var-annotated]

    def reduce(self, tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if not tensor.is_floating_point():  # Lightning's own: lengths of loaders
            return tensor
        self.summed.append(tensor)
        return sum(self.others, tensor)


def test_processes_that_validate_together_see_the_figures_of_all_requests(log: Log, tmp_path: Path) -> None:
    """Also one that has counted no request, and each sums up once."""
    cfg = tiny_retrieval()
    towers, _ = train_tiny(log, cfg, tmp_path)
    module = TwoTowerModule(towers.model, cfg.model, n_ads=len(log.ad_ids), k=20)
    targets = log.ad_targets("prior_select")
    collate = ValidationBatches(log, targets, UserInputs(log, cfg.pairs), cfg.pairs, seed=0)
    parts = [collate(range(25)), collate(range(25, 38)), collate([38])]
    parts[2]["target_BN"].zero_()

    def validated(batches: list[ValidationBatch], *others: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
        strategy = Beside(*others)
        trainer = L.Trainer(strategy=strategy, **SILENT)
        trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
        [summed] = strategy.summed
        return {name: float(value) for name, value in trainer.callback_metrics.items()}, summed

    whole, _ = validated(parts)
    sums = [validated([part])[1] for part in parts]
    assert set(whole) == {"val_nll", "val_recall"}
    for place, part in enumerate(parts):
        found, _ = validated([part], *sums[:place], *sums[place + 1 :])
        assert found == pytest.approx(whole)
    assert validated(parts[2:])[0] == {}


def test_the_epoch_is_not_chosen_by_a_list_of_all_that_runs(log: Log, tmp_path: Path) -> None:
    """A list as long as what is active recalls everything, whatever the towers are worth; half of it does not."""
    cfg = tiny_retrieval()
    towers, _ = train_tiny(log, cfg, tmp_path)
    targets = log.ad_targets("prior_select")
    collate = ValidationBatches(log, targets, UserInputs(log, cfg.pairs), cfg.pairs, seed=0)
    module, batch = TwoTowerModule(towers.model, cfg.model, n_ads=len(log.ad_ids), k=10_000), collate(range(25))
    trainer = L.Trainer(accelerator="cpu", **SILENT)
    [found] = trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)  # type: ignore[arg-type]

    user_BD = towers.embedder(log, cfg.pairs)(targets.user[:25], targets.market[:25], targets.period[:25])
    recalls = []
    for row in range(25):
        active = np.flatnonzero(batch["active_BN"][row])
        score = towers.index.vectors(active.astype(np.int32)) @ user_BD[row] / cfg.model.temperature
        score = score + towers.popularity_weight * batch["popularity_BN"][row, active].numpy()
        wanted = np.intersect1d(targets.of(row), active)
        k = (len(active) + 1) // 2
        if len(wanted):
            recalls.append(np.isin(active[np.argsort(-score)[:k]], wanted).sum() / min(k, len(wanted)))
    assert found["val_recall"] == pytest.approx(np.mean(recalls), abs=0.02)
    assert 0.3 < found["val_recall"] < 1.0


def test_a_killed_fit_ends_like_an_undisturbed_one(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_retrieval(trainer=TrainerConfig(max_epochs=3, patience=None, progress_bar=False))
    whole, expected = train_tiny(log, cfg, tmp_path / "whole")
    collate, calls = TrainingBatches.__call__, 0

    def dies(self: TrainingBatches, rows: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 1.5 * expected.steps / expected.epochs:
            raise RuntimeError("killed")
        return collate(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingBatches, "__call__", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_tiny(log, cfg, tmp_path / "killed")
    monkeypatch.setattr(TrainingBatches, "__call__", collate)
    resumed, result = train_tiny(log, cfg, tmp_path / "killed")
    assert result == expected
    ads = np.arange(len(log.ad_ids), dtype=np.int32)
    np.testing.assert_array_equal(resumed.index.vectors(ads), whole.index.vectors(ads))


def test_saved_and_loaded_it_embeds_the_same(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval()
    towers, _ = train_tiny(log, cfg, tmp_path / "work")
    towers.save(tmp_path / "towers")
    again = TrainedTwoTower.load(tmp_path / "towers", IndexConfig())
    asked = np.arange(20), np.arange(20) % 3, np.full(20, 8)
    ours, theirs = (one.embedder(log, cfg.pairs)(*asked) for one in (towers, again))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-5)
    (tmp_path / "towers" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="two-tower"):
        TrainedTwoTower.load(tmp_path / "towers", IndexConfig())


def test_vectors_read_nothing_of_the_period_or_later(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval()
    towers, _ = train_tiny(log, cfg, tmp_path)
    early = replace(log, events=log.events.select(log.events.period < 8))
    asked = np.arange(40), np.zeros(40, dtype=int), np.full(40, 8)
    np.testing.assert_array_equal(towers.embedder(early, cfg.pairs)(*asked), towers.embedder(log, cfg.pairs)(*asked))
    first = np.arange(3), np.zeros(3, dtype=int), np.ones(3, dtype=int)
    assert np.isnan(towers.embedder(log, cfg.pairs)(*first)).all()


def test_towers_of_a_selection_span_where_no_converted_ad_ran_train_to_the_end(log: Log, tmp_path: Path) -> None:
    placed = log.placements
    nothing = replace(
        placed, market_ptr=np.zeros_like(placed.market_ptr), first=placed.first[:0], ptr=np.zeros(1, placed.ptr.dtype),
        ad=placed.ad[:0], display=placed.display[:0], mailer=placed.mailer[:0],
    )  # fmt: skip
    _, result = train_tiny(replace(log, placements=nothing), tiny_retrieval(), tmp_path)
    assert result.best_epoch == 1
    assert result.history == []


@pytest.mark.parametrize(("accelerator", "told"), [("auto", "expected: one GPU"), ("cpu", "more than train one stage")])
def test_several_gpus_are_refused_before_any_training(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, told: str
) -> None:
    """Several processes of the CPU are stopped by what stops any stage that a larger command trains."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    trainer = TrainerConfig(max_epochs=1, devices=2, accelerator=accelerator, progress_bar=False)
    with pytest.raises(UserError, match=told):
        train_tiny(log, tiny_retrieval(trainer=trainer), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_refit_towers_read_all_before_a_period_and_nothing_of_it(log: Log, tmp_path: Path) -> None:
    def refit(known: Log, before: int, name: str) -> bytes:
        text = np.zeros((len(log.advertiser_ids), 8), np.float32)
        cfg = tiny_retrieval(trainer=TrainerConfig(max_epochs=1, patience=None, progress_bar=False))
        codes, known_span = random_ids(log).codes_AL, (1, before - 1)
        towers, _ = train_two_tower(
            known, codes, text, cfg, work_dir=tmp_path / name, fit_span=known_span, select_span=None
        )
        towers.save(tmp_path / name / "towers")
        return (tmp_path / name / "towers" / "model.safetensors").read_bytes()

    cut = replace(log, events=log.events.select(log.events.period < 10))
    assert refit(log, 10, "whole") == refit(cut, 10, "cut")
    assert refit(log, 12, "later") != refit(cut, 12, "cut later")


def test_a_log_with_other_ads_is_refused(log: Log, tmp_path: Path) -> None:
    towers, _ = train_tiny(log, tiny_retrieval(), tmp_path / "work")
    (tmp_path / "other").mkdir()
    with pytest.raises(LineageError, match="150 ads"):
        towers.embedder(tiny_log(tmp_path / "other", n_ads=150), tiny_retrieval().pairs)


def test_vectors_looked_up_are_the_towers_own(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval(model=TwoTowerConfig(dim=16, hidden=32, layers=1, id_dropout=0.2, context=["market"]))
    towers, _ = train_tiny(log, cfg, tmp_path)
    embed = towers.embedder(log, cfg.pairs)
    users, markets, periods = np.arange(30), np.arange(30) % 3, np.full(30, 9)
    with torch.no_grad():
        whole = towers.model.users(**embed.inputs(users, markets, periods)).numpy()
    known = embed.users.histories.sizes(users, periods) > 0
    np.testing.assert_allclose(embed(users, markets, periods)[known], whole[known], atol=1e-5)


WITH_MARKET = TwoTowerConfig(dim=16, hidden=32, context=["market"])


def at_market(log: Log, towers: TrainedTwoTower, market: int) -> np.ndarray:
    """Vectors of users who have bought something, all in one market."""
    users = np.arange(20)
    return towers.embedder(log, tiny_retrieval().pairs)(users, np.full(20, market), np.full(20, 9))


def test_a_user_is_another_one_in_another_market(log: Log, tmp_path: Path) -> None:
    towers, _ = train_tiny(log, tiny_retrieval(model=WITH_MARKET), tmp_path / "work")
    here, there = at_market(log, towers, 0), at_market(log, towers, 1)
    assert (np.abs(here - there).max(1) > 1e-3).all()
    towers.save(tmp_path / "towers")
    again = TrainedTwoTower.load(tmp_path / "towers", IndexConfig())
    # A log that has grown numbers its markets otherwise.
    grown = replace(log, market_ids=np.append(log.market_ids.min() - 1, log.market_ids))
    np.testing.assert_array_equal(at_market(grown, again, 2), there)


def test_a_market_that_was_not_trained_on_is_none(log: Log, tmp_path: Path) -> None:
    towers, _ = train_tiny(log, tiny_retrieval(model=WITH_MARKET), tmp_path)
    elsewhere = replace(log, market_ids=log.market_ids + 100)
    nowhere = at_market(log, towers, -1)
    assert np.isfinite(nowhere).all()
    for found in (at_market(elsewhere, towers, 0), at_market(log, towers, len(log.market_ids))):
        np.testing.assert_array_equal(found, nowhere)


def test_training_reads_the_markets_that_serving_reads(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval(model=WITH_MARKET)
    towers, _ = train_tiny(log, cfg, tmp_path)
    targets, rows = log.ad_targets("prior_fit"), np.arange(10, 30)
    context = towers.shape.context
    batch = TrainingBatches(log, targets, UserInputs(log, cfg.pairs, context=context), cfg.pairs, seed=0)(rows.tolist())
    asked = targets.user[rows], targets.market[rows], targets.period[rows]
    served = towers.embedder(log, cfg.pairs).inputs(*asked)
    for name, expected in served.items():
        assert torch.equal(batch[name], expected), name  # type: ignore[literal-required]
    known = [context["market"][code - 1] for code in batch["context_BF"][:, 0].tolist()]
    assert known == log.market_ids[targets.market[rows]].tolist()


def test_towers_without_a_context_are_those_of_before(log: Log, tmp_path: Path) -> None:
    towers, _ = train_tiny(log, tiny_retrieval(model=TwoTowerConfig(dim=16, hidden=32, context=[])), tmp_path / "work")
    np.testing.assert_array_equal(at_market(log, towers, 0), at_market(log, towers, 1))
    assert not [name for name in towers.model.state_dict() if "context" in name]
    towers.save(tmp_path / "towers")
    facts = json.loads((tmp_path / "towers" / "two_tower.json").read_text())
    del facts["shape"]["context"], facts["config"]["context"]  # as they were written then
    (tmp_path / "towers" / "two_tower.json").write_text(json.dumps(facts))
    again = TrainedTwoTower.load(tmp_path / "towers", IndexConfig())
    assert again.cfg.context == []
    np.testing.assert_array_equal(at_market(log, again, 0), at_market(log, towers, 0))


def market_steps(context: list[str]) -> tuple[float, TwoTower]:
    """Loss after some steps on users of whom nothing is known, who buy ad 0 in one market and ad 1 in another."""
    torch.manual_seed(0)
    cfg = TwoTowerConfig(dim=16, hidden=32, dropout=0.0, popularity_weight=None, context=context)
    shape = TwoTowerShape({"ad": 3}, {}, text_dim=0, ages=1, counts=1, context={name: ["a", "b"] for name in context})
    encoder = ItemEncoder(torch.arange(1, 3)[:, None], torch.full((2,), -1), torch.zeros(0, 0), shape=shape, dim=16)
    module = TwoTowerModule(TwoTower(encoder, shape, cfg), cfg, n_ads=2)
    both, nothing = torch.arange(2), torch.zeros(2, 0, dtype=torch.int64)
    among = Candidates(
        item_C=both,
        pair_row_P=both,
        pair_column_P=both,
        log_q_C=torch.zeros(2),
        log_count_C=torch.zeros(2),
        legal_BC=~torch.eye(2, dtype=torch.bool),
        popularity_BC=torch.zeros(2, 2),
    )
    batch = Batch(
        history_BH=nothing,
        age_BH=nothing,
        count_BH=nothing,
        profile_BF=nothing,
        context_BF=both[:, None][:, : len(context)] + 1,
        ads=among,
        advertisers=None,
    )
    optimizer = module.configure_optimizers()
    for _ in range(40):
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        optimizer.step()
    return loss.item(), module.model


def test_what_a_market_buys_is_learned() -> None:
    blind, _ = market_steps([])
    seeing, model = market_steps(["market"])
    assert blind > 0.99 * np.log(2) > 10 * seeing
    assert model.user_tower.context is not None
    unknown, *known = model.user_tower.context.embedding_bags["market"].weight
    assert not unknown.any()
    assert all(row.any() for row in known)


def test_layers_do_not_read_padding(log: Log, tmp_path: Path) -> None:
    """A longer history of the same items embeds the same: what pads it is not there."""
    cfg = tiny_retrieval(model=TwoTowerConfig(dim=16, hidden=32, layers=2))
    towers, _ = train_tiny(log, cfg, tmp_path)
    asked = np.arange(30), np.zeros(30, dtype=int), np.full(30, 4)
    short, long = (PairsConfig(history=length, window=64) for length in (40, 60))
    ours, theirs = (towers.embedder(log, pairs)(*asked) for pairs in (short, long))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_popularity_is_counted_for_every_request(log: Log) -> None:
    cfg = tiny_retrieval().pairs
    targets = log.ad_targets("prior_fit")
    batches = TrainingBatches(log, targets, UserInputs(log, cfg), cfg, seed=0)
    batch = batches(range(10, 30))["ads"]
    counted, scored = log_popularity(log, cfg), batch["popularity_BC"].numpy() != 0
    assert scored.any()
    for row, column in np.argwhere(scored)[::37]:
        market, period = int(targets.market[10 + row]), int(targets.period[10 + row])
        expected = counted(batch["item_C"][column : column + 1].numpy(), market, period)
        assert batch["popularity_BC"][row, column] == pytest.approx(expected[0])


WITH_ADVERTISERS = TwoTowerConfig(dim=16, hidden=32, advertiser_weight=0.5)


def advertiser_batches(log: Log, cfg: PairsConfig) -> TrainingBatches:
    targets = log.ad_targets("prior_fit")
    return TrainingBatches(log, targets, UserInputs(log, cfg), cfg, seed=0, advertisers=True)


def test_candidates_of_the_advertiser_tower_are_the_owners_of_the_ads(log: Log) -> None:
    batches = advertiser_batches(log, tiny_retrieval().pairs)
    rows = np.arange(10, 40)
    batch = batches(rows.tolist())
    ads, advertisers = batch["ads"], batch["advertisers"]
    assert advertisers is not None

    def pairs_of(of: Candidates) -> list[tuple[int, int]]:
        targets_P = of["item_C"][of["pair_column_P"]]
        return list(zip(of["pair_row_P"].tolist(), targets_P.tolist(), strict=True))

    pairs = pairs_of(advertisers)
    owners = [(row, int(log.ad_advertiser[ad])) for row, ad in pairs_of(ads)]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {pair for pair in owners if pair[1] >= 0}
    counted, targets = log_popularity(log, batches.cfg, of_advertisers=True), batches.targets
    for place, row in enumerate(rows.tolist()):
        market, period = int(targets.market[row]), int(targets.period[row])
        active = set(log.active_advertisers(market, period).tolist())
        bought = set(log.ad_advertiser[targets.of(row)].tolist())
        expected = [advertiser in active - bought for advertiser in advertisers["item_C"].tolist()]
        assert advertisers["legal_BC"][place].tolist() == expected
        column = next(i for i, advertiser in enumerate(advertisers["item_C"].tolist()) if advertiser in active)
        popularity = counted(advertisers["item_C"][column : column + 1].numpy(), market, period)
        assert advertisers["popularity_BC"][place, column] == pytest.approx(popularity[0])


def test_expected_counts_are_those_of_the_batches(log: Log) -> None:
    cfg = replace(tiny_retrieval().pairs, targets_per_request=50)  # all targets: no approximation
    batches = advertiser_batches(log, cfg)
    rng, seen = np.random.default_rng(0), np.zeros((2, max(len(log.ad_ids), len(log.advertiser_ids))))
    times = 60
    for _ in range(times):
        batch = batches(rng.integers(0, len(batches), cfg.batch_size).tolist())
        assert batch["advertisers"] is not None
        for counts, of in zip(seen, (batch["ads"], batch["advertisers"]), strict=True):
            counts[of["item_C"].numpy()] += np.exp(of["log_count_C"].numpy()) / times
    for counts, expected in zip(seen, (batches.expected_counts(), batches.expected_advertisers()), strict=True):
        deviation = np.sqrt(expected / times) + 1e-6
        assert (np.abs(counts[: len(expected)] - expected) < 5 * deviation).all()


def test_the_advertiser_tower_learns_and_is_saved(log: Log, tmp_path: Path) -> None:
    trainer = TrainerConfig(max_epochs=6, patience=None, progress_bar=False)
    cfg = tiny_retrieval(model=WITH_ADVERTISERS, trainer=trainer)
    towers, _ = train_tiny(log, cfg, tmp_path / "work")
    towers.save(tmp_path / "towers")
    loaded = TrainedTwoTower.load(tmp_path / "towers", IndexConfig())
    ours, theirs = (one.advertiser_scores(log, cfg.pairs) for one in (towers, loaded))
    targets = log.ad_targets("prior_select")
    vectors, found, chance = towers.embedder(log, cfg.pairs)(targets.user, targets.market, targets.period), [], []
    for row in np.flatnonzero(~np.isnan(vectors).any(1))[:200].tolist():
        market, period = int(targets.market[row]), int(targets.period[row])
        log_prob = ours(vectors[row], market, period)
        np.testing.assert_array_equal(log_prob, theirs(vectors[row], market, period))
        assert np.exp(log_prob).sum() == pytest.approx(1.0, abs=1e-4)
        active = log.active_advertisers(market, period)
        first, bought = active[np.argsort(-log_prob[active])[:3]], log.ad_advertiser[targets.of(row)]
        found.append(np.isin(bought, first).mean())
        chance.append(3 / len(active))
    assert np.mean(found) > 1.3 * np.mean(chance)


def test_towers_without_the_advertisers_say_so(log: Log, tmp_path: Path) -> None:
    towers, _ = train_tiny(log, tiny_retrieval(), tmp_path)
    with pytest.raises(UserError, match="an advertiser tower"):
        towers.advertiser_scores(log, tiny_retrieval().pairs)
    with pytest.raises(ValueError, match="advertiser_weight"):
        towers.model.advertisers(torch.arange(2))


def test_a_candidate_drawn_twice_counts_twice() -> None:
    """One column with its count is as good as a column a draw, as the softmax over all draws has it."""
    torch.manual_seed(0)
    items_N, rows_P = torch.tensor([4, 7, 7, 2, 4]), torch.tensor([0, 1])  # the pairs' targets first
    scores_BI, log_q_I = torch.randn(2, 9), torch.randn(9)
    legal_BN = torch.tensor([[False, True, True, True, False], [True, False, False, True, True]])
    logits_BN = scores_BI[:, items_N] - log_q_I[items_N]
    expected = []
    for row in range(2):
        drawn = torch.cat([logits_BN[row, row : row + 1], logits_BN[row][legal_BN[row]]])
        expected.append(-drawn.log_softmax(0)[0])
    items_C, column_N, count_C = items_N.unique(return_inverse=True, return_counts=True)
    legal_BC = torch.zeros(2, 3, dtype=torch.bool)
    legal_BC[:, column_N] = legal_BN
    among = Candidates(
        item_C=items_C,
        pair_row_P=rows_P,
        pair_column_P=column_N[:2],
        log_q_C=log_q_I[items_C],
        log_count_C=count_C.log(),
        legal_BC=legal_BC,
        popularity_BC=torch.zeros(2, 3),
    )
    torch.testing.assert_close(sampled_softmax(scores_BI[:, items_C], among), torch.stack(expected).mean())


def test_gradients_are_clipped_by_their_norm_in_all() -> None:
    bag, layer = torch.nn.EmbeddingBag(10, 4, mode="sum", sparse=True), torch.nn.Linear(4, 4)
    dense = copy.deepcopy(bag)
    dense.sparse = False
    other = copy.deepcopy(layer)
    for table, top in ((bag, layer), (dense, other)):
        top(table(torch.tensor([1, 2, 1, 7]), torch.arange(4))).pow(2).sum().mul(100).backward()
    clip_gradients([*bag.parameters(), *layer.parameters()], 0.5)
    torch.nn.utils.clip_grad_norm_([dense.weight, *other.parameters()], 0.5)
    torch.testing.assert_close(bag.weight.grad.to_dense(), dense.weight.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(layer.weight.grad, other.weight.grad)


def test_row_adam_is_sparse_adam() -> None:
    """After a change of hands in the middle too: what is saved is all there is."""
    bags = [torch.nn.EmbeddingBag(10, 4, mode="sum", sparse=True)]
    bags += [copy.deepcopy(bags[0])]
    ours, theirs = RowAdam([*bags[0].parameters()], lr=0.1), torch.optim.SparseAdam([*bags[1].parameters()], lr=0.1)
    for step in range(6):
        read = torch.randint(10, (6,), generator=torch.Generator().manual_seed(step))
        for bag in bags:
            bag.zero_grad()
            (bag(read, torch.arange(6)) - step).pow(2).sum().backward()
        if step == 3:
            saved, ours = ours.state_dict(), RowAdam([*bags[0].parameters()], lr=0.1)
            ours.load_state_dict(saved)
        ours.step()
        theirs.step()
    torch.testing.assert_close(bags[0].weight, bags[1].weight)


def test_only_rows_that_were_read_move() -> None:
    bag, layer = torch.nn.EmbeddingBag(10, 4, mode="sum", sparse=True), torch.nn.Linear(4, 4)
    before = bag.weight.detach().clone()
    optimizer = RowsAndLayers(list(bag.parameters()), list(layer.parameters()), lr=0.1, weight_decay=0.1)
    layer(bag(torch.tensor([3, 5]), torch.arange(2))).sum().backward()
    optimizer.step()
    moved = (bag.weight.detach() != before).any(1)
    assert moved.nonzero().ravel().tolist() == [3, 5]


BAD = [
    (lambda: RetrievalConfig(budget=0), "retrieval.budget=0"),
    (lambda: RetrievalConfig(ks=[500]), r"retrieval.ks=\[500\]"),
    (lambda: RetrievalConfig(quotas=[]), r"retrieval.quotas=\[\]"),
    (lambda: RetrievalConfig(quota_requests=0), "retrieval.quota_requests=0"),
    (lambda: PairsConfig(history=10, window=5), "window=5 below history=10"),
    (lambda: ForecastChannelConfig(advertisers=0, prior_weights=[-1.0]), "(?s)advertisers=0.*prior_weights"),
    (lambda: ForecastChannelConfig(seeded_share=1.5), "seeded_share"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_configuration_is_told(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


BAD_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"dim": 0}, r"retrieval\.model\.dim=0"),
    ({"id_dropout": 1.0}, r"retrieval\.model\.id_dropout=1\.0"),
    ({"layers": -1}, r"retrieval\.model\.layers=-1"),
    ({"weight_decay": -0.1}, r"retrieval\.model\.weight_decay=-0\.1"),
    ({"learning_rate": float("nan")}, r"retrieval\.model\.learning_rate=nan"),
    ({"context": ["weather"]}, r"(?s)retrieval\.model\.context=\['weather'\].*distinct names out of market"),
    ({"context": ["market", "market"]}, "distinct names"),
    ({"advertiser_weight": 0.0}, r"retrieval\.model\.advertiser_weight=0\.0"),
    ({"layers": 1, "dim": 30, "heads": 4}, "heads that divide dim"),
    ({"dim": 0, "heads": 0, "dropout": 2.0, "layers": 1}, r"(?s)\.dim=0.*\.heads=0.*\.dropout=2\.0"),
]


@pytest.mark.parametrize(("sizes", "message"), BAD_SIZES)
def test_sizes_of_the_towers_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoTowerConfig(**sizes)
