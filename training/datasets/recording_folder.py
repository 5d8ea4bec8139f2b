"""A folder of one's own long recordings: `segments.csv` says what happens in them from which frame to which."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from model.contract import DataSource
from training.datasets import frame_files
from training.datasets.clips import DataError, Frames
from training.datasets.frame_files import Row
from training.datasets.recordings import Recordings, Segments

SEGMENTS, RECORDINGS = "segments.csv", "recordings.csv"
GROUPS = ("split", "subject", "view")


def load(
    path: Path,
    *,
    units: str,
    fps: float | None = None,
    layout: str | None = None,
    frame_shape: tuple[int, ...] | None = None,
    missing: bool = False,
    nothing: str = "nothing",
    source: DataSource | None = None,
) -> Recordings:
    """Reads the folder `path`; recordings are (T, *frame_shape), T >= 1, in `units`.

    `segments.csv` has columns `file,first,last,label`: frames `first` to `last` of the file, both inclusive and counted from 0, show one
    performance of `label`. Frames in no segment are of the class `nothing`; with an empty string there is no such class, and every frame must
    be in a segment. `recordings.csv`, which may be absent, has a column `file` and perhaps `split,subject,view,fps`; it lists every
    recording, also those in which nothing happens. Files of frames and the other arguments are those of `clip_folder`.

    Classes are the labels in order, as numbers where all are whole numbers, and `nothing` behind them. Groups: those of "split", "subject",
    "view" that are columns, and "recording", the file as it is named. Raises `DataError` naming file, line and what was expected;
    `model.skeletons.UnknownLayout`.
    """
    frame_shape = frame_files.frame_shape_of(path, layout, frame_shape)
    rows = frame_files.read_rows(path / SEGMENTS, ("file", "first", "last", "label"))
    if not rows:
        raise DataError(f"{path / SEGMENTS}: lists no segments, expected a row per segment below the header")
    row_of, rows_of = _by_recording(path, rows)
    labels = frame_files.class_names(row.values["label"] for row in rows)
    if nothing in labels:
        raise DataError(f"{path / SEGMENTS}: label {nothing!r}, expected it to be left out: frames in no segment are {nothing!r}")
    rate = frame_files.rate(path / RECORDINGS, list(row_of.values()), fps)
    frames = frame_files.read_all(row_of, frame_shape, missing)
    segments = tuple(_segments(rows_of[file], len(recording), labels) for file, recording in zip(row_of, frames, strict=True))
    if not nothing:
        _check_complete(path, row_of, frames, segments)
    columns = [group for group in GROUPS if group in next(iter(row_of.values())).values]
    return Recordings(
        frames=frames,
        segments=segments,
        classes=(*labels, nothing) if nothing else labels,
        nothing=nothing or None,
        groups={
            **{group: np.array([row.values[group] for row in row_of.values()], np.str_) for group in columns},
            "recording": np.array([row.values["file"] for row in row_of.values()], np.str_),
        },
        fps=rate,
        units=units,
        source=source or DataSource(name=path.resolve().name, terms="not stated", citation="not stated"),
        layout=layout,
    )


def _by_recording(folder: Path, rows: list[Row]) -> tuple[dict[Path, Row], dict[Path, list[Row]]]:
    """For every recording the row that introduces it, and its segments."""
    row_of: dict[Path, Row] = {}
    listed = (folder / RECORDINGS).exists()
    if listed:
        row_of = frame_files.each_once(folder, frame_files.read_rows(folder / RECORDINGS, ("file",), (*GROUPS, "fps")))
    rows_of: dict[Path, list[Row]] = {file: [] for file in row_of}
    for row in rows:
        file = frame_files.inside(row.where, folder, row.values["file"])
        if listed and file not in row_of:
            raise DataError(f"{row.where}: file {row.values['file']!r} is not listed in {folder / RECORDINGS}, expected every recording there")
        row_of.setdefault(file, row)
        rows_of.setdefault(file, []).append(row)
    return row_of, rows_of


def _segments(rows: list[Row], length: int, labels: tuple[str, ...]) -> Segments:
    """The segments of one recording of `length` frames in the order of time."""
    segments = sorted(((*_range(row, length), row) for row in rows), key=lambda segment: segment[:2])
    for (_, last, one), (first, _, other) in pairwise(segments):
        if first <= last:
            raise DataError(f"{other.where}: starts at frame {first}, before the segment of {one.where} ends ({last}), expected segments apart")
    return np.array([(first, last + 1, labels.index(row.values["label"])) for first, last, row in segments], np.int64).reshape(-1, 3)


def _range(row: Row, length: int) -> tuple[int, int]:
    first, last = row.values["first"], row.values["last"]
    # Eighteen digits fit any frame number: int() refuses endless ones in its own way.
    if not all(number.isdecimal() and len(number) <= 18 for number in (first, last)) or int(first) > int(last):
        raise DataError(f"{row.where}: first {first!r}, last {last!r}, expected frame numbers from 0, first not after last")
    if int(last) >= length:
        raise DataError(f"{row.where}: last frame {last}, expected at most {length - 1}: {row.values['file']} has {length} frames, counted from 0")
    return int(first), int(last)


def _check_complete(folder: Path, row_of: dict[Path, Row], frames: tuple[Frames, ...], segments: tuple[Segments, ...]) -> None:
    for row, recording, rows in zip(row_of.values(), frames, segments, strict=True):
        covered = int((rows[:, 1] - rows[:, 0]).sum())
        if covered < len(recording):
            left = f"{len(recording) - covered} of {len(recording)} frames in no segment"
            raise DataError(f"{folder / SEGMENTS}: {row.values['file']} has {left}, expected none, or a class for them (nothing=)")
