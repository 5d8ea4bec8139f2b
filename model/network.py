"""The whole network: causal features, a recurrent stack, a linear head; and the one state row that all of it shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import skeletons
from model.backbones import backbone
from model.config import ModelConfig
from model.features import ChannelFeatures, SkeletonFeatures
from model.indrnn import Recurrence, ScoreAverage
from model.layers import SequenceDropout, step_mask


class Network(nn.Module):
    """frames (B, T, *frame_shape), lengths (B,), state (B, state_width) -> logits (B, T, classes), next state.

    Batch first, as in the contract; time-major inside. The state row holds the features' part, then one part per layer.
    """

    def __init__(self, config: ModelConfig, frame_shape: tuple[int, ...], classes: int, layout: str | None = None) -> None:
        super().__init__()
        self.config, self.frame_shape, self.classes, self.layout = config, frame_shape, classes, layout
        self.features = _features(config, frame_shape, layout)
        self.input_dropout = SequenceDropout(config.input_dropout)
        self.backbone = backbone(self.features.width, config)
        self.head = nn.Linear(self.backbone.width, classes)
        self.average = ScoreAverage(classes, config.average) if config.average else None
        self.state_widths = [self.features.state_width, *self.backbone.state_widths, *([self.average.state_width] if self.average else [])]

    @property
    def state_width(self) -> int:
        return sum(self.state_widths)

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.state_width, device=self.head.weight.device)

    def forward(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        _, logits, next_state = self.outputs(frames, lengths, state)
        return logits, next_state

    def outputs(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of each step alone, logits to go by (the same, unless scores are averaged), both (B, T, classes), and the next state."""
        steps, averaged, next_state = self._run(frames, lengths, state)
        steps = steps.transpose(0, 1)
        return steps, steps if averaged is None else averaged.transpose(0, 1).clamp(min=1e-9).log(), next_state

    def scores(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (B, T, classes) and the next state: what is exported."""
        steps, averaged, next_state = self._run(frames, lengths, state)
        return (torch.softmax(steps, -1) if averaged is None else averaged).transpose(0, 1), next_state

    def _run(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Time-major: logits of each step (T, B, classes), averaged probabilities if any, next state."""
        x = frames.transpose(0, 1)
        mask = step_mask(lengths, x.shape[0])
        layers = len(self.backbone.state_widths)
        parts = torch.split(state, self.state_widths, dim=1)
        x, features_end = self.features(x, lengths, parts[0])
        x, ends = self.backbone(self.input_dropout(x), list(parts[1 : layers + 1]), mask)
        logits = self.head(x)
        if self.average is None:
            return logits, None, torch.cat([features_end, *ends], dim=1)
        averaged, average_end = self.average(logits, parts[-1], mask)
        return logits, averaged, torch.cat([features_end, *ends, average_end], dim=1)

    def clamp_recurrent_(self) -> None:
        """Puts every recurrent weight back inside its bound; after each optimiser step."""
        for module in self.modules():
            if isinstance(module, Recurrence):
                module.clamp_()

    @torch.no_grad()
    def fit_features(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Measures mean and deviation of the features on training batches (frames, lengths), before training starts."""
        rows = []
        for frames, lengths in batches:
            features, _ = self.features(frames.transpose(0, 1), lengths, frames.new_zeros(len(frames), self.features.state_width))
            rows.append(features[step_mask(lengths, frames.shape[1])])
        values = torch.cat(rows)
        self.features.standardise.fit(values.mean(0), values.std(0, unbiased=False))


def _features(config: ModelConfig, frame_shape: tuple[int, ...], layout: str | None) -> ChannelFeatures | SkeletonFeatures:
    if layout is None:
        if len(frame_shape) != 1:
            raise ValueError(f"frames of shape {frame_shape} without a layout: expected (channels,); name the skeleton's layout")
        return ChannelFeatures(frame_shape[0], positions=config.positions, motion=config.motion, missing=config.missing)
    names = skeletons.layout(layout)
    if names.dimensions != 3:
        raise ValueError(f"layout {layout} has {names.dimensions} coordinates a joint; skeleton features need three")
    if frame_shape != (len(names.joints), 3):
        raise ValueError(f"layout {layout} has frames of shape ({len(names.joints)}, 3), got {frame_shape}")
    sides = [tuple(names.index(f"{side}_{joint}") for joint in ("hip", "shoulder")) for side in ("left", "right")]
    root = (names.index("left_hip"), names.index("right_hip"))
    return SkeletonFeatures(len(names.joints), root, *sides, view=config.view, positions=config.positions, motion=config.motion, missing=config.missing)
