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


@dataclass(frozen=True)
class Evaluation:
    """`scores` (N, classes) at each clip's last frame; `frame_accuracy` is the share of all frames whose best class is right."""

    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    loss: float
    frame_accuracy: float

    @property
    def accuracy(self) -> float:
        return float((self.scores.argmax(1) == self.labels).mean())

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(classes, classes): rows are true, columns predicted."""
        matrix = np.zeros((self.scores.shape[1],) * 2, np.int64)
        np.add.at(matrix, (self.labels, self.scores.argmax(1)), 1)
        return matrix


@torch.no_grad()
def evaluate(network: Network, clips: ClipSet) -> Evaluation:
    """Runs every clip from the zero state, whole."""
    was_training = network.training
    network.eval()
    scores = np.zeros((len(clips), len(clips.classes)), np.float32)
    right = frames = 0
    for batch, index in evaluation_batches(clips):
        logits, _ = network(batch.frames, batch.lengths, network.initial_state(len(index)))
        last = logits[torch.arange(len(index)), batch.lengths - 1]
        scores[index] = torch.softmax(last, -1).numpy()
        real = step_mask(batch.lengths, batch.frames.shape[1]).T
        right += int(((logits.argmax(-1) == batch.labels[:, None]) & real).sum())
        frames += int(batch.lengths.sum())
    network.train(was_training)
    loss = -np.log(np.maximum(scores[np.arange(len(clips)), clips.labels], 1e-9)).mean()
    return Evaluation(scores, clips.labels, float(loss), right / frames)
