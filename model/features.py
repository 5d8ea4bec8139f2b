"""Causal features, computed inside the network and so inside the exported file: what a frame means, given the frames before it.

Each module turns raw frames (T, B, *frame shape) and its part of the state row (B, state_width) into features (T, B, width) and the
next state. The state is what was last seen of each joint or channel, with a mark that it was seen at all; zeros mean nothing yet.
Nothing depends on how long a stream has been running.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import Standardise, at_end
from model.recurrence import hold


class LastSeen(nn.Module):
    """Fills in missing values with the last one seen, and gives each step its predecessor.

    Works on P points (joints or channels) of D numbers: a point is missing when any of its numbers is NaN.
    """

    def __init__(self, points: int, dimensions: int, missing: bool) -> None:
        super().__init__()
        self.points, self.dimensions, self.missing = points, dimensions, missing
        self.state_width = points * (dimensions + 1)

    def forward(self, x: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (T, B, P, D) -> values and their predecessors, both (T, B, P, D + 1), validity (T, B, P, 1), next state.

        The extra number is 1 once the point has been seen, else 0; a point not yet seen has zeros.
        """
        valid = ~torch.isnan(x).any(-1, keepdim=True) if self.missing else torch.ones_like(x[..., :1], dtype=torch.bool)
        marked = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        if self.missing:
            flat = torch.where(valid, marked, 0.0).flatten(2)
            marked = hold(flat, valid.expand_as(marked).flatten(2), state).reshape(marked.shape)
        before = torch.cat([state.reshape(1, -1, self.points, self.dimensions + 1), marked[:-1]])
        return marked, before, valid, at_end(marked.flatten(2), lengths, state)


class ChannelFeatures(nn.Module):
    """For frames that are plain channels (C,): values, what changed since the previous frame, and what is missing."""

    def __init__(self, channels: int, *, positions: bool, motion: bool, missing: bool) -> None:
        super().__init__()
        self.positions, self.motion, self.missing = positions, motion, missing
        self.last_seen = LastSeen(channels, 1, missing)
        self.state_width = self.last_seen.state_width
        self.width = channels * (positions + motion + missing)
        self.blocks = [(channels, 1)] * (positions + motion + missing)  # of what the features are made: (points, numbers of each)
        self.standardise = Standardise(self.width)

    def forward(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        now, before, valid, next_state = self.last_seen(frames[..., None], lengths, state)
        parts = []
        if self.positions:
            parts.append(now[..., 0])
        if self.motion:
            parts.append((now[..., 0] - before[..., 0]) * before[..., 1])
        if self.missing:
            parts.append(1.0 - valid[..., 0].to(now.dtype))
        return self.standardise(torch.cat(parts, -1)), next_state


class SkeletonFeatures(nn.Module):
    """For frames of joints (J, 3): positions about the body's root, bones, motion of each joint, and which joints are missing.

    The root is the mean of `root` joints; of all joints seen, while none of those has been. With `view="body"` the body is turned about
    the vertical axis so that the line from the `right` to the `left` joints, which come in pairs, always points the same way. That makes
    the features the same from every camera. With `parents`, the joint that each hangs on (itself, for the root), there are bones: where a
    joint lies, seen from its parent.
    """

    root: Tensor
    left: Tensor
    right: Tensor
    parents: Tensor

    def __init__(
        self,
        joints: int,
        root: tuple[int, ...],
        left: tuple[int, ...],
        right: tuple[int, ...],
        *,
        view: str,
        positions: bool,
        motion: bool,
        missing: bool,
        parents: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        for name, joints_of in (("root", root), ("left", left), ("right", right), ("parents", parents)):
            self.register_buffer(name, torch.tensor(joints_of, dtype=torch.int64), persistent=False)
        self.view, self.positions, self.motion, self.missing, self.bones = view, positions, motion, missing, bool(parents)
        self.last_seen = LastSeen(joints, 3, missing)
        self.state_width = self.last_seen.state_width
        turning = [(1, 2)] * (view == "body" and motion)
        self.blocks = [(joints, 3)] * (positions + self.bones + motion) + turning + [(joints, 1)] * missing  # what they are made of: (points, numbers of each)
        self.width = sum(points * numbers for points, numbers in self.blocks)
        self.standardise = Standardise(self.width)

    def forward(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """frames (T, B, J, 3)."""
        now, before, valid, next_state = self.last_seen(frames, lengths, state)
        seen = now[..., 3:]
        position = (now[..., :3] - self._centre(now)) * seen
        motion = (now[..., :3] - before[..., :3]) * before[..., 3:]
        parts = []
        if self.view == "body":
            heading, clear = self._heading(torch.cat([before[:1], now]))
            position, motion = _turn(position, heading[1:]), _turn(motion, heading[1:])
        if self.positions:
            parts.append(position.flatten(2))
        if self.bones:
            both = seen * seen.index_select(2, self.parents)
            parts.append(((position - position.index_select(2, self.parents)) * both).flatten(2))
        if self.motion:
            parts.append(motion.flatten(2))
            if self.view == "body":  # turning on the spot is lost by the change of axes: give it back
                parts.append(_turning(heading, clear))
        if self.missing:
            parts.append(1.0 - valid[..., 0].to(now.dtype))
        return self.standardise(torch.cat(parts, -1)), next_state

    def _centre(self, marked: Tensor) -> Tensor:
        """Mean of those root joints that were seen, or of all joints that were: (T, B, 1, 3)."""
        root = marked.index_select(2, self.root)
        return torch.where(root[..., 3:].amax(2, keepdim=True) > 0, _mean(root), _mean(marked))

    def _heading(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the body's direction about the vertical axis, (T, B, 1, 2), and whether it has one, (T, B, 1).

        Only pairs of which both sides were seen count; straight ahead where there is none.
        """
        left, right = marked.index_select(2, self.left), marked.index_select(2, self.right)
        across = _mean(torch.cat([left[..., :3] - right[..., :3], left[..., 3:] * right[..., 3:]], -1))
        x, z = -across[..., 0], -across[..., 2]  # a person facing the sensor has the left at smaller x
        square = x * x + z * z
        clear = square > 1e-6
        length = torch.sqrt(torch.where(clear, square, 1.0))  # the root of zero has no gradient
        return torch.stack([torch.where(clear, x / length, 1.0), torch.where(clear, z / length, 0.0)], -1), clear


def _turning(heading: Tensor, clear: Tensor) -> Tensor:
    """Cosine less one and sine of the change of heading, from headings (T + 1, B, 1, 2): (T, B, 2); zero where either has no direction."""
    now, before = heading[1:, :, 0], heading[:-1, :, 0]
    cosine, sine = (now * before).sum(-1) - 1.0, before[..., 0] * now[..., 1] - before[..., 1] * now[..., 0]
    return torch.stack([cosine, sine], -1) * (clear[1:] & clear[:-1]).to(now.dtype)


def _mean(marked: Tensor) -> Tensor:
    """Mean over those points of (T, B, P, 4) whose mark is 1, (T, B, 1, 3); zero where there is none."""
    return (marked[..., :3] * marked[..., 3:]).sum(2, keepdim=True) / marked[..., 3:].sum(2, keepdim=True).clamp(min=1.0)


def _turn(vectors: Tensor, heading: Tensor) -> Tensor:
    """Turns (T, B, J, 3) about the y axis so that a body with this heading faces the sensor."""
    cosine, sine = heading[..., 0], heading[..., 1]
    x, y, z = vectors.unbind(-1)
    return torch.stack([cosine * x + sine * z, y, cosine * z - sine * x], -1)
