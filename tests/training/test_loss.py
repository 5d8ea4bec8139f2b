"""The loss: every clip its share, padding nothing, classes as they are weighted, parts of a batch as the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batches import Batch, collate
from training.config import TrainConfig
from training.loss import class_weights, sequence_loss


def _batch(lengths: list[int]) -> Batch:
    return collate([np.zeros((n, 2), np.float32) for n in lengths], [0] * len(lengths))


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), early=st.floats(0, 1), last=st.booleans())
def test_every_clip_counts_the_same_and_padding_nothing(lengths: list[int], early: float, last: bool) -> None:
    batch, options = _batch(lengths), TrainConfig(early=early, label_smoothing=0.0)
    logits = torch.zeros(len(lengths), max(lengths), 4)
    for row, n in enumerate(lengths):
        logits[row, n:] = 50.0 * torch.tensor([-1.0, 1, 1, 1])
    assert sequence_loss(logits, batch, options, last=last).item() == pytest.approx(math.log(4), rel=1e-5)


def test_with_early_zero_the_first_step_is_forgiven_unless_it_is_the_only_one() -> None:
    logits = torch.zeros(2, 3, 2)
    logits[0, 0] = torch.tensor([-9.0, 9.0])
    logits[1, 0] = torch.tensor([-9.0, 9.0])
    loss = sequence_loss(logits, _batch([3, 1]), TrainConfig(early=0.0, label_smoothing=0.0))
    assert loss.item() == pytest.approx((math.log(2) + 18) / 2, rel=1e-4)


def test_with_last_only_the_last_step_of_each_clip_counts() -> None:
    logits = torch.randn(3, 5, 4)
    options, batch = TrainConfig(early=1.0, label_smoothing=0.1), _batch([5, 2, 1])
    at_end = logits[torch.arange(3), batch.lengths - 1]
    expected = torch.nn.functional.cross_entropy(at_end, batch.labels, label_smoothing=0.1)
    torch.testing.assert_close(sequence_loss(logits, batch, options, last=True), expected)


def test_balanced_classes_count_the_same_however_many_clips_they_have() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    weights = class_weights(labels, 2, TrainConfig(class_weights="balanced"))
    assert (weights[labels][labels == 0].sum(), weights[labels].mean()) == (pytest.approx(weights[labels][labels == 1].sum()), pytest.approx(1))
    assert class_weights(labels, 2, TrainConfig()).tolist() == [1, 1]
    batch = collate([np.zeros((1, 2), np.float32)] * 10, labels.tolist(), weights)
    logits = torch.tensor([[[9.0, -9.0]]]).expand(10, 1, 2)  # always says the frequent class
    assert sequence_loss(logits, batch, TrainConfig(label_smoothing=0.0)).item() == pytest.approx(9, rel=1e-4)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    batch = collate([np.zeros((n, 2), np.float32) for n in (4, 1, 7, 3, 2)], [0, 1, 1, 2, 0], np.array([0.5, 1.0, 3.0]))
    logits, options = torch.randn(5, 7, 3), TrainConfig()
    parts = [batch.take(slice(rank, None, 6)) for rank in range(6)]  # the last has no rows
    losses = [sequence_loss(logits[rank::6, : part.frames.shape[1]], part, options) for rank, part in enumerate(parts)]
    torch.testing.assert_close(sum(losses), sequence_loss(logits, batch, options))
