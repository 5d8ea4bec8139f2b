"""Sample recordings: somebody who repeats an exercise, stopped in the middle of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.synthetic import clip_set, recording_set
from training.config import StreamConfig
from training.datasets import clip_folder
from training.datasets.clips import DataError
from training.samples import repetitions, write_samples
from training.streams import Streams


def test_repetitions_stop_in_the_middle_of_the_third() -> None:
    streams = Streams(clip_set(48, joints=13), StreamConfig(together=("subject",), idle=10))
    samples = repetitions(streams)
    assert samples.labels.tolist() == [0, 1, 2]
    assert set(samples.groups["subject"]) == {"a"}  # one person, the first who does it twice
    for frames, label in zip(samples.frames, samples.labels, strict=True):
        number = next(i for i, group in enumerate(streams.repeats) if streams.clips.labels[group[0]] == label)
        stream = streams.stream("repeats", number, seed=0)
        begin, end, _ = stream.segments[2].tolist()
        assert begin < len(frames) <= end
        assert np.array_equal(frames, stream.frames[: len(frames)])


def test_recorded_repetitions_are_shown_as_they_were_recorded() -> None:
    """Of the first recording of nothing else; where one is of a single repetition or others are mixed, clips are put one after another."""
    mixed = recording_set(8)
    segments = [rows.copy() for rows in mixed.segments]
    for number, label in ((2, 1), (3, 0), (5, 1), (6, 2)):
        segments[number][:, 2] = label
    segments[6] = segments[6][:1]
    streams = Streams(replace(mixed, segments=tuple(segments)), StreamConfig())
    samples = repetitions(streams)
    assert samples.labels.tolist() == [0, 1, 2]
    for frames, number in zip(samples.frames, (3, 2), strict=False):
        begin, end, _ = segments[number][2].tolist()
        assert begin < len(frames) <= end
        assert np.array_equal(frames, mixed.frames[number][: len(frames)])
    made = streams.stream("repeats", 2, seed=0)
    assert set(made.segments[:, 2].tolist()) == {2}
    assert np.array_equal(samples.frames[2], made.frames[: len(samples.frames[2])])


def test_where_nobody_repeats_anything_it_is_said() -> None:
    with pytest.raises(DataError, match="nobody does one thing twice in a row"):
        repetitions(Streams(clip_set(3), StreamConfig(together=("subject",))))


def test_samples_are_bodies_of_requests_and_a_clip_folder(tmp_path: Path) -> None:
    clips = clip_set(12, longest=24)
    paths = write_samples(clips, tmp_path / "samples", longest=10, decimals=2)
    assert [path.name for path in paths] == ["rising.json", "falling.json", "waving.json"]
    read = clip_folder.load(tmp_path / "samples", units="metres", fps=30.0)
    for path, frames in zip(paths, read.frames, strict=True):
        body = json.loads(path.read_text())
        assert set(body) == {"frames"}
        assert len(frames) <= 10
        assert np.array_equal(np.array(body["frames"], np.float32), frames)
    assert [read.classes[label] for label in read.labels] == ["rising", "falling", "waving"]
