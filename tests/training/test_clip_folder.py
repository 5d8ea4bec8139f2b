from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.contract import DataSource
from model.skeletons import UnknownLayout
from training.datasets import clip_folder
from training.datasets.clips import ClipSet, DataError


def index(folder: Path, *rows: str, header: str = "file,label") -> Path:
    (folder / "index.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def load(folder: Path, **arguments: Any) -> ClipSet:
    return clip_folder.load(folder, **({"units": "metres", "fps": 30.0} | arguments))


def frames(length: int, *shape: int) -> Any:
    return np.random.default_rng(length).uniform(-1, 1, (length, *shape)).astype(np.float32)


def save_npy(path: Path, array: Any) -> None:
    np.save(path, array)


def save_npz(path: Path, array: Any) -> None:
    np.savez(path, anything=array)


def save_npz_frames(path: Path, array: Any) -> None:
    np.savez(path, frames=array, times=np.arange(len(array)))


def save_csv(path: Path, array: Any) -> None:
    path.write_text("\n".join(",".join(map(str, row.tolist())) for row in array.reshape(len(array), -1)) + "\n")


def save_csv_header(path: Path, array: Any) -> None:
    save_csv(path, array)
    path.write_bytes(b"\xef\xbb\xbf" + ",".join(f"c{i}" for i in range(array[0].size)).encode() + b"\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))


def save_json(path: Path, array: Any) -> None:
    path.write_text(json.dumps(array.tolist()))


def save_json_object(path: Path, array: Any) -> None:
    path.write_text(json.dumps({"frames": array.tolist(), "camera": "left"}))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.npy", save_npy),
        ("a.npz", save_npz),
        ("a.npz", save_npz_frames),
        ("a.csv", save_csv),
        ("a.csv", save_csv_header),
        ("a.json", save_json),
        ("a.json", save_json_object),
    ],
)
def test_every_format_gives_the_same_clip(tmp_path: Path, name: str, save: Callable[[Path, Any], None], length: int) -> None:
    clip = frames(length, 13, 3)
    save(tmp_path / name, clip)
    loaded = load(index(tmp_path, f"{name},walk"), layout="body-13")
    np.testing.assert_array_equal(loaded.frames[0], clip)
    assert loaded.frames[0].dtype == np.float32
    assert loaded.frames[0].flags.c_contiguous
    assert (loaded.layout, loaded.units, loaded.fps) == ("body-13", "metres", 30.0)


def test_columns_become_groups_and_classes_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for i, name in enumerate(["a.npy", "b.npy", "more/a.npy"]):
        np.save(tmp_path / name, frames(i + 1, 2))
    rows = ["b.npy,walk,test,anna,1", "a.npy,sit,train,bert,2", "more/a.npy,walk,train,bert,2"]
    clips = load(index(tmp_path, *rows, header="file,label,split,subject,view"))
    assert [len(clip) for clip in clips.frames] == [2, 1, 3]
    assert (clips.classes, clips.labels.tolist()) == (("sit", "walk"), [1, 0, 1])
    assert {name: column.tolist() for name, column in clips.groups.items()} == {
        "split": ["test", "train", "train"],
        "subject": ["anna", "bert", "bert"],
        "view": ["1", "2", "2"],
    }


def test_number_labels_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", frames(1, 2))
    assert load(index(tmp_path, "a.npy,10", "b.npy,9", "c.npy,1")).classes == ("1", "9", "10")


def test_source_is_the_folder_unless_stated(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frames(1, 2))
    index(tmp_path, "a.npy,x")
    assert load(tmp_path).source.name == tmp_path.name
    source = DataSource(name="mine", terms="private", citation="none")
    assert load(tmp_path, source=source).source is source


def test_rate_from_the_column(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frames(1, 2))
    np.save(tmp_path / "b.npy", frames(1, 2))
    index(tmp_path, "a.npy,x,25", "b.npy,x,25.0", header="file,label,fps")
    assert load(tmp_path, fps=None).fps == 25.0
    assert load(tmp_path, fps=25.0).fps == 25.0
    index(tmp_path, "a.npy,x", "b.npy,x")
    for rate in (-1.0, 0.0, math.nan):
        with pytest.raises(DataError, match="expected a number above 0"):
            load(tmp_path, fps=rate)


def test_integers_and_doubles_become_float32(tmp_path: Path) -> None:
    for name, dtype in (("a", np.int16), ("b", np.uint8), ("c", np.float64), ("d", np.float16)):
        np.save(tmp_path / f"{name}.npy", np.ones((2, 3), dtype, order="F"))
    clips = load(index(tmp_path, "a.npy,x", "b.npy,x", "c.npy,x", "d.npy,x"))
    assert all(clip.flags.c_contiguous and clip.dtype == np.float32 and (clip == 1).all() for clip in clips.frames)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[[[1, 2], [3, 4]], [null, [5, 6]], [[7, 8], [null, null]], null]"),
        ("a.csv", "1,2,3,4\n,,5,6\n7,8,,\n,,,\n"),
        ("a.csv", "x1,y1,x2,y2\n1,2,3,4\nnan,nan,5,6\n7,8,,\n,,,\n"),
    ],
)
def test_missing_values_where_asked_for(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    index(tmp_path, f"{name},x")
    nan = np.nan
    expected = [[[1, 2], [3, 4]], [[nan, nan], [5, 6]], [[7, 8], [nan, nan]], [[nan, nan], [nan, nan]]]
    np.testing.assert_array_equal(load(tmp_path, missing=True, frame_shape=(2, 2)).frames[0], expected)
    with pytest.raises(DataError, match=rf"index.csv:2: {name}: frame 1 holds a missing value, expected none unless"):
        load(tmp_path, frame_shape=(2, 2))


def test_a_single_channel_may_be_flat_where_the_shape_is_stated(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frames(4))
    assert load(index(tmp_path, "a.npy,x"), frame_shape=(1,)).frames[0].shape == (4, 1)


@pytest.mark.parametrize(
    ("header", "rows", "line", "message"),
    [
        ("file", ["a.npy"], 1, "columns 'file', expected file,label and perhaps split,subject,view,fps, each once"),
        ("file,label,colour", ["a.npy,x,red"], 1, "columns 'file,label,colour', expected"),
        ("file,label,label", ["a.npy,x,x"], 1, "columns 'file,label,label', expected"),
        ("file,label", [], None, "lists no clips"),
        ("file,label", ["a.npy"], 2, "expected 2 values, none empty: file,label"),
        ("file,label", ["a.npy,x,y"], 2, "expected 2 values, none empty: file,label"),
        ("file,label", ["a.npy,"], 2, "expected 2 values, none empty: file,label"),
        ("file,label,split", ["a.npy,x,"], 2, "expected 3 values, none empty: file,label,split"),
        ("file,label", ["a.npy,x", "/a.npy,x"], 3, "file '/a.npy', expected a path relative to"),
        ("file,label", ["C:\\a.npy,x"], 2, "file 'C:\\\\a.npy', expected a path relative to"),
        ("file,label", ["a.npy,x", "../a.npy,x"], 3, "file '../a.npy' leaves the folder, expected a file inside"),
        ("file,label", ["link/a.npy,x"], 2, "file 'link/a.npy' leaves the folder"),
        ("file,label", ["a.npy,x", "b.npy,x", "./sub/../a.npy,y"], 4, "./sub/../a.npy is the file of {index}:2 again"),
        ("file,label", ["absent.npy,x"], 2, "file 'absent.npy', expected to find it in"),
        ("file,label", ["sub.npy,x"], 2, "file 'sub.npy', expected to find it in"),
        ("file,label", ["a.txt,x"], 2, "file 'a.txt', expected one ending in .npy, .npz, .csv, .json"),
        ("file,label", ['"a.npy,x'], 2, "expected comma-separated values"),
        ("file,label,fps", ["a.npy,x,fast"], 2, "fps 'fast', expected a number above 0"),
        ("file,label,fps", ["a.npy,x,0"], 2, "fps '0', expected a number above 0"),
        ("file,label,fps", ["a.npy,x,30", "b.npy,x,25"], 3, "fps 25, expected 30 as before: a model learns at one rate"),
        ("file,label,fps", ["a.npy,x,25"], 2, "fps 25, expected 30 as before"),
    ],
)
def test_faults_of_the_index(tmp_path: Path, header: str, rows: list[str], line: int | None, message: str) -> None:
    folder, outside = tmp_path / "clips", tmp_path / "outside"
    for directory in (folder, outside, folder / "sub", folder / "sub.npy"):
        directory.mkdir()
    for path in (tmp_path, folder, outside):
        np.save(path / "a.npy", frames(2, 2))
    np.save(folder / "b.npy", frames(2, 2))
    (folder / "a.txt").write_text("1,2\n")
    (folder / "link").symlink_to(outside)
    where = str(index(folder, *rows, header=header) / "index.csv") + (f":{line}" if line else "")
    with pytest.raises(DataError, match=re.escape(f"{where}: {message.format(index=folder / 'index.csv')}")):
        load(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, ": expected a readable file"),
        (b"", ":1: columns '', expected file,label"),
        (b"file,label\na.npy,caf\xe9\n", ":2: expected text in UTF-8"),
    ],
)
def test_faults_of_the_index_file_itself(tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / "index.csv").write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "index.csv") + message)):
        load(tmp_path)


def test_a_rate_must_be_known(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frames(1, 2))
    with pytest.raises(DataError, match=r"index.csv: expected a column fps, or the rate from the caller"):
        load(index(tmp_path, "a.npy,x"), fps=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.npy", np.array([[1, None]], object), ": expected a readable NumPy file of numbers, without pickled objects"),
        ("b.npy", b"not an array", ": expected a readable NumPy file"),
        ("b.npy", b"", ": expected a readable NumPy file"),
        ("b.npz", b"PK\x03\x04 cut", ": expected a readable NumPy file"),
        ("b.npz", {"x": np.zeros((1, 2)), "y": np.zeros((1, 2))}, ": arrays x, y, expected a single one or one called frames"),
        ("b.npz", {"frames": np.array([[1, None]], object)}, ": expected a readable NumPy file of numbers, without pickled objects"),
        ("b.npy", np.zeros((0, 2)), ": shape (0, 2), expected (T, ...) with at least one frame"),
        ("b.npy", np.float32(1), ": shape (), expected (T, ...)"),
        ("b.npy", np.zeros(3), ": shape (3,), expected (T, channels)"),
        ("b.npy", np.zeros((3, 2), complex), ": values are complex128, expected real numbers"),
        ("b.npy", np.array([["1", "2"]]), ": values are <U1, expected real numbers"),
        ("b.npy", np.zeros((3, 4)), " has frames of shape (4,), expected (2,) as in a.npy"),
        ("b.npy", np.array([[0, 0], [np.inf, 0]]), ": frame 1 holds an infinite value or one beyond float32"),
        ("b.npy", np.array([[0, 0], [1e300, 0]]), ": frame 1 holds an infinite value or one beyond float32"),
        ("b.npy", np.array([[np.nan, 0]]), ": frame 0 holds a missing value"),
        ("b.csv", b"", ": shape (0,), expected (T, ...) with at least one frame"),
        ("b.csv", b"x,y\n", ": shape (0,), expected (T, ...) with at least one frame"),
        ("b.csv", b"x,y\n1,2\n3\n", ":3: 1 fields, expected 2 as on line 2"),
        ("b.csv", b"x,y\n1,2\n\n5,6\n", ":3: a blank line, expected a frame on every line"),
        ("b.csv", b"1,2\n3,four\n", ":2: expected numbers"),
        ("b.csv", b"1,y\n3,4\n", ":1: expected numbers"),
        ("b.csv", b"1,2\n\xff,4\n", ":2: expected text in UTF-8"),
        ("b.csv", b"1,2\n3,inf\n", ": frame 1 holds an infinite value"),
        ("b.json", b"{", ": expected JSON"),
        ("b.json", b"[" * 100_000, ": expected JSON"),
        ("b.json", b"[[1, NaN]]", ": expected JSON: NaN is not JSON, a missing value is null"),
        ("b.json", b"\xff", ":1: expected text in UTF-8"),
        ("b.json", b'{"clips": []}', ": expected a list of frames, or an object with a list called 'frames'"),
        ("b.json", b"3", ": expected a list of frames"),
        ("b.json", b"[]", ": shape (0,), expected (T, ...) with at least one frame"),
        ("b.json", b"[" * 20 + b"]" * 20, ": lists nested 20 deep, expected at most 8"),
        ("b.json", b"[[1, 2], [3]]", ": frames[1] is [3], expected a list of 2"),
        ("b.json", b"[[1, 2], 3]", ": frames[1] is 3, expected a list of 2"),
        ("b.json", b'[[1, "2"]]', ": frames[0][1] is '2', expected a number or null"),
        ("b.json", b"[[1, true]]", ": frames[0][1] is True, expected a number or null"),
        ("b.json", b"[[1, 1" + b"0" * 400 + b"]]", ": frame 0 holds an infinite value"),
        ("b.json", b"[[1, null]]", ": frame 0 holds a missing value"),
    ],
)
def test_faults_of_a_clip_name_the_index_line_and_the_file(tmp_path: Path, name: str, content: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", frames(2, 2))
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    else:
        np.save(tmp_path / name, content)
    index(tmp_path, "a.npy,x", f"{name},y")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'index.csv'}:3: {name}{message}")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 12, 3), {"layout": "body-13"}, "frames of shape (12, 3), expected (13, 3) or 39 numbers"),
        ((2, 3, 13), {"layout": "body-13"}, "frames of shape (3, 13), expected (13, 3) or 39 numbers"),
        ((2, 38), {"frame_shape": (13, 3)}, "frames of shape (38,), expected (13, 3) or 39 numbers"),
        ((2, 13, 3), {"frame_shape": (39,)}, "frames of shape (13, 3), expected (39,)"),
        ((2, 13, 3), {"layout": "body-13", "frame_shape": (12, 3)}, "frame_shape (12, 3), expected (..., 13, 3) for layout body-13"),
    ],
)
def test_frames_must_have_the_stated_shape(tmp_path: Path, shape: tuple[int, ...], arguments: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(DataError, match=re.escape(message)):
        load(index(tmp_path, "a.npy,x"), **arguments)


def test_several_bodies_of_one_layout(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frames(4, 2, 13, 3))
    assert load(index(tmp_path, "a.npy,x"), layout="body-13", frame_shape=(2, 13, 3)).frame_shape == (2, 13, 3)


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout):
        load(tmp_path, layout="octopus")
