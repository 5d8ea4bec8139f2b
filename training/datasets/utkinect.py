"""UTKinect-Action3D: ten actions by ten people in 20 long recordings, Kinect v1 joints, from its text files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model import skeletons
from model.contract import DataSource
from training.datasets.archives import files
from training.datasets.clips import DataError, Frames
from training.datasets.recordings import Recordings, Segments

LAYOUT = "kinect-v1"
LABELS, FOLDER, ARCHIVE = "actionLabel_modified.txt", "joints", "joints.tar.xz"

ACTIONS = {
    "walk": "walk",
    "sitDown": "sit down",
    "standUp": "stand up",
    "pickUp": "pick up",
    "carry": "carry",
    "throw": "throw",
    "push": "push",
    "pull": "pull",
    "waveHands": "wave hands",
    "clapHands": "clap hands",
}
NOTHING = "nothing"

SOURCE = DataSource(
    name="UTKinect-Action3D",
    terms="free for research with citation, no open licence stated; neither the data nor weights trained on it may be shipped",
    citation="L. Xia, C.-C. Chen, J. K. Aggarwal, View Invariant Human Action Recognition Using Histograms of 3D Joints, CVPR Workshops 2012",
)

NUMBERS_PER_SECOND = 60  # frame numbers are even: two to a picture of a 30 Hz sensor
FPS = 14.0  # frames a second while the person was tracked; a frame came every 4.28 numbers

_FARTHEST = 100.0  # metres; the sensor sees less than ten
_NAME = re.compile(r"s(\d\d)_e(\d\d)")
_PREFIX = "joints_"


@dataclass(frozen=True, slots=True)
class _Range:
    where: str  # file and line, for messages
    label: int
    first: int  # frame numbers, both inclusive
    last: int


@dataclass(frozen=True, slots=True)
class _Track:
    """One recording as its file has it, repeats left out."""

    where: str
    numbers: npt.NDArray[np.int64]  # (T,), rising
    frames: Frames  # (T, 20, 3)


def load(path: Path) -> Recordings:
    """Reads a folder that holds `joints/` or `joints.tar.xz`; recordings are (T, 20, 3) in metres, frames between actions are "nothing".

    Ranges are those of `actionLabel_modified.txt`, in which obvious errors of the original are corrected. Of frames with the same number
    the first is kept. Where one action's last number is the next one's first, the frame belongs to the earlier. `times` are frame numbers over
    60: frames come unevenly, 14 a second on average, so that `fps` is right for the set and not for a single step.

    Groups: "subject" ("1" to "10"), "episode" ("1", "2"), "recording" ("s01_e01"). Raises `DataError` naming file and line when a file is
    missing, malformed, or labels and frames do not fit together.
    """
    ranges: dict[str, list[_Range]] = {}
    tracks: dict[str, _Track] = {}
    for file, where, data in files(path / FOLDER, path / ARCHIVE, ".txt"):
        if file.name == LABELS:
            ranges = _read_labels(where, _text(where, data))
        elif file.stem.startswith(_PREFIX):
            tracks[file.stem.removeprefix(_PREFIX)] = _read_track(where, _text(where, data))
    if not ranges:
        raise DataError(f"{path}: expected {LABELS} with at least one recording, in {FOLDER}/ or {ARCHIVE}")
    if odd := sorted(set(ranges) ^ set(tracks)):
        fault = f"is not in {LABELS}" if odd[0] in tracks else f"has no file {_PREFIX}{odd[0]}.txt"
        raise DataError(f"{path}: recording {odd[0]} {fault}, expected both for every recording")
    names = sorted(ranges)
    parts = [match.groups() for match in map(_NAME.fullmatch, names) if match]
    return Recordings(
        frames=tuple(tracks[name].frames for name in names),
        segments=tuple(_segments(tracks[name], ranges[name]) for name in names),
        classes=(*ACTIONS.values(), NOTHING),
        nothing=NOTHING,
        groups={
            "subject": np.array([str(int(subject)) for subject, _ in parts], np.str_),
            "episode": np.array([str(int(episode)) for _, episode in parts], np.str_),
            "recording": np.array(names, np.str_),
        },
        fps=FPS,
        units="metres",
        source=SOURCE,
        layout=LAYOUT,
        times=tuple((tracks[name].numbers - tracks[name].numbers[0]) / NUMBERS_PER_SECOND for name in names),
    )


def _text(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected text in UTF-8: {error}") from error


def _is_number(word: str) -> bool:
    return word.isdecimal() and len(word) < 10  # longer ones are no frame numbers and need not fit an int64


def _read_labels(where: str, text: str) -> dict[str, list[_Range]]:
    """By recording, the ranges that are known; an action whose range is "NaN NaN" is left out."""
    ranges: dict[str, list[_Range]] = {}
    seen: dict[str, list[str]] = {}
    name = ""
    for i, line in enumerate(text.splitlines(), start=1):
        words = line.replace(":", " ").split()
        at = f"{where}:{i}"
        if not words:
            continue
        if _NAME.fullmatch(line.strip()):
            name = line.strip()
            if name in ranges:
                raise DataError(f"{at}: recording {name} again, expected each once")
            ranges[name], seen[name] = [], []
            continue
        if len(words) != 3 or words[0] not in ACTIONS or not name:
            raise DataError(f"{at}: {line!r}, expected a recording like s01_e01, and below it a line 'action: first last' for each of {', '.join(ACTIONS)}")
        seen[name].append(words[0])
        if words[1:] == ["NaN", "NaN"]:
            continue
        if not all(map(_is_number, words[1:])) or int(words[1]) > int(words[2]):
            raise DataError(f"{at}: range {' '.join(words[1:])!r}, expected first and last frame number, first not after last, or NaN NaN")
        ranges[name].append(_Range(at, list(ACTIONS).index(words[0]), int(words[1]), int(words[2])))
    for recording, actions in seen.items():
        if sorted(actions) != sorted(ACTIONS):
            raise DataError(f"{where}: recording {recording} has {', '.join(actions) or 'no actions'}, expected each of {', '.join(ACTIONS)} once")
    return ranges


def _read_track(where: str, text: str) -> _Track:
    joints = len(skeletons.layout(LAYOUT).joints)
    numbers: list[int] = []
    rows: list[list[float]] = []
    for i, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if len(fields) != 1 + 3 * joints:
            raise DataError(f"{where}:{i}: {len(fields)} fields, expected a frame number and {3 * joints} coordinates")
        if not _is_number(fields[0]):
            raise DataError(f"{where}:{i}: starts with {fields[0]!r}, expected a frame number")
        number = int(fields[0])
        if numbers and number < numbers[-1]:
            raise DataError(f"{where}:{i}: frame {number} after {numbers[-1]}, expected numbers that never fall")
        try:
            row = [float(field) for field in fields[1:]]
        except ValueError as error:
            raise DataError(f"{where}:{i}: expected numbers: {error}") from None
        if not all(abs(value) <= _FARTHEST for value in row):  # NaN too
            raise DataError(f"{where}:{i}: NaN or a coordinate beyond {_FARTHEST:g} m, expected metres")
        if not numbers or number > numbers[-1]:  # else a second guess at the same frame
            numbers.append(number)
            rows.append(row)
    if not rows:
        raise DataError(f"{where}: no frames, expected one a line")
    return _Track(where, np.array(numbers, np.int64), np.array(rows, np.float32).reshape(-1, joints, 3))


def _segments(track: _Track, ranges: list[_Range]) -> Segments:
    """Ranges of frame numbers as ranges of frames, in the order of time."""
    rows: list[tuple[int, int, int]] = []
    before = 0
    for one in sorted(ranges, key=lambda one: one.first):
        if one.first < before:
            raise DataError(f"{one.where}: range {one.first} {one.last} starts before another action ends ({before}), expected at most its last frame shared")
        first, end = np.searchsorted(track.numbers, [one.first, one.last + 1]).tolist()
        first = max(first, rows[-1][1] if rows else 0)
        if first >= end:
            raise DataError(f"{one.where}: range {one.first} {one.last} holds no frame of {track.where} ({track.numbers[0]} to {track.numbers[-1]})")
        rows.append((first, end, one.label))
        before = one.last
    return np.array(rows, np.int64).reshape(-1, 3)
