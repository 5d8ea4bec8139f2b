from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.contract import DataSource
from training.datasets.clips import ClipSet, DataError


def clip_set() -> ClipSet:
    return ClipSet(
        frames=tuple(np.full((length, 2), length, np.float32) for length in (1, 3, 2)),
        labels=np.array([0, 1, 0]),
        classes=("walk", "sit"),
        groups={"split": np.array(["train", "test", "train"]), "subject": np.array(["1", "2", "3"])},
        fps=30.0,
        units="metres",
        source=DataSource(name="toy", terms="none", citation="none"),
    )


def test_knows_its_size_and_frame_shape() -> None:
    clips = clip_set()
    assert (len(clips), clips.frame_shape, clips.missing) == (3, (2,), False)


def test_missing_when_any_value_is_nan() -> None:
    clips = clip_set()
    clips.frames[1][2, 0] = np.nan
    assert clips.missing


def test_take_keeps_order_and_columns() -> None:
    taken = clip_set().take([2, 0])
    assert [len(clip) for clip in taken.frames] == [2, 1]
    assert taken.labels.tolist() == [0, 0]
    assert taken.groups["subject"].tolist() == ["3", "1"]


def test_where_chooses_by_group() -> None:
    assert clip_set().where("split", ["train"]).groups["subject"].tolist() == ["1", "3"]
    assert len(clip_set().where("subject", ["1", "2", "9"])) == 2


@pytest.mark.parametrize(
    ("group", "values", "message"), [("view", ["1"], "no group 'view'; there are: split, subject"), ("split", ["val"], "there are: test, train")]
)
def test_where_names_what_there_is(group: str, values: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        clip_set().where(group, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": ()}, "no clips"),
        ({"frames": (np.zeros((1, 2), np.float64),) * 3}, "float64"),
        ({"frames": (np.zeros((0, 2), np.float32),) * 3}, "T >= 1"),
        ({"frames": (np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float32))}, "clip 1"),
        ({"labels": np.array([0, 1])}, "expected 3 in 0..1"),
        ({"labels": np.array([0, 1, 2])}, "expected 3 in 0..1"),
        ({"groups": {"split": np.array(["train"])}}, "group 'split' has 1 values for 3 clips"),
    ],
)
def test_refuses_what_does_not_fit_together(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(clip_set(), **change)  # type: ignore[arg-type]
