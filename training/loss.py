"""What is minimised: cross-entropy along clips and streams, and how much each class counts in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from training.batches import Batch
from training.config import TrainConfig
from training.streams import NO_CLASS


def sequence_loss(logits: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """Cross-entropy of logits (B, T, classes), every step as much as its weight says."""
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": config.label_smoothing, "ignore_index": NO_CLASS}
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, **options)
    return (losses * batch.weights).sum(1).sum()


def class_weights(labels: npt.NDArray[np.int64], classes: int, config: TrainConfig) -> npt.NDArray[np.float64]:
    """How much a clip of each class counts, (classes,): all the same, or in inverse proportion to how many there are; 1 on average."""
    counts = np.bincount(labels, minlength=classes)
    if config.class_weights == "none":
        return np.ones(classes)
    return len(labels) / (classes * np.maximum(counts, 1))
