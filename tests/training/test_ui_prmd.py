from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.skeletons import UnknownLayout, layout
from training.datasets import ui_prmd
from training.datasets.clips import DataError
from training.datasets.recordings import Recordings

DATA = os.environ.get("TRAINING_DATA")


def entries(**changes: Any) -> dict[str, Any]:
    """Three clips of 2, 1 and 3 frames; an entry of None is left out."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "joints_mm": rng.integers(-3000, 3000, (6, 22, 3), np.int16),
        "offsets": np.array([0, 2, 3, 6]),
        "movement": np.array([1, 10, 2], np.int16),
        "subject": np.array([7, 8, 1], np.int16),
        "episode": np.array([1, 2, 10], np.int16),
        "correct": np.array([1, 0, 1], np.int8),
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def write(path: Path, **changes: Any) -> Path:
    np.savez_compressed(path, **entries(**changes))
    return path


def test_reads_clips_labels_and_groups(tmp_path: Path) -> None:
    clips = ui_prmd.load(write(tmp_path / "clips.npz"))
    assert [clip.shape for clip in clips.frames] == [(2, 13, 3), (1, 13, 3), (3, 13, 3)]
    assert all(clip.dtype == np.float32 and clip.flags.c_contiguous for clip in clips.frames)
    assert [clips.classes[label] for label in clips.labels] == ["deep squat", "standing shoulder scaption", "hurdle step"]
    assert {name: column.tolist() for name, column in clips.groups.items()} == {
        "split": ["train", "test", "train"],
        "subject": ["7", "8", "1"],
        "episode": ["1", "2", "10"],
        "correct": ["correct", "incorrect", "correct"],
    }
    assert (clips.fps, clips.units, clips.layout) == (30.0, "metres", "body-13")


def test_maps_millimetres_to_common_axes_in_metres(tmp_path: Path) -> None:
    joints = entries()["joints_mm"].astype(np.float64)
    clip = ui_prmd.load(write(tmp_path / "clips.npz")).frames[2]
    target, source = layout("body-13"), layout("ui-prmd")
    np.testing.assert_allclose(clip[:, target.index("left_wrist")], joints[3:, source.index("left_wrist")] * [-1e-3, 1e-3, -1e-3], rtol=1e-6)
    head = (joints[3:, source.index("head_base")] + joints[3:, source.index("head_top")]) / 2
    np.testing.assert_allclose(clip[:, target.index("head")], head * [-1e-3, 1e-3, -1e-3], rtol=1e-6)


def test_own_layout_keeps_the_published_axes(tmp_path: Path) -> None:
    clips = ui_prmd.load(write(tmp_path / "clips.npz"), layout="ui-prmd")
    np.testing.assert_allclose(np.concatenate(clips.frames), entries()["joints_mm"] / 1000.0, rtol=1e-6)


def test_thinned_variant_holds_correct_repetitions_only(tmp_path: Path) -> None:
    clips = ui_prmd.load(write(tmp_path / "tiny.npz", correct=None), fps=10.0)
    assert clips.fps == 10.0
    assert set(clips.groups["correct"].tolist()) == {"correct"}


def repetitions(path: Path, episodes: list[int], **changes: Any) -> Path:
    """One person who lifts everything from 0 to 1000 mm and back in 11 frames after two at rest, once for each of these episodes, the file in their order."""
    lift = np.array([0, 0, 200, 400, 600, 800, 1000, 800, 600, 400, 200, 0, 0], np.int16)
    joints = np.concatenate([np.repeat(lift + 5 * episode, 22 * 3).reshape(-1, 22, 3) for episode in episodes]).astype(np.int16)
    count = len(episodes)
    columns = {name: np.full(count, value) for name, value in (("movement", 3), ("subject", 9), ("correct", 0))}
    return write(path, joints_mm=joints, offsets=13 * np.arange(count + 1), episode=np.array(episodes), **(columns | changes))


def test_recordings_are_the_clips_one_after_another(tmp_path: Path) -> None:
    path = repetitions(tmp_path / "clips.npz", [2, 3, 1])
    found = ui_prmd.load(path, layout="ui-prmd", recordings=True, rest=0.25)
    assert isinstance(found, Recordings)
    assert {name: column.tolist() for name, column in found.groups.items()} == {
        "split": ["test"],
        "subject": ["9"],
        "correct": ["incorrect"],
        "recording": ["m03_s09_incorrect"],
    }
    assert (found.classes[-1], found.nothing, found.fps, found.units) == ("nothing", "nothing", 30.0, "metres")
    assert found.frames[0][::13, 0, 0].tolist() == pytest.approx([0.005, 0.010, 0.015])  # episodes in the order of their numbers
    # The body has left its pose at 400 of 1000 and is back at 200: frames 3 to 9 of each.
    assert found.segments[0].tolist() == [[3, 10, 2], [16, 23, 2], [29, 36, 2]]
    nearer = ui_prmd.load(path, layout="ui-prmd", recordings=True, rest=0.1)
    assert isinstance(nearer, Recordings)
    assert nearer.segments[0].tolist() == [[2, 11, 2], [15, 24, 2], [28, 37, 2]]


def test_recordings_are_told_apart_by_exercise_person_and_way(tmp_path: Path) -> None:
    path = repetitions(tmp_path / "clips.npz", [1, 2, 1, 1], subject=np.array([9, 9, 10, 9]), correct=np.array([1, 1, 1, 0]))
    found = ui_prmd.load(path, recordings=True)
    assert found.groups["recording"].tolist() == ["m03_s09_correct", "m03_s09_incorrect", "m03_s10_correct"]
    assert [len(frames) for frames in found.frames] == [26, 13, 13]


def test_clips_that_do_not_follow_each_other_are_no_recording(tmp_path: Path) -> None:
    for episodes, said in (([2, 5, 8], "2, 5, 8"), ([1, 2, 2], "1, 2, 2")):
        with pytest.raises(DataError, match=f"episodes {said} of m03_s09_incorrect, expected each number once and none left out"):
            ui_prmd.load(repetitions(tmp_path / "clips.npz", episodes), recordings=True)
    for rest in (-0.1, 0.5, float("nan")):
        with pytest.raises(DataError, match="rest is"):
            ui_prmd.load(repetitions(tmp_path / "clips.npz", [1]), recordings=True, rest=rest)


@settings(deadline=None)
@given(steps=st.integers(1, 30), rest=st.floats(0, 0.49), seed=st.integers(0, 100))
def test_whatever_a_body_does_some_frame_of_it_is_the_movement(steps: int, rest: float, seed: int) -> None:
    clip = np.random.default_rng(seed).normal(size=(steps, 13, 3)).astype(np.float32)
    for one in (clip, np.repeat(clip[:1], steps, 0)):
        first, end = ui_prmd.moving(one, rest)
        assert 0 <= first < end <= steps


def test_refuses_a_layout_without_depth(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout):
        ui_prmd.load(write(tmp_path / "clips.npz"), layout="coco-17")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joints_mm": None}, "entry 'joints_mm' is missing"),
        ({"subject": None}, "entry 'subject' is missing"),
        ({"joints_mm": np.zeros((6, 22, 3))}, "entry 'joints_mm' is float64, expected signed integers"),
        ({"joints_mm": np.zeros((6, 20, 3), np.int16)}, r"entry 'joints_mm' has shape \(6, 20, 3\), expected \(frames, 22, 3\)"),
        ({"joints_mm": np.zeros((6, 66), np.int16)}, r"entry 'joints_mm' has shape \(6, 66\)"),
        ({"offsets": np.array([0.0, 2, 3, 6])}, "entry 'offsets' is float64"),
        ({"offsets": np.array([[0, 2, 3, 6]])}, r"entry 'offsets' has shape \(1, 4\)"),
        ({"offsets": np.array([0])}, r"entry 'offsets' has shape \(1,\), expected \(clips \+ 1,\) with at least one clip"),
        ({"offsets": np.array([1, 2, 3, 6])}, "entry 'offsets' runs from 1 to 6, expected 0 to 6"),
        ({"offsets": np.array([0, 2, 3, 7])}, "entry 'offsets' runs from 0 to 7, expected 0 to 6"),
        ({"offsets": np.array([0, 3, 2, 6])}, r"entry 'offsets'\[2\] is 2 after 3, expected increasing"),
        ({"offsets": np.array([0, 2, 2, 6])}, r"entry 'offsets'\[2\] is 2 after 2"),
        ({"movement": np.array([1, 2])}, r"entry 'movement' has shape \(2,\), expected \(3,\)"),
        ({"movement": np.array([1, 11, 2])}, r"entry 'movement'\[1\] is 11, expected 1 to 10"),
        ({"subject": np.array([0, 1, 2])}, r"entry 'subject'\[0\] is 0"),
        ({"episode": np.array([1, 2, -1])}, r"entry 'episode'\[2\] is -1"),
        ({"correct": np.array([0, 1, 2])}, r"entry 'correct'\[2\] is 2, expected 0 to 1"),
        ({"movement": np.array(["a", "b", "c"])}, "entry 'movement' is <U1, expected signed integers"),
        ({"movement": np.array([1, None, 2], object)}, "entry 'movement' cannot be read"),
    ],
)
def test_faults_name_file_and_entry(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "clips.npz", **changes)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {message}"):
        ui_prmd.load(path)


def test_faults_of_the_file_itself(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[200:240] = bytes(40)  # within the first compressed array
    np.save(tmp_path / "bare.npy", np.zeros(3))
    cases = {
        "truncated.npz": (whole[: len(whole) // 2], "expected a readable .npz file"),
        "text.npz": (b"movement,subject\n", "expected a readable .npz file"),
        "empty.npz": (b"", "expected a readable .npz file"),
        "bare.npz": ((tmp_path / "bare.npy").read_bytes(), "one bare array"),
        "damaged.npz": (bytes(damaged), "cannot be read"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{message}"):
            ui_prmd.load(path)
    with pytest.raises(DataError, match=r"absent.npz: expected a readable"):
        ui_prmd.load(tmp_path / "absent.npz")


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs ui-prmd/ui-prmd-kinect-xyz.npz)")
def test_real_data() -> None:
    clips = ui_prmd.load(Path(DATA or "") / "ui-prmd" / "ui-prmd-kinect-xyz.npz")
    lengths = np.array([len(clip) for clip in clips.frames])
    correct = clips.groups["correct"] == "correct"
    assert (len(clips), lengths.sum()) == (2000, 151_158)
    assert np.bincount(clips.labels).tolist() == [200] * 10
    assert (lengths[correct].min(), np.median(lengths[correct]), lengths[correct].max()) == (39, 71, 160)
    assert (lengths[~correct].min(), np.median(lengths[~correct]), lengths[~correct].max()) == (28, 72, 179)
    assert len(clips.where("split", ["train"])) == 1400
    frames, joint = np.concatenate(clips.frames), layout("body-13").index
    assert 2.0 < np.median(frames[..., 2]) < 3.0  # away from the sensor
    assert np.median(frames[:, joint("left_hip"), 0] - frames[:, joint("right_hip"), 0]) < 0  # facing the sensor
    assert np.median(frames[:, joint("head"), 1] - frames[:, joint("left_ankle"), 1]) > 1.0  # upright


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs ui-prmd/ui-prmd-kinect-xyz.npz)")
def test_real_clips_were_cut_from_recordings_without_a_frame_between() -> None:
    """Where one ends and the next begins the body moves no farther than from one frame to the next around there."""
    path = Path(DATA or "") / "ui-prmd" / "ui-prmd-kinect-xyz.npz"
    clips, found = ui_prmd.load(path), ui_prmd.load(path, recordings=True)
    assert isinstance(found, Recordings)
    assert (len(found), [len(segments) for segments in found.segments]) == (200, [10] * 200)
    ratios = []
    numbers = zip(clips.labels.tolist(), clips.groups["subject"].tolist(), clips.groups["correct"].tolist(), map(int, clips.groups["episode"]), strict=True)
    by_number = dict(zip(numbers, clips.frames, strict=True))
    for (label, subject, correct, episode), clip in by_number.items():
        if (after := by_number.get((label, subject, correct, episode + 1))) is not None:
            near = [np.linalg.norm(np.diff(frames, axis=0), axis=2).mean() for frames in (clip[-4:], after[:4])]
            ratios.append(np.linalg.norm(clip[-1] - after[0], axis=1).mean() / np.mean(near))
    assert len(ratios) == 1800
    assert 0.7 < np.median(ratios) < 1.2
    assert np.quantile(ratios, 0.99) < 4
    moving = np.concatenate([segments[:, 1] - segments[:, 0] for segments in found.segments])
    between = np.concatenate([segments[1:, 0] - segments[:-1, 1] for segments in found.segments])
    assert moving.min() >= 10
    assert 20 < np.median(between) < 35  # frames at rest between two repetitions


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs ui-prmd/ui-prmd-tiny.npz)")
def test_real_data_thinned() -> None:
    clips = ui_prmd.load(Path(DATA or "") / "ui-prmd" / "ui-prmd-tiny.npz", fps=10.0)
    assert (len(clips), sum(map(len, clips.frames))) == (300, 7569)
    assert set(clips.groups["episode"].tolist()) == {"2", "5", "8"}
