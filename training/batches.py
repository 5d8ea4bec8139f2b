"""From clips to padded batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.augment import Augment
from training.datasets.clips import ClipSet, Frames


@dataclass(frozen=True)
class Batch:
    """Clips of unequal length, padded with zeros: frames (B, T, *frame shape), lengths (B,), labels (B,).

    `shares` (B,) is how much each clip counts in the loss; they add up to one over the batch that was drawn, also when processes divide it.
    """

    frames: Tensor
    lengths: Tensor
    labels: Tensor
    shares: Tensor

    def take(self, rows: slice) -> Batch:
        """These rows, padded no further than they need; there may be none, which is then one step of nothing."""
        lengths = self.lengths[rows]
        steps = int(lengths.max()) if len(lengths) else 1
        return Batch(self.frames[rows, :steps], lengths, self.labels[rows], self.shares[rows])

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.frames, self.lengths, self.labels, self.shares)))


def collate(clips: list[Frames], labels: list[int], weights: npt.NDArray[np.float64] | None = None) -> Batch:
    """Pads clips to the longest of them; `weights` (classes,) is how much a clip of each class counts, by default all the same."""
    lengths = [len(clip) for clip in clips]
    frames = np.zeros((len(clips), max(lengths), *clips[0].shape[1:]), np.float32)
    for row, clip in zip(frames, clips, strict=True):
        row[: len(clip)] = clip
    shares = np.ones(len(clips)) if weights is None else weights[labels]
    return Batch(torch.from_numpy(frames), torch.tensor(lengths), torch.tensor(labels), torch.tensor(shares / shares.sum(), dtype=torch.float32))


def training_batches(
    clips: ClipSet, size: int, augment: Augment, max_frames: int, seed: tuple[int, ...], weights: npt.NDArray[np.float64] | None = None
) -> Iterator[Batch]:
    """One epoch: every clip once, long ones once per `max_frames`, in random order, changed at random. Equal seeds give equal batches.

    Clips of similar length share a batch, as padding costs as much as frames: the order is shuffled, then, after the clips were changed,
    sorted in runs of eight batches. Each draw has a generator of its own, so what becomes of a clip depends on no other.
    """
    rng = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(len(clips)), _visits(clips, max_frames))
    order = rng.permutation(len(drawn))
    for first in range(0, len(order), 8 * size):
        run = order[first : first + 8 * size]
        changed = [_changed(clips.frames[drawn[i]], augment, max_frames, np.random.default_rng((*seed, 1 + int(i)))) for i in run]
        by_length = np.argsort([len(clip) for clip in changed], kind="stable")
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        for index in rng.permutation(len(batches)):
            chosen = batches[index]
            yield collate([changed[i] for i in chosen], clips.labels[drawn[run[chosen]]].tolist(), weights)


def epoch_batches(clips: ClipSet, size: int, max_frames: int) -> int:
    """How many batches `training_batches` yields."""
    return -(-int(_visits(clips, max_frames).sum()) // size)


def _visits(clips: ClipSet, max_frames: int) -> np.ndarray:
    """How often an epoch draws from each clip."""
    return np.array([max(1, round(len(clip) / max_frames)) for clip in clips.frames])


def evaluation_batches(clips: ClipSet, size: int = 64) -> Iterator[tuple[Batch, np.ndarray]]:
    """Whole clips as they are, longest first, with their indices."""
    order = np.argsort([-len(clip) for clip in clips.frames], kind="stable")
    for i in range(0, len(order), size):
        chosen = order[i : i + size]
        yield collate([clips.frames[j] for j in chosen], clips.labels[chosen].tolist()), chosen


def _changed(clip: Frames, augment: Augment, longest: int, rng: np.random.Generator) -> Frames:
    """Augmented, and of that a random stretch of consecutive frames: a stream knows no other kind."""
    clip = augment(clip, rng)
    start = rng.integers(0, max(0, len(clip) - longest) + 1)
    return clip[start : start + longest]
