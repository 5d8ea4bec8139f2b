"""Bad input: said before the first step, and nothing is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.synthetic import clip_set, config, recording_set
from training.config import Config, ConfigError
from training.datasets.clips import ClipSet, DataError
from training.distributed import CPU
from training.loop import train
from training.preflight import check
from training.splits import split


def spoilt(value: float, part: str = "a") -> ClipSet:
    clips = clip_set(48)
    clips.frames[int(np.flatnonzero(clips.groups["subject"] == part)[1])][2] = value
    return clips


RULES = {"nothing": "rest", "enter": 0.5, "leave": 0.4, "least": 3, "gap": 2}


def numbered() -> ClipSet:
    """Clips each of which is alone in its group."""
    clips = clip_set(48)
    return replace(clips, groups={**clips.groups, "number": np.arange(48).astype(np.str_)})


def refused(settings: Config, folder: Path, clips: ClipSet, error: type[Exception], message: str) -> None:
    folder.mkdir()
    (folder / "best.pt").write_bytes(b"an earlier run")
    parts = split(settings, clips)
    with pytest.raises(error, match=message):
        train(settings, parts.training, parts.validation, folder, watch=lambda _: pytest.fail("a step was made"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"best.pt": b"an earlier run"}


@pytest.mark.parametrize(
    ("sections", "clips", "error", "message"),
    [
        ({}, spoilt(np.nan), ConfigError, r"values are missing in training clips: set model.missing = true \(the first is clip 1\)"),
        ({}, spoilt(np.nan, "c"), ConfigError, "values are missing in validation clips"),
        ({}, spoilt(np.inf), DataError, r"training clip 1 \(class 'falling'\) has an infinite value"),
        ({"model": {"missing": True}}, spoilt(-np.inf), DataError, "has an infinite value"),
        ({"train": {"batch": 10**9}}, clip_set(48), ConfigError, "estimated to need .* lower train.batch"),
        ({"model": {"head": "tokens"}}, clip_set(48), ConfigError, "model.head = tokens"),
        ({"streams": {"together": ["view"]}}, clip_set(48), ConfigError, "streams.together names 'view', .*; there are: subject, split"),
        ({"streams": {"nothing": "waving"}}, clip_set(48), ConfigError, "streams.nothing is 'waving', which is an action"),
        ({"streams": {"together": ["number"]}}, numbered(), DataError, "no two training clips have the same number, so none can follow another"),
        ({"export": {"events": RULES}}, clip_set(48), ConfigError, "export.events.nothing is 'rest', none of the network's classes: rising, falling, waving$"),
        ({"export": {"events": RULES}, "streams": {}}, clip_set(48), ConfigError, "none of the network's classes: rising, falling, waving, nothing$"),
        ({"streams": {"frames": 10**9}}, clip_set(48), ConfigError, "of 8 streams of 1000000000 frames .* lower train.batch or streams.frames"),
    ],
)
def test_what_cannot_be_trained_on_is_said_and_nothing_is_touched(
    tmp_path: Path, sections: dict[str, Any], clips: ClipSet, error: type[Exception], message: str
) -> None:
    refused(config(**sections), tmp_path / "run", clips, error, message)


def test_missing_values_are_taken_where_the_model_knows_them(tmp_path: Path) -> None:
    settings = config(model={"missing": True}, train={"epochs": 1})
    parts = split(settings, spoilt(np.nan))
    assert train(settings, parts.training, parts.validation, tmp_path, watch=lambda _: None).exists()


def test_an_empty_class_is_named_also_when_no_split_was_made(tmp_path: Path) -> None:
    clips = clip_set(24)
    with pytest.raises(DataError, match="no training clip is left of class 'jumping'"):
        train(config(), replace(clips, classes=(*clips.classes, "jumping")), clips, tmp_path, watch=lambda _: None)
    assert not list(tmp_path.iterdir())


def test_clips_of_other_shapes_and_labels_out_of_range_are_no_clip_set() -> None:
    clips = clip_set(24)
    with pytest.raises(DataError, match=r"clip 1 is float32 \(4, 3\), expected float32 \(T >= 1, 2\)"):
        replace(clips, frames=(clips.frames[0], np.zeros((4, 3), np.float32), *clips.frames[2:]))
    for label in (-1, 3):
        with pytest.raises(DataError, match=rf"labels from .*{label}.*, expected 24 in 0\.\.2"):
            replace(clips, labels=np.where(np.arange(24) == 5, label, clips.labels))


def test_validation_of_another_kind_is_refused(tmp_path: Path) -> None:
    clips = clip_set(24)
    other = replace(clips, frames=tuple(np.zeros((3, 5), np.float32) for _ in clips.frames))
    with pytest.raises(DataError, match=r"validation clips have frames \(5,\)"):
        train(config(), clips, other, tmp_path, watch=lambda _: None)


def test_recordings_are_looked_through_whole() -> None:
    settings = config(streams={"together": ["subject"]})
    data = recording_set(16)
    check(settings, data, data, CPU)
    spoilt = recording_set(16)
    spoilt.frames[1][-1] = np.inf  # in no action
    with pytest.raises(DataError, match="training recording 1 has an infinite value"):
        check(settings, spoilt, None, CPU)
    spoilt.frames[1][-1] = np.nan
    with pytest.raises(ConfigError, match=r"values are missing in validation recordings: set model.missing = true \(the first is recording 1\)"):
        check(settings, data, spoilt, CPU)
    with pytest.raises(ConfigError, match="the recordings call it 'nothing'"):
        check(config(streams={"nothing": "rest"}), data, None, CPU)


def test_no_clip_of_nothing_is_asked_for() -> None:
    check(config(streams={}), clip_set(24), clip_set(24), CPU)
    with pytest.raises(DataError, match="no training clip is left of class 'jumping'"):
        check(config(streams={}), replace(clip_set(24), classes=(*clip_set(24).classes, "jumping")), None, CPU)
