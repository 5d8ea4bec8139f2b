"""The whole network: causal features, a recurrent stack, a linear head, what clears the stack; and the one state row that all of it shares."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import skeletons
from model.backbones import backbone
from model.boundary import Boundary
from model.config import ModelConfig
from model.contract import Architecture
from model.convolution import PointConvolution
from model.features import ChannelFeatures, SkeletonFeatures
from model.indrnn import Recurrence, ScoreAverage
from model.layers import SequenceDropout, step_mask
from model.tokens import TokenFeatures


class Outputs(NamedTuple):
    """What a network is taught by: logits of each step alone, and those to go by (the same, unless scores are averaged), both (B, T, classes);
    the next state; and logits (B, T) that something new has just begun, where `reset` is soft.
    """

    steps: Tensor
    logits: Tensor
    state: Tensor
    boundary: Tensor | None


class Network(nn.Module):
    """frames (B, T, *frame_shape), lengths (B,), state (B, state_width) -> logits (B, T, classes), next state.

    Batch first, as in the contract; time-major inside. The state row holds the features' part, then one part per
    layer, the average's and those of the boundary stack, where there are such.
    With `head="tokens"` frames are ids, of shape (1,), and the classes are the vocabulary. Raises `ValueError` when frames, layout and
    configuration do not go together.
    """

    def __init__(self, config: ModelConfig, frame_shape: tuple[int, ...], classes: int, layout: str | None = None) -> None:
        super().__init__()
        self.config, self.frame_shape, self.classes, self.layout = config, frame_shape, classes, layout
        self.features = _features(config, frame_shape, classes, layout)
        self.input_dropout = SequenceDropout(config.input_dropout)
        self.convolution = None if isinstance(self.features, TokenFeatures) or not config.filters else PointConvolution(self.features.blocks, config)
        self.backbone = backbone(self.convolution.width if self.convolution else self.features.width, config)
        self.head = nn.Linear(self.backbone.width, classes + config.weighted)  # what a step counts is one more output
        self.average = ScoreAverage(classes, config.average) if config.average else None
        self.layer_widths = [*(self.convolution.state_widths if self.convolution else []), *self.backbone.state_widths]  # state of each recurrent layer
        self.boundary = Boundary(self.features.width, config) if config.reset == "soft" else None
        behind = [*([self.average.state_width] if self.average else []), *(self.boundary.state_widths if self.boundary else [])]
        self.state_widths = [self.features.state_width, *self.layer_widths, *behind]

    @property
    def state_width(self) -> int:
        return sum(self.state_widths)

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.state_width, device=self.head.weight.device)

    def forward(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        found = self.outputs(frames, lengths, state)
        return found.logits, found.state

    def outputs(self, frames: Tensor, lengths: Tensor, state: Tensor) -> Outputs:
        """All that training looks at."""
        steps, averaged, next_state, boundary = self._run(frames, lengths, state)
        steps = steps.transpose(0, 1)
        logits = steps if averaged is None else averaged.transpose(0, 1).clamp(min=1e-9).log()
        return Outputs(steps, logits, next_state, None if boundary is None else boundary.transpose(0, 1))

    def scores(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (B, T, classes) and the next state: what is exported."""
        steps, averaged, next_state, _ = self._run(frames, lengths, state)
        return (torch.softmax(steps, -1) if averaged is None else averaged).transpose(0, 1), next_state

    def _run(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Time-major: logits of each step (T, B, classes), averaged probabilities if any, next state, logits of a boundary (T, B) if any."""
        x = frames.transpose(0, 1)
        mask = step_mask(lengths, x.shape[0])
        parts = list(torch.split(state, self.state_widths, dim=1))
        first, *states = parts[: 1 + len(self.layer_widths)]
        behind = parts[1 + len(self.layer_widths) :]
        x, features_end = self.features(x, lengths, first)
        boundary, boundary_ends = None, list[Tensor]()
        gate: dict[str, Tensor] = {}  # baselines take none, nor are they given one
        if self.boundary is not None:
            boundary, gate["keep"], boundary_ends = self.boundary(x, behind[-len(self.boundary.state_widths) :], mask)
        x, ends = self.input_dropout(x), []
        if self.convolution is not None:
            x, ends = self.convolution(x, states[:1], mask, **gate)
        x, backbone_ends = self.backbone(x, states[len(ends) :], mask, **gate)
        ends = [features_end, *ends, *backbone_ends]
        logits = self.head(x)
        if self.average is None:
            return logits, None, torch.cat([*ends, *boundary_ends], dim=1), boundary
        weight = None
        if self.config.weighted:  # at least a thousandth, so that a stream begins with an average; softmax of two is a sigmoid that exports exactly
            logits, trust = logits[..., :-1], logits[..., -1:]
            weight = torch.softmax(torch.cat([trust, torch.zeros_like(trust)], -1), -1)[..., :1] + 1e-3
        averaged, average_end = self.average(logits, behind[0], mask, weight, **gate)
        return logits, averaged, torch.cat([*ends, average_end, *boundary_ends], dim=1), boundary

    def clamp_recurrent_(self) -> None:
        """Puts every recurrent weight back inside its bound; after each optimiser step. Does nothing where the bound is kept by `penalty`."""
        for recurrence in self._recurrences():
            recurrence.clamp_()

    def penalty(self) -> Tensor:
        """What to add to the loss for recurrent weights outside their bound, a scalar: zero unless `bound = "penalty"`."""
        return sum((recurrence.penalty() for recurrence in self._recurrences()), self.head.weight.new_zeros(()))

    def horizon(self) -> int:
        """Frames after which no more than a hundredth of any unit's state is left; 0: nothing bounds it.

        The configured one where u is clamped to it; what the weights came to where it was kept by a penalty. A reset only shortens it.
        """
        if self.config.bound == "clamp":
            return max(self.config.horizon, self.config.boundary_horizon) if self.config.horizon and self.boundary else self.config.horizon
        largest = max(float(recurrence.u.detach().abs().max()) for recurrence in self._recurrences())
        return 0 if largest >= 1 else max(1, math.ceil(math.log(0.01) / math.log(max(largest, 1e-9))))

    def architecture(self) -> Architecture:
        """What the network is, for the manifest. A dense stack counts all its recurrent layers; its units are those of the widest.
        What finds boundaries counts among the parameters alone.
        """
        config = self.config
        dense = config.kind == "dense"
        words = (
            config.kind,
            config.activation if config.activation != "relu" else "",
            "convolution" if self.convolution else "",
            "soft reset" if self.boundary else "",
        )
        return Architecture(
            kind=", ".join(word for word in words if word),
            layers=len(self.layer_widths) if dense else config.layers + bool(self.convolution),
            units=max(self.layer_widths) if dense else config.units,
            parameters=sum(p.numel() for p in self.parameters()),
        )

    def _recurrences(self) -> list[Recurrence]:
        return [module for module in self.modules() if isinstance(module, Recurrence)]

    @torch.no_grad()
    def fit_features(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Measures mean and deviation of the features on training batches (frames, lengths), before training starts.

        Tokens have neither, but an id that is not in the vocabulary is found here.
        """
        rows = []
        for frames, lengths in batches:
            features, _ = self.features(frames.transpose(0, 1), lengths, frames.new_zeros(len(frames), self.features.state_width))
            rows.append(features[step_mask(lengths, frames.shape[1])])
        if isinstance(self.features, TokenFeatures):
            return
        values = torch.cat(rows)
        self.features.standardise.fit(values.mean(0), values.std(0, unbiased=False))


def _features(config: ModelConfig, frame_shape: tuple[int, ...], classes: int, layout: str | None) -> ChannelFeatures | SkeletonFeatures | TokenFeatures:
    if config.head == "tokens":
        if frame_shape != (1,) or layout is not None:
            raise ValueError(f"tokens are frames of shape (1,) without a layout, got {frame_shape}" + (f", layout {layout}" if layout else ""))
        return TokenFeatures(classes, config.units)
    if layout is None:
        if len(frame_shape) != 1:
            raise ValueError(f"frames of shape {frame_shape} without a layout: expected (channels,); name the skeleton's layout")
        if config.bones:
            raise ValueError("bones = true needs a skeleton: channels have none; name the layout, or leave bones out")
        return ChannelFeatures(frame_shape[0], positions=config.positions, motion=config.motion, missing=config.missing)
    names = skeletons.layout(layout)
    if names.dimensions != 3:
        raise ValueError(f"layout {layout} has {names.dimensions} coordinates a joint; skeleton features need three")
    if frame_shape != (len(names.joints), 3):
        raise ValueError(f"layout {layout} has frames of shape ({len(names.joints)}, 3), got {frame_shape}")
    sides = [tuple(names.index(f"{side}_{joint}") for joint in ("hip", "shoulder")) for side in ("left", "right")]
    root = (names.index("left_hip"), names.index("right_hip"))
    return SkeletonFeatures(
        len(names.joints), root, *sides, view=config.view, positions=config.positions, motion=config.motion, missing=config.missing,
        parents=tuple(j if p < 0 else p for j, p in enumerate(names.parents)) if config.bones else (),
    )  # fmt: skip
