"""The ranker's config refuses what cannot be, every problem at once."""

from __future__ import annotations

import pytest

from data.errors import UserError
from models.dcn_v2 import DCNv2Config
from models.deepfm import DeepFMConfig
from models.dlrm import DLRMConfig
from pipeline.config import compose
from ranking.config import MODELS, FeatureConfig, RankerConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "dnn"}, "ranker.model=dnn"),
        ({"dlrm": DLRMConfig(embedding_dim=0)}, "ranker.dlrm.embedding_dim=0"),
        ({"dlrm": DLRMConfig(over_layers=[])}, "ranker.dlrm.over_layers="),
        ({"dcn_v2": DCNv2Config(cross_rank=0)}, "ranker.dcn_v2.cross_rank=0"),
        ({"dcn_v2": DCNv2Config(over_layers=[64, -1])}, r"ranker.dcn_v2.over_layers\[1\]=-1"),
        ({"deepfm": DeepFMConfig(deep_layers=[])}, "ranker.deepfm.deep_layers="),
        ({"batch_size": 0}, "ranker.batch_size=0"),
        ({"seeds": []}, "ranker.seeds="),
        ({"seeds": [1, 1]}, "each named once"),
        ({"seeds": [-1]}, r"ranker.seeds=\[-1\]"),
        ({"learning_rate": 0.0}, r"(?s)ranker.learning_rate=0.0.*a number above 0"),
        ({"learning_rate": float("nan")}, "ranker.learning_rate=nan"),
        ({"embedding_learning_rate": -1.0}, "ranker.embedding_learning_rate=-1.0"),
        ({"weight_decay": -1.0}, r"(?s)ranker.weight_decay=-1.0.*a number, at least 0"),
        ({"features": FeatureConfig(clip=0.0)}, "ranker.features.clip=0.0"),
    ],
)
def test_impossible_values_are_told_with_their_key(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankerConfig(**changes)


def test_all_problems_are_told_together() -> None:
    with pytest.raises(UserError, match=r"(?s)batch_size.*draws") as error:
        RankerConfig(batch_size=0, draws=0, model="dnn")
    assert all(model in str(error.value) for model in MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_a_ranker_is_chosen_by_its_name_alone(model: str) -> None:
    assert compose([f"ranker={model}"]).ranker.model == model
    assert compose(["experiment=smoke", f"ranker={model}"]).ranker.model == model


def test_the_features_are_written_out_in_yaml() -> None:
    assert compose(["ranker=dlrm"]).ranker.features == FeatureConfig()
