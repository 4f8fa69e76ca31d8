"""Shared bottom: tasks that share one MLP over a ranker's features and have a tower each.

What one task learns of the features serves the others; where tasks disagree, they pull at the same weights.

    representation (B, R) ─► bottom: MLP ─┬─► tower of task 1 ─► logit
                                          └─► tower of task T ─► logit

Caruana, Multitask Learning, 1997; in the form of Ma et al. 2018 (see `models.mmoe`), section 3.1.

Shapes: B rows, R width of a ranker's representation, H width of the bottom's last layer, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchrec.modules.mlp import MLP

from models.pointwise import check_sizes, single_head


@dataclass
class SharedBottomConfig:
    """Sizes of a shared bottom.

    Attributes:
        bottom_layers: widths of the MLP that all tasks share, at least one.
        tower_layers: hidden widths of each task's MLP, at least one; one logit follows.
    """

    bottom_layers: list[int] = field(default_factory=lambda: [64])
    tower_layers: list[int] = field(default_factory=lambda: [32])


class SharedBottom(nn.Module):
    """A ranker's representation to one logit a task.

    Args:
        width: R.
        cfg: sizes.
        base_rates: of each task the share of rows with its outcome, where its untrained logit starts.

    Raises:
        ValueError: a size is not positive, or a base rate is no probability strictly inside (0, 1).

    Example:
        >>> SharedBottom(24, cfg=SharedBottomConfig(), base_rates=[0.1, 0.02])(torch.zeros(5, 24)).shape
        torch.Size([5, 2])
    """

    def __init__(self, width: int, *, cfg: SharedBottomConfig, base_rates: Sequence[float]) -> None:
        super().__init__()
        check_sizes(cfg, [width, *(cfg.bottom_layers or [0]), *(cfg.tower_layers or [0])])
        self.bottom = MLP(width, cfg.bottom_layers)
        self.towers = nn.ModuleList(single_head(cfg.tower_layers, rate)(cfg.bottom_layers[-1]) for rate in base_rates)

    def forward(self, x_BR: Tensor) -> Tensor:
        """Log-odds of each task's outcome, ``(B, T)``."""
        shared_BH = self.bottom(x_BR)
        return torch.cat([tower(shared_BH) for tower in self.towers], dim=1)
