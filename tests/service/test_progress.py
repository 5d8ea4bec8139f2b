"""What a stream remembers beside its row: nothing changes before a commit, and it may be put away and taken up again anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.detector import TimedEvent
from service.errors import WrongTime
from service.progress import Progress
from service.resampler import Floats, Times
from tests import toy_models
from tests.toy_models import CHANNELS, GAPPY_GESTURES, Toy, moving_frames

PLAIN = toy_models.manifest_of(CHANNELS, toy_models.build(CHANNELS), "plain")
MANIFEST = toy_models.manifest_of(GAPPY_GESTURES, toy_models.build(GAPPY_GESTURES), "toy")
FRAMES = moving_frames(GAPPY_GESTURES, 80, seed=1)
FRAMES[5:60:9, 2] = np.nan


def scores(steps: Floats) -> Floats:
    """Four classes' scores of each step alone: a network without memory, whose state row is kept elsewhere anyway."""
    seen = np.nan_to_num(steps)
    logits = 4 * np.stack([seen[:, 0], seen[:, 1], seen[:, 2], -seen[:, 0]], axis=1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def take(progress: Progress, first: int, frames: Floats, t: Times | None) -> tuple[Floats, list[TimedEvent]]:
    passage = progress.prepare(first, frames, t)
    passage.commit(scores(passage.steps))
    return passage.scores, passage.events


RATES: Any = st.sampled_from([25.0, 10.0, 60.0, None])


@settings(deadline=None, max_examples=100)
@given(RATES, st.lists(st.integers(1, 79), max_size=8, unique=True), st.integers(0, 3))
def test_put_away_and_taken_up_again(fps: float | None, cuts: list[int], resets_every: int) -> None:
    """At each cut the stream goes through JSON into a new one, and perhaps a reset."""
    t = None if fps else np.cumsum(np.random.default_rng(1).choice([0.02, 0.05, 0.3, 3.0], 80, p=[0.5, 0.3, 0.15, 0.05]))
    one, other = Progress(MANIFEST, fps or 25.0), Progress(MANIFEST, fps or 25.0)
    places = sorted({0, 80, *cuts})
    for number, (first, end) in enumerate(itertools.pairwise(places)):
        part = None if t is None else t[first:end]
        expected, events = take(one, first, FRAMES[first:end], part)
        got, same = take(other, first, FRAMES[first:end], part)
        assert got.tobytes() == expected.tobytes()
        assert same == events
        for event in events:
            assert event.time == pytest.approx(event.event.frame / fps if fps else t[event.event.frame] - t[0])  # type: ignore[index]
        moved = Progress(MANIFEST, fps or 25.0)
        moved.restore(json.loads(json.dumps(other.to_dict())))
        other = moved
        if resets_every and number % resets_every == 0:
            assert one.reset(end) == other.reset(end)
        assert one.open_event() == other.open_event()


def test_preparing_changes_nothing() -> None:
    progress = Progress(MANIFEST, 10.0)
    take(progress, 0, FRAMES[:30], None)
    before = progress.to_dict()
    for first in (30, 31):
        progress.prepare(first, FRAMES[30:50], None)
    with pytest.raises(WrongTime):
        progress.prepare(30, FRAMES[30:32], np.array([7.0, 8.0]))
    assert progress.to_dict() == before


@pytest.mark.parametrize(("toy", "fps", "plain"), [(CHANNELS, 30.0, True), (CHANNELS, 29.97, False), (GAPPY_GESTURES, 25.0, False)])
def test_only_the_models_own_rate_without_events_is_plain(toy: Toy, fps: float, plain: bool) -> None:
    manifest = PLAIN if toy is CHANNELS else MANIFEST
    progress = Progress(manifest, fps)
    assert progress.plain is plain
    frames = moving_frames(toy, 5)
    assert (progress.prepare(0, frames, None).steps is frames) == (fps == manifest.fps)


def test_times_are_for_all_frames_or_for_none() -> None:
    with_t, without = Progress(PLAIN, 30.0), Progress(PLAIN, 30.0)
    take(with_t, 0, moving_frames(CHANNELS, 2), np.array([5.0, 5.1]))
    take(without, 0, moving_frames(CHANNELS, 2), None)
    with pytest.raises(WrongTime, match="frame 2: this stream began with t"):
        with_t.prepare(2, moving_frames(CHANNELS, 1), None)
    with pytest.raises(WrongTime, match="frame 2: this stream began without t"):
        without.prepare(2, moving_frames(CHANNELS, 1), np.array([0.1]))


def test_an_event_knows_its_time_long_after_its_frame() -> None:
    """Frames one by one: when it is decided, the message of its first frame is long gone."""
    t = np.cumsum(np.random.default_rng(2).uniform(0.02, 0.06, 80))
    progress = Progress(MANIFEST, 25.0)
    events: list[TimedEvent] = []
    for at in range(80):
        events += take(progress, at, FRAMES[at : at + 1], t[at : at + 1])[1]
        assert len(progress.to_dict()["moments"]) <= 4
    assert len(events) > 3
    assert any(one.event.decided > one.event.frame for one in events)
    for one in events:
        assert one.time == t[one.event.frame] - t[0]
