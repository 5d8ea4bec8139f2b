from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from model.contract import DataSource
from training.datasets.clips import DataError
from training.datasets.recordings import Recordings


def segments(*rows: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(-1, 3)


def recordings() -> Recordings:
    """Three recordings; in the first, two performances of "sit" follow each other without a frame between."""
    return Recordings(
        frames=tuple(np.arange(2 * length, dtype=np.float32).reshape(length, 2) + 100 * i for i, length in enumerate((9, 4, 3))),
        segments=(segments((1, 3, 2), (3, 5, 2), (7, 9, 0)), segments(), segments((0, 3, 0))),
        classes=("walk", "idle", "sit"),
        nothing="idle",
        groups={"subject": np.array(["a", "b", "a"])},
        fps=15.0,
        units="metres",
        source=DataSource(name="toy", terms="none", citation="none"),
        times=tuple(np.arange(length) / 15 for length in (9, 4, 3)),
    )


def test_frames_in_no_segment_are_nothing() -> None:
    labels = recordings().labels
    assert [row.tolist() for row in labels] == [[1, 2, 2, 2, 2, 1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0]]
    assert all(row.dtype == np.int64 for row in labels)
    with pytest.raises(ValueError, match="read-only"):
        labels[0][0] = 0


def test_knows_its_size_frame_shape_and_gaps() -> None:
    whole = recordings()
    assert (len(whole), whole.frame_shape, whole.missing) == (3, (2,), False)
    whole.frames[1][2, 0] = np.nan
    assert whole.missing


def test_clips_are_the_segments_each_for_itself() -> None:
    whole = recordings()
    clips = whole.clips()
    assert clips.classes == ("walk", "sit")
    assert [clips.classes[label] for label in clips.labels] == ["sit", "sit", "walk", "walk"], "two performances without a gap stay two"
    for clip, (i, first, end) in zip(clips.frames, [(0, 1, 3), (0, 3, 5), (0, 7, 9), (2, 0, 3)], strict=True):
        np.testing.assert_array_equal(clip, whole.frames[i][first:end])
    assert {name: column.tolist() for name, column in clips.groups.items()} == {"recording": ["0", "0", "0", "2"], "subject": ["a", "a", "a", "a"]}
    assert (clips.fps, clips.units, clips.source, clips.layout) == (whole.fps, whole.units, whole.source, whole.layout)


def test_a_group_of_that_name_stays() -> None:
    named = replace(recordings(), groups={"recording": np.array(["x", "y", "z"])})
    assert named.clips().groups["recording"].tolist() == ["x", "x", "x", "z"]


def test_no_segment_gives_no_clips() -> None:
    with pytest.raises(DataError, match="toy: no segment in any of 1 recordings"):
        recordings().take([1]).clips()


def test_without_a_class_for_nothing_every_frame_is_in_a_segment() -> None:
    whole = replace(recordings().take([2]), nothing=None)
    assert whole.labels[0].tolist() == [0, 0, 0]
    assert whole.clips().classes == whole.classes
    with pytest.raises(DataError, match="recording 0: frames outside all segments"):
        replace(recordings(), nothing=None)


def test_take_keeps_order_and_columns() -> None:
    taken = recordings().take([2, 0])
    assert [len(frames) for frames in taken.frames] == [3, 9]
    assert [len(rows) for rows in taken.segments] == [1, 3]
    assert [len(row) for row in taken.labels] == [3, 9]
    assert taken.times is not None
    assert [len(row) for row in taken.times] == [3, 9]
    assert replace(recordings(), times=None).take([0]).times is None
    with pytest.raises(DataError, match="no recordings"):
        taken.take([])


def test_where_chooses_by_group_and_names_what_there_is() -> None:
    assert [len(frames) for frames in recordings().where("subject", ["a", "z"]).frames] == [9, 3]
    with pytest.raises(DataError, match="no group 'view'; there are: subject"):
        recordings().where("view", ["1"])
    with pytest.raises(DataError, match=r"no recording with subject in \['z'\]; there are: a, b"):
        recordings().where("subject", ["z"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": ()}, "no recordings"),
        ({"frames": (np.zeros((9, 2)),) * 3}, "recording 0 is float64"),
        (
            {"frames": (np.zeros((9, 2), np.float32), np.zeros((0, 2), np.float32), np.zeros((3, 2), np.float32))},
            r"recording 1 is .*expected float32 \(T >= 1, 2\)",
        ),
        ({"frames": (np.zeros((9, 2), np.float32), np.zeros((4, 3), np.float32), np.zeros((3, 2), np.float32))}, "recording 1"),
        ({"classes": ("walk", "walk", "idle")}, "expected each once"),
        ({"nothing": "rest"}, "nothing is 'rest', expected one of the classes: walk, idle, sit"),
        ({"segments": (segments(),) * 2}, "segments of 2 recordings, expected 3"),
        ({"segments": (np.zeros((1, 3)), segments(), segments())}, r"recording 0: segments are float64 \(1, 3\), expected int64"),
        ({"segments": (np.zeros((2, 2), np.int64), segments(), segments())}, r"segments are int64 \(2, 2\)"),
        ({"segments": (segments((2, 2, 0)), segments(), segments())}, r"segment \[2, 2\) of 9 frames"),
        ({"segments": (segments((-1, 2, 0)), segments(), segments())}, r"segment \[-1, 2\) of 9 frames"),
        ({"segments": (segments(), segments((2, 5, 0)), segments())}, r"recording 1: segment \[2, 5\) of 4 frames, expected 0 <= first < end <= 4"),
        ({"segments": (segments((0, 3, 0), (2, 5, 2)), segments(), segments())}, r"segment \[2, 5\) starts before the one in front of it ends \(3\)"),
        ({"segments": (segments((4, 6, 0), (0, 2, 2)), segments(), segments())}, r"segment \[0, 2\) starts before"),
        ({"segments": (segments((0, 3, 3)), segments(), segments())}, r"has label 3, expected one in 0..2"),
        ({"segments": (segments((0, 3, -1)), segments(), segments())}, "has label -1"),
        ({"segments": (segments((0, 3, 1)), segments(), segments())}, "has label 1, expected one in 0..2 that is not nothing"),
        ({"groups": {"split": np.array(["train"])}}, "group 'split' has 1 values for 3 recordings"),
        ({"times": (np.arange(9.0),)}, "times of 1 recordings, expected 3"),
        ({"times": (np.arange(9.0), np.arange(3.0), np.arange(3.0))}, r"recording 1: times are \(3,\), expected \(4,\)"),
        ({"times": (np.arange(9.0), np.array([0.0, 1.0, 1.0, 2.0]), np.arange(3.0))}, "recording 1: times are .*each later than the one before"),
        ({"times": (np.full(9, np.nan), np.arange(4.0), np.arange(3.0))}, "recording 0: times are"),
        ({"times": (np.append(np.arange(8.0), np.inf), np.arange(4.0), np.arange(3.0))}, "recording 0: times are"),
    ],
)
def test_refuses_what_does_not_fit_together(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^toy: .*{message}"):
        replace(recordings(), **change)  # type: ignore[arg-type]
