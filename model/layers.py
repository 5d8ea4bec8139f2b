"""Layers that know about time: normalisation that is the same at every step, dropout with one mask per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.normalise import Total, normalise


@dataclass
class Share:
    """This process's part of a batch that several hold together: `rows` of `batch` rows; `total` adds up tensors over all processes.

    A network whose layers were given one computes what it would on the whole batch (`take_part`).
    """

    total: Total
    rows: slice
    batch: int


class SequenceNorm(nn.Module):
    """Batch normalisation over time and batch, (T, B, N) -> (T, B, N), leaving masked steps out of its statistics.

    In evaluation it is one multiply-add per unit, the same at every step (`affine`), so a stream and a clip agree.
    """

    running_mean: Tensor
    running_var: Tensor
    share: Share | None = None

    def __init__(self, units: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(units)), nn.Parameter(torch.zeros(units))
        self.register_buffer("running_mean", torch.zeros(units))
        self.register_buffer("running_var", torch.ones(units))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (T, B, N), mask (T, B) bool."""
        if self.training:
            y, mean, var, count = normalise(x, mask, self.weight, self.bias, self.eps, self.share.total if self.share else None)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * (count / (count - 1).clamp(min=1.0))).to(self.running_var), self.momentum)
            return y
        scale, shift = self.affine()
        return x * scale + shift

    def affine(self) -> tuple[Tensor, Tensor]:
        """The (scale, shift) that evaluation applies, each (N,)."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale


class Standardise(nn.Module):
    """Fixed (x - mean) / deviation with figures measured on the training data: (T, B, N) -> (T, B, N)."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("inverse", torch.ones(width))

    def fit(self, mean: Tensor, deviation: Tensor) -> None:
        """Takes both (N,); a channel that never changes is only centred."""
        self.mean.copy_(mean)
        self.inverse.copy_(torch.where(deviation > 1e-6, 1.0 / deviation.clamp(min=1e-6), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.inverse


class SequenceDropout(nn.Module):
    """Dropout with one mask per sequence, shared over time (paper 2, section III): (T, B, N) -> (T, B, N).

    With a `share`, masks of the whole batch are drawn and this process's rows taken, so that all processes draw alike.
    """

    share: Share | None = None

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        rows = self.share.batch if self.share else x.shape[1]
        keep = torch.empty(1, rows, *x.shape[2:], dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.rate)
        if self.share:
            keep = keep[:, self.share.rows]
        return x * (keep / (1.0 - self.rate))


def normed(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """What `norm`, a `SequenceNorm` or the identity in its place, makes of x (T, B, N)."""
    return norm(x, mask) if isinstance(norm, SequenceNorm) else x


def take_part(network: nn.Module, share: Share | None) -> None:
    """Gives every layer that looks across the batch its share of it; None: the batch is all here."""
    for module in network.modules():
        if isinstance(module, SequenceNorm | SequenceDropout):
            module.share = share


def step_mask(lengths: Tensor, steps: int) -> Tensor:
    """(B,) lengths -> (steps, B) bool, True where a step is real."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def at_end(sequence: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """The value of (T, B, N) at each row's last real step, or `before` (B, N) where a row has none."""
    index = lengths[None, :, None].expand(1, -1, sequence.shape[-1])
    return torch.cat([before[None], sequence]).gather(0, index)[0]
