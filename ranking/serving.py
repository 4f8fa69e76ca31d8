"""A ranker as one file for inference: ``torch.export`` of the trained model, with the level and the sigmoid in it.

    dense_BN (B, N) ──────────────┐
    values (V,), lengths (F B,) ──┴─► ranker.pt2 ─► probability_BT

``lengths`` holds the bag sizes of the first sparse feature for all rows, then of the second and so on, ``values`` the
ids of these bags in the same order: the two tensors of a ``KeyedJaggedTensor``. ``serving.json`` says which
features these are; scaling and looking up ids is `ranking.spec.FeatureSpec.apply`, whose file lies beside.

Shapes: B rows, T tasks, N dense features, F sparse features, V ids of all bags.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.artifacts import atomic_directory, hash_file
from data.errors import LineageError, UserError
from models.pointwise import PointwiseModule, RankerBatch
from ranking.ranker import SPEC, Ranker
from ranking.rows import Bags, Design, Features
from ranking.spec import FeatureSpec
from ranking.stored import batch_of

PROGRAM, SIGNATURE = "ranker.pt2", "serving.json"
TOLERANCE = 1e-5
"""Largest difference of a probability between the exported program and the model it was made of."""


class _Program(nn.Module):
    """The model behind plain tensors."""

    def __init__(self, module: PointwiseModule, keys: list[str]) -> None:
        super().__init__()
        self.ranker, self.keys = module.ranker, keys
        self.register_buffer("intercept", module.intercept.clone())

    def forward(self, dense_BN: Tensor, values_V: Tensor, lengths_FB: Tensor) -> Tensor:
        sparse = KeyedJaggedTensor(self.keys, values_V, lengths=lengths_FB)
        return torch.sigmoid(self.ranker(dense_BN, sparse) + self.intercept)


@dataclass(frozen=True)
class ServedRanker:
    """An exported ranker.

    Attributes:
        program: from `PROGRAM`.
        spec: how features are scaled and looked up.
    """

    program: nn.Module
    spec: FeatureSpec

    @classmethod
    def load(cls, directory: Path) -> ServedRanker:
        """Read what `export` wrote.

        Raises:
            UserError: there is none, or a file of it is damaged.
            LineageError: program and feature spec were not exported together.
        """
        try:
            made = json.loads((directory / SIGNATURE).read_text(encoding="utf-8"))["files"]
            changed = [name for name in (PROGRAM, SPEC) if hash_file(directory / name) != made[name]]
            if changed:
                raise LineageError(
                    f"{directory}, with another {' and another '.join(changed)} than {SIGNATURE} was written for",
                    expected="program and feature spec of one export, unchanged",
                    action="export the ranker again",
                )
            spec = FeatureSpec.from_json((directory / SPEC).read_text(encoding="utf-8"))
            program = torch.export.load(directory / PROGRAM).module()
        except (OSError, RuntimeError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(
                f"{directory} ({type(error).__name__})",
                expected=f"{PROGRAM}, {SPEC} and {SIGNATURE} as `adsid export` wrote them",
                action="export the ranker again",
            ) from error
        return cls(program, spec)

    def probabilities(self, features: Features) -> NDArray[np.float64]:
        """Chance of a conversion of each row, shape ``(N,)``; as `ranking.ranker.Ranker.probabilities`."""
        design = self.spec.apply(features)
        with torch.no_grad():
            return _run(self.program, batch_of(design, np.arange(len(design))))[:, 0].double().numpy()


def export(ranker: Ranker, directory: Path) -> float:
    """Write a ranker for inference, and compare it with the model on made-up rows before it is kept.

    Args:
        ranker: the trained one.
        directory: to be made; replaced once the new one is whole.

    Returns:
        The largest difference of a probability.

    Raises:
        ValueError: the exported program says something else than the model.
    """
    keys = list(ranker.spec.features)
    program = _Program(ranker.module, keys).eval()
    example = _rows(ranker.spec, 5, seed=0)
    rows, ids = torch.export.Dim("rows", min=1), torch.export.Dim("ids", min=0)
    shapes = ({0: rows}, {0: ids}, {0: len(keys) * rows})
    with _quiet(), torch.no_grad():
        arguments = (example.dense_BN, example.sparse.values(), example.sparse.lengths())
        exported = torch.export.export(program, arguments, dynamic_shapes=shapes, strict=False)
    check, served = _rows(ranker.spec, 257, seed=1), exported.module()
    with torch.no_grad():
        expected = torch.sigmoid(ranker.module(check).double())
        difference = float((_run(served, check).double() - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported ranker differs by {difference:.2g} from the model; expected {TOLERANCE} at most"
        )
    with atomic_directory(directory) as output:
        torch.export.save(exported, output / PROGRAM)
        (output / SPEC).write_text(ranker.spec.to_json() + "\n", encoding="utf-8")
        files = {name: hash_file(output / name) for name in (PROGRAM, SPEC)}
        signature = {
            "inputs": {
                "dense_BN": {"dtype": "float32", "features": ranker.spec.dense},
                "values_V": {"dtype": "int64", "rows_of_tables": {t.name: t.rows for t in ranker.spec.sparse_tables()}},
                "lengths_FB": {"dtype": "int64", "features": keys},
            },
            "output": {"dtype": "float32", "probability_of_tasks": list(ranker.tasks)},
            "model": ranker.model,
            "largest_difference": difference,
            "files": files,
        }
        (output / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n", encoding="utf-8")
    return difference


def _run(program: nn.Module, batch: RankerBatch) -> Tensor:
    found: Tensor = program(batch.dense_BN, batch.sparse.values(), batch.sparse.lengths())
    return found


def _rows(spec: FeatureSpec, n_rows: int, *, seed: int) -> RankerBatch:
    """Random rows with ids of every table, empty bags among them."""
    rng = np.random.default_rng(seed)
    size = {table.name: table.rows for table in spec.sparse_tables()}
    bags = {}
    for name, table in spec.features.items():
        length_N = rng.integers(0, 4, n_rows)
        value = rng.integers(0, size[table], length_N.sum())
        bags[name] = Bags(value, np.concatenate([[0], np.cumsum(length_N)]), np.arange(n_rows))
    dense_NF = rng.normal(size=(n_rows, len(spec.dense))).astype(np.float32)
    nothing = np.zeros(n_rows, np.float32)
    return batch_of(Design(dense_NF, bags, nothing[:, None], nothing), np.arange(n_rows))


@contextmanager
def _quiet() -> Iterator[Any]:
    """Without TorchRec's advice on how long tracing takes."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
