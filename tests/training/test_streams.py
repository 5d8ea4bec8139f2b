"""Streams: what is in them, what was made and what was recorded, and that nothing jumps where nothing should."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.synthetic import SOURCE, clip_set, recording_set
from training.augment import Augment
from training.config import AugmentConfig, ConfigError, StreamConfig
from training.datasets.clips import ClipSet, DataError, Frames
from training.datasets.recordings import Recordings
from training.streams import NO_CLASS, Stream, Streams, classes_of

EVERYTHING: dict[str, Any] = {
    "rotate": 20.0, "tilt": 5.0, "scale": 0.1, "speed": 1.3, "amplitude": 1.2, "noise": 0.01, "drop_joints": 0.3,
    "mirror": True, "offset": 0.1, "cut_start": 0.3,
}  # fmt: skip


def bodies(count: int = 40) -> ClipSet:
    return clip_set(count, joints=13)


def labelled(count: int = 24) -> ClipSet:
    """The first channel of every frame is its clip's label, the second the clip's number."""
    clips = clip_set(count)
    frames = [np.stack([np.full(len(clip), label), np.full(len(clip), i)], 1) for i, (clip, label) in enumerate(zip(clips.frames, clips.labels, strict=True))]
    return replace(clips, frames=tuple(frame.astype(np.float32) for frame in frames))


def streams(data: ClipSet | Recordings, augment: dict[str, Any] | None = None, **changes: Any) -> Streams:
    return Streams(data, StreamConfig(**changes), None if augment is None else Augment(AugmentConfig(**augment), data.layout))


def first(made: Streams, count: int, seed: int = 0) -> list[Stream]:
    return list(itertools.islice(made.pieces(np.random.default_rng(seed)), count))


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(["bodies", "channels", "recordings"]),
    seed=st.integers(0, 999),
    idle=st.integers(0, 20),
    cuts=st.floats(0, 1),
    dropped=st.floats(0, 0.9),
    nothing=st.sampled_from(["nothing", ""]),
)
def test_frames_labels_and_actions_of_any_stream_fit_together(kind: str, seed: int, idle: int, cuts: float, dropped: float, nothing: str) -> None:
    data: ClipSet | Recordings = {"bodies": bodies, "channels": clip_set, "recordings": recording_set}[kind]()
    made = streams(data, EVERYTHING, idle=idle, cuts=cuts, dropped=dropped, nothing=nothing, together=("subject",))
    for piece in first(made, 40, seed):
        assert piece.frames.dtype == np.float32
        assert piece.frames.shape == (len(piece.labels), *data.frame_shape)
        assert len(piece.frames) >= 1
        expected = np.full(len(piece.labels), len(made.classes) - 1 if nothing else NO_CLASS)
        ends = [0]
        for start, end, label in piece.segments.tolist():
            assert ends[-1] <= start < end <= len(piece.frames)
            assert 0 <= label < 3
            expected[start:end] = label
            ends.append(end)
        assert np.array_equal(piece.labels, expected)


def test_raw_cuts_are_clips_end_to_end_of_one_group() -> None:
    clips = labelled()
    made = streams(clips, together=("subject",))
    for number in range(8):
        stream = made.stream("cuts", number, seed=5, actions=20)
        chosen = [int(stream.frames[start, 1]) for start, _, _ in stream.segments]
        assert len(chosen) == 20
        assert np.array_equal(stream.frames, np.concatenate([clips.frames[i] for i in chosen]))
        assert stream.labels.tolist() == stream.frames[:, 0].tolist()
        assert {str(clips.groups["subject"][i]) for i in chosen} == {"abcd"[number % 4]}
        assert all(a != b for a, b in itertools.pairwise(chosen))


@pytest.mark.parametrize(("repeat", "least", "most"), [(0.0, 0.2, 0.45), (0.7, 0.7, 0.9), (1.0, 1.0, 1.0)])
def test_an_action_is_done_again_as_often_as_is_said_but_never_by_the_same_clip(repeat: float, least: float, most: float) -> None:
    stream = streams(labelled(), repeat=repeat).stream("cuts", 0, seed=0, actions=300)
    labels, clips = stream.segments[:, 2], stream.frames[stream.segments[:, 0], 1]
    assert least <= (labels[1:] == labels[:-1]).mean() <= most
    assert (clips[1:] != clips[:-1]).all()


def test_repeats_are_one_exercise_of_one_group_each_clip_once_in_order() -> None:
    made = streams(labelled(24), together=("subject",), idle=4)
    assert len(made.repeats) == 4 * 3  # subjects, classes
    for number, group in enumerate(made.repeats):
        stream = made.stream("repeats", number, seed=1)
        assert len({label for _, _, label in stream.segments.tolist()}) == 1
        assert [int(stream.frames[begin, 1]) for begin, _, _ in stream.segments.tolist()] == group.tolist()
        assert all(before[1] < after[0] for before, after in itertools.pairwise(stream.segments.tolist()))
    with pytest.raises(DataError, match="two clips of one class"):
        streams(labelled(3), together=("subject",)).stream("repeats", 0, seed=1)


def test_a_body_that_moves_from_one_action_to_the_next_never_jumps() -> None:
    made = streams(bodies(), together=("subject",))
    steps = {}
    for form in made.forms:
        stream = made.stream(form, 0, seed=1, actions=30)
        root = stream.frames[:, made.root].mean(1)
        steps[form] = np.linalg.norm(np.diff(root, axis=0), axis=1).max()
    inside = max(np.linalg.norm(np.diff(clip[:, made.root].mean(1), axis=0), axis=1).max() for clip in made.clips.frames)
    assert steps["smooth"] < 1.5 * inside
    assert steps["cuts"] > 5 * inside


def test_an_action_in_a_smooth_stream_is_the_clip_somewhere_else() -> None:
    clips = bodies()
    made = streams(clips, together=("subject",))
    stream = made.stream("smooth", 2, seed=0, actions=15)
    for start, end, _ in stream.segments:
        here = stream.frames[start:end].astype(np.float64)
        assert any(np.allclose(here - here[0], clip - clip[0], atol=1e-4) for clip in clips.frames if len(clip) == end - start)


@pytest.mark.parametrize(("idle", "pauses"), [(0, 1.0), (30, 0.0), (30, 0.6)])
def test_between_actions_there_is_a_movement_and_in_some_a_pause(idle: int, pauses: float) -> None:
    made = streams(bodies(), idle=idle, pauses=pauses, blend=(5, 8))
    stream = made.stream("smooth", 0, seed=3, actions=300)
    gaps = stream.segments[1:, 0] - stream.segments[:-1, 1]
    assert stream.segments[0, 0] == 0
    assert gaps.min() >= 5
    assert gaps.max() <= 8 + idle
    expected = pauses * idle / (idle + 1) if idle else 0
    assert (gaps > 8).mean() == pytest.approx(expected, abs=0.12 if expected else 0)
    assert (stream.labels == 3).sum() == gaps.sum()


def roughness(frames: list[Frames]) -> float:
    """How far frames (T, points, 3) are from the mean of their neighbours: a median, which a movement now and then does not change."""
    return float(np.median([np.abs(one[1:-1] - (one[:-2] + one[2:]) / 2).mean((1, 2)).mean() for one in frames]))


def test_made_frames_are_as_noisy_as_those_of_the_sensor_and_sway_slowly() -> None:
    """The first joints of these bodies stand still but for noise: whatever differs there gives the made frames away."""

    def idle(made: Streams) -> list[Frames]:
        stream = made.stream("smooth", 0, seed=0, actions=200)
        gaps = zip(stream.segments[:-1, 1], stream.segments[1:, 0], strict=True)
        return [stream.frames[a : a + 15, :6] for a, b in gaps if b - a >= 50 and np.ptp(stream.frames[a : a + 15, :6], 0).max() < 0.3]  # before the movement

    made = streams(bodies(), pauses=1.0, idle=60, blend=(1, 1))
    noise = roughness([clip[:, :6] for clip in made.clips.frames])
    assert len(idle(made)) > 10
    assert roughness(idle(made)) == pytest.approx(noise, rel=0.15)
    made._jitters = {i: np.zeros_like(clip) for i, clip in enumerate(made.clips.frames)}
    swaying = idle(made)
    assert roughness(swaying) < 0.1 * noise
    radius = np.mean([made._radius(clip[0]) for clip in made.clips.frames])
    assert 0.001 * radius < np.median([np.ptp(one, 0).mean() for one in swaying]) < 0.1 * radius


def test_a_stretch_has_one_camera_and_one_body() -> None:
    clips = replace(clip_set(8), frames=tuple(np.ones((6, 2), np.float32) for _ in range(8)))
    made = streams(clips, {"scale": 0.5}, cuts=1.0, stay=(4, 4))
    sizes = [set(piece.frames.ravel().tolist()) for piece in first(made, 40)]
    assert all(len(one) == 1 for one in sizes)
    stretches = [sizes[i : i + 4] for i in range(0, 40, 4)]
    assert all(one[0] == other for one in stretches for other in one)
    assert len({next(iter(one[0])) for one in stretches}) == 10


def test_movements_of_a_stretch_are_larger_or_smaller_from_where_the_body_rests() -> None:
    """Outside actions the first channel stays at 3; an action, recorded at 0, 1 or 2, is so many times as far from there, the same in all of a stretch."""
    factors = []
    pieces = first(streams(recording_set(), {"amplitude": 2.0}, whole=1.0, stay=(1, 1)), 300)
    for piece in pieces:
        outside = piece.labels == 3
        if not outside.any() or not len(piece.segments):
            continue
        np.testing.assert_allclose(piece.frames[outside, 0], 3.0, atol=1e-5)
        found = (piece.frames[~outside, 0] - 3) / (piece.labels[~outside] - 3)
        np.testing.assert_allclose(found, found[0], atol=1e-5)
        factors.append(found[0])
    assert len(factors) > 30
    assert min(factors) >= 0.5 - 1e-5
    assert max(factors) <= 2.0 + 1e-5
    assert np.std(np.log(factors)) > 0.3
    clips = streams(labelled(), {"amplitude": 2.0}, cuts=1.0, stay=(3, 3))
    for stretch in zip(*[iter(first(clips, 90))] * 3, strict=True):
        rest = stretch[0].labels[-1]  # nothing but actions: where the first of them ends
        away = {float(np.round((piece.frames[0, 0] - rest) / (piece.labels[0] - rest), 4)) for piece in stretch if piece.labels[0] != rest}
        assert len(away) <= 1


def test_a_turned_camera_turns_the_places_of_a_stretch_too() -> None:
    """By one angle about one place: turned each about itself, bodies would stay where they were."""
    body, places = clip_set(1, joints=13).frames[0][0], np.random.default_rng(1).normal(0, 2, (6, 3)).astype(np.float32)
    data = replace(bodies(6), frames=tuple(np.repeat((body - body.mean(0) + place)[None], 10 * 2**i, 0) for i, place in enumerate(places)))
    angles = []
    pieces = first(streams(data, {"rotate": 90.0}, cuts=1.0, stay=(6, 6)), 60)
    for stretch in (pieces[i : i + 6] for i in range(0, 60, 6)):
        found = np.array([piece.frames[0].mean(0) for piece in stretch])
        known = places[[round(np.log2(len(piece.frames) / 10)) for piece in stretch]]
        np.testing.assert_allclose(found[0], known[0], atol=1e-5)
        moved, original = ((one[1:] - one[0]) @ np.array([1, 0, 1j]) for one in (found, known))
        np.testing.assert_allclose(np.abs(moved), np.abs(original), atol=1e-4)
        far = np.abs(original) > 0.1
        turns = moved[far] / original[far]
        np.testing.assert_allclose(turns, turns[0], atol=1e-3)
        angles.append(float(np.angle(turns[0])))
    assert np.std(angles) > 0.3


def test_clips_of_a_stretch_are_played_at_one_pace_and_a_little() -> None:
    clips = replace(clip_set(8), frames=tuple(np.zeros((400, 2), np.float32) for _ in range(8)))
    lengths = np.array([len(piece.frames) for piece in first(streams(clips, {"speed": 3.0}, cuts=1.0, stay=(5, 5)), 100)]).reshape(20, 5)
    within = np.log(lengths.max(1) / lengths.min(1))
    assert within.max() <= 2 * np.log(1.15) + 0.02
    assert within.min() > 0
    assert np.ptp(np.log(lengths.mean(1))) > 1


def test_lost_frames_are_gone_and_labels_go_with_them() -> None:
    made = streams(labelled(), {}, dropped=0.8, cuts=1.0)
    pieces = first(made, 400)
    for piece in pieces:
        assert piece.labels.tolist() == piece.frames[:, 0].tolist()
    lost = 1 - sum(len(piece.frames) for piece in pieces) / 400 / np.mean([len(clip) for clip in made.clips.frames])
    assert lost == pytest.approx(0.4, abs=0.12)


def test_recordings_are_played_as_they_are_from_anywhere_in_them() -> None:
    data = recording_set()
    made = streams(data, whole=1.0, stay=(2, 2))
    assert made.classes == data.classes
    starts = set()
    for piece in first(made, 300):
        assert piece.labels.tolist() == piece.frames[:, 0].tolist()
        assert (np.diff(piece.frames[:, 1]) == 1).all()
        assert len(piece.segments) <= 2
        starts.add(int(piece.frames[0, 1]))
    assert len(starts) > 40
    for i in range(len(data) + 2):
        stream = made.stream("whole", i, seed=9)
        assert np.array_equal(stream.frames, data.frames[i % len(data)])
        assert np.array_equal(stream.labels, data.labels[i % len(data)])
        assert np.array_equal(stream.segments, data.segments[i % len(data)])


def test_a_stretch_of_a_recording_has_so_many_actions_at_most() -> None:
    made = streams(recording_set(2, actions=30), whole=1.0, stay=(4, 4))
    count = times = 0
    last = -1.0
    for piece in first(made, 200):
        if piece.frames[0, 1] != last + 1:
            assert count <= 4
            count, times = 0, times + 1
        count += len(piece.segments)
        last = piece.frames[-1, 1]
    assert times > 30


def test_recordings_and_clips_cut_from_them_are_mixed() -> None:
    made = streams(recording_set(), {"speed": 1.2}, whole=0.5, cuts=0.5, together=("subject",), nothing="nothing")
    assert made.forms == ("cuts", "smooth", "whole")
    pieces = first(made, 300)
    gaps = [piece for piece in pieces if piece.segments.size and piece.segments[0, 0]]
    recorded = [piece for piece in gaps if (piece.frames[: piece.segments[0, 0], 0] > 2.9).all()]
    assert 20 < len(recorded) < len(gaps) - 20


def test_a_nothing_that_stands_among_the_classes_becomes_the_last() -> None:
    data = recording_set()
    swap = {0: 1, 1: 2, 2: 3}
    moved = replace(
        data, classes=("nothing", *data.classes[:3]), segments=tuple(np.column_stack([s[:, :2], [swap[v] for v in s[:, 2]]]) for s in data.segments)
    )
    made = streams(moved)
    assert made.classes == data.classes
    assert np.array_equal(made.stream("whole", 0, seed=0).labels, data.labels[0])


def test_the_same_generator_gives_the_same_stream_and_a_number_one_of_its_own() -> None:
    made = streams(bodies(), EVERYTHING, together=("subject",))

    def look(pieces: list[Stream]) -> list[bytes]:
        return [piece.frames.tobytes() for piece in pieces]

    assert look(first(made, 20, 4)) == look(first(streams(bodies(), EVERYTHING, together=("subject",)), 20, 4))
    assert look(first(made, 20, 4)) != look(first(made, 20, 5))
    tests = [made.stream("smooth", i, seed=1, actions=3).frames.tobytes() for i in range(12)]
    assert len(set(tests)) == 12
    plain = streams(bodies(), together=("subject",))
    assert tests == [plain.stream("smooth", i, seed=1, actions=3).frames.tobytes() for i in range(12)]  # augmentation is off


def test_values_that_are_missing_stay_missing_and_spoil_no_others() -> None:
    clips = bodies(12)
    for clip in clips.frames:
        clip[:, 12] = np.nan
    stream = streams(clips).stream("smooth", 0, seed=0, actions=20)
    assert np.isnan(stream.frames[:, 12]).all()
    assert np.isfinite(stream.frames[:, :12]).all()
    gone = replace(clips, frames=tuple(np.full_like(clip, np.nan) for clip in clips.frames))
    assert np.isnan(streams(gone).stream("smooth", 0, seed=0, actions=3).frames).all()


def test_clips_of_one_frame_and_groups_of_one_clip_make_streams() -> None:
    clips = ClipSet((np.ones((1, 2), np.float32),) * 2, np.array([0, 1]), ("a", "b"), {"who": np.array(["x", "y"])}, 1.0, "", SOURCE)
    stream = streams(clips, together=("who",)).stream("smooth", 1, seed=0, actions=3)
    assert stream.segments[:, 2].tolist() == [1, 1, 1]


def test_classes_end_with_nothing_unless_it_is_switched_off() -> None:
    clips = clip_set(6)
    assert classes_of(clips, None) == clips.classes
    assert classes_of(clips, StreamConfig(nothing="rest")) == (*clips.classes, "rest")
    assert classes_of(clips, StreamConfig(nothing="")) == clips.classes


@pytest.mark.parametrize(
    ("data", "changes", "error", "message"),
    [
        (clip_set(12), {"together": ("camera",)}, ConfigError, "streams.together names 'camera', .*; there are: subject, split"),
        (clip_set(12), {"nothing": "waving"}, ConfigError, "streams.nothing is 'waving', which is an action of synthetic"),
        (recording_set(), {"nothing": "rest"}, ConfigError, "streams.nothing is 'rest', the recordings call it 'nothing'"),
    ],
)
def test_what_no_streams_can_be_made_of_is_said(data: ClipSet | Recordings, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        streams(data, **changes)


def test_clips_are_no_recordings() -> None:
    with pytest.raises(DataError, match="streams of the form whole need recordings"):
        streams(clip_set(6)).stream("whole", 0, seed=0)


def test_a_stream_says_which_of_its_actions_are_clips_that_were_trained_on() -> None:
    data = labelled()
    copies = np.arange(len(data)) % 3 == 0
    made = Streams(data, StreamConfig(), copies=copies)
    for form in ("cuts", "smooth"):
        one = made.stream(form, 0, seed=3, actions=30)
        clips = [int(one.frames[start, 1]) for start, _, _ in one.segments.tolist()]
        assert one.copied.tolist() == copies[clips].tolist()
        assert 0 < one.copied.sum() < 30
    assert not streams(data).stream("smooth", 0, seed=3, actions=30).copied.any()
    recorded = streams(recording_set()).stream("whole", 1, seed=3)
    assert recorded.copied.tolist() == [False] * len(recorded.segments)
