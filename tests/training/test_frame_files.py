"""Tables and files by themselves; what a folder of them makes of each format and fault is in test_clip_folder.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from training.datasets import frame_files
from training.datasets.clips import DataError


def test_rows_have_the_columns_in_any_order_and_say_where_they_stand(tmp_path: Path) -> None:
    (table := tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfb, a\r\n1 ,x\r\n\r\n2,"y, z"\r\n')
    rows = frame_files.read_rows(table, ("a",), ("b", "c"))
    assert [row.values for row in rows] == [{"b": "1", "a": "x"}, {"b": "2", "a": "y, z"}]
    assert [row.where for row in rows] == [f"{table}:2", f"{table}:4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: columns '', expected a and perhaps b, each once"),
        ("b\n", ":1: columns 'b', expected a and perhaps b, each once"),
        ("a,a\n", ":1: columns 'a,a', expected"),
        ("a,c\n", ":1: columns 'a,c', expected"),
        ("a,b\n1,2\n1\n", ":3: expected 2 values, none empty: a,b"),
        ("a,b\n1, \n", ":2: expected 2 values, none empty"),
        ('a\n"1\n', ":2: expected comma-separated values"),
    ],
)
def test_faults_of_a_table(tmp_path: Path, text: str, message: str) -> None:
    (table := tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{table}{message}")):
        frame_files.read_rows(table, ("a",), ("b",))


def test_class_names_are_sorted_as_what_they_are() -> None:
    assert frame_files.class_names(["10", "9", "10"]) == ("9", "10")
    assert frame_files.class_names(["10", "9", "x"]) == ("10", "9", "x")


def test_every_format_holds_the_same_frames(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", frames)
    np.savez(tmp_path / "a.npz", frames=frames, other=np.zeros(3))
    np.savetxt(tmp_path / "a.csv", frames.reshape(5, 6), delimiter=",", fmt="%.9g")
    (tmp_path / "a.json").write_text(json.dumps(frames.tolist()))
    for ending in ("npy", "npz", "csv", "json"):
        file = frame_files.inside("here", tmp_path, f"a.{ending}")
        np.testing.assert_array_equal(frame_files.read("here", file, (2, 3), missing=False), frames)


def test_the_shape_of_frames_follows_from_the_layout_unless_it_is_stated(tmp_path: Path) -> None:
    assert frame_files.frame_shape_of(tmp_path, None, None) is None
    assert frame_files.frame_shape_of(tmp_path, "body-13", None) == (13, 3)
    assert frame_files.frame_shape_of(tmp_path, "body-13", (2, 13, 3)) == (2, 13, 3)
    with pytest.raises(DataError, match=r"frame_shape \(13, 2\), expected \(..., 13, 3\) for layout body-13"):
        frame_files.frame_shape_of(tmp_path, "body-13", (13, 2))
