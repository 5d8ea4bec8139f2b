"""What is minimised: cross-entropy along each clip, and how much each clip counts in it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.layers import step_mask
from training.batches import Batch
from training.config import TrainConfig


def sequence_loss(logits: Tensor, batch: Batch, config: TrainConfig, *, last: bool = False) -> Tensor:
    """Cross-entropy at every real step of logits (B, T, classes), weighted from `early` at a clip's first step to 1 at its last.

    Each clip has its share of the batch, whatever its length. With `last` only a clip's last step counts.
    """
    steps, lengths = logits.shape[1], batch.lengths[:, None]
    real = step_mask(batch.lengths, steps).T.to(logits.device)
    place = torch.arange(steps, device=lengths.device)[None, :] / (lengths - 1)
    place = torch.where(lengths > 1, place, 1.0)  # the only step of a clip is its last
    weight = real * ((place == 1).float() if last else config.early + (1 - config.early) * place)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    labels = batch.labels[:, None].expand(-1, steps)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=config.label_smoothing)
    return ((losses * weight).sum(1) * batch.shares).sum()


def class_weights(labels: npt.NDArray[np.int64], classes: int, config: TrainConfig) -> npt.NDArray[np.float64]:
    """How much a clip of each class counts, (classes,): all the same, or in inverse proportion to how many there are; 1 on average."""
    counts = np.bincount(labels, minlength=classes)
    if config.class_weights == "none":
        return np.ones(classes)
    return len(labels) / (classes * np.maximum(counts, 1))
