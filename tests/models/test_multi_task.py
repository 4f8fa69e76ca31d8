"""Heads of several tasks are what their papers say, learn each task, and leave alone what a row has no label of."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from models.dcn_v2 import DCNv2
from models.deepfm import DeepFM
from models.dlrm import DLRM
from models.mmoe import MMoE, MMoEConfig
from models.pointwise import Heads, PointwiseModule, RankerBatch
from models.shared_bottom import SharedBottom, SharedBottomConfig
from tests.models.test_dlrm import CFG, TABLES, random_sparse
from tests.models.test_rankers import DCN, FM, inputs

RATES = [0.2, 0.02]
HEADS: dict[str, Callable[[list[float]], Heads]] = {
    "shared_bottom": lambda rates: partial(
        SharedBottom, cfg=SharedBottomConfig(bottom_layers=[16], tower_layers=[16]), base_rates=rates
    ),
    "mmoe": lambda rates: partial(
        MMoE, cfg=MMoEConfig(experts=3, expert_layers=[16], tower_layers=[16]), base_rates=rates
    ),
}
RANKERS: dict[str, Callable[[Heads], nn.Module]] = {
    "dlrm": lambda heads: DLRM(TABLES, n_dense=3, cfg=CFG, heads=heads),
    "dcn_v2": lambda heads: DCNv2(TABLES, n_dense=3, cfg=DCN, heads=heads),
    "deepfm": lambda heads: DeepFM(TABLES, n_dense=3, cfg=FM, heads=heads),
}
every_head = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())


def module_of(ranker: nn.Module, weights: tuple[float, ...] = (1.0, 1.0)) -> PointwiseModule:
    return PointwiseModule(
        ranker, learning_rate=0.03, embedding_learning_rate=0.03, weight_decay=0.0, task_weights=weights
    )


@pytest.mark.parametrize("name", HEADS)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"models.{name}"), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


@every_head
@pytest.mark.parametrize("build", RANKERS.values(), ids=RANKERS.keys())
def test_over_every_ranker_each_task_starts_at_its_rate_and_learns(
    build: Callable[[Heads], nn.Module], heads: Callable[[list[float]], Heads]
) -> None:
    torch.manual_seed(0)
    module = module_of(build(heads(RATES)))
    dense_BN, sparse = inputs(256, 3)
    batch = RankerBatch(
        dense_BN, sparse, torch.stack([dense_BN[:, 0] > 0, dense_BN[:, 1] > 1], 1).float(), torch.ones(256)
    )
    start_T = module(batch).mean(0)
    assert start_T.tolist() == pytest.approx(torch.logit(torch.tensor(RATES)).tolist(), abs=0.7)
    optimizer = module.optimizer()
    before, losses = {name: value.clone() for name, value in module.ranker.state_dict().items()}, []
    for _ in range(60):
        loss_T, weight_T = module._weighted_loss(batch)
        optimizer.zero_grad()
        (loss_T / weight_T).sum().backward()
        optimizer.step()
        losses.append(loss_T.detach())
    assert (losses[-1] < 0.5 * losses[0]).all()
    assert all(not torch.equal(value, before[name]) for name, value in module.ranker.state_dict().items())


def test_mmoe_mixes_its_experts_by_the_gate_of_each_task() -> None:
    torch.manual_seed(0)
    head = MMoE(5, cfg=MMoEConfig(experts=3, expert_layers=[4], tower_layers=[2]), base_rates=RATES)
    x_BR = torch.randn(7, 5)
    for task, (gate, tower) in enumerate(zip(head.gates, head.towers, strict=True)):
        share_BE = gate(x_BR).softmax(1)
        mixed_BH = sum(share_BE[:, [n]] * expert(x_BR) for n, expert in enumerate(head.experts))
        torch.testing.assert_close(head(x_BR)[:, task], tower(mixed_BH)[:, 0])


def test_tasks_of_a_shared_bottom_meet_in_the_bottom_alone() -> None:
    head = SharedBottom(5, cfg=SharedBottomConfig([4], [3]), base_rates=RATES)
    head(torch.randn(6, 5))[:, 0].sum().backward()
    own = [
        float(p.grad.abs().sum())
        for part in (head.bottom, head.towers[0])
        for p in part.parameters()
        if p.grad is not None
    ]
    other = [float(p.grad.abs().sum()) for p in head.towers[1].parameters() if p.grad is not None]
    assert min(own) > 0
    assert set(other) <= {0.0}


def batch_with(label_BT: torch.Tensor) -> RankerBatch:
    generator = torch.Generator().manual_seed(0)
    rows = len(label_BT)
    weight_B = torch.linspace(1, 5, rows)
    return RankerBatch(torch.randn(rows, 3, generator=generator), random_sparse(rows, generator), label_BT, weight_B)


def test_a_row_without_a_label_of_a_task_counts_for_the_others_alone() -> None:
    label_BT = (torch.arange(40) % 3 == 0).float()[:, None].repeat(1, 2)
    label_BT[10:, 1] = torch.nan
    module = module_of(DLRM(TABLES, n_dense=3, cfg=CFG, heads=HEADS["mmoe"](RATES)))
    batch = batch_with(label_BT)
    loss_T, weight_T = module._weighted_loss(batch)
    assert weight_T.tolist() == pytest.approx([batch.weight_B.sum().item(), batch.weight_B[:10].sum().item()])
    logit_B = module(batch)[:10, 1]
    expected = nn.functional.binary_cross_entropy_with_logits(logit_B, label_BT[:10, 1], reduction="none")
    assert loss_T[1].item() == pytest.approx((expected * batch.weight_B[:10]).sum().item(), rel=1e-5)
    loss_T.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_a_batch_without_any_label_of_a_task_and_the_weights_of_tasks() -> None:
    label_BT = (torch.arange(40) % 3 == 0).float()[:, None].repeat(1, 2)
    label_BT[:, 1] = torch.nan
    ranker = DLRM(TABLES, n_dense=3, cfg=CFG, heads=HEADS["shared_bottom"](RATES))
    losses = {}
    for weights in ((1.0, 1.0), (3.0, 1.0)):
        module = module_of(ranker, weights)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        losses[weights] = module.training_step(batch_with(label_BT), 0).item()
    assert losses[3.0, 1.0] == pytest.approx(3 * losses[1.0, 1.0])
    assert losses[1.0, 1.0] > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: SharedBottom(4, cfg=SharedBottomConfig(bottom_layers=[]), base_rates=RATES),
        lambda: SharedBottom(4, cfg=SharedBottomConfig(tower_layers=[0]), base_rates=RATES),
        lambda: SharedBottom(4, cfg=SharedBottomConfig(), base_rates=[0.1, 1.0]),
        lambda: MMoE(4, cfg=MMoEConfig(experts=0), base_rates=RATES),
        lambda: MMoE(4, cfg=MMoEConfig(expert_layers=[]), base_rates=RATES),
        lambda: MMoE(0, cfg=MMoEConfig(), base_rates=RATES),
        lambda: MMoE(4, cfg=MMoEConfig(), base_rates=[0.0]),
    ],
)
def test_impossible_sizes_and_rates_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="expected"):
        build()
