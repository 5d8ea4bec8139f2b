"""Batches: every clip as often as it is due, padded with zeros, the same from the same generator."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.synthetic import SOURCE, clip_set
from training.augment import Augment
from training.batches import collate, epoch_batches, evaluation_batches, training_batches
from training.config import AugmentConfig
from training.datasets.clips import ClipSet

NOTHING = Augment(AugmentConfig(), None)


def numbered(lengths: list[int]) -> ClipSet:
    """Clip i has channels (i, frame number)."""
    frames = tuple(np.stack([np.full(n, i), np.arange(n)], 1).astype(np.float32) for i, n in enumerate(lengths))
    return ClipSet(frames, np.arange(len(lengths)) % 2, ("a", "b"), {}, 1.0, "", SOURCE)


def test_collate_pads_with_zeros() -> None:
    batch = collate([np.ones((2, 3), np.float32), np.full((1, 3), 2, np.float32)], [1, 0])
    assert batch.frames.tolist() == [[[1] * 3, [1] * 3], [[2] * 3, [0] * 3]]
    assert (batch.lengths.tolist(), batch.labels.tolist()) == ([2, 1], [[1, 1], [0, 0]])
    assert batch.weights.tolist() == [[0.25, 0.25], [0.5, 0]]
    assert batch.judged.tolist() == [[False, True], [True, False]]
    assert batch.lengths.dtype == torch.int64


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), size=st.integers(1, 9), longest=st.integers(1, 30), seed=st.integers(0, 99))
def test_an_epoch_draws_from_every_clip_as_often_as_it_is_long(lengths: list[int], size: int, longest: int, seed: int) -> None:
    clips, drawn = numbered(lengths), Counter[int]()
    batches = list(training_batches(clips, size, NOTHING, longest, (seed,)))
    for batch in batches:
        assert 1 <= len(batch.labels) <= size
        assert batch.frames.shape[1] == batch.lengths.max() <= longest
        for row, n, label in zip(batch.frames, batch.lengths.tolist(), batch.labels[:, 0].tolist(), strict=True):
            clip, start = int(row[0, 0]), int(row[0, 1])
            drawn[clip] += 1
            assert n == min(lengths[clip], longest)
            assert label == clip % 2
            assert row[:n, 1].tolist() == list(range(start, start + n))  # consecutive frames
            assert not row[n:].any()
    assert drawn == {i: max(1, round(n / longest)) for i, n in enumerate(lengths)}
    assert len(batches) == epoch_batches(clips, size, longest)


def test_equal_generators_give_equal_batches_and_others_do_not() -> None:
    clips, augment = clip_set(40), Augment(AugmentConfig(noise=0.1, speed=1.3, cut_start=0.5), None)

    def epoch(seed: int) -> list[bytes]:
        return [batch.frames.numpy().tobytes() for batch in training_batches(clips, 8, augment, 12, (seed,))]

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)


def test_stretches_of_a_long_clip_start_anywhere() -> None:
    starts = {int(row[0, 1]) for seed in range(60) for batch in training_batches(numbered([12]), 4, NOTHING, 8, (seed,)) for row in batch.frames}
    assert starts == {0, 1, 2, 3, 4}


def test_clips_of_similar_length_share_a_batch() -> None:
    clips = numbered([n for n in range(1, 65) for _ in range(2)])
    batches = list(training_batches(clips, 16, NOTHING, 64, (0,)))
    padded, real = sum(b.frames.shape[0] * b.frames.shape[1] for b in batches), sum(int(b.lengths.sum()) for b in batches)
    assert padded < 1.3 * real


def test_similar_length_means_that_after_the_clips_were_changed() -> None:
    augment = Augment(AugmentConfig(speed=2.0, cut_start=0.5), None)
    batches = list(training_batches(numbered([40] * 128), 16, augment, 64, (0,)))
    padded, real = sum(b.frames.shape[0] * b.frames.shape[1] for b in batches), sum(int(b.lengths.sum()) for b in batches)
    assert padded < 1.2 * real
    assert len({b.frames.shape[1] for b in batches}) > 4


def test_what_becomes_of_a_clip_depends_on_no_other() -> None:
    """Half the batch size makes other batches of the very same changed clips."""
    clips, augment = clip_set(40), Augment(AugmentConfig(noise=0.1, speed=1.3, cut_start=0.5), None)
    rows = [
        sorted(row[:n].numpy().tobytes() for b in training_batches(clips, size, augment, 12, (3,)) for row, n in zip(b.frames, b.lengths, strict=True))
        for size in (8, 4)
    ]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == len(rows[0])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_evaluation_takes_every_clip_once_and_whole(size: int) -> None:
    clips, seen = numbered([3, 9, 1, 9, 4]), []
    for batch, index in evaluation_batches(clips, size):
        seen += index.tolist()
        for row, n, i in zip(batch.frames, batch.lengths.tolist(), index, strict=True):
            assert np.array_equal(row[:n], clips.frames[i])
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[0] in (1, 3)
