"""Batches: every clip as often as it is due, padded with zeros, the same from the same generator."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.synthetic import SOURCE, clip_set
from training.augment import Augment
from training.batches import Weighting, collate, epoch_batches, evaluation_batches, stream_batches, training_batches
from training.config import AugmentConfig, StreamConfig
from training.datasets.clips import ClipSet
from training.streams import NO_CLASS, Streams

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


def made(**changes: Any) -> Streams:
    return Streams(clip_set(40), StreamConfig(steps=5, frames=30, **changes), Augment(AugmentConfig(noise=0.1, speed=1.2), None))


def test_each_row_of_a_batch_goes_on_where_it_was() -> None:
    streams = made()
    batches = list(stream_batches(streams, 3, (7, 1), Weighting()))
    assert [batch.frames.shape for batch in batches] == [(3, 30, 2)] * 5
    assert all(batch.lengths.tolist() == [30] * 3 for batch in batches)
    for row in range(3):
        pieces = list(itertools.islice(streams.pieces(np.random.default_rng((7, 1, row))), 30))
        frames, labels = np.concatenate([piece.frames for piece in pieces]), np.concatenate([piece.labels for piece in pieces])
        assert np.array_equal(np.concatenate([batch.frames[row] for batch in batches]), frames[:150])
        assert np.array_equal(np.concatenate([batch.labels[row] for batch in batches]), labels[:150])
    assert all(batch.judged.all() for batch in batches)


def test_what_comes_in_a_stream_depends_on_no_other() -> None:
    few, many = (list(stream_batches(made(), size, (2,), Weighting())) for size in (2, 5))
    assert all(np.array_equal(a.frames, b.frames[:2]) for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize(("nothing", "least"), [(0.0, 0), (0.3, 0), (1.0, 0), (0.0, 25), (0.3, 25)])
def test_steps_of_a_stream_count_by_their_place_in_an_action_and_in_all_one(nothing: float, least: int) -> None:
    """Those of a pause shorter than `least` count together like so many."""
    classes = np.array([1.0, 2.0, 3.0])
    streams = made(cuts=0.2)
    batches = list(stream_batches(streams, 2, (3,), Weighting(early=0.2, classes=classes, nothing=nothing, least_pause=least)))
    raised = 0
    assert all(float(batch.weights.sum()) == pytest.approx(1) for batch in batches)
    for row in range(2):
        expected: list[float] = []
        for piece in itertools.islice(streams.pieces(np.random.default_rng((3, row))), 30):
            (start, end, label), weights = piece.segments[0], np.full(len(piece.frames), nothing)
            if 0 < start < least:
                weights[:start] *= least / start
                raised += 1
            weights[start:end] = classes[label] * np.linspace(0.2, 1, end - start)
            expected += weights.tolist()
        for i, batch in enumerate(batches):
            share = batch.weights[row].numpy() / max(1e-9, float(batch.weights[row, -1]))
            here = np.array(expected[30 * i : 30 * i + 30])
            if here[-1] > 0:
                np.testing.assert_allclose(share, here / here[-1], rtol=1e-4)
    assert bool(raised) == bool(least)


def test_an_action_of_a_stream_counts_like_one_of_so_many_frames_however_long_it_is() -> None:
    long, short, tiny = (Weighting(early=0.2, action=30).inside(count) for count in (60, 6, 2))
    assert long.sum() == pytest.approx(short.sum()) == pytest.approx(30 * 0.6)
    np.testing.assert_allclose(long / long[-1], np.linspace(0.2, 1, 60))
    assert tiny.sum() == pytest.approx(30 * 0.6 * 2 / 4), "one of less than four frames as if it had four"
    np.testing.assert_allclose(Weighting(early=0.2).inside(60), np.linspace(0.2, 1, 60))
    streams = made(cuts=1.0)
    for each, alike in zip(*(stream_batches(streams, 3, (5,), Weighting(action=action)) for action in (0, 20)), strict=True):
        assert torch.equal(each.frames, alike.frames)
        factors = (alike.weights / each.weights)[alike.labels < 3]
        assert factors.max() > 1.5 * factors.min()  # clips have 8 to 24 frames


def test_a_short_pause_of_no_class_weighs_nothing() -> None:
    for batch in stream_batches(made(nothing="", cuts=0.0), 4, (0,), Weighting(least_pause=50)):
        assert not batch.weights[batch.labels == NO_CLASS].any()


def test_frames_of_no_class_weigh_nothing_and_are_not_judged() -> None:
    found = 0
    for batch in stream_batches(made(nothing="", cuts=0.0), 4, (0,), Weighting()):
        outside = batch.labels == NO_CLASS
        found += int(outside.sum())
        assert not batch.weights[outside].any()
        assert torch.equal(batch.judged, ~outside)
    assert found > 50
