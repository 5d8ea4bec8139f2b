"""Which clips are for what; options of readers are checked before they are called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.synthetic import clip_set, config, recording_set, write_folder
from training.config import ConfigError
from training.datasets.clips import DataError
from training.datasets.recordings import Recordings
from training.splits import Splits, describe, load, read_data, split


def subjects(splits: Splits) -> list[set[str]]:
    return [set(part.groups["subject"].tolist()) for part in (splits.training, splits.validation, splits.test) if part is not None]


def test_parts_share_no_clip_and_lose_none() -> None:
    splits = split(config(), clip_set(60))
    assert subjects(splits) == [{"a", "b"}, {"c"}, {"d"}]
    assert splits.validation is not None
    assert splits.test is not None
    assert len(splits.training) + len(splits.validation) + len(splits.test) == 60


def test_a_final_run_trains_on_the_validation_part_too() -> None:
    splits = split(config(final=True), clip_set(60))
    assert splits.validation is None
    assert subjects(splits) == [{"a", "b", "c"}, {"d"}]


def test_a_clip_is_chosen_when_all_groups_agree() -> None:
    splits = split(config(data={"test": {"split": ["test"], "subject": ["c"]}}), clip_set(60))
    assert splits.test is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test": {"view": ["1"]}}, "no group 'view'; there are: subject, split"),
        ({"test": {"subject": ["d", "x"]}}, "no clip has subject 'x'; there are: a, b, c, d"),
        ({"validation": {"subject": ["d"]}}, "no clip has subject 'd'; there are: a, b, c"),
        ({"test": {"split": ["train", "test"]}}, "every clip is a test clip"),
        ({"validation": {"subject": ["a", "b", "c"]}}, "holds out 45 of 45 training clips"),
    ],
)
def test_parts_that_cannot_be_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(config(data=data), clip_set(60))


@pytest.mark.parametrize("final", [False, True])
def test_a_class_without_training_clips_is_refused(final: bool) -> None:
    clips = clip_set(60)
    keep = (clips.labels != 1) | (clips.groups["split"] == "test")
    with pytest.raises(DataError, match="no training clip is left of class 'falling'"):
        split(config(final=final), clips.take(np.flatnonzero(keep)))


def test_a_part_is_asked_for_by_name() -> None:
    splits = split(config(final=True), clip_set(60))
    assert splits.named("training") is splits.training
    with pytest.raises(DataError, match="this run has no validation split"):
        splits.named("validation")
    for name in ("tests", "named", "__class__"):
        with pytest.raises(DataError, match="there are: training, validation, test"):
            splits.named(name)


def test_finds_held_out_clips_that_training_has_as_well() -> None:
    clips = clip_set(60)
    is_test = clips.groups["split"] == "test"
    test, training = np.flatnonzero(is_test), np.flatnonzero(~is_test & (clips.groups["subject"] == "a"))
    frames = list(clips.frames)
    frames[test[3]] = frames[training[0]].copy()
    frames[test[5]] = frames[training[1]] + np.float32(1e-6)
    splits = split(config(), replace(clips, frames=tuple(frames)))
    assert np.flatnonzero(splits.copies("test")).tolist() == [3], "only what is the same number for number"
    assert not splits.copies("validation").any()
    assert splits.copies("training").all()


@pytest.mark.parametrize("final", [False, True])
def test_leaves_clips_out_of_training_that_are_held_out_as_well(final: bool) -> None:
    clips = clip_set(60)
    subject = clips.groups["subject"]
    frames = list(clips.frames)
    a, c, d = (np.flatnonzero(subject == name) for name in "acd")
    frames[a[0]], frames[a[2]] = frames[d[3]].copy(), frames[c[1]].copy()  # a test and a validation clip
    frames[a[1]] = frames[d[4]] + np.float32(1e-6)
    clips = replace(clips, frames=tuple(frames))
    plain, dropped = (split(config(final=final, data={"drop_copies": drop}), clips) for drop in (False, True))
    left = [clip.tobytes() for clip in dropped.training.frames]
    gone = [clip.tobytes() for clip in plain.training.frames if clip.tobytes() not in left]
    assert gone == [frames[a[0]].tobytes(), *([] if final else [frames[a[2]].tobytes()])], "a final run trains on the validation part"
    assert [len(part) for part in (dropped.named("test"), plain.named("test"))] == [15, 15]
    assert not dropped.copies("test").any()


def test_copies_are_dropped_among_clips_only() -> None:
    with pytest.raises(ConfigError, match=r"data\.drop_copies is for clips"):
        split(config(data={"drop_copies": True}), recording_set())


def test_says_what_was_chosen_on_which_part() -> None:
    assert describe(config()) == "epoch and configuration chosen on subject c of the training data, held out"
    assert "trained on all training data" in describe(config(final=True))
    assert "nothing was chosen" in describe(config(final=True, data={"validation": {}}))


def test_reads_what_the_configuration_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clips", clip_set(24))
    splits = load(config(data={"path": str(folder)}))
    assert [len(splits.training), len(splits.named("validation")), len(splits.named("test"))] == [12, 6, 6]


def test_recordings_are_found_whole_and_cut_into_clips(tmp_path: Path) -> None:
    clips = clip_set(24)
    segments, listed = ["file,first,last,label"], ["file,subject,split"]
    for subject in "abcd":
        one = clips.where("subject", [subject])
        ends = np.cumsum([len(clip) for clip in one.frames])
        np.save(tmp_path / f"{subject}.npy", np.concatenate(one.frames))
        listed.append(f"{subject}.npy,{subject},{one.groups['split'][0]}")
        segments += [f"{subject}.npy,{end - len(clip)},{end - 1},{clips.classes[label]}" for clip, end, label in zip(one.frames, ends, one.labels, strict=True)]
    (tmp_path / "segments.csv").write_text("\n".join(segments))
    (tmp_path / "recordings.csv").write_text("\n".join(listed))
    value = config(data={"reader": "recording_folder", "path": str(tmp_path)})
    whole = read_data(value, value.data.options)
    assert isinstance(whole, Recordings)
    assert len(whole) == 4
    splits = load(value)
    for part, subject in ((splits.validation, "c"), (splits.test, "d")):
        assert part is not None
        expected = clips.where("subject", [subject])
        assert [part.classes[label] for label in part.labels] == [clips.classes[label] for label in expected.labels]
        assert [clip.tobytes() for clip in part.frames] == [clip.tobytes() for clip in expected.frames]


def test_options_become_what_the_reader_takes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clips", clip_set(24))
    source = {"name": "mine", "terms": "free", "citation": "me"}
    splits = load(config(data={"path": str(folder), "options": {"units": "m", "fps": 30, "frame_shape": [2], "missing": True, "source": source}}))
    assert splits.training.source.name == "mine"
    assert splits.training.fps == 30.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"reader": "os"}, "data.reader 'os' is unknown; there are: clip_folder, finger_points"),
        ({"path": ""}, "data.path is not set"),
        ({"options": {"units": "m", "rate": 30}}, "data.options.rate is unknown to clip_folder; there are: units, fps"),
        ({"options": {"fps": 30.0}}, "data.options.units is missing: clip_folder needs it"),
        ({"options": {"units": 3}}, "data.options.units: expected str"),
        ({"options": {"units": "m", "fps": "fast"}}, "data.options.fps: expected float"),
        ({"options": {"units": "m", "frame_shape": 2}}, "data.options.frame_shape: expected a list"),
        ({"options": {"units": "m", "source": {"name": "x"}}}, "data.options.source: field 'citation' is missing"),
        ({"reader": "finger_points", "options": {"lost": "no"}}, "data.options.lost: 'no' is none of"),
        ({"reader": "uea", "options": {"test": 3}}, "data.options.test: expected str"),
        ({"options": {"units": "m", "path": "x"}}, "data.options.path is unknown"),
    ],
)
def test_options_the_reader_does_not_take_are_named(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    value = config()
    changed = {"reader": value.data.reader, "path": str(tmp_path), "options": value.data.options} | data

    with pytest.raises(ConfigError, match=message):
        load(replace(value, data=replace(value.data, **changed)))


def test_evaluation_options_change_validation_and_test_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clips", clip_set(24))
    splits = load(config(data={"path": str(folder), "evaluation_options": {"units": "feet"}}))
    assert [splits.training.units, splits.named("validation").units, splits.named("test").units] == ["metres", "feet", "feet"]


def test_a_share_of_every_class_is_held_out_the_same_for_every_seed() -> None:
    data = {"validation": {}, "validation_share": 0.2}
    parts = [split(config(seed=seed, data=data), clip_set(60)) for seed in (0, 5)]
    held_out = [part.named("validation") for part in parts]
    assert np.bincount(held_out[0].labels).tolist() == [3, 3, 3]
    assert all(np.array_equal(a, b) for a, b in zip(held_out[0].frames, held_out[1].frames, strict=True))
    assert len(parts[0].training) + len(held_out[0]) == 45
    assert "20 % of every class" in describe(config(data=data))


@pytest.mark.parametrize("by", ["", "subject"])
def test_every_training_clip_is_held_out_in_one_fold(by: str) -> None:
    found = []
    for fold in range(3):
        settings = config(data={"validation": {}, "folds": 3, "fold": fold, "fold_by": by})
        part = split(settings, clip_set(60)).named("validation")
        found += [clip.tobytes() for clip in part.frames]
        assert not by or len(set(part.groups["subject"].tolist())) == 1
    assert len(found) == len(set(found)) == 45
    assert "fold 3 of 3" in describe(settings)


def test_recordings_are_divided_whole_and_then_cut() -> None:
    data = recording_set(12)
    splits = split(config(), data)
    assert [set(splits.recordings[name].groups["subject"].tolist()) for name in ("training", "validation", "test")] == [{"a", "b"}, {"c"}, {"d"}]
    assert sum(len(part) for part in splits.recordings.values()) == 12
    for name in ("training", "validation", "test"):
        assert splits.whole(name) is splits.recordings[name]
        assert [clip.tobytes() for clip in splits.named(name).frames] == [clip.tobytes() for clip in splits.recordings[name].clips().frames]
    clips = split(config(), data.clips())
    assert clips.recordings == {}
    assert clips.whole("test") is clips.test
    for name in ("training", "validation", "test"):
        assert {clip.tobytes() for clip in clips.named(name).frames} == {clip.tobytes() for clip in splits.named(name).frames}


def test_folds_of_recordings_are_those_of_their_clips() -> None:
    data = recording_set(13)
    for fold in range(3):
        by = {"validation": {}, "folds": 3, "fold": fold, "fold_by": "subject"}
        whole, cut = (split(config(data=by), one) for one in (data, data.clips()))
        assert set(whole.recordings["validation"].groups["subject"].tolist()) == set(cut.named("validation").groups["subject"].tolist())
        assert len(whole.named("training")) == len(cut.named("training"))


@pytest.mark.parametrize("by", [{"validation_share": 0.3}, {"folds": 3}])
def test_clips_of_one_recording_may_be_divided_unless_streams_are_made_of_it(by: dict[str, Any]) -> None:
    data = {"validation": {}, **by}
    splits = split(config(data=data), recording_set(12))
    assert splits.recordings == {}
    assert splits.whole("validation") is splits.validation
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(by))} divides the clips of each recording, and streams are made of whole ones"):
        split(config(data=data, streams={}), recording_set(12))
    assert split(config(data=data, streams={}), clip_set(60)).validation is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test": {"subject": ["d", "x"]}}, "no recording has subject 'x'; there are: a, b, c, d"),
        ({"test": {"split": ["train", "test"]}}, "every recording is a test recording"),
        ({"validation": {"subject": ["a", "b", "c"]}}, "holds out 9 of 9 training recordings"),
        ({"validation": {}, "folds": 5, "fold_by": "subject"}, "5 folds of 3 groups"),
    ],
)
def test_parts_of_recordings_that_cannot_be_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(config(data=data), recording_set(12))
