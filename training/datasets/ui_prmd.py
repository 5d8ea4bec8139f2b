"""UI-PRMD: ten rehabilitation exercises by ten people, Kinect v2 joints, from the project's `.npz` (see this folder's README)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from model import skeletons
from model.contract import DataSource
from training.datasets.clips import ClipSet, DataError, Frames
from training.datasets.recordings import Recordings, Segments

Integers = npt.NDArray[np.signedinteger[Any]]

LAYOUT = "ui-prmd"  # of the file; a clip may be mapped onto another
CLASSES = (
    "deep squat",
    "hurdle step",
    "inline lunge",
    "side lunge",
    "sit to stand",
    "standing active straight leg raise",
    "standing shoulder abduction",
    "standing shoulder extension",
    "standing shoulder internal-external rotation",
    "standing shoulder scaption",
)
NOTHING = "nothing"
TRAIN_SUBJECTS = range(1, 8)  # the rest, 8 to 10, is the test split

SOURCE = DataSource(
    name="UI-PRMD",
    terms="public domain: Open Data Commons Public Domain Dedication and License (PDDL) 1.0",
    citation="A. Vakanski, H.-P. Jun, D. Paul, R. Baker, A Data Set of Human Body Movements for Physical Rehabilitation Exercises, Data 3(1):2, 2018",
)

_RANGES = {"movement": (1, 10), "subject": (1, 10), "episode": (1, 10), "correct": (0, 1)}


@overload
def load(path: Path, layout: str = ..., fps: float = ..., recordings: Literal[False] = ..., rest: float = ...) -> ClipSet: ...


@overload
def load(path: Path, layout: str = ..., fps: float = ..., *, recordings: bool, rest: float = ...) -> ClipSet | Recordings: ...


def load(path: Path, layout: str = "body-13", fps: float = 30.0, recordings: bool = False, rest: float = 0.25) -> ClipSet | Recordings:
    """Reads the `.npz`; clips are (T, joints of `layout`, 3) in metres, on the axes of `layout`.

    For every layout but "ui-prmd" itself those are the common axes of `model.skeletons`. `fps` is the rate of the file, which does not
    hold it: 30, or 10 for the thinned variant. Groups: "split" ("train": subjects 1 to 7, "test": 8 to 10), "subject", "episode",
    "correct" ("correct", "incorrect"); a file without the entry `correct` holds correct repetitions only.

    With `recordings` the clips are put together again: those of one person, exercise and way of doing it were cut from one recording without
    a frame between them. An action is then where the body moves, see `moving`; the rest is "nothing". Groups: "split", "subject", "correct"
    and "recording" ("m01_s08_correct").

    Raises `DataError` naming the file and entry, `model.skeletons.UnknownLayout` when the joints cannot be mapped onto `layout`.
    """
    if not 0 <= rest < 0.5:
        raise DataError(f"{path}: rest is {rest}, expected a share of the movement from 0 on and below 0.5")
    clips = _clips(path, layout, fps)
    return _together(path, clips, rest) if recordings else clips


def moving(clip: Frames, rest: float) -> tuple[int, int]:
    """First frame in which a body (T, joints, 3) has left its first pose, and one past the last before it is back at its last pose.

    Poses are as far apart as their joints are on average; within `rest` of the farthest of the clip a body counts as still there. Where no
    frame is left, so of a body that does not move, that is the whole clip.
    """
    ahead, behind = (np.linalg.norm(clip - pose, axis=-1).mean(-1) for pose in (clip[0], clip[-1]))
    first = int(np.argmax(ahead > rest * ahead.max()))
    end = len(clip) - int(np.argmax((behind > rest * behind.max())[::-1]))
    return (first, end) if first < end else (0, len(clip))


def _together(path: Path, clips: ClipSet, rest: float) -> Recordings:
    """The recordings that the clips were cut from, by exercise, subject and whether it is done right."""
    episode = clips.groups["episode"].astype(np.int64)
    keys = list(zip(clips.labels.tolist(), map(int, clips.groups["subject"].tolist()), clips.groups["correct"].tolist(), strict=True))
    frames: list[Frames] = []
    segments: list[Segments] = []
    columns: dict[str, list[str]] = {"split": [], "subject": [], "correct": [], "recording": []}
    for key in sorted(set(keys)):
        label, subject, correct = key
        rows = np.array([i for i, one in enumerate(keys) if one == key], np.int64)
        rows = rows[np.argsort(episode[rows])]
        name = f"m{label + 1:02}_s{subject:02}_{correct}"
        if (np.diff(episode[rows]) != 1).any():
            raise DataError(
                f"{path}: episodes {', '.join(map(str, episode[rows].tolist()))} of {name}, expected each number once and none left out: "
                "only clips that follow each other make a recording"
            )
        parts = [clips.frames[i] for i in rows]
        starts = np.cumsum([0, *map(len, parts[:-1])])
        frames.append(np.concatenate(parts))
        segments.append(
            np.array([(start + first, start + end, label) for start, (first, end) in zip(starts, (moving(one, rest) for one in parts), strict=True)], np.int64)
        )
        for column, value in zip(columns.values(), (str(clips.groups["split"][rows[0]]), str(subject), correct, name), strict=True):
            column.append(value)
    return Recordings(
        frames=tuple(frames),
        segments=tuple(segments),
        classes=(*clips.classes, NOTHING),
        nothing=NOTHING,
        groups={name: np.array(column, np.str_) for name, column in columns.items()},
        fps=clips.fps,
        units=clips.units,
        source=clips.source,
        layout=clips.layout,
    )


def _clips(path: Path, layout: str, fps: float) -> ClipSet:
    mapping = skeletons.mapping(LAYOUT, layout)
    arrays = _read(path)
    joints, offsets = arrays["joints_mm"], arrays["offsets"]
    count = len(mapping.source.joints)
    if joints.ndim != 3 or joints.shape[1:] != (count, 3):
        raise DataError(f"{path}: entry 'joints_mm' has shape {joints.shape}, expected (frames, {count}, 3)")
    _check_offsets(path, offsets, len(joints))
    clips = len(offsets) - 1
    columns = {name: _column(path, name, arrays[name], clips) for name in _RANGES if name in arrays}
    correct = columns.get("correct", np.ones(clips, np.int64))
    subject = columns["subject"]
    return ClipSet(
        frames=tuple(np.split(_map(joints, mapping), offsets[1:-1])),
        labels=columns["movement"] - 1,
        classes=CLASSES,
        groups={
            "split": np.where(np.isin(subject, list(TRAIN_SUBJECTS)), "train", "test"),
            "subject": subject.astype(np.str_),
            "episode": columns["episode"].astype(np.str_),
            "correct": np.where(correct == 1, "correct", "incorrect"),
        },
        fps=fps,
        units="metres",
        source=SOURCE,
        layout=layout,
    )


def _read(path: Path) -> dict[str, Integers]:
    """Every entry this reader knows, as signed integers of any width."""
    arrays: dict[str, Integers] = {}
    entry = ""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: holds one bare array, expected an .npz file")
            for name in ("joints_mm", "offsets", *_RANGES):
                if name in archive.files:
                    entry = name
                    arrays[name] = archive[name]
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        what = f"entry {entry!r} cannot be read, expected an array of integers" if entry else "expected a readable .npz file"
        raise DataError(f"{path}: {what}: {error}") from error
    for name in ("joints_mm", "offsets", *_RANGES):
        if name not in arrays and name != "correct":
            raise DataError(f"{path}: entry {name!r} is missing, expected it beside: {', '.join(arrays) or 'nothing'}")
    for name, array in arrays.items():
        if array.dtype.kind != "i":
            raise DataError(f"{path}: entry {name!r} is {array.dtype}, expected signed integers")
    return arrays


def _check_offsets(path: Path, offsets: Integers, frames: int) -> None:
    if offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(f"{path}: entry 'offsets' has shape {offsets.shape}, expected (clips + 1,) with at least one clip")
    if offsets[0] != 0 or offsets[-1] != frames:
        raise DataError(f"{path}: entry 'offsets' runs from {offsets[0]} to {offsets[-1]}, expected 0 to {frames}, the number of frames in 'joints_mm'")
    if len(bad := np.flatnonzero(offsets[1:] <= offsets[:-1])):
        raise DataError(f"{path}: entry 'offsets'[{bad[0] + 1}] is {offsets[bad[0] + 1]} after {offsets[bad[0]]}, expected increasing numbers")


def _column(path: Path, name: str, values: Integers, clips: int) -> npt.NDArray[np.int64]:
    if values.shape != (clips,):
        raise DataError(f"{path}: entry {name!r} has shape {values.shape}, expected ({clips},), one value per clip")
    low, high = _RANGES[name]
    if len(bad := np.flatnonzero((values < low) | (values > high))):
        raise DataError(f"{path}: entry {name!r}[{bad[0]}] is {values[bad[0]]}, expected {low} to {high}")
    return values.astype(np.int64)


def _map(joints: Integers, mapping: skeletons.Mapping) -> Frames:
    """(frames, joints of the source, 3) in millimetres -> (frames, joints of the target, 3) in metres."""
    scale = np.array(mapping.signs) / 1000.0
    mapped = np.empty((len(joints), len(mapping.sources), 3), np.float32)
    for j, sources in enumerate(mapping.sources):
        mapped[:, j] = joints[:, list(sources)].mean(axis=1) * scale
    return mapped
