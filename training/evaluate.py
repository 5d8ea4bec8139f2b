"""How right a network is: on clips, by the score at their last frame, and along them; on streams, action by action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.layers import step_mask
from model.network import Network
from training.batches import evaluation_batches
from training.datasets.clips import ClipSet
from training.distributed import Group
from training.streams import NO_CLASS, Stream

STREAM_CHUNK = 512  # frames of a stream run at once


@dataclass(frozen=True)
class Evaluation:
    """`scores` (N, classes) at each clip's last frame; `frame_accuracy` is the share of all frames whose best class is right.

    `copied` (N,) says which clips are training clips as well, where somebody looked (`Splits.copies`).
    """

    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    loss: float
    frame_accuracy: float
    copied: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], frame_accuracy: float = float("nan")) -> Evaluation:
        """With the loss that the scores come to."""
        loss = -np.log(np.maximum(scores[np.arange(len(labels)), labels], 1e-9)).mean()
        return cls(scores, labels, float(loss), frame_accuracy)

    @property
    def accuracy(self) -> float:
        return float((self.scores.argmax(1) == self.labels).mean())

    @property
    def copies(self) -> int:
        """How many clips are training clips as well."""
        return 0 if self.copied is None else int(self.copied.sum())

    @property
    def accuracy_without_copies(self) -> float:
        """NaN where nothing else is left."""
        fresh = np.ones(len(self.labels), bool) if self.copied is None else ~self.copied
        return float((self.scores.argmax(1) == self.labels)[fresh].mean()) if fresh.any() else float("nan")

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(classes, classes): rows are true, columns predicted."""
        matrix = np.zeros((self.scores.shape[1],) * 2, np.int64)
        np.add.at(matrix, (self.labels, self.scores.argmax(1)), 1)
        return matrix


@dataclass(frozen=True)
class StreamEvaluation:
    """Of streams left running from the zero state: `accuracy` is the share of actions most of whose frames were given their class, nothing being
    one that is wrong; `frame_accuracy` that of frames in actions, `nothing_accuracy` that of the others (NaN where there are none, or no class for
    them); `loss` the mean over all frames that have a class."""

    accuracy: float
    frame_accuracy: float
    nothing_accuracy: float
    loss: float


@torch.no_grad()
def evaluate(network: Network, clips: ClipSet, group: Group | None = None) -> Evaluation:
    """Runs every clip from the zero state, whole, on the network's device; a group of processes divides the clips.

    A network that was taught streams may have one class more than the clips, that of nothing: to say it of a clip is wrong.
    """
    group, device = group or Group(), network.head.weight.device
    was_training = network.training
    network.eval()
    scores = torch.zeros(len(clips), network.classes)
    counts = torch.zeros(2, dtype=torch.float64)  # frames that are right, frames
    for i, (batch, index) in enumerate(evaluation_batches(clips)):
        if i % group.size != group.rank:
            continue
        batch = batch.to(device)
        logits, _ = network(batch.frames, batch.lengths, network.initial_state(len(index)))
        last = logits[torch.arange(len(index), device=device), batch.lengths - 1]
        scores[index] = torch.softmax(last, -1).cpu()
        real = step_mask(batch.lengths, batch.frames.shape[1]).T
        counts += torch.stack([((logits.argmax(-1) == batch.labels) & real).sum(), batch.lengths.sum()]).cpu()
    network.train(was_training)
    right, frames = group.total(counts.to(group.device)).tolist()
    return Evaluation.of(group.total(scores.to(group.device)).cpu().numpy(), clips.labels, right / frames)


@torch.no_grad()
def evaluate_streams(network: Network, streams: Sequence[Stream], group: Group | None = None) -> StreamEvaluation:
    """Runs streams side by side, never reset, on the network's device; a group of processes divides them. There must be an action in them."""
    group, device = group or Group(), network.head.weight.device
    was_training = network.training
    network.eval()
    own = streams[group.rank :: group.size]
    # actions, those right, frames of actions, those right, other frames, those right, loss, frames with a class
    counts = np.zeros(8)
    state = network.initial_state(len(own))
    guesses: list[list[npt.NDArray[np.int64]]] = [[] for _ in own]
    for start in range(0, max((len(stream.frames) for stream in own), default=0), STREAM_CHUNK):
        parts = [stream.frames[start : start + STREAM_CHUNK] for stream in own]
        lengths = torch.tensor([len(part) for part in parts], device=device)
        frames = np.zeros((len(parts), max(map(len, parts)), *network.frame_shape), np.float32)
        for row, part in zip(frames, parts, strict=True):
            row[: len(part)] = part
        logits, state = network(torch.from_numpy(frames).to(device), lengths, state)
        losses = -torch.log_softmax(logits, -1).cpu().numpy()
        for guess, loss, stream, part in zip(guesses, losses, own, parts, strict=True):
            labels = stream.labels[start : start + len(part)]
            known = np.flatnonzero(labels != NO_CLASS)
            guess.append(loss[: len(part)].argmin(-1))
            counts[6:] += loss[known, labels[known]].sum(), len(known)
    for guess, stream in zip(guesses, own, strict=True):
        counts[:6] += _count(np.concatenate(guess), stream, network.classes)
    network.train(was_training)
    actions, right, inside, inside_right, others, others_right, total, known = group.total(torch.from_numpy(counts).to(group.device)).tolist()
    nothing = others_right / others if others else float("nan")
    return StreamEvaluation(right / max(1, actions), inside_right / max(1, inside), nothing, total / max(1, known))


def _count(guess: npt.NDArray[np.int64], stream: Stream, classes: int) -> tuple[int, ...]:
    """Actions, those right, frames of actions, those right, frames of nothing, those right."""
    right, frames = guess == stream.labels, np.zeros(len(guess), bool)
    actions = 0
    for first, end, label in stream.segments.tolist():
        frames[first:end] = True
        actions += int(np.bincount(guess[first:end], minlength=classes).argmax() == label)
    others = ~frames & (stream.labels != NO_CLASS)
    return len(stream.segments), actions, int(frames.sum()), int(right[frames].sum()), int(others.sum()), int(right[others].sum())
