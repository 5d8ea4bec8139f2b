"""Stacks of recurrent layers. Each turns (T, B, inputs) into (T, B, width) and lists the widths of its states.

`states` is a list with one (B, units) tensor per recurrent layer, in order; the same list comes back, one chunk later.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.config import ModelConfig
from model.indrnn import IndRNN, Recurrence, recurrent_bound
from model.layers import SequenceDropout, SequenceNorm


def _bound(config: ModelConfig) -> float:
    return recurrent_bound(config.horizon) if config.horizon else 1.0


class Plain(nn.Module):
    """(Linear, [norm], recurrence, [norm], dropout) x layers: the stack of paper 1."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        widths = [inputs] + [config.units] * config.layers
        memories = ["every"] * (config.layers - 1) + [config.memory]
        self.cells = nn.ModuleList(
            IndRNN(a, b, _bound(config), memory, config.horizon or 32)  # type: ignore[arg-type]
            for a, b, memory in zip(widths[:-1], widths[1:], memories, strict=True)
        )
        self.before = nn.ModuleList(SequenceNorm(config.units) if config.norm == "before" else nn.Identity() for _ in self.cells)
        self.after = nn.ModuleList(SequenceNorm(config.units) if config.norm == "after" else nn.Identity() for _ in self.cells)
        self.dropout = SequenceDropout(config.dropout)
        self.state_widths, self.width = widths[1:], config.units

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        ends = []
        for cell, before, after, h in zip(self.cells, self.before, self.after, states, strict=True):
            assert isinstance(cell, IndRNN)  # what ModuleList holds, for the type checker
            x, end = cell.recurrence(_normed(before, cell.linear(x), mask), h, mask)
            x = self.dropout(_normed(after, x, mask))
            ends.append(end)
        return x, ends


class ResidualBlock(nn.Module):
    """x + two times (norm, recurrence, dropout, Linear): pre-activation, identity skip (paper 2, figure 4b)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        units = config.units
        self.norms = nn.ModuleList(SequenceNorm(units) for _ in range(2))
        self.recurrences = nn.ModuleList(Recurrence(units, _bound(config)) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(units, units) for _ in range(2))
        for linear in self.linears:
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        self.dropout = SequenceDropout(config.dropout)

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        skip, ends = x, []
        for norm, recurrence, linear, h in zip(self.norms, self.recurrences, self.linears, states, strict=True):
            x, end = recurrence(norm(x, mask), h, mask)
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
        self.recurrence = Recurrence(config.units, _bound(config), config.memory, config.horizon or 32)
        self.state_widths, self.width = [config.units] * (config.layers + 1), config.units

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, ends = self.enter(x), []
        for i, block in enumerate(self.blocks):
            x, block_ends = block(x, states[2 * i : 2 * i + 2], mask)
            ends += block_ends
        x, end = self.recurrence(self.norm(x, mask), states[-1], mask)
        return x, [*ends, end]


def _normed(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return norm(x, mask) if isinstance(norm, SequenceNorm) else x


def backbone(inputs: int, config: ModelConfig) -> Plain | Residual:
    """The stack that `config.kind` names."""
    return Plain(inputs, config) if config.kind == "plain" else Residual(inputs, config)
