"""Training a ranker whose embedding tables are spread over processes: TorchRec under a Lightning Strategy of its own.

TorchRec's planner gives every table, or every part of its rows, to one process. Each process has a share of the
batch's rows: it sends ids to the processes that hold them and gets pooled embeddings back. The dense layers are the
same everywhere, their gradients averaged. Tables are stepped inside the backward pass by the fused optimiser of the
process that holds them, so no gradient of a table is ever kept or sent whole.

    rank 0   rows 0, 2, 4 … ─► ids ─┐                     ┌─► embeddings ─► dense layers ─► loss ─┐ mean of the
                                    ├─► all-to-all ─► tables (row-wise Adagrad, fused)            ├─ gradients
    rank 1   rows 1, 3, 5 … ─► ids ─┘                     └─► embeddings ─► dense layers ─► loss ─┘

Lightning wraps nothing around it: `DistributedModelParallel` shards the tables and averages the gradients of the rest.
A checkpoint is a directory of ``torch.distributed.checkpoint``, which any number of processes reads back, and
beside it ``trainer.pt``, all else that Lightning keeps.

Ivchenko et al., TorchRec: a PyTorch Domain Library for Recommendation Systems, RecSys 2022.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.optim import Optimizer
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from models.pointwise import PointwiseModule
from models.training import TRAINER_STATE, rank_of_world

Obj = TypeVar("Obj")

for _noisy in ("torchrec.distributed.planner", "torchrec.distributed.logging_handlers"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)  # advice to those who write planners


def join_processes(accelerator: str = "auto") -> None:
    """Joins the processes that ``torchrun`` started, over nccl with GPUs and gloo without; or makes a group of one.

    Args:
        accelerator: Lightning's name of what they train on; ``cpu`` leaves GPUs alone.
    """
    if dist.is_initialized():
        return
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)


def is_leader() -> bool:
    """True in one of the processes that train together: the one that writes."""
    return rank_of_world()[0] == 0


def as_leader_says(value: Obj) -> Obj:
    """The value of the first process, in all of them."""
    if rank_of_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class TorchRecStrategy(ParallelStrategy):
    """Shards the tables of a `PointwiseModule`'s ranker over the processes of `join_processes`.

    Args:
        table_learning_rate: of row-wise Adagrad at the first step; it falls as the rate of the dense layers does.
    """

    strategy_name = "torchrec"

    def __init__(self, *, table_learning_rate: float) -> None:
        super().__init__()
        self.table_learning_rate = table_learning_rate
        self.sharded: DistributedModelParallel

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: what is loaded goes into the shards."""
        return True

    def setup_environment(self) -> None:
        super().setup_environment()
        join_processes(self.root_device.type)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def model_to_device(self) -> None:
        """Nothing to do: sharding puts every part where it belongs, and a whole table may fit on no device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Shards the ranker; the optimisers of the dense layers are made after this."""
        assert isinstance(model, PointwiseModule)
        model.ranker = self.sharded = shard(
            model.ranker, device=self.root_device, table_learning_rate=self.table_learning_rate
        )
        model.intercept = model.intercept.to(self.root_device)
        return model

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """One step: the tables during the backward pass of ``closure``, the dense layers after it."""
        dense = optimizer.param_groups[-1]
        for group in self.sharded.fused_optimizer.param_groups:
            group["lr"] = self.table_learning_rate * dense["lr"] / dense["initial_lr"]
        self.sharded.fused_optimizer.step()  # hands the rate to the kernels
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go into the sharded part of a checkpoint."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a directory: first beside its place, so that a crash leaves the old one."""
        target = Path(filepath)
        unfinished = target.with_name(f".{target.name}.unfinished")
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.barrier()
        dcp.save(self._tensors(), checkpoint_id=unfinished)
        if self.is_global_zero:
            torch.save(checkpoint, unfinished / TRAINER_STATE)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the tensors into their shards, and returns the rest."""
        dcp.load(self._tensors(), checkpoint_id=checkpoint_path)
        state: dict[str, Any] = torch.load(Path(checkpoint_path) / TRAINER_STATE, weights_only=True)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing to do: `load_checkpoint` did it."""

    def _tensors(self) -> dict[str, Any]:
        """Weights and the state of the fused optimisers; writing into these writes into the shards."""
        assert isinstance(self.lightning_module, PointwiseModule)
        states = self.sharded.fused_optimizer.state_dict()["state"]
        return {
            "intercept": self.lightning_module.intercept,
            **{f"ranker.{name}": value for name, value in self.sharded.state_dict().items()},
            **{f"fused.{table}.{name}": value for table, state in states.items() for name, value in state.items()},
        }

    def barrier(self, name: str | None = None) -> None:
        dist.barrier()

    def broadcast(self, obj: Obj, src: int = 0) -> Obj:
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor | Any:
        if not isinstance(tensor, Tensor):
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total / self.world_size if reduce_op in ("mean", "avg", dist.ReduceOp.AVG) else total


def shard(ranker: nn.Module, *, device: torch.device, table_learning_rate: float) -> DistributedModelParallel:
    """Spreads a ranker over the processes of the group; collective.

    Args:
        ranker: with the same weights in every process.
        device: of this process.
        table_learning_rate: of row-wise Adagrad, which steps the tables in the backward pass.

    Returns:
        The sharded ranker. It computes what the ranker did: TorchRec draws the tables anew, so they are copied over.
    """
    collections = [part for part in ranker.modules() if isinstance(part, EmbeddingBagCollection)]
    names = [config.name for part in collections for config in part.embedding_bag_configs()]
    whole = {name: value.detach().clone() for name, value in ranker.state_dict().items()}
    for part in collections:
        apply_optimizer_in_backward(RowWiseAdagrad, part.parameters(), {"lr": table_learning_rate})
    world = dist.get_world_size()
    topology = Topology(
        world_size=world,
        compute_device=device.type,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
    )
    # Whole tables or blocks of rows: these keep the optimiser's state in one shape for any number of processes.
    rows = ParameterConstraints(sharding_types=["table_wise", "row_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(topology=topology, constraints=dict.fromkeys(names, rows))
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    group = dist.group.WORLD
    assert group is not None
    sharded = DistributedModelParallel(
        ranker,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=planner.collective_plan(ranker, sharders, group),
        sharders=sharders,
    )
    for name, value in sharded.state_dict().items():
        if isinstance(value, ShardedTensor):
            for part in value.local_shards():
                (row, _), (rows_here, _) = part.metadata.shard_offsets, part.metadata.shard_sizes
                part.tensor.copy_(whole[name][row : row + rows_here])
    return sharded


def read_checkpoint(module: PointwiseModule, checkpoint: Path) -> dict[str, Any]:
    """Reads the weights of a sharded checkpoint into a whole module, in this process alone.

    Args:
        module: of the same shapes, not sharded; written to.
        checkpoint: directory of `TorchRecStrategy.save_checkpoint`, by any number of processes.

    Returns:
        What Lightning kept beside the weights.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
        dcp.load(dict(module.state_dict()), checkpoint_id=checkpoint, no_dist=True)
    state: dict[str, Any] = torch.load(checkpoint / TRAINER_STATE, weights_only=True)
    return state
