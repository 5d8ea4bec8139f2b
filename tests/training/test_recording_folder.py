from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.contract import DataSource
from model.skeletons import UnknownLayout
from training.datasets import clip_folder, recording_folder
from training.datasets.clips import DataError
from training.datasets.recordings import Recordings

ROWS = ["b.npy,5,9,wave", "b.npy,0,3,wave", "a.csv,2,2,bow", "./b.npy,10,11,bow"]


def frames(length: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(length).uniform(-1, 1, (length, 2)).astype(np.float32)


def folder(path: Path, *rows: str, header: str = "file,first,last,label", recordings: list[str] | None = None) -> Path:
    """Three recordings of 12, 4 and 5 frames; `recordings` are the lines of recordings.csv."""
    path.mkdir(exist_ok=True)
    np.save(path / "b.npy", frames(12))
    (path / "a.csv").write_text("\n".join(",".join(map(str, row.tolist())) for row in frames(4)))
    np.save(path / "idle.npy", frames(5))
    (path / "segments.csv").write_text("\n".join([header, *rows]) + "\n")
    if recordings is not None:
        (path / "recordings.csv").write_text("\n".join(recordings) + "\n")
    return path


def load(path: Path, **arguments: Any) -> Recordings:
    return recording_folder.load(path, **({"units": "metres", "fps": 30.0} | arguments))


def test_segments_of_every_recording_in_the_order_of_time(tmp_path: Path) -> None:
    recordings = load(folder(tmp_path, *ROWS))
    assert (recordings.classes, recordings.nothing) == (("bow", "wave", "nothing"), "nothing")
    assert recordings.groups["recording"].tolist() == ["b.npy", "a.csv"]
    assert [rows.tolist() for rows in recordings.segments] == [[[0, 4, 1], [5, 10, 1], [10, 12, 0]], [[2, 3, 0]]]
    assert [row.tolist() for row in recordings.labels] == [[1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 0, 0], [2, 2, 0, 2]]
    for found, expected in zip(recordings.frames, (frames(12), frames(4)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (recordings.fps, recordings.units, recordings.layout, recordings.source.name) == (30.0, "metres", None, tmp_path.name)


def test_a_list_of_recordings_gives_order_groups_rate_and_those_in_which_nothing_happens(tmp_path: Path) -> None:
    listed = ["file,subject,fps,split", "idle.npy,anna,25,train", "a.csv,bert,25.0,test", "b.npy,anna,25,train"]
    recordings = load(folder(tmp_path, *ROWS, recordings=listed), fps=None)
    assert {name: column.tolist() for name, column in recordings.groups.items()} == {
        "split": ["train", "test", "train"],
        "subject": ["anna", "bert", "anna"],
        "recording": ["idle.npy", "a.csv", "b.npy"],
    }
    assert recordings.fps == 25.0
    assert [len(rows) for rows in recordings.segments] == [0, 1, 3]
    assert recordings.labels[0].tolist() == [2] * 5
    assert recordings.clips().groups["recording"].tolist() == ["a.csv", "b.npy", "b.npy", "b.npy"]


def test_clips_are_what_a_clip_folder_of_the_cut_pieces_holds(tmp_path: Path) -> None:
    clips = load(folder(tmp_path, *ROWS)).clips()
    (cut := tmp_path / "cut").mkdir()
    for i, (source, first, last) in enumerate([(frames(12), 0, 3), (frames(12), 5, 9), (frames(12), 10, 11), (frames(4), 2, 2)]):
        np.save(cut / f"{i}.npy", source[first : last + 1])
    (cut / "index.csv").write_text("file,label\n0.npy,wave\n1.npy,wave\n2.npy,bow\n3.npy,bow\n")
    expected = clip_folder.load(cut, units="metres", fps=30.0)
    assert (clips.classes, clips.labels.tolist()) == (expected.classes, expected.labels.tolist())
    for found, clip in zip(clips.frames, expected.frames, strict=True):
        np.testing.assert_array_equal(found, clip)


def test_the_class_for_nothing_has_the_name_that_is_asked_for_or_there_is_none(tmp_path: Path) -> None:
    assert load(folder(tmp_path, *ROWS), nothing="rest").classes == ("bow", "wave", "rest")
    whole = load(folder(tmp_path, "a.csv,0,1,1", "a.csv,2,3,10"), nothing="")
    assert (whole.classes, whole.nothing, whole.labels[0].tolist()) == (("1", "10"), None, [0, 0, 1, 1])
    with pytest.raises(DataError, match=r"segments.csv: b.npy has 1 of 12 frames in no segment, expected none, or a class for them \(nothing=\)"):
        load(folder(tmp_path, *ROWS), nothing="")
    with pytest.raises(DataError, match=r"segments.csv: label 'bow', expected it to be left out"):
        load(folder(tmp_path, *ROWS), nothing="bow")


def test_layout_shape_missing_values_and_source_are_those_of_clip_folder(tmp_path: Path) -> None:
    skeleton = np.random.default_rng(0).uniform(-1, 1, (3, 39)).astype(np.float32)
    skeleton[1, 5] = np.nan
    folder(tmp_path, "s.npy,0,2,bow")
    np.save(tmp_path / "s.npy", skeleton)
    source = DataSource(name="mine", terms="private", citation="none")
    recordings = load(tmp_path, layout="body-13", missing=True, source=source)
    assert (recordings.frame_shape, recordings.layout, recordings.missing, recordings.source) == ((13, 3), "body-13", True, source)
    with pytest.raises(DataError, match=r"segments.csv:2: s.npy: frame 1 holds a missing value"):
        load(tmp_path, layout="body-13")
    with pytest.raises(DataError, match=r"frames of shape \(39,\), expected \(12, 3\)"):
        load(tmp_path, frame_shape=(12, 3))
    with pytest.raises(UnknownLayout):
        load(tmp_path, layout="octopus")


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ([], None, "lists no segments, expected a row per segment below the header"),
        (["b.npy,0,3"], 2, "expected 4 values, none empty: file,first,last,label"),
        (["b.npy,0,3,"], 2, "expected 4 values, none empty"),
        (["b.npy,0,3,wave", "c.npy,0,3,wave"], 3, "file 'c.npy', expected to find it in"),
        (["../b.npy,0,3,wave"], 2, "file '../b.npy' leaves the folder"),
        (["b.txt,0,3,wave"], 2, "file 'b.txt', expected one ending in .npy, .npz, .csv, .json"),
        (["b.npy,4,3,wave"], 2, "first '4', last '3', expected frame numbers from 0, first not after last"),
        (["b.npy,-1,3,wave"], 2, "first '-1', last '3', expected frame numbers"),
        (["b.npy,0,3.5,wave"], 2, "first '0', last '3.5', expected frame numbers"),
        ([f"b.npy,0,{'9' * 5000},wave"], 2, "first '0', last '9999"),
        (["b.npy,0,12,wave"], 2, "last frame 12, expected at most 11: b.npy has 12 frames, counted from 0"),
        (["b.npy,4,8,wave", "b.npy,0,4,bow"], 2, "starts at frame 4, before the segment of {segments}:3 ends (4), expected segments apart"),
        (["b.npy,0,4,wave", "a.csv,0,2,wave", "./b.npy,2,3,wave"], 4, "starts at frame 2, before the segment of {segments}:2 ends (4)"),
        (["b.npy,0,4,nothing"], None, "label 'nothing', expected it to be left out: frames in no segment are 'nothing'"),
    ],
)
def test_faults_of_the_segments(tmp_path: Path, rows: list[str], line: int | None, message: str) -> None:
    segments = folder(tmp_path / "own", *rows) / "segments.csv"
    np.save(tmp_path / "b.npy", frames(12))
    where = f"{segments}:{line}: " if line else f"{segments}: "
    with pytest.raises(DataError, match="^" + re.escape(where + message.format(segments=segments))):
        load(segments.parent)


def test_faults_of_the_columns_and_of_the_list_of_recordings(tmp_path: Path) -> None:
    for i, (header, recordings, fps, message) in enumerate(
        [
            ("file,first,end,label", None, 30.0, "segments.csv:1: columns 'file,first,end,label', expected file,first,last,label, each once"),
            ("file,first,last,label", [], 30.0, "recordings.csv:1: columns '', expected file and perhaps split,subject,view,fps, each once"),
            ("file,first,last,label", ["file", "a.csv"], 30.0, "segments.csv:2: file 'b.npy' is not listed in {recordings}, expected every recording there"),
            ("file,first,last,label", ["file", "a.csv", "b.npy", "./a.csv"], 30.0, "recordings.csv:4: ./a.csv is the file of {recordings}:2 again"),
            ("file,first,last,label", ["file", "a.csv", "b.npy", "c.npy"], 30.0, "recordings.csv:4: file 'c.npy', expected to find it in"),
            ("file,first,last,label", ["file,fps", "a.csv,30", "b.npy,25"], None, "recordings.csv:3: fps 25, expected 30 as before"),
            ("file,first,last,label", ["file", "a.csv", "b.npy"], None, "recordings.csv: expected a column fps, or the rate from the caller (fps=)"),
            ("file,first,last,label", None, None, "recordings.csv: expected a column fps, or the rate from the caller (fps=)"),
        ]
    ):
        path = folder(tmp_path / str(i), *ROWS, header=header, recordings=recordings)
        with pytest.raises(DataError, match=re.escape(f"{path}/{message.format(recordings=path / 'recordings.csv')}")):
            load(path, fps=fps)
    with pytest.raises(DataError, match=r"segments.csv: expected a readable file"):
        load(tmp_path)


def test_frames_of_all_recordings_have_one_shape(tmp_path: Path) -> None:
    folder(tmp_path, "b.npy,0,1,bow", "s.npy,0,1,bow")
    np.save(tmp_path / "s.npy", np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"segments.csv:3: s.npy has frames of shape \(3,\), expected \(2,\) as in b.npy"):
        load(tmp_path)
