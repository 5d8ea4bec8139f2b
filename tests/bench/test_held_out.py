"""Streams of a served model's test people: whole actions, nothing jumps, the same again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.client import Event
from tests.bench.conftest import BODIES, PLAIN
from tests.bench.held_out import HeldOut, chunks, find, found


def test_the_highest_version_is_the_one_that_is_served(toys: dict[str, Path]) -> None:
    served = find(toys["models"], "older")
    assert (served.version, served.manifest.classes) == ("10", BODIES.classes)


def test_a_stream_without_end_jumps_nowhere_and_tells_whole_actions(toys: dict[str, Path]) -> None:
    held = HeldOut(find(toys["models"], "bodies"), toys["config"], toys["data"])
    pieces = list(held.endless(3000, seed=1))
    frames = np.concatenate([piece.frames for piece in pieces])
    assert len(frames) == 3000
    steps = np.linalg.norm(np.diff(frames.mean(1), axis=0), axis=1)
    inside = max(float(np.linalg.norm(np.diff(clip.mean(1), axis=0), axis=1).max()) for clip in held.streams.clips.frames)
    assert steps.max() < 2 * inside
    starts = np.cumsum([0, *(len(piece.frames) for piece in pieces)])
    segments = np.concatenate([piece.segments + np.array([start, start, 0]) for piece, start in zip(pieces, starts, strict=False)])
    assert (segments[:, 0] < segments[:, 1]).all()
    assert (segments[1:, 0] >= segments[:-1, 1]).all()
    assert segments[-1, 1] <= 3000
    assert set(segments[:, 2].tolist()) == {0, 1, 2}
    repeated = (segments[1:, 2] == segments[:-1, 2]).mean()
    assert repeated > 0.5  # a third would be the same by chance
    again = np.concatenate([piece.frames for piece in held.endless(3000, seed=1)])
    np.testing.assert_array_equal(frames, again)
    np.testing.assert_array_equal(np.concatenate(list(chunks((piece.frames for piece in pieces), 64))), frames)


def test_actions_are_told_in_the_classes_of_the_model(toys: dict[str, Path]) -> None:
    """The reader orders classes in another way than the models do."""
    for model, toy in (("plain", PLAIN), ("bodies", BODIES)):
        held = HeldOut(find(toys["models"], model), toys["config"], toys["data"])
        assert held.streams.classes != toy.classes
        assert set(held.streams.classes) == set(toy.classes)
        assert set(held.streams.clips.groups["split"]) == {"test"}
        stream, again = held.finite(3, 12, seed=1), held.finite(3, 12, seed=1)
        np.testing.assert_array_equal(stream.frames, again.frames)
        assert len(stream.segments) == 12
        for first, end, label in stream.segments.tolist():
            risen = float((stream.frames[end - 1, 6:, 1] - stream.frames[first, 6:, 1]).mean())
            assert toy.classes[label] == ("rising" if risen > 0.5 else "falling" if risen < -0.5 else "waving")


def test_events_become_rows_and_the_last_may_be_open() -> None:
    told = [Event("start", "b", 0.9, 10, 12, 0.3), Event("end", "b", 0.8, 20, 22, 0.6), Event("start", "a", 0.7, 22, 25, 0.7)]
    assert found(told, ("a", "b"), 40).tolist() == [[10, 20, 1, 12], [22, 40, 0, 25]]
    assert found([], ("a",), 40).shape == (0, 4)
