"""The IndRNN layer: a linear map, then the elementwise recurrence (Li et al., CVPR 2018)."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from model.config import Activation, ModelConfig
from model.recurrence import recur

Memory = Literal["every", "last", "ones", "normal"]
Map = TypeVar("Map", nn.Linear, nn.Conv1d)
PENALTY = 100.0  # weight of the squares by which |u| is above its bound: an excess of 0.01 costs as much as 0.01 of loss


def recurrent_bound(horizon: int, remainder: float = 0.01) -> float:
    """Largest |u| under which no more than `remainder` of a state is left after `horizon` steps: remainder^(1/horizon) < 1.

    A model that runs on endless streams needs it: with |u| = 1 a unit integrates for ever.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1 frame, got {horizon}")
    return float(remainder ** (1.0 / horizon))


class Recurrence(nn.Module):
    """The recurrence alone, h[t] = activation(z[t] + u * h[t-1]), with its own vector u of `units` weights in [-bound, bound].

    `memory` says how u starts (after paper 2, section III):
    "every", for a score at every step: Uniform(0, bound), so that units keep memories of all lengths;
    "last", for a layer of whose outputs only the last is used: Uniform(remainder^(2/horizon), bound), long memories only;
    "ones", for the same: all at the bound, the longest memory there is;
    "normal", for language models: Normal(0.4, 0.2), inside the bound.

    With `penalised` u may leave its bound, at a price: see `penalty`. Called with keep, it keeps that share of h[t-1] at each step.
    """

    def __init__(
        self, units: int, bound: float = 1.0, memory: Memory = "every", horizon: int = 32, activation: Activation = "relu", *, penalised: bool = False
    ) -> None:
        super().__init__()
        self.units, self.bound, self.activation, self.penalised = units, bound, activation, penalised
        self.u = nn.Parameter(_start(units, bound, memory, horizon))

    @classmethod
    def of(cls, config: ModelConfig, units: int, *, last: bool = False) -> Recurrence:
        """As the configuration has it; `last` marks the last recurrence of a stack, to which "last" and "ones" apply."""
        return cls(units, **_options(config, last))

    def forward(self, z: Tensor, h: Tensor, mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (T, B, units), h (B, units), mask (T, B), keep (T, B) -> all states (T, B, units) and the last one (B, units); needs T >= 1."""
        y = recur(z, self.u, h, mask, self.activation, keep)
        return y, y[-1]  # masked steps repeat the state, so the last row is the state of every stream

    @torch.no_grad()
    def clamp_(self) -> None:
        """Puts u back into [-bound, bound], unless it is penalised; called after every optimiser step."""
        if not self.penalised:
            self.u.clamp_(-self.bound, self.bound)

    def penalty(self) -> Tensor:
        """What to add to the loss for u outside its bound: a scalar; zero inside, and where u is clamped."""
        excess = torch.relu(self.u.abs() - self.bound) if self.penalised else self.u.new_zeros(1)
        return PENALTY * excess.square().sum()


class ScoreAverage(nn.Module):
    """Averages class probabilities over the past, those `frames` steps ago counting a hundredth.

    A recurrence with fixed weights: sums of probabilities and of weights both decay, and their quotient is the average from the first step
    on. Neither is ever negative, so the ReLU of `recur` leaves them as they are.
    """

    decay: Tensor

    def __init__(self, classes: int, frames: int) -> None:
        super().__init__()
        self.state_width = classes + 1
        self.register_buffer("decay", torch.full((classes + 1,), recurrent_bound(frames)), persistent=False)

    def forward(self, logits: Tensor, h: Tensor, mask: Tensor, weight: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits (T, B, classes), h (B, classes + 1), mask (T, B) -> averaged probabilities (T, B, classes), next state.

        `weight` (T, B, 1), positive, says how much each step counts; one, where there is none. `keep` (T, B): the share of it that the past keeps at each step.
        """
        p = torch.softmax(logits, -1)
        weight = torch.ones_like(p[..., :1]) if weight is None else weight
        sums = recur(torch.cat([p * weight, weight], -1), self.decay, h, mask, keep=keep)
        return sums[..., :-1] / sums[..., -1:].clamp(min=1e-6), sums[-1]  # a row that has not begun has neither


class IndRNN(nn.Module):
    """Linear map and recurrence: (T, B, inputs) -> (T, B, units). Weights: Kaiming; `options` are those of `Recurrence`."""

    def __init__(self, inputs: int, units: int, bound: float = 1.0, memory: Memory = "every", horizon: int = 32, **options: Any) -> None:
        super().__init__()
        self.linear = kaiming(nn.Linear(inputs, units), options.get("activation", "relu"))
        self.recurrence = Recurrence(units, bound, memory, horizon, **options)

    @classmethod
    def of(cls, config: ModelConfig, inputs: int, units: int, *, last: bool = False) -> IndRNN:
        """As the configuration has it; see `Recurrence.of`."""
        return cls(inputs, units, **_options(config, last))

    def forward(self, x: Tensor, h: Tensor, mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.recurrence(self.linear(x), h, mask, keep)  # type: ignore[no-any-return]


def kaiming(layer: Map, activation: Activation = "relu") -> Map:
    """Fresh weights that keep the size of what passes through (He et al., 2015), biases zero; returns the layer itself."""
    assert layer.bias is not None
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear" if activation == "identity" else activation)
    nn.init.zeros_(layer.bias)
    return layer


def _options(config: ModelConfig, last: bool) -> dict[str, Any]:
    """What `Recurrence` takes beside its units."""
    return {
        "bound": recurrent_bound(config.horizon) if config.horizon else 1.0,
        "memory": config.memory if last or config.memory == "normal" else "every",
        "horizon": config.horizon or 32,
        "activation": config.activation,
        "penalised": config.bound == "penalty",
    }


def _start(units: int, bound: float, memory: Memory, horizon: int) -> Tensor:
    """Fresh u."""
    u = torch.empty(units)
    if memory == "normal":
        return u.normal_(0.4, 0.2).clamp_(-bound, bound)
    low = {"every": 0.0, "last": min(recurrent_bound(max(1, horizon // 2)), bound), "ones": bound}[memory]
    return u.uniform_(low, bound)
