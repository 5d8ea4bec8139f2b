"""The loss: every clip its share, padding nothing, classes as they are weighted, parts of a batch as the whole."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batches import Batch, Weighting, collate
from training.config import TrainConfig
from training.loss import boundary_loss, class_weights, sequence_loss
from training.streams import NO_CLASS


def _batch(lengths: list[int], **options: Any) -> Batch:
    return collate([np.zeros((n, 2), np.float32) for n in lengths], [0] * len(lengths), Weighting(**options))


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), early=st.floats(0, 1), last=st.booleans())
def test_every_clip_counts_the_same_and_padding_nothing(lengths: list[int], early: float, last: bool) -> None:
    batch, options = _batch(lengths, early=early, last=last), TrainConfig(label_smoothing=0.0)
    logits = torch.zeros(len(lengths), max(lengths), 4)
    for row, n in enumerate(lengths):
        logits[row, n:] = 50.0 * torch.tensor([-1.0, 1, 1, 1])
    assert sequence_loss(logits, batch, options).item() == pytest.approx(math.log(4), rel=1e-5)


def test_with_early_zero_the_first_step_is_forgiven_unless_it_is_the_only_one() -> None:
    logits = torch.zeros(2, 3, 2)
    logits[0, 0] = torch.tensor([-9.0, 9.0])
    logits[1, 0] = torch.tensor([-9.0, 9.0])
    loss = sequence_loss(logits, _batch([3, 1], early=0.0), TrainConfig(label_smoothing=0.0))
    assert loss.item() == pytest.approx((math.log(2) + 18) / 2, rel=1e-4)


def test_with_last_only_the_last_step_of_each_clip_counts() -> None:
    logits = torch.randn(3, 5, 4)
    options, batch = TrainConfig(label_smoothing=0.1), _batch([5, 2, 1], last=True)
    at_end = logits[torch.arange(3), batch.lengths - 1]
    expected = torch.nn.functional.cross_entropy(at_end, batch.labels[:, 0], label_smoothing=0.1)
    torch.testing.assert_close(sequence_loss(logits, batch, options), expected)


def test_balanced_classes_count_the_same_however_many_clips_they_have() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    weights = class_weights(labels, 2, TrainConfig(class_weights="balanced"))
    assert (weights[labels][labels == 0].sum(), weights[labels].mean()) == (pytest.approx(weights[labels][labels == 1].sum()), pytest.approx(1))
    assert class_weights(labels, 2, TrainConfig()).tolist() == [1, 1]
    batch = collate([np.zeros((1, 2), np.float32)] * 10, labels.tolist(), Weighting(classes=weights))
    logits = torch.tensor([[[9.0, -9.0]]]).expand(10, 1, 2)  # always says the frequent class
    assert sequence_loss(logits, batch, TrainConfig(label_smoothing=0.0)).item() == pytest.approx(9, rel=1e-4)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    batch = collate([np.zeros((n, 2), np.float32) for n in (4, 1, 7, 3, 2)], [0, 1, 1, 2, 0], Weighting(early=0.5, classes=np.array([0.5, 1.0, 3.0])))
    logits, options = torch.randn(5, 7, 3), TrainConfig()
    parts = [batch.take(slice(rank, None, 6)) for rank in range(6)]  # the last has no rows
    losses = [sequence_loss(logits[rank::6, : part.frames.shape[1]], part, options) for rank, part in enumerate(parts)]
    torch.testing.assert_close(sum(losses), sequence_loss(logits, batch, options))


def test_is_what_the_formula_says_clip_by_clip() -> None:
    lengths, labels, early, shares = (4, 1, 7), (0, 2, 1), 0.3, np.array([0.5, 1.0, 3.0])
    batch = collate([np.zeros((n, 2), np.float32) for n in lengths], list(labels), Weighting(early=early, classes=shares))
    logits, expected = torch.randn(3, 7, 3, dtype=torch.float64), 0.0
    for row, n, label in zip(logits, lengths, labels, strict=True):
        places = [i / (n - 1) for i in range(n)] if n > 1 else [1.0]
        weights = [early + (1 - early) * place for place in places]
        losses = [-float(torch.log_softmax(step, -1)[label]) for step in row[:n]]
        expected += shares[label] / shares[list(labels)].sum() * sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert sequence_loss(logits, batch, TrainConfig(label_smoothing=0.0)).item() == pytest.approx(expected, rel=1e-6)


def test_frames_without_a_class_count_nothing() -> None:
    batch = _batch([3])
    batch = Batch(batch.frames, batch.lengths, torch.tensor([[0, NO_CLASS, 0]]), torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([[True, False, True]]))
    logits = torch.tensor([[[1.0, 2.0], [9.0, -9.0], [1.0, 2.0]]], requires_grad=True)
    loss = sequence_loss(logits, batch, TrainConfig(label_smoothing=0.1))
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert not logits.grad[0, 1].any()
    assert logits.grad[0, 0].all()


def _labelled(labels: list[list[int]], lengths: list[int] | None = None) -> Batch:
    rows = torch.tensor(labels)
    judged = torch.ones(rows.shape, dtype=torch.bool)
    counts = torch.tensor(lengths or [rows.shape[1]] * len(rows))
    return Batch(torch.zeros(*rows.shape, 2), counts, rows, torch.full(rows.shape, 1 / rows.numel()), judged)


def test_something_new_has_begun_for_four_frames_from_a_change_of_class_on() -> None:
    batch = _labelled([[0] * 6 + [1] * 6, [2] * 12])
    logits = torch.zeros(2, 12, requires_grad=True)
    boundary_loss(logits, batch, 2).backward()
    assert logits.grad is not None
    said = [["" if g == 0 else "new" if g < 0 else "old" for g in row] for row in logits.grad.tolist()]
    assert said == [["", "", "", "", "old", "old", "new", "new", "new", "new", "old", "old"], [""] * 4 + ["old"] * 8]


def test_of_the_first_frames_only_those_count_that_a_change_in_sight_decides() -> None:
    batch = _labelled([[0, 0, 1, 1, 1, 1, 1, 1]])
    logits = torch.zeros(1, 8, requires_grad=True)
    boundary_loss(logits, batch, 1).backward()
    assert logits.grad is not None
    assert logits.grad[0].sign().tolist() == [0, 0, -1, -1, -1, -1, 1, 1]


def test_boundary_loss_is_the_mean_cross_entropy_of_known_frames_row_by_row() -> None:
    batch = _labelled([[0] * 5 + [NO_CLASS] * 5, [1] * 10], [10, 7])
    logits = torch.randn(2, 10)
    targets = torch.tensor([[0.0] * 5 + [1.0] * 4 + [0.0], [0.0] * 10])
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(boundary_loss(logits, batch, 2), (losses[0, 4:].mean() + losses[1, 4:7].mean()) / 2)
    logits[1, 7:] = float("nan")  # padding
    assert boundary_loss(logits, batch, 2).isfinite()


def test_boundary_losses_of_parts_add_up_to_that_of_the_whole_and_short_clips_have_none() -> None:
    labels = torch.randint(0, 3, (5, 9), generator=torch.Generator().manual_seed(0))
    batch, logits = _labelled(labels.tolist(), [9, 1, 4, 7, 9]), torch.randn(5, 9)
    parts = [batch.take(slice(rank, None, 6)) for rank in range(6)]  # the last has no rows
    losses = [boundary_loss(logits[rank::6, : part.frames.shape[1]], part, 5) for rank, part in enumerate(parts)]
    torch.testing.assert_close(sum(losses), boundary_loss(logits, batch, 5))
    assert boundary_loss(logits[:, :1], _labelled([[0]] * 5), 5) == 0
