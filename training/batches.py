"""From clips and streams to batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.augment import Augment
from training.datasets.clips import ClipSet, Frames
from training.streams import NO_CLASS, Stream, Streams

SHORT = 4  # frames: of a shorter action none is made to count for the whole


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded with zeros: frames (B, T, *frame shape), lengths (B,), and of each step labels, weights and judged, (B, T).

    `weights` is how much a step counts in the loss; they add up to one over the batch that was drawn, also when processes divide it. `judged`
    are the steps by which accuracy is told: of a clip its last, of a stream all that have a class. Where a label is `NO_CLASS` the weight is zero.
    """

    frames: Tensor
    lengths: Tensor
    labels: Tensor
    weights: Tensor
    judged: Tensor

    def take(self, rows: slice) -> Batch:
        """These rows, padded no further than they need; there may be none, which is then one step of nothing."""
        lengths = self.lengths[rows]
        steps = int(lengths.max()) if len(lengths) else 1
        return Batch(self.frames[rows, :steps], lengths, self.labels[rows, :steps], self.weights[rows, :steps], self.judged[rows, :steps])

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.frames, self.lengths, self.labels, self.weights, self.judged)))


@dataclass(frozen=True)
class Weighting:
    """What steps count in the loss: `early` at the first of an action, rising to 1 at its last; `last`: nothing but the last.

    `classes` is how much an action of each class counts, by default all the same; `nothing` a step between actions of a stream, of which so few as lead
    up to an action count together like `least_pause`. `action`: an action of a stream counts like one of so many frames, however long it is, unless it
    has less than `SHORT`; 0: the longer it is, the more it counts.
    """

    early: float = 1.0
    last: bool = False
    classes: npt.NDArray[np.float64] | None = None
    nothing: float = 1.0
    least_pause: int = 0
    action: int = 0

    def pause(self, count: int) -> float:
        """Of each of so many steps that lead up to an action."""
        return self.nothing * max(1.0, self.least_pause / count)

    def steps(self, count: int) -> npt.NDArray[np.float64]:
        """Of an action of so many steps, (count,); the only step is the last."""
        place = np.arange(count) / (count - 1) if count > 1 else np.ones(1)
        return (place == 1).astype(float) if self.last else self.early + (1 - self.early) * place

    def inside(self, count: int) -> npt.NDArray[np.float64]:
        """Of an action of so many steps in a stream, (count,)."""
        return self.steps(count) * (self.action / max(count, SHORT) if self.action else 1.0)

    def of(self, label: int) -> float:
        return 1.0 if self.classes is None else float(self.classes[label])


def collate(clips: list[Frames], labels: list[int], weighting: Weighting | None = None) -> Batch:
    """Pads clips to the longest of them; each has its share of the batch, whatever its length."""
    weighting = weighting or Weighting()
    lengths = [len(clip) for clip in clips]
    frames = np.zeros((len(clips), max(lengths), *clips[0].shape[1:]), np.float32)
    weights, judged = np.zeros(frames.shape[:2]), np.zeros(frames.shape[:2], bool)
    shares = np.array([weighting.of(label) for label in labels])
    for i, (clip, share) in enumerate(zip(clips, shares / shares.sum(), strict=True)):
        frames[i, : len(clip)] = clip
        steps = weighting.steps(len(clip))
        weights[i, : len(clip)] = share * (steps / steps.sum())
        judged[i, len(clip) - 1] = True
    every = torch.tensor(labels)[:, None].expand(-1, frames.shape[1])
    return Batch(torch.from_numpy(frames), torch.tensor(lengths), every, torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(judged))


def stream_batches(streams: Streams, size: int, seed: tuple[int, ...], weighting: Weighting) -> Iterator[Batch]:
    """One epoch: `size` streams side by side, batch after batch going on where the one before ended. Equal seeds give equal batches.

    Each stream has a generator of its own, so what comes in it depends on no other.
    """
    c = streams.config
    rows = [_Row(streams.pieces(np.random.default_rng((*seed, i))), weighting) for i in range(size)]
    for _ in range(c.steps):
        frames = np.empty((size, c.frames, *streams.clips.frame_shape), np.float32)
        labels, weights = np.empty((size, c.frames), np.int64), np.empty((size, c.frames))
        for i, row in enumerate(rows):
            row.fill(frames[i], labels[i], weights[i])
        weights /= max(weights.sum(), 1e-9)  # nothing but frames without a class: nothing to learn
        tensors = (torch.from_numpy(values) for values in (labels, weights.astype(np.float32), labels != NO_CLASS))
        yield Batch(torch.from_numpy(frames), torch.full((size,), c.frames), *tensors)


class _Row:
    """One stream of a batch: pieces are poured from one batch to the next."""

    def __init__(self, pieces: Iterator[Stream], weighting: Weighting) -> None:
        self.pieces, self.weighting = pieces, weighting
        self.piece, self.weights, self.done = next(pieces), np.zeros(0), 0
        self.weights = self._weights()

    def fill(self, frames: Frames, labels: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]) -> None:
        """The next frames of the stream, as many as there is room for."""
        at = 0
        while at < len(frames):
            if self.done == len(self.piece.frames):
                self.piece, self.done = next(self.pieces), 0
                self.weights = self._weights()
            count = min(len(frames) - at, len(self.piece.frames) - self.done)
            here, there = slice(at, at + count), slice(self.done, self.done + count)
            frames[here], labels[here], weights[here] = self.piece.frames[there], self.piece.labels[there], self.weights[there]
            at, self.done = at + count, self.done + count

    def _weights(self) -> npt.NDArray[np.float64]:
        weights = np.where(self.piece.labels == NO_CLASS, 0.0, self.weighting.nothing)
        before = 0
        for first, end, label in self.piece.segments.tolist():
            if first > before and weights[before]:
                weights[before:first] = self.weighting.pause(first - before)
            weights[first:end] = self.weighting.inside(end - first) * self.weighting.of(label)
            before = end
        return weights


def training_batches(
    clips: ClipSet, size: int, augment: Augment, max_frames: int, seed: tuple[int, ...], weighting: Weighting | None = None
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
            yield collate([changed[i] for i in chosen], clips.labels[drawn[run[chosen]]].tolist(), weighting)


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
