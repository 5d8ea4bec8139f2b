"""What is minimised: cross-entropy along clips and streams, how much each class counts in it, and where the class changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training.batches import Batch
from training.config import TrainConfig
from training.streams import NO_CLASS

NEW = 4  # frames from a change of class on that something new has just begun


def sequence_loss(logits: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """Cross-entropy of logits (B, T, classes), every step as much as its weight says."""
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": config.label_smoothing, "ignore_index": NO_CLASS}
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, **options)
    return (losses * batch.weights).sum(1).sum()


def boundary_loss(logits: Tensor, batch: Batch, rows: int) -> Tensor:
    """Binary cross-entropy of logits (B, T) that something new has just begun: that the class changed at one of the last `NEW` frames.

    The mean over each row, divided by `rows`, those of the whole batch, so that parts of it add up. What came before the first frame is not
    known here: frames whose answer depends on it are left out.
    """
    changed = torch.zeros_like(batch.judged)
    changed[:, 1:] = batch.labels[:, 1:] != batch.labels[:, :-1]
    new = nn.functional.max_pool1d(nn.functional.pad(changed.float()[:, None], (NEW - 1, 0)), NEW, 1)[:, 0]
    steps = torch.arange(changed.shape[1], device=changed.device)
    known = (steps[None] < batch.lengths[:, None]) & ((steps[None] >= NEW) | (new > 0))
    losses = torch.where(known, nn.functional.binary_cross_entropy_with_logits(logits.float(), new, reduction="none"), 0.0)
    return (losses.sum(1) / known.sum(1).clamp(min=1)).sum() / rows


def class_weights(labels: npt.NDArray[np.int64], classes: int, config: TrainConfig) -> npt.NDArray[np.float64]:
    """How much a clip of each class counts, (classes,): all the same, or in inverse proportion to how many there are; 1 on average."""
    counts = np.bincount(labels, minlength=classes)
    if config.class_weights == "none":
        return np.ones(classes)
    return len(labels) / (classes * np.maximum(counts, 1))
