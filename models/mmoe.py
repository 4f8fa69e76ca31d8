"""MMoE: tasks that share experts over a ranker's features, each mixing them by a gate of its own.

Tasks that have little in common need not disturb each other: their gates take different experts.

                            ┌─► experts 1 … E: MLPs ──► (B, E, H) ─┐
    representation (B, R) ──┤                                      ├─► mix of task t ─► tower of task t ─► logit
                            └─► gate of task t: softmax ► (B, E) ──┘

Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018,
https://doi.org/10.1145/3219819.3220007, eq. 6 and 7.

Shapes: B rows, R width of a ranker's representation, E experts, H width of an expert's last layer, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchrec.modules.mlp import MLP

from models.pointwise import check_sizes, single_head


@dataclass
class MMoEConfig:
    """Sizes of an MMoE.

    Attributes:
        experts: number E of experts, at least one.
        expert_layers: widths of each expert's MLP, at least one.
        tower_layers: hidden widths of each task's MLP, at least one; one logit follows.
    """

    experts: int = 4
    expert_layers: list[int] = field(default_factory=lambda: [32])
    tower_layers: list[int] = field(default_factory=lambda: [32])


class MMoE(nn.Module):
    """A ranker's representation to one logit a task.

    Args:
        width: R.
        cfg: sizes.
        base_rates: of each task the share of rows with its outcome, where its untrained logit starts.

    Raises:
        ValueError: a size is not positive, or a base rate is no probability strictly inside (0, 1).

    Example:
        >>> MMoE(24, cfg=MMoEConfig(), base_rates=[0.1, 0.02])(torch.zeros(5, 24)).shape
        torch.Size([5, 2])
    """

    def __init__(self, width: int, *, cfg: MMoEConfig, base_rates: Sequence[float]) -> None:
        super().__init__()
        check_sizes(cfg, [width, cfg.experts, *(cfg.expert_layers or [0]), *(cfg.tower_layers or [0])])
        self.experts = nn.ModuleList(MLP(width, cfg.expert_layers) for _ in range(cfg.experts))
        self.gates = nn.ModuleList(nn.Linear(width, cfg.experts, bias=False) for _ in base_rates)
        self.towers = nn.ModuleList(single_head(cfg.tower_layers, rate)(cfg.expert_layers[-1]) for rate in base_rates)

    def forward(self, x_BR: Tensor) -> Tensor:
        """Log-odds of each task's outcome, ``(B, T)``."""
        expert_BEH = torch.stack([expert(x_BR) for expert in self.experts], dim=1)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            share_BE = gate(x_BR).softmax(-1)
            logits.append(tower((share_BE.unsqueeze(-1) * expert_BEH).sum(1)))
        return torch.cat(logits, dim=1)
