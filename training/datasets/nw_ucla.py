"""NW-UCLA: ten actions seen from three sides, Kinect v1 joints, from the `all_sqe` JSON files and an index of them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import skeletons
from model.contract import DataSource
from training.datasets.archives import files
from training.datasets.clips import ClipSet, DataError, Frames

LAYOUT = "kinect-v1"
INDEX, FOLDER, ARCHIVE = "index.csv", "all_sqe", "all_sqe.tar.xz"

# Action numbers have gaps; labels count 1 to 10 in this order.
ACTIONS = {
    1: "pick up with one hand",
    2: "pick up with two hands",
    3: "drop trash",
    4: "walk around",
    5: "sit down",
    6: "stand up",
    8: "donning",
    9: "doffing",
    11: "throw",
    12: "carry",
}

SOURCE = DataSource(
    name="NW-UCLA",
    terms="research only: published without an open licence, in a copy under CC BY-NC 4.0; neither the data nor weights trained on it may be shipped",
    citation="J. Wang, X. Nie, Y. Xia, Y. Wu, S.-C. Zhu, Cross-view Action Modeling, Learning and Recognition, CVPR 2014",
)

_FARTHEST = 100.0  # metres; the sensor sees less than ten
_COLUMNS = ("file_name", "action", "label", "subject", "episode", "view", "frames", "split")


@dataclass(frozen=True, slots=True)
class _Entry:
    where: str  # file and line, for messages
    name: str
    label: int  # 1 to 10
    subject: int
    view: int
    frames: int
    split: str


def load(path: Path) -> ClipSet:
    """Reads a folder that holds `index.csv` and either `all_sqe/` or `all_sqe.tar.xz`; clips are (T, 20, 3) in metres, T >= 1.

    Groups: "split" ("train": views 1 and 2, "test": view 3, as the index says), "subject", "view". 30 frames a second is the sensor's
    nominal rate; the sequences are thinned unevenly. Raises `DataError` naming file and line or field when a file is missing,
    malformed or disagrees with the index.
    """
    entries = _read_index(path / INDEX)
    clips: dict[str, Frames] = {}
    for file, where, data in files(path / FOLDER, path / ARCHIVE, ".json"):
        if file.stem not in entries:
            raise DataError(f"{where}: not listed in {path / INDEX}, expected only files the index names")
        clips[file.stem] = _parse(where, data, entries[file.stem])
    for entry in entries.values():
        if entry.name not in clips:
            raise DataError(f"{entry.where}: expected a file {entry.name}.json in {path / FOLDER} or {path / ARCHIVE}, there is none")
    rows = list(entries.values())
    return ClipSet(
        frames=tuple(clips[row.name] for row in rows),
        labels=np.array([row.label - 1 for row in rows], np.int64),
        classes=tuple(ACTIONS.values()),
        groups={
            "split": np.array([row.split for row in rows], np.str_),
            "subject": np.array([str(row.subject) for row in rows], np.str_),
            "view": np.array([str(row.view) for row in rows], np.str_),
        },
        fps=30.0,
        units="metres",
        source=SOURCE,
        layout=LAYOUT,
    )


def _read_index(path: Path) -> dict[str, _Entry]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable CSV file in UTF-8: {error}") from error
    rows = csv.reader(text.splitlines())
    if tuple(header := next(rows, [])) != _COLUMNS:
        raise DataError(f"{path}:1: columns {','.join(header)!r}, expected {','.join(_COLUMNS)!r}")
    entries: dict[str, _Entry] = {}
    for row in rows:
        entry = _entry(f"{path}:{rows.line_num}", row)
        if entry.name in entries:
            raise DataError(f"{entry.where}: file {entry.name} is listed twice, expected each file once")
        entries[entry.name] = entry
    if not entries:
        raise DataError(f"{path}: lists no files, expected one row per file below the header")
    return entries


def _entry(where: str, row: list[str]) -> _Entry:
    if len(row) != len(_COLUMNS):
        raise DataError(f"{where}: {len(row)} fields, expected {len(_COLUMNS)}: {','.join(_COLUMNS)}")
    name, *numbers, split = row
    try:
        action, label, subject, episode, view, frames = map(int, numbers)
    except ValueError:
        raise DataError(f"{where}: {','.join(numbers)!r}, expected whole numbers in columns {','.join(_COLUMNS[1:-1])}") from None
    if name != (expected := f"a{action:02}_s{subject:02}_e{episode:02}_v{view:02}"):
        raise DataError(f"{where}: file_name {name!r}, expected {expected!r} by its action, subject, episode and view")
    if action not in ACTIONS or label != list(ACTIONS).index(action) + 1:
        raise DataError(f"{where}: action {action} with label {label}, expected an action of {', '.join(map(str, ACTIONS))} with its place in this list")
    if split not in ("train", "test"):
        raise DataError(f"{where}: split {split!r}, expected 'train' or 'test'")
    return _Entry(where, name, label, subject, view, frames, split)


def _parse(where: str, data: bytes, entry: _Entry) -> Frames:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds a {type(value).__name__}, expected an object with file_name, skeletons and label")
    for field, expected in (("file_name", entry.name), ("label", entry.label)):
        if value.get(field) != expected:
            raise DataError(f"{where}: {field} is {value.get(field)!r}, expected {expected!r} by {entry.where}")
    joints = len(skeletons.layout(LAYOUT).joints)
    try:
        frames = np.asarray(value.get("skeletons"))
    except ValueError:  # ragged lists
        frames = np.empty(0, object)
    if frames.dtype.kind not in "fi" or frames.shape[1:] != (joints, 3):
        raise DataError(f"{where}: skeletons are no numbers of shape (T, {joints}, 3), which was expected; found {frames.dtype} {frames.shape}")
    if len(frames) != entry.frames:
        raise DataError(f"{where}: {len(frames)} frames, expected {entry.frames} by {entry.where}")
    if not (np.abs(frames) <= _FARTHEST).all():  # NaN too
        raise DataError(f"{where}: skeletons hold NaN or a coordinate beyond {_FARTHEST:g} m, expected metres")
    return np.ascontiguousarray(frames, np.float32)
