"""DLRM equals TorchRec's own model, runs as its docstring says, and learns calibrated probabilities."""

from __future__ import annotations

import doctest
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import models.dlrm
from models.dlrm import DLRM, DLRMConfig
from models.pointwise import PointwiseModule, RankerBatch, SparseTable, embedding_bags, level_shift

TABLES = [SparseTable("ad", 50, ("ad",)), SparseTable("advertiser", 10, ("advertiser", "history"))]
CFG = DLRMConfig(embedding_dim=8, dense_layers=[16], over_layers=[16, 8])


def random_sparse(rows: int, generator: torch.Generator) -> KeyedJaggedTensor:
    history_lengths = torch.randint(0, 4, (rows,), generator=generator)
    return KeyedJaggedTensor(
        keys=["ad", "advertiser", "history"],
        values=torch.cat(
            [
                torch.randint(0, 50, (rows,), generator=generator),
                torch.randint(0, 10, (rows,), generator=generator),
                torch.randint(0, 10, (int(history_lengths.sum()),), generator=generator),
            ]
        ),
        lengths=torch.cat([torch.ones(2 * rows, dtype=torch.int64), history_lengths]),
    )


def test_docstring_example_runs() -> None:
    assert doctest.testmod(models.dlrm).failed == 0


def test_equals_torchrecs_dlrm_with_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = DLRM(TABLES, n_dense=5, cfg=CFG)
    theirs = torchrec_dlrm.DLRM(
        embedding_bags(TABLES, 8),
        dense_in_features=5,
        dense_arch_layer_sizes=[16, 8],
        over_arch_layer_sizes=[16, 8, 1],
    )
    theirs.load_state_dict(ours.state_dict())
    dense_BN, sparse = torch.randn(12, 5, generator=generator), random_sparse(12, generator)
    torch.testing.assert_close(ours(dense_BN, sparse), theirs(dense_BN, sparse))


def test_an_empty_bag_is_a_zero_vector_and_other_rows_do_not_matter() -> None:
    ranker = DLRM(TABLES, n_dense=2, cfg=CFG).eval()
    keys = ["ad", "advertiser", "history"]
    one = KeyedJaggedTensor(keys, torch.tensor([3, 4]), lengths=torch.tensor([1, 1, 0]))
    two = KeyedJaggedTensor(keys, torch.tensor([3, 9, 4, 1, 5, 6]), lengths=torch.tensor([1, 1, 1, 1, 0, 2]))
    dense_BN = torch.randn(2, 2)
    torch.testing.assert_close(ranker(dense_BN[:1], one)[0], ranker(dense_BN, two)[0])


def test_untrained_model_predicts_about_the_base_rate() -> None:
    torch.manual_seed(0)
    ranker = DLRM(TABLES, n_dense=5, cfg=CFG, base_rate=0.01)
    generator = torch.Generator().manual_seed(1)
    logits_B = ranker(torch.randn(256, 5, generator=generator), random_sparse(256, generator))
    assert logits_B.mean().item() == pytest.approx(torch.logit(torch.tensor(0.01)).item(), abs=0.5)


@pytest.mark.parametrize(
    ("changes", "n_dense", "base_rate"),
    [
        ({"embedding_dim": 0}, 3, 0.5),
        ({"over_layers": []}, 3, 0.5),
        ({"dense_layers": [0]}, 3, 0.5),
        ({}, 0, 0.5),
        ({}, 3, 0.0),
        ({}, 3, 1.0),
        ({}, 3, float("nan")),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, n_dense: int, base_rate: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        DLRM(TABLES, n_dense=n_dense, cfg=DLRMConfig(**changes), base_rate=base_rate)


@pytest.mark.parametrize("tables", [[], [SparseTable("a", 3, ("x",)), SparseTable("b", 3, ("x",))]])
def test_tables_must_have_features_of_their_own(tables: list[SparseTable]) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        DLRM(tables, n_dense=3, cfg=CFG)


def test_weights_undo_the_sampling_of_negatives() -> None:
    """Nine of ten negatives dropped, the tenth weighted by ten: the fitted rate is that of the whole."""
    torch.manual_seed(0)
    rows, rate = 400, 0.5 / (0.5 + 0.5 * 10)
    module = PointwiseModule(
        DLRM(TABLES, n_dense=1, cfg=CFG), learning_rate=0.02, embedding_learning_rate=0.02, weight_decay=0.0
    )
    label_B = (torch.arange(rows) % 2).float()
    batch = RankerBatch(
        dense_BN=torch.zeros(rows, 1),
        sparse=KeyedJaggedTensor(
            ["ad", "advertiser", "history"],
            torch.zeros(2 * rows, dtype=torch.int64),
            lengths=torch.cat([torch.ones(2 * rows), torch.zeros(rows)]).long(),
        ),
        label_BT=label_B[:, None],
        weight_B=torch.where(label_B > 0, 1.0, 10.0),
    )
    optimizer = torch.optim.AdamW(module.parameter_groups())
    for _ in range(200):
        loss, weight = module._weighted_loss(batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
    assert torch.sigmoid(module(batch)).mean().item() == pytest.approx(rate, abs=0.005)


def test_torchrec_is_quiet_about_tracing_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch.fx._symbolic_trace")
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.propagate, before = True, logger.propagate
        try:
            logger.warning("is_fx_tracing will return true for both fx.symbolic_trace and torch.export.")
            logger.warning("something else")
        finally:
            logger.propagate = before
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_every_parameter_is_in_one_group_and_tables_have_a_rate_of_their_own() -> None:
    ranker = DLRM(TABLES, n_dense=2, cfg=CFG)
    module = PointwiseModule(ranker, learning_rate=0.1, embedding_learning_rate=0.01, weight_decay=0.5)
    tables, matrices, biases = module.parameter_groups()
    assert [tuple(p.shape) for p in tables["params"]] == [(50, 8), (10, 8)]
    assert (tables["lr"], matrices["lr"], biases["lr"]) == (0.01, 0.1, 0.1)
    assert biases["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in (tables, matrices, biases)) == len(list(ranker.parameters()))


def test_ids_without_a_row_of_their_own_start_with_nothing() -> None:
    ranker = DLRM(TABLES, n_dense=2, cfg=CFG)
    for bag in ranker.sparse_arch.embedding_bag_collection.embedding_bags.values():
        assert (bag.weight[0] == 0).all()
        assert (bag.weight[1:] != 0).all()


def test_the_level_is_set_to_the_mean_outcome_and_the_order_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    logit_N = torch.randn(500, generator=generator, dtype=torch.float64) + 3
    label_N = (torch.rand(500, generator=generator) < 0.2).float()
    weight_N = torch.where(label_N > 0, 1.0, 20.0)
    shifted_N = torch.sigmoid(logit_N + level_shift(logit_N, label_N, weight_N))
    expected = (weight_N * label_N).sum() / weight_N.sum()
    assert ((weight_N * shifted_N).sum() / weight_N.sum()).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(shifted_N.argsort(), logit_N.argsort())


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_rows_of_one_class_do_not_move_the_level(label: float) -> None:
    assert level_shift(torch.zeros(4).double(), torch.full((4,), label), torch.ones(4)) == 0.0


def test_the_level_can_be_set_where_the_model_is_sure_of_everything() -> None:
    logit_N = torch.tensor([900.0, 900.0, -900.0, -900.0], dtype=torch.float64)
    shift = level_shift(logit_N, torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.ones(4))
    assert abs(shift) <= 60


def test_the_stopping_loss_counts_each_row_once_and_is_blind_to_the_level() -> None:
    generator = torch.Generator().manual_seed(0)
    module = PointwiseModule(
        DLRM(TABLES, n_dense=2, cfg=CFG), learning_rate=0.1, embedding_learning_rate=0.1, weight_decay=0.0
    )
    dense_BN, sparse = torch.randn(40, 2, generator=generator), random_sparse(40, generator)
    label_B = (torch.arange(40) % 3 == 0).float()

    def val_loss(weight_B: torch.Tensor, level: float) -> float:
        logged: dict[str, torch.Tensor] = {}
        module.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
        module.intercept.fill_(level)
        module.on_validation_epoch_start()
        module.validation_step(RankerBatch(dense_BN, sparse, label_B[:, None], weight_B), 0)
        module.on_validation_epoch_end()
        return float(logged["val_loss"])

    plain = val_loss(torch.ones(40), 0.0)
    assert val_loss(torch.linspace(1, 200, 40), 0.0) == plain
    assert val_loss(torch.ones(40), -3.0) == pytest.approx(plain, rel=1e-5)


class NoReduction(SingleDeviceStrategy):
    """Of processes whose backend takes no tensor of the CPU."""

    is_distributed = True

    def reduce(self, tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if tensor.is_floating_point():  # else it is Lightning's own, made on the right device
            raise RuntimeError("No backend type associated with device type cpu")
        return tensor


def test_the_stopping_loss_is_of_all_processes_and_not_reduced_again() -> None:
    module = PointwiseModule(
        DLRM(TABLES, n_dense=2, cfg=CFG), learning_rate=0.1, embedding_learning_rate=0.1, weight_decay=0.0
    )
    sparse, label_BT = random_sparse(6, torch.Generator().manual_seed(0)), torch.tensor([[0.0], [1.0]]).repeat(3, 1)
    batches = [RankerBatch(torch.randn(6, 2), sparse, label_BT, torch.ones(6))]
    trainer = L.Trainer(
        strategy=NoReduction("cpu"), use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert 0 < trainer.callback_metrics["val_loss"] < 2
