from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest

from training.datasets import uea
from training.datasets.clips import DataError

DATA = os.environ.get("TRAINING_DATA")

HEADER = """# a comment
@problemName Toy
@timeStamps false
@missing false
@univariate false
@dimensions 2
@equalLength true
@seriesLength 3
@classLabel true up down
@data
"""
CASES = "1,2,3:4,5,6:up\n-1,-2.5,3e1: 0, 0, 0 :down\n"


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def header(**changes: str | None) -> str:
    """The header with the line of a key replaced, or left out."""
    lines = HEADER.splitlines()
    for key, line in changes.items():
        lines = [new for old in lines for new in ([line] if old.startswith(f"@{key} ") else [old]) if new is not None]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["toy.ts", "toy.ts.gz"])
def test_reads_time_by_channels(tmp_path: Path, name: str) -> None:
    clips = uea.load(write(tmp_path / name, HEADER + CASES), fps=10.0)
    np.testing.assert_array_equal(clips.frames[0], [[1, 4], [2, 5], [3, 6]])
    np.testing.assert_array_equal(clips.frames[1], [[-1, 0], [-2.5, 0], [30, 0]])
    assert all(frames.dtype == np.float32 and frames.flags.c_contiguous for frames in clips.frames)
    assert (clips.classes, clips.labels.tolist(), clips.groups["split"].tolist()) == (("up", "down"), [0, 1], ["train", "train"])
    assert (clips.source.name, clips.fps, clips.layout) == ("Toy", 10.0, None)


def test_train_and_test_by_path_or_by_name(tmp_path: Path) -> None:
    train = write(tmp_path / "Toy_TRAIN.ts", HEADER + CASES)
    test = write(tmp_path / "Toy_TEST.ts.gz", HEADER + "7,8,9:7,8,9:down\n")
    for clips in (uea.load(train, test), uea.load(tmp_path, name="Toy")):
        assert clips.groups["split"].tolist() == ["train", "train", "test"]
        assert clips.labels.tolist() == [0, 1, 1]


def test_unequal_lengths_down_to_one(tmp_path: Path) -> None:
    text = header(equalLength="@equalLength false", seriesLength=None) + "1:2:up\n1,2,3,4:5,6,7,8:down\n"
    assert [len(clip) for clip in uea.load(write(tmp_path / "toy.ts", text)).frames] == [1, 4]


def test_what_the_header_leaves_open_comes_from_the_first_case(tmp_path: Path) -> None:
    text = header(dimensions=None, seriesLength=None, missing=None) + CASES
    assert uea.load(write(tmp_path / "toy.ts", text)).frame_shape == (2,)


def test_univariate_series_have_one_channel(tmp_path: Path) -> None:
    text = header(univariate="@univariate true", dimensions=None) + "1,2,3:up\n"
    assert uea.load(write(tmp_path / "toy.ts", text)).frame_shape == (1,)


def test_missing_values_where_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "toy.ts", header(missing="@missing true") + "1,?,3:4,5,NaN:up\n")
    clips = uea.load(path, missing=True)
    np.testing.assert_array_equal(clips.frames[0], [[1, 4], [np.nan, 5], [3, np.nan]])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:11: dimension 1: a value is missing, expected numbers only unless"):
        uea.load(path)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "holds no cases"),
        (HEADER, None, "holds no cases"),
        (HEADER + CASES + "1,2,3:up\n", 13, "1 dimensions, expected 2 and a class label"),
        (HEADER + CASES + "1,2,3:4,5,6:7,8,9:up\n", 13, "3 dimensions, expected 2"),
        (HEADER + CASES + "up\n", 13, "0 dimensions, expected 2"),
        (HEADER + "1,2,3:4,5,6:left\n", 11, "class label 'left', expected one of up down"),
        (HEADER + "1,2,3:4,5,6:\n", 11, "class label ''"),
        (HEADER + "1,2,3:4,5:up\n", 11, "dimensions of 3 2 values, expected equal lengths within a case"),
        (HEADER + "1,2:4,5:up\n", 11, "2 values a dimension, expected 3"),
        (header(seriesLength=None) + CASES + "1,2:4,5:up\n", 12, "2 values a dimension, expected 3"),
        (HEADER + "1,2,x:4,5,6:up\n", 11, "dimension 1: expected numbers separated by commas"),
        (HEADER + "1,2,3:4,,6:up\n", 11, "dimension 2: expected numbers separated by commas"),
        (HEADER + "1,2,3::up\n", 11, "dimension 2: expected numbers separated by commas"),
        (HEADER + "1,2,inf:4,5,6:up\n", 11, "dimension 1: expected values that float32 can hold"),
        (HEADER + "1,2,1e300:4,5,6:up\n", 11, "dimension 1: expected values that float32 can hold"),
        (HEADER + "1,2,?:4,5,6:up\n", 11, "dimension 1: a value is missing, expected none by '@missing false'"),
        (HEADER + "(0,1),(1,2):(0,1),(1,2):up\n", 11, "dimension 1: expected numbers"),
        ("1,2,3:4,5,6:up\n", 1, "expected '@' lines up to '@data'"),
        (header(classLabel=None) + CASES, 9, "expected a line '@classLabel true LABEL ...' before the data"),
        (header(classLabel="@classLabel false") + CASES, 9, "expected '@classLabel true' and the labels"),
        (header(classLabel="@classLabel true") + CASES, 9, "expected '@classLabel true' and the labels"),
        (header(classLabel="@classLabel true up up") + CASES, 9, "labels that differ"),
        (header(classLabel="@targetLabel true") + CASES, 9, "unknown header '@targetLabel', expected one of @problemName"),
        (header(timeStamps="@timeStamps true") + CASES, 3, "time stamps are not read, expected '@timeStamps false'"),
        (header(missing="@missing perhaps") + CASES, 4, "expected '@missing true' or '@missing false'"),
        (header(univariate="@univariate true") + CASES, 6, "2 dimensions, expected 1 as said before"),
        (header(dimensions="@dimensions two") + CASES, 6, "expected @dimensions and a whole number from 1"),
        (header(seriesLength="@seriesLength 0") + CASES, 8, "expected @seriesLength and a whole number from 1"),
        (header(missing="@timeStamps false") + CASES, 4, "@timeStamps occurs twice"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    path = write(tmp_path / "toy.ts", text)
    where = f"{path}:{line}" if line else f"{path}"
    with pytest.raises(DataError, match=f"^{re.escape(where)}: .*{re.escape(message)}"):
        uea.load(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("toy.ts", HEADER.encode() + b"1,2,3:4,5,6:\xff\n", ":11: expected text in UTF-8"),
        ("toy.ts.gz", HEADER.encode(), ": expected a readable .ts or .ts.gz file"),
        ("toy.ts.gz", gzip.compress(HEADER.encode())[:-9], ": expected a readable .ts or .ts.gz file"),
    ],
)
def test_faults_of_the_file_itself(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / name) + message)}"):
        uea.load(tmp_path / name)


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"toy.ts: expected a readable"):
        uea.load(tmp_path / "toy.ts")
    write(tmp_path / "Toy_TRAIN.ts", HEADER + CASES)
    with pytest.raises(DataError, match=r"expected a file Toy_TEST.ts or Toy_TEST.ts.gz, there is none"):
        uea.load(tmp_path, name="Toy")


@pytest.mark.parametrize(
    "text",
    [
        header(classLabel="@classLabel true down up") + CASES,
        header(dimensions="@dimensions 1") + "1,2,3:up\n",
    ],
)
def test_test_file_must_fit_the_training_file(tmp_path: Path, text: str) -> None:
    train, test = write(tmp_path / "a.ts", HEADER + CASES), write(tmp_path / "b.ts", text)
    with pytest.raises(DataError, match=r"b.ts: . dimensions, classes .*; expected 2 dimensions, classes up down, as in .*a.ts"):
        uea.load(train, test)


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs uea/*_TRAIN.ts.gz and uea/*_TEST.ts.gz)")
@pytest.mark.parametrize(
    ("name", "train", "test", "channels", "shortest", "longest", "classes"),
    [
        ("BasicMotions", 40, 40, 6, 100, 100, 4),
        ("JapaneseVowels", 270, 370, 12, 7, 29, 9),
        ("Libras", 180, 180, 2, 45, 45, 15),
        ("PenDigits", 7494, 3498, 2, 8, 8, 10),
        ("RacketSports", 151, 152, 6, 30, 30, 4),
    ],
)
def test_real_data(name: str, train: int, test: int, channels: int, shortest: int, longest: int, classes: int) -> None:
    clips = uea.load(Path(DATA or "") / "uea", name=name)
    lengths = [len(clip) for clip in clips.frames]
    assert [len(clips.where("split", [split])) for split in ("train", "test")] == [train, test]
    assert (clips.frame_shape, min(lengths), max(lengths)) == ((channels,), shortest, longest)
    assert len(clips.classes) == len(set(clips.labels.tolist())) == classes
    assert clips.source.name == name
    if name == "Libras":
        assert len({clip.tobytes() for clip in clips.frames}) == 330
