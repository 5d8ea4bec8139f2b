"""How right a network is: on clips, by the score at their last frame, and along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.layers import step_mask
from model.network import Network
from training.batches import evaluation_batches
from training.datasets.clips import ClipSet
from training.distributed import Group


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


@torch.no_grad()
def evaluate(network: Network, clips: ClipSet, group: Group | None = None) -> Evaluation:
    """Runs every clip from the zero state, whole, on the network's device; a group of processes divides the clips."""
    group, device = group or Group(), network.head.weight.device
    was_training = network.training
    network.eval()
    scores = torch.zeros(len(clips), len(clips.classes))
    counts = torch.zeros(2, dtype=torch.float64)  # frames that are right, frames
    for i, (batch, index) in enumerate(evaluation_batches(clips)):
        if i % group.size != group.rank:
            continue
        batch = batch.to(device)
        logits, _ = network(batch.frames, batch.lengths, network.initial_state(len(index)))
        last = logits[torch.arange(len(index), device=device), batch.lengths - 1]
        scores[index] = torch.softmax(last, -1).cpu()
        real = step_mask(batch.lengths, batch.frames.shape[1]).T
        counts += torch.stack([((logits.argmax(-1) == batch.labels[:, None]) & real).sum(), batch.lengths.sum()]).cpu()
    network.train(was_training)
    right, frames = group.total(counts.to(group.device)).tolist()
    return Evaluation.of(group.total(scores.to(group.device)).cpu().numpy(), clips.labels, right / frames)
