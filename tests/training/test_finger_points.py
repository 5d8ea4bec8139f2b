from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from training.datasets import finger_points
from training.datasets.clips import ClipSet, DataError

DATA = os.environ.get("TRAINING_DATA")

Path2D = npt.NDArray[np.float64]


def walk(length: int, seed: int) -> Path2D:
    """A path (length, 2) of small steps from 0,0."""
    steps = np.random.default_rng(seed).uniform(-0.01, 0.01, (length, 2))
    steps[0] = 0
    return steps.cumsum(axis=0)


def rows(label: int, path: Path2D, leave_out: tuple[int, ...] = ()) -> list[str]:
    """The file's rows for one recording: a window at each frame but those left out."""
    windows = [path[start : start + 16] - path[start] for start in range(len(path) - 15) if start not in leave_out]
    return [",".join([str(label), *(f"{value:.9f}" for value in window.ravel())]) for window in windows]


def write(path: Path, lines: list[str]) -> Path:
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def clips_of(clips: ClipSet, part: str) -> list[npt.NDArray[np.float32]]:
    return [clip for clip, name in zip(clips.frames, clips.groups["part"], strict=True) if name == part]


@pytest.mark.parametrize("name", ["points.csv", "points.csv.gz"])
def test_recordings_are_stitched_and_cut_between_parts(tmp_path: Path, name: str) -> None:
    path = walk(115, 1)  # 100 windows: 60 of train-a, 15 of train-b, 25 of test
    clips = finger_points.load(write(tmp_path / name, rows(1, path)))
    assert clips.groups["part"].tolist() == ["train-a", "test"]  # train-b's windows all reach into test
    assert [len(clip) for clip in clips.frames] == [60, 40]
    for clip, first in zip(clips.frames, (0, 75), strict=True):
        np.testing.assert_allclose(clip, path[first : first + len(clip)] - path[first], atol=1e-6)


def test_no_frame_is_in_two_parts(tmp_path: Path) -> None:
    path = walk(415, 2)  # 400 windows: 240, 60, 100
    lines = write(tmp_path / "points.csv", rows(0, path))
    recordings, windows = finger_points.load(lines), finger_points.load(lines, form="windows")
    assert [(part, len(clip)) for part, clip in zip(recordings.groups["part"], recordings.frames, strict=True)] == [
        ("train-a", 240),
        ("train-b", 60),
        ("test", 115),
    ]
    assert recordings.groups["split"].tolist() == ["train", "train", "test"]
    assert [len(clips_of(windows, part)) for part in ("train-a", "train-b", "test")] == [225, 45, 100]
    assert windows.frames[0].shape == (16, 2)
    for part, first in (("train-a", 0), ("train-b", 240), ("test", 300)):
        for i, clip in enumerate(clips_of(windows, part)):
            np.testing.assert_allclose(clip, path[first + i : first + i + 16] - path[first + i], atol=1e-6)


def test_a_row_left_out_does_not_end_a_recording(tmp_path: Path) -> None:
    path = walk(115, 3)
    clips = finger_points.load(write(tmp_path / "points.csv", rows(3, path, leave_out=(4, 9, 10, 98))))
    assert set(clips.groups["recording"].tolist()) == {"0"}
    test = clips.where("split", ["test"]).frames[0]
    np.testing.assert_allclose(test, path[-len(test) :] - path[-len(test)], atol=1e-6)


def test_recordings_end_where_windows_or_labels_part(tmp_path: Path) -> None:
    lines = [*rows(0, walk(16, 4)), *rows(0, walk(17, 5)), *rows(2, walk(18, 6))]
    clips = finger_points.load(write(tmp_path / "points.csv", lines))
    assert set(zip(clips.labels.tolist(), clips.groups["recording"].tolist(), strict=True)) == {(0, "0"), (0, "1"), (2, "2")}


def test_a_resting_finger_is_one_recording(tmp_path: Path) -> None:
    clips = finger_points.load(write(tmp_path / "points.csv", rows(0, np.zeros((95, 2)))))
    assert set(clips.groups["recording"].tolist()) == {"0"}


def test_frames_without_a_hand_may_be_missing(tmp_path: Path) -> None:
    path = walk(95, 7)
    path[[20, 21, 50]] = -0.5, -0.4  # the image's corner
    lines = write(tmp_path / "points.csv", rows(3, path))
    assert not finger_points.load(lines).missing
    train, test = finger_points.load(lines, lost="missing").frames
    assert np.flatnonzero(np.isnan(train).all(axis=1)).tolist() == [20, 21]
    np.testing.assert_allclose(train[22:], path[22 : len(train)], atol=1e-6)
    assert not np.isnan(test).any()  # starts after frame 50
    windows = clips_of(finger_points.load(lines, form="windows", lost="missing"), "train-a")
    np.testing.assert_allclose(windows[20][2:], path[22:36] - path[20], atol=1e-6)
    assert np.isnan(windows[20][:2]).all()


def row(text: str) -> str:
    return rows(0, walk(16, 8))[0].replace("0,", f"{text},", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,0,0", "3 fields, expected 33"),
        ("", "1 fields, expected 33"),
        (row("4"), "label '4', expected 0 to 3"),
        (row("Stop"), "label 'Stop'"),
        ("0,0,0,x" + ",0" * 29, "expected numbers after the label"),
        ("0,0,0,nan" + ",0" * 29, "expected positions from -1 to 1"),
        ("0,0,0,inf" + ",0" * 29, "expected positions from -1 to 1"),
        ("0,0,0,640" + ",0" * 29, "expected positions from -1 to 1"),
        ("0,0.1" + ",0" * 31, "expected positions from -1 to 1, relative to the first, which is 0,0"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "points.csv", [row("0"), line, row("0")])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2: {message}"):
        finger_points.load(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("points.csv", b"", "holds no rows"),
        ("points.csv", b"\xff\xfe", "expected a readable CSV file"),
        ("points.csv.gz", b"0,0,0", "expected a readable CSV file"),
        ("points.csv.gz", gzip.compress(b"0,0,0" * 99)[:-9], "expected a readable CSV file"),
    ],
)
def test_faults_of_the_file_itself(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / name))}: {message}"):
        finger_points.load(tmp_path / name)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.csv: expected a readable CSV file"):
        finger_points.load(tmp_path / "absent.csv")


def nearest_neighbour(train_x: Path2D, train_y: npt.NDArray[np.int64], test_x: Path2D, test_y: npt.NDArray[np.int64]) -> float:
    distances = (train_x**2).sum(1) - 2 * test_x @ train_x.T
    return float((train_y[distances.argmin(1)] == test_y).mean())


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs finger-point-history/point_history.csv.gz)")
def test_real_data() -> None:
    path = Path(DATA or "") / "finger-point-history" / "point_history.csv.gz"
    recordings, windows = finger_points.load(path), finger_points.load(path, form="windows")
    assert len(set(recordings.groups["recording"].tolist())) == 14
    assert np.bincount(windows.where("split", ["test"]).labels).tolist() == [371, 309, 320, 326]  # the last quarter, complete
    assert set(recordings.groups["part"].tolist()) == {"train-a", "train-b", "test"}
    for part in ("train-a", "train-b", "test"):
        assert set(recordings.where("part", [part]).labels.tolist()) == {0, 1, 2, 3}
    lost = finger_points.load(path, lost="missing")
    assert sum(int(np.isnan(clip[:, 0]).sum()) for clip in lost.frames) == 108


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs finger-point-history/point_history.csv.gz)")
def test_real_data_gives_the_published_nearest_neighbour_accuracy() -> None:
    path = Path(DATA or "") / "finger-point-history" / "point_history.csv.gz"
    table = np.loadtxt(path, delimiter=",")
    labels = table[:, 0].astype(np.int64)
    assert np.bincount(labels).tolist() == [1481, 1234, 1279, 1302]
    windows = finger_points.load(path, form="windows")
    train, test = windows.where("split", ["train"]), windows.where("split", ["test"])
    test_x = np.stack(test.frames).reshape(len(test), -1).astype(np.float64)
    training_rows = np.concatenate([(of := np.flatnonzero(labels == label))[: len(of) * 3 // 4] for label in range(4)])
    with_overlap = nearest_neighbour(table[training_rows, 1:], labels[training_rows], test_x, test.labels)
    assert with_overlap == pytest.approx(0.860, abs=0.001)
    without_overlap = nearest_neighbour(np.stack(train.frames).reshape(len(train), -1).astype(np.float64), train.labels, test_x, test.labels)
    assert without_overlap == pytest.approx(0.949, abs=0.001)
