"""Every ranker has one interface, starts at the base rate, is what its paper says and learns by the same module."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.dcn_v2 import DCNv2, DCNv2Config
from models.deepfm import DeepFM, DeepFMConfig
from models.dlrm import DLRM, DLRMConfig
from models.logistic import LogisticRegression
from models.pointwise import PointwiseModule, RankerBatch, SparseTable, embedding_bags
from tests.models.test_dlrm import TABLES, random_sparse

DCN = DCNv2Config(embedding_dim=8, dense_layers=[16], cross_layers=2, cross_rank=4, over_layers=[16, 8])
FM = DeepFMConfig(embedding_dim=8, dense_layers=[16], deep_layers=[16, 8])
Build = Callable[..., nn.Module]
RANKERS: dict[str, Build] = {
    "dlrm": lambda tables, **kwargs: DLRM(
        tables, cfg=DLRMConfig(embedding_dim=8, dense_layers=[16], over_layers=[16, 8]), **kwargs
    ),
    "dcn_v2": lambda tables, **kwargs: DCNv2(tables, cfg=DCN, **kwargs),
    "deepfm": lambda tables, **kwargs: DeepFM(tables, cfg=FM, **kwargs),
    "logistic": LogisticRegression,
}
every_ranker = pytest.mark.parametrize("build", RANKERS.values(), ids=RANKERS.keys())


def inputs(rows: int, n_dense: int) -> tuple[Tensor, KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, n_dense, generator=generator), random_sparse(rows, generator)


@pytest.mark.parametrize("name", RANKERS)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"models.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@every_ranker
def test_untrained_it_predicts_about_the_base_rate(build: Build) -> None:
    torch.manual_seed(0)
    logits_BT = build(TABLES, n_dense=5, base_rate=0.01)(*inputs(256, 5))
    assert logits_BT.shape == (256, 1)
    assert logits_BT.mean().item() == pytest.approx(torch.logit(torch.tensor(0.01)).item(), abs=0.7)


@every_ranker
def test_a_row_does_not_see_the_other_rows(build: Build) -> None:
    torch.manual_seed(0)
    ranker = build(TABLES, n_dense=3).eval()
    for parameter in ranker.parameters():
        nn.init.normal_(parameter, std=0.3)
    dense_BN, sparse = inputs(6, 3)
    whole = ranker(dense_BN, sparse)
    dense_BN[1:] += 1.0
    assert ranker(dense_BN, sparse)[0].item() == pytest.approx(whole[0].item(), abs=1e-5)
    assert not torch.allclose(ranker(dense_BN, sparse)[1:], whole[1:])


@every_ranker
def test_every_weight_learns_and_is_in_one_group(build: Build) -> None:
    torch.manual_seed(0)
    module = PointwiseModule(
        build(TABLES, n_dense=3), learning_rate=0.05, embedding_learning_rate=0.05, weight_decay=0.0
    )
    dense_BN, sparse = inputs(128, 3)
    batch = RankerBatch(dense_BN, sparse, (dense_BN[:, :1] > 0).float(), torch.ones(128))
    groups = module.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(module.ranker.parameters()))
    optimizer = torch.optim.AdamW(groups)
    before = {name: tensor.clone() for name, tensor in module.ranker.state_dict().items()}
    losses = []
    for _ in range(40):
        loss, weight = module._weighted_loss(batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
        losses.append(loss.item() / 128)
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in module.ranker.state_dict().items())


@every_ranker
@pytest.mark.parametrize(("n_dense", "base_rate"), [(0, 0.5), (3, 0.0), (3, 1.0), (3, float("nan"))])
def test_impossible_inputs_are_refused(build: Build, n_dense: int, base_rate: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        build(TABLES, n_dense=n_dense, base_rate=base_rate)


@pytest.mark.parametrize(
    ("model", "cfg"),
    [
        (DCNv2, replace(DCN, embedding_dim=0)),
        (DCNv2, replace(DCN, cross_layers=0)),
        (DCNv2, replace(DCN, cross_rank=0)),
        (DCNv2, replace(DCN, over_layers=[])),
        (DeepFM, replace(FM, embedding_dim=0)),
        (DeepFM, replace(FM, dense_layers=[0])),
        (DeepFM, replace(FM, deep_layers=[])),
    ],
)
def test_impossible_sizes_are_refused(model: Build, cfg: object) -> None:
    with pytest.raises(ValueError, match="expected positive sizes"):
        model(TABLES, n_dense=3, cfg=cfg)


def test_dcn_v2_equals_torchrecs_with_the_same_weights() -> None:
    ours = DCNv2(TABLES, n_dense=5, cfg=DCN)
    theirs = torchrec_dlrm.DLRM_DCN(
        embedding_bags(TABLES, 8),
        dense_in_features=5,
        dense_arch_layer_sizes=[16, 8],
        over_arch_layer_sizes=[16, 8, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=4,
    )
    theirs.load_state_dict(ours.state_dict())
    dense_BN, sparse = inputs(12, 5)
    torch.testing.assert_close(ours(dense_BN, sparse), theirs(dense_BN, sparse))


def test_deepfm_multiplies_every_pair_of_fields_once() -> None:
    ranker = DeepFM(TABLES, n_dense=5, cfg=FM)
    field_BFD = torch.randn(7, 4, 8)
    pairs = [(field_BFD[:, i] * field_BFD[:, j]).sum(1) for i in range(4) for j in range(i)]
    torch.testing.assert_close(ranker._pairs(field_BFD), torch.stack(pairs).sum(0)[:, None])


def test_the_parts_of_deepfm_are_added() -> None:
    ranker = DeepFM(TABLES, n_dense=5, cfg=FM)
    dense_BN, sparse = inputs(7, 5)
    fields = torch.cat([ranker.dense_arch(dense_BN).unsqueeze(1), ranker.sparse_arch(sparse)], 1)
    expected = ranker.first_order(dense_BN, sparse) + ranker._pairs(fields) + ranker.deep([fields])
    torch.testing.assert_close(ranker(dense_BN, sparse), expected)


def test_a_logistic_regression_adds_up_its_features() -> None:
    floor = LogisticRegression([SparseTable("ad", 50, ("ad",))], n_dense=2, base_rate=0.2)
    for parameter in floor.parameters():
        nn.init.normal_(parameter)
    dense_BN = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    sparse = KeyedJaggedTensor(["ad"], torch.tensor([3, 3, 3, 3]), lengths=torch.ones(4, dtype=torch.int64))
    neither, first, second, both = floor(dense_BN, sparse).flatten().tolist()
    assert both - neither == pytest.approx((first - neither) + (second - neither), abs=1e-5)
