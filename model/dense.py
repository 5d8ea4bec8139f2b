"""Densely connected IndRNN: a layer sees what all layers before it in its block have found (paper 2, section III and figure 4c)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.indrnn import IndRNN
from model.layers import SequenceDropout, SequenceNorm, normed

FIRST = 6  # width of the first layer, in multiples of the growth
BOTTLENECK = 4  # inner width of a dense layer, in multiples of the growth


class DenseCell(nn.Module):
    """Linear, [norm], recurrence, [norm], dropout: what every part of a dense stack is made of."""

    def __init__(self, inputs: int, units: int, config: ModelConfig, dropout: float, *, last: bool = False) -> None:
        super().__init__()
        self.indrnn = IndRNN.of(config, inputs, units, last=last)
        self.before = SequenceNorm(units) if config.norm == "before" else nn.Identity()
        self.after = SequenceNorm(units) if config.norm == "after" else nn.Identity()
        self.dropout = SequenceDropout(dropout)
        self.state_widths = [units]

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        z = normed(self.before, self.indrnn.linear(x), mask)
        y, end = self.indrnn.recurrence(z, states[0], mask, keep)
        return self.dropout(normed(self.after, y, mask)), [end]


class DenseLayer(nn.Module):
    """A bottleneck of 4 x growth units, then `growth` units, whose outputs are put beside the layer's own input."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        self.bottleneck = DenseCell(inputs, BOTTLENECK * config.growth, config, config.bottleneck_dropout)
        self.features = DenseCell(BOTTLENECK * config.growth, config.growth, config, config.dropout)
        self.state_widths = self.bottleneck.state_widths + self.features.state_widths

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        inner, inner_ends = self.bottleneck(x, states[:1], mask, keep)
        found, ends = self.features(inner, states[1:], mask, keep)
        return torch.cat([x, found], -1), inner_ends + ends


class Dense(nn.Module):
    """A first layer of 6 x growth units, then blocks of dense layers, after each a transition: a layer of half the width reached."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        width = FIRST * config.growth
        parts: list[DenseCell | DenseLayer] = [DenseCell(inputs, width, config, config.dropout)]
        for i, layers in enumerate(config.blocks):
            for _ in range(layers):
                parts.append(DenseLayer(width, config))
                width += config.growth
            parts.append(DenseCell(width, width // 2, config, config.transition_dropout, last=i == len(config.blocks) - 1))
            width //= 2
        self.parts = nn.ModuleList(parts)
        self.widths = [part.state_widths for part in parts]
        self.state_widths, self.width = [units for widths in self.widths for units in widths], width

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        ends: list[Tensor] = []
        for part, widths in zip(self.parts, self.widths, strict=True):
            x, part_ends = part(x, states[len(ends) : len(ends) + len(widths)], mask, keep)
            ends += part_ends
        return x, ends
