"""A network's own guess where one thing ends and the next begins, and so how much of the past to keep: the soft reset.

In an endless stream most of what a state holds belongs to something that is over. A forget gate (Gers, Schmidhuber, Cummins: Learning to
Forget, Neural Computation 2000) clears it, here one for the whole network and driven by the input alone: so that recurrences stay elementwise, and
what the gate goes by is not what it clears.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.backbones import Plain
from model.config import ModelConfig

START = -3.0  # of the logit's bias: a boundary is rare, and nothing is cleared before that was learnt


class Boundary(nn.Module):
    """A small plain stack of short memory: features (T, B, inputs) -> logit (T, B) that something new has just begun, and keep (T, B).

    keep = 1 - sigmoid(logit) is what `recur` takes. The stack remembers `boundary_horizon` frames and is never reset itself.
    """

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        layers, units, horizon = config.boundary_layers, config.boundary_units, config.boundary_horizon
        self.stack = Plain(inputs, replace(config, kind="plain", layers=layers, units=units, horizon=horizon, memory="every", dropout=0.0))
        self.head = nn.Linear(self.stack.width, 1)
        nn.init.constant_(self.head.bias, START)
        self.state_widths = self.stack.state_widths

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logit, keep, and the last state of each layer."""
        y, ends = self.stack(x, states, mask)
        logit = self.head(y)
        # A softmax of two, since elementwise operators such as Sigmoid round differently from one batch shape to another in onnxruntime.
        keep = torch.softmax(torch.cat([logit, torch.zeros_like(logit)], -1), -1)[..., 1]
        return logit[..., 0], keep, ends
