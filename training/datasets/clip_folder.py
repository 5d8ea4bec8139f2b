"""A folder of one's own recordings: `index.csv` with one row per clip, beside `.npy`, `.npz`, `.csv` or `.json` files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.contract import DataSource
from training.datasets import frame_files
from training.datasets.clips import ClipSet, DataError

INDEX = "index.csv"
GROUPS = ("split", "subject", "view")


def load(
    path: Path,
    *,
    units: str,
    fps: float | None = None,
    layout: str | None = None,
    frame_shape: tuple[int, ...] | None = None,
    missing: bool = False,
    source: DataSource | None = None,
) -> ClipSet:
    """Reads the folder `path`; clips are (T, *frame_shape), T >= 1, in `units`.

    `index.csv` has columns `file,label` and perhaps `split,subject,view,fps`; files are named relative to the folder. `.npy` holds one
    array, `.npz` one array or one called `frames`, `.csv` one row per frame (with or without a header; an empty field is missing),
    `.json` a list of frames or an object with `frames` (null is missing, at any depth).
    `frame_shape`, by default what `layout` needs, is the shape of a frame: flat frames of as many numbers are reshaped, others must have
    it. The rate comes from `fps` or the column, which must agree. NaN is accepted where `missing` is true.

    Classes are the labels in order, as numbers where all are whole numbers. Groups: those of "split", "subject", "view" that are columns.
    Raises `DataError` naming file, line and what was expected; `model.skeletons.UnknownLayout`.
    """
    frame_shape = frame_files.frame_shape_of(path, layout, frame_shape)
    rows = frame_files.read_rows(path / INDEX, ("file", "label"), (*GROUPS, "fps"))
    row_of = frame_files.each_once(path, rows)
    if not rows:
        raise DataError(f"{path / INDEX}: lists no clips, expected a row per clip below the header")
    rate = frame_files.rate(path / INDEX, rows, fps)
    names = [row.values["label"] for row in rows]
    classes = frame_files.class_names(names)
    return ClipSet(
        frames=frame_files.read_all(row_of, frame_shape, missing),
        labels=np.array([classes.index(name) for name in names], np.int64),
        classes=classes,
        groups={group: np.array([row.values[group] for row in rows], np.str_) for group in GROUPS if group in rows[0].values},
        fps=rate,
        units=units,
        source=source or DataSource(name=path.resolve().name, terms="not stated", citation="not stated"),
        layout=layout,
    )
