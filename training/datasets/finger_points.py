"""Finger point history: the path of an index finger tip in four gestures, stitched back from overlapping windows into recordings."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from model.contract import DataSource
from training.datasets.clips import ClipSet, DataError, Frames

Numbers = npt.NDArray[np.float64]

CLASSES = ("Stop", "Clockwise", "Counter Clockwise", "Move")
WINDOW = 16  # positions a row

SOURCE = DataSource(
    name="finger point history",
    terms="Apache-2.0",
    citation="Kazuhito Takahashi (Kazuhito00), hand-gesture-recognition-using-mediapipe, point_history.csv",
)

_LARGEST_SHIFT = 8  # at least half of a window must agree with the next; fewer points agree by chance
_TOLERANCE = 1e-6  # positions are rounded to 1e-9 and lie a pixel apart, 1e-3
_JUMP = 0.15  # of the image within one frame: no finger does that


@dataclass(frozen=True)
class _Recording:
    rows: range  # of the file
    starts: npt.NDArray[np.int64]  # (rows,), frame at which each row's window starts
    positions: Numbers  # (T, 2), relative to the first


def load(path: Path, form: Literal["recordings", "windows"] = "recordings", lost: Literal["keep", "missing"] = "keep", fps: float = 30.0) -> ClipSet:
    """Reads the CSV, plain or `.gz`: label, then 16 times (dx, dy), in parts of the image's width and height, y down.

    With `form="recordings"` a clip is (T, 2), a continuous path relative to its first position: rows of one label are joined where they
    overlap. With "windows" a clip is one row of the file, (16, 2), relative to its first position. The recorder wrote the image's corner
    while it saw no hand; `lost="missing"` makes those frames NaN.

    Groups: "split" ("train", or "test": the last quarter of each class, in file order), "part" ("train-a"; "train-b", the last fifth of
    the training rows of each class; "test") and "recording". No frame is in two parts: where a recording crosses a border, the rows
    that reach over it are left out of the earlier part. Raises `DataError` naming file and line.
    """
    labels, windows = _read(path)
    parts = _parts(labels)
    frames: list[Frames] = []
    columns: list[tuple[int, str, str]] = []  # label, part, recording
    for number, recording in enumerate(_stitch(labels, windows)):
        positions = _without_corner(recording.positions) if lost == "missing" else recording.positions
        names = parts[recording.rows.start : recording.rows.stop]
        for part in dict.fromkeys(names.tolist()):
            starts = _own(recording.starts, names, part)
            if form == "windows":
                pieces = [positions[start : start + WINDOW] - recording.positions[start] for start in starts]
            else:
                pieces = [positions[starts[0] : starts[-1] + WINDOW] - recording.positions[starts[0]]] if len(starts) else []
            frames += [np.ascontiguousarray(piece, np.float32) for piece in pieces]
            columns += [(int(labels[recording.rows.start]), part, str(number))] * len(pieces)
    part_column = np.array([part for _, part, _ in columns], np.str_)
    return ClipSet(
        frames=tuple(frames),
        labels=np.array([label for label, _, _ in columns], np.int64),
        classes=CLASSES,
        groups={
            "split": np.where(part_column == "test", "test", "train"),
            "part": part_column,
            "recording": np.array([name for _, _, name in columns], np.str_),
        },
        fps=fps,
        units="parts of the image's width and height",
        source=SOURCE,
    )


def _read(path: Path) -> tuple[npt.NDArray[np.int64], Numbers]:
    """Labels (N,) and windows (N, 16, 2)."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable CSV file, plain or .gz: {error}") from error
    labels, windows = [], []
    for line, row in enumerate(text.splitlines(), start=1):
        fields = row.split(",")
        if len(fields) != 1 + 2 * WINDOW:
            raise DataError(f"{path}:{line}: {len(fields)} fields, expected {1 + 2 * WINDOW}: label, then {WINDOW} times dx, dy")
        if fields[0] not in ("0", "1", "2", "3"):
            raise DataError(f"{path}:{line}: label {fields[0]!r}, expected 0 to {len(CLASSES) - 1}")
        try:
            window = np.array(fields[1:], np.float64).reshape(WINDOW, 2)
        except ValueError as error:
            raise DataError(f"{path}:{line}: expected numbers after the label: {error}") from None
        if not (np.abs(window) <= 1.0).all() or window[0].any():
            raise DataError(f"{path}:{line}: expected positions from -1 to 1, relative to the first, which is 0,0")
        labels.append(int(fields[0]))
        windows.append(window)
    if not labels:
        raise DataError(f"{path}: holds no rows, expected label, then {WINDOW} times dx, dy on each line")
    return np.array(labels, np.int64), np.stack(windows)


def _parts(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """The part of each row: within each class, in file order, 12/20 "train-a", 3/20 "train-b", 5/20 "test"."""
    parts = np.full(len(labels), "train-a")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        training = len(rows) * 3 // 4
        parts[rows[training * 4 // 5 : training]] = "train-b"
        parts[rows[training:]] = "test"
    return parts


def _stitch(labels: npt.NDArray[np.int64], windows: Numbers) -> list[_Recording]:
    """Joins rows into recordings. The recorder sometimes left a row out, so a window may be two frames on from the one before."""
    recordings = []
    first, offset, origin = 0, 0, np.zeros(2)
    starts, pieces = [0], [windows[0]]
    for row in range(1, len(labels) + 1):
        shift = _shift(windows[row - 1], windows[row]) if row < len(labels) and labels[row] == labels[row - 1] else 0
        if shift:
            offset, origin = offset + shift, origin + windows[row - 1, shift]
            starts.append(offset)
            pieces.append(origin + windows[row, WINDOW - shift :])
            continue
        recordings.append(_Recording(range(first, row), np.array(starts, np.int64), np.concatenate(pieces)))
        if row < len(labels):
            first, offset, origin = row, 0, np.zeros(2)
            starts, pieces = [0], [windows[row]]
    return recordings


def _shift(window: Numbers, following: Numbers) -> int:
    """By how many frames `following` is on from `window`; 0 where they do not overlap."""
    for shift in range(1, _LARGEST_SHIFT + 1):
        if np.abs(window[shift:] - window[shift] - following[:-shift]).max() <= _TOLERANCE:
            return shift
    return 0


def _own(starts: npt.NDArray[np.int64], parts: npt.NDArray[np.str_], part: str) -> npt.NDArray[np.int64]:
    """The windows of one part that share no frame with a later part of the same recording."""
    rows = np.flatnonzero(parts == part)
    later = starts[rows[-1] + 1 :]
    own = starts[rows]
    return own[own + WINDOW <= later[0]] if len(later) else own


def _without_corner(positions: Numbers) -> Numbers:
    """NaN where no hand was seen: the one point that every jump of the recording starts from or ends at."""
    steps = np.flatnonzero(np.abs(np.diff(positions, axis=0)).max(axis=1) > _JUMP)
    if len(steps) < 2:
        return positions
    for corner in (positions[steps[0]], positions[steps[0] + 1]):
        at_corner = np.abs(positions - corner).max(axis=1) <= _TOLERANCE
        if (at_corner[steps] | at_corner[steps + 1]).all():
            return np.where(at_corner[:, None], np.nan, positions)
    return positions
