"""Convolutional IndRNN (paper 2, section III): the first layer's linear map is a convolution over neighbouring joints or channels.

It looks along the frame, never along time, so it needs no more state than its recurrence has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.indrnn import Recurrence, kaiming
from model.layers import SequenceDropout, SequenceNorm, normed


class PointConvolution(nn.Module):
    """Convolution, [norm], recurrence, [norm], dropout over points in the order of the frame: (T, B, inputs) -> (T, B, width).

    `blocks` says of what the inputs are made: (points, numbers) for each part, flattened one after the other. Parts with as many points as
    the first are the maps of the convolution; what is left, such as the turning of the whole body, passes by unchanged.
    """

    def __init__(self, blocks: Sequence[tuple[int, int]], config: ModelConfig) -> None:
        super().__init__()
        self.blocks, self.points = list(blocks), blocks[0][0]
        maps = sum(numbers for points, numbers in blocks if points == self.points)
        by = sum(points * numbers for points, numbers in blocks if points != self.points)
        units = self.points * config.filters
        self.convolution = kaiming(nn.Conv1d(maps, config.filters, config.kernel, padding="same"), config.activation)
        self.before = SequenceNorm(units) if config.norm == "before" else nn.Identity()
        self.recurrence = Recurrence.of(config, units)
        self.after = SequenceNorm(units) if config.norm == "after" else nn.Identity()
        self.dropout = SequenceDropout(config.dropout)
        self.state_widths, self.width = [units], units + by

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        parts = torch.split(x, [points * numbers for points, numbers in self.blocks], dim=-1)
        blocks = list(zip(parts, self.blocks, strict=True))
        maps = torch.cat([part.reshape(-1, *block) for part, block in blocks if block[0] == self.points], -1)  # (T * B, points, maps)
        by = [part for part, block in blocks if block[0] != self.points]
        z = self.convolution(maps.transpose(1, 2)).reshape(*x.shape[:2], self.recurrence.units)
        y, end = self.recurrence(normed(self.before, z, mask), states[0], mask, keep)
        return torch.cat([self.dropout(normed(self.after, y, mask)), *by], -1), [end]
