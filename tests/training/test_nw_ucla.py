from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.skeletons import layout
from training.datasets import nw_ucla
from training.datasets.clips import DataError

DATA = os.environ.get("TRAINING_DATA")

HEADER = "file_name,action,label,subject,episode,view,frames,split"
ROWS = ["a01_s01_e00_v01,1,1,1,0,1,2,train", "a08_s10_e03_v03,8,7,10,3,3,1,test"]


def clip(name: str, label: int, frames: int) -> dict[str, Any]:
    return {"file_name": name, "skeletons": np.random.default_rng(label).uniform(0, 3, (frames, 20, 3)).round(6).tolist(), "label": label}


FILES = {"a01_s01_e00_v01": clip("a01_s01_e00_v01", 1, 2), "a08_s10_e03_v03": clip("a08_s10_e03_v03", 7, 1)}


def write(folder: Path, rows: list[str] | None = None, files: dict[str, Any] | None = None, header: str = HEADER, packed: bool = False) -> Path:
    """Files are JSON values, or text as it is to stand in the file."""
    (folder / "index.csv").write_text("\n".join([header, *(ROWS if rows is None else rows)]) + "\n")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in (files or FILES).items()}
    if packed:
        with tarfile.open(folder / "all_sqe.tar.xz", "w:xz") as tar:
            for name, text in texts.items():
                member = tarfile.TarInfo(f"all_sqe/{name}.json")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    else:
        (folder / "all_sqe").mkdir()
        for name, text in texts.items():
            (folder / "all_sqe" / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_reads_folder_and_archive(tmp_path: Path, packed: bool) -> None:
    clips = nw_ucla.load(write(tmp_path, packed=packed))
    assert [frames.shape for frames in clips.frames] == [(2, 20, 3), (1, 20, 3)]
    assert all(frames.dtype == np.float32 and frames.flags.c_contiguous for frames in clips.frames)
    np.testing.assert_array_equal(clips.frames[0], np.array(FILES["a01_s01_e00_v01"]["skeletons"], np.float32))
    assert [clips.classes[label] for label in clips.labels] == ["pick up with one hand", "donning"]
    assert {name: column.tolist() for name, column in clips.groups.items()} == {"split": ["train", "test"], "subject": ["1", "10"], "view": ["1", "3"]}
    assert (clips.fps, clips.units, clips.layout) == (30.0, "metres", "kinect-v1")


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ([], None, "lists no files"),
        (["a01_s01_e00_v01,1,1,1,0,1,2"], 2, "7 fields, expected 8"),
        ([ROWS[0], ""], 3, "0 fields, expected 8"),
        (["a01_s01_e00_v01,1,1,1,0,1,two,train"], 2, "expected whole numbers in columns action,"),
        (["a01_s01_e00_v02,1,1,1,0,1,2,train"], 2, "expected 'a01_s01_e00_v01' by its action"),
        (["a07_s01_e00_v01,7,7,1,0,1,2,train"], 2, "action 7 with label 7, expected an action of 1, 2, 3"),
        (["a08_s01_e00_v01,8,8,1,0,1,2,train"], 2, "action 8 with label 8"),
        (["a01_s01_e00_v01,1,1,1,0,1,2,val"], 2, "split 'val', expected 'train' or 'test'"),
        ([ROWS[0], ROWS[1], ROWS[0]], 4, "a01_s01_e00_v01 is listed twice"),
        ([*ROWS, "a02_s01_e00_v01,2,2,1,0,1,2,train"], 4, "expected a file a02_s01_e00_v01.json"),
    ],
)
def test_faults_of_the_index(tmp_path: Path, rows: list[str], line: int | None, message: str) -> None:
    where = re.escape(str(write(tmp_path, rows) / "index.csv")) + (f":{line}" if line else "")
    with pytest.raises(DataError, match=f"^{where}: .*{message}"):
        nw_ucla.load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "holds a list, expected an object"),
        (clip("a01_s01_e00_v02", 1, 2), "file_name is 'a01_s01_e00_v02', expected 'a01_s01_e00_v01' by .*index.csv:2"),
        (clip("a01_s01_e00_v01", 2, 2), "label is 2, expected 1 by .*index.csv:2"),
        (clip("a01_s01_e00_v01", 1, 3), "3 frames, expected 2 by .*index.csv:2"),
        (FILES["a01_s01_e00_v01"] | {"skeletons": [[[0, 0, 0]] * 19]}, r"of shape \(T, 20, 3\).*found int64 \(1, 19, 3\)"),
        (FILES["a01_s01_e00_v01"] | {"skeletons": [[[0, 0, 0]] * 20, [[0, 0, 0]] * 19]}, r"of shape \(T, 20, 3\)"),
        (FILES["a01_s01_e00_v01"] | {"skeletons": [[["0", "0", "0"]] * 20] * 2}, r"of shape \(T, 20, 3\)"),
        (FILES["a01_s01_e00_v01"] | {"skeletons": [[[0, 0, None]] * 20] * 2}, r"of shape \(T, 20, 3\)"),
        ({"file_name": "a01_s01_e00_v01", "label": 1}, r"of shape \(T, 20, 3\)"),
        (FILES["a01_s01_e00_v01"] | {"skeletons": [[[0, 0, float("nan")]] * 20] * 2}, "hold NaN or a coordinate beyond 100 m"),
        (FILES["a01_s01_e00_v01"] | {"skeletons": [[[0, 0, 1e300]] * 20] * 2}, "hold NaN or a coordinate beyond 100 m"),
    ],
)
def test_faults_of_a_clip(tmp_path: Path, value: Any, message: str, packed: bool) -> None:
    write(tmp_path, files=FILES | {"a01_s01_e00_v01": value}, packed=packed)
    where = "all_sqe.tar.xz: all_sqe/a01_s01_e00_v01.json" if packed else "all_sqe/a01_s01_e00_v01.json"
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / where))}: .*{message}"):
        nw_ucla.load(tmp_path)


def test_faults_around_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index.csv: expected a readable CSV file"):
        nw_ucla.load(tmp_path)
    (tmp_path / "index.csv").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"index.csv: expected a readable CSV file in UTF-8"):
        nw_ucla.load(tmp_path)
    (tmp_path / "index.csv").write_text(HEADER.replace(",view", "") + "\n")
    with pytest.raises(DataError, match=r"index.csv:1: columns .*, expected 'file_name,action"):
        nw_ucla.load(tmp_path)
    (tmp_path / "index.csv").write_text("\n".join([HEADER, *ROWS]))
    with pytest.raises(DataError, match=r"all_sqe.tar.xz: expected this archive, readable, or a folder"):
        nw_ucla.load(tmp_path)
    write(tmp_path, packed=True)
    archive = tmp_path / "all_sqe.tar.xz"
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match=r"all_sqe.tar.xz: expected this archive, readable"):
        nw_ucla.load(tmp_path)


def test_refuses_files_beyond_the_index(tmp_path: Path) -> None:
    write(tmp_path, rows=ROWS[:1])
    with pytest.raises(DataError, match=r"a08_s10_e03_v03.json: not listed in .*index.csv"):
        nw_ucla.load(tmp_path)


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs nw-ucla/index.csv and nw-ucla/all_sqe.tar.xz)")
def test_real_data() -> None:
    clips = nw_ucla.load(Path(DATA or "") / "nw-ucla")
    lengths = np.array([len(clip) for clip in clips.frames])
    assert (len(clips), lengths.sum(), lengths.min(), np.median(lengths), lengths.max()) == (1484, 58_534, 1, 31, 201)
    assert (lengths == 1).sum() == 2
    assert np.bincount(clips.labels).tolist() == [150, 152, 141, 173, 148, 149, 142, 142, 145, 142]
    assert [len(clips.where("view", [view])) for view in "123"] == [516, 504, 464]
    assert [len(clips.where("split", [split])) for split in ("train", "test")] == [1020, 464]
    assert set(clips.where("split", ["test"]).groups["view"].tolist()) == {"3"}
    assert len(set(clips.groups["subject"].tolist())) == 10
    frames, joint = np.concatenate(clips.frames), layout("kinect-v1").index
    assert 2.0 < np.median(frames[..., 2]) < 3.5
    assert np.median(frames[:, joint("head"), 1] - frames[:, joint("left_ankle"), 1]) > 1.0
    known = {clip.tobytes() for clip in clips.where("split", ["train"]).frames}
    copied = [
        clips.classes[label]
        for clip, label, part in zip(clips.frames, clips.labels, clips.groups["split"], strict=True)
        if part == "test" and clip.tobytes() in known
    ]
    assert {name: copied.count(name) for name in set(copied)} == {"pick up with two hands": 50, "drop trash": 45}, "of view 3 these are the files of view 2"
