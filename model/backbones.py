"""Stacks of recurrent layers. Each turns (T, B, inputs) into (T, B, width) and lists the widths of its states.

`states` is a list with one (B, units) tensor per recurrent layer, in order; the same list comes back, one chunk later. `keep` (T, B) is the share of
its states that a stack of IndRNNs keeps at each step.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from model.baselines import Baseline
from model.config import BASELINES, ModelConfig
from model.dense import Dense
from model.indrnn import IndRNN, Recurrence, kaiming
from model.layers import SequenceDropout, SequenceNorm, normed


class Plain(nn.Module):
    """(Linear, [norm], recurrence, [norm], dropout) x layers: the stack of paper 1."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        widths = [inputs] + [config.units] * config.layers
        self.cells = nn.ModuleList(IndRNN.of(config, a, b, last=i == config.layers - 1) for i, (a, b) in enumerate(pairwise(widths)))
        self.before = nn.ModuleList(SequenceNorm(config.units) if config.norm == "before" else nn.Identity() for _ in self.cells)
        self.after = nn.ModuleList(SequenceNorm(config.units) if config.norm == "after" else nn.Identity() for _ in self.cells)
        self.dropout = SequenceDropout(config.dropout)
        self.state_widths, self.width = widths[1:], config.units

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        ends = []
        for cell, before, after, h in zip(self.cells, self.before, self.after, states, strict=True):
            assert isinstance(cell, IndRNN)  # what ModuleList holds, for the type checker
            x, end = cell.recurrence(normed(before, cell.linear(x), mask), h, mask, keep)
            x = self.dropout(normed(after, x, mask))
            ends.append(end)
        return x, ends


class ResidualBlock(nn.Module):
    """x + two times (norm, recurrence, dropout, Linear): pre-activation, identity skip (paper 2, figure 4b)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        units = config.units
        self.norms = nn.ModuleList(SequenceNorm(units) for _ in range(2))
        self.recurrences = nn.ModuleList(Recurrence.of(config, units) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(units, units) for _ in range(2))
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            kaiming(linear, config.activation)
        self.dropout = SequenceDropout(config.dropout)

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        skip, ends = x, []
        for norm, recurrence, linear, h in zip(self.norms, self.recurrences, self.linears, states, strict=True):
            x, end = recurrence(norm(x, mask), h, mask, keep)
            x = linear(self.dropout(x))
            ends.append(end)
        return skip + x, ends


class Residual(nn.Module):
    """A linear map into `units`, residual blocks, a last norm and recurrence: layers + 1 recurrences in all."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, config.units)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.layers // 2))
        self.norm = SequenceNorm(config.units)
        self.recurrence = Recurrence.of(config, config.units, last=True)
        self.state_widths, self.width = [config.units] * (config.layers + 1), config.units

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        x, ends = self.enter(x), []
        for i, block in enumerate(self.blocks):
            x, block_ends = block(x, states[2 * i : 2 * i + 2], mask, keep)
            ends += block_ends
        x, end = self.recurrence(self.norm(x, mask), states[-1], mask, keep)
        return x, [*ends, end]


Backbone = Plain | Residual | Dense | Baseline


def backbone(inputs: int, config: ModelConfig) -> Backbone:
    """The stack that `config.kind` names."""
    if config.kind in BASELINES:
        return Baseline(inputs, config)
    kinds: dict[str, type[Plain | Residual | Dense]] = {"plain": Plain, "residual": Residual, "dense": Dense}
    return kinds[config.kind](inputs, config)
