"""The files of one's own data: tables in CSV that name, beside them, `.npy`, `.npz`, `.csv` or `.json` files of frames."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from model import skeletons
from training.datasets.clips import DataError, Frames

_DEEPEST = 8  # dimensions of a clip in JSON

_Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table below its header."""

    where: str  # file and line, for messages
    values: dict[str, str]  # by column, none empty


def read_rows(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[Row]:
    """Reads a table with a header: all columns of `required` and any of `optional`, in any order; every field has a value.

    Raises `DataError` naming file and line when the file cannot be read or breaks this.
    """
    (line, columns), *body = _table(str(path), path) or [(1, [])]
    if not set(required) <= set(columns) <= {*required, *optional} or len(set(columns)) != len(columns):
        perhaps = f" and perhaps {','.join(optional)}" if optional else ""
        raise DataError(f"{path}:{line}: columns {','.join(columns)!r}, expected {','.join(required)}{perhaps}, each once")
    for line, fields in body:
        if len(fields) != len(columns) or not all(fields):
            raise DataError(f"{path}:{line}: expected {len(columns)} values, none empty: {','.join(columns)}")
    return [Row(f"{path}:{line}", dict(zip(columns, fields, strict=True))) for line, fields in body]


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels that occur, each once, in order: as numbers where all are whole numbers."""
    labels = set(labels)
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def inside(where: str, folder: Path, name: str) -> Path:
    """The file `name` in `folder`, links followed; raises `DataError` for what lies outside, is not there or has another ending."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\0" in name:
        raise DataError(f"{where}: file {name!r}, expected a path relative to {folder}")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise DataError(f"{where}: file {name!r} leaves the folder, expected a file inside {folder}")
    if file.suffix not in _READERS:
        raise DataError(f"{where}: file {name!r}, expected one ending in {', '.join(_READERS)}")
    if not file.is_file():
        raise DataError(f"{where}: file {name!r}, expected to find it in {folder}")
    return file


def each_once(folder: Path, rows: Iterable[Row]) -> dict[Path, Row]:
    """The rows by the file that their column "file" names; raises `DataError` as `inside` does, and for a file in two rows."""
    row_of: dict[Path, Row] = {}
    for row in rows:
        file = inside(row.where, folder, row.values["file"])
        if file in row_of:
            raise DataError(f"{row.where}: {row.values['file']} is the file of {row_of[file].where} again, expected each file once")
        row_of[file] = row
    return row_of


def rate(index: Path, rows: list[Row], fps: float | None) -> float:
    """The one rate of all rows, from `fps` or their column of that name, which must agree; raises `DataError` otherwise."""
    if "fps" not in rows[0].values:
        if fps is None:
            raise DataError(f"{index}: expected a column fps, or the rate from the caller (fps=)")
        if not 0 < fps < math.inf:
            raise DataError(f"{index}: fps={fps!r}, expected a number above 0")
        return fps
    for row in rows:
        try:
            stated = float(row.values["fps"])
        except ValueError:
            stated = math.nan
        if not 0 < stated < math.inf:
            raise DataError(f"{row.where}: fps {row.values['fps']!r}, expected a number above 0")
        fps = stated if fps is None else fps
        if stated != fps:
            raise DataError(f"{row.where}: fps {stated:g}, expected {fps:g} as before: a model learns at one rate, so resample to one first")
    assert fps is not None
    return fps


def frame_shape_of(path: Path, layout: str | None, frame_shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The shape that frames in `path` must have, by default what `layout` needs; None: any.

    Raises `DataError` when shape and layout contradict each other, `model.skeletons.UnknownLayout`.
    """
    if layout is None:
        return frame_shape
    known = skeletons.layout(layout)
    frame_shape = frame_shape or (len(known.joints), known.dimensions)
    if frame_shape[-2:] != (len(known.joints), known.dimensions):
        raise DataError(f"{path}: frame_shape {frame_shape}, expected (..., {len(known.joints)}, {known.dimensions}) for layout {layout}")
    return frame_shape


def read_all(row_of: dict[Path, Row], frame_shape: tuple[int, ...] | None, missing: bool) -> tuple[Frames, ...]:
    """Reads every file as `read` does; raises `DataError` also where frames differ in shape from those of the first."""
    every: list[Frames] = []
    names = [row.values["file"] for row in row_of.values()]
    for file, row in row_of.items():
        frames = read(f"{row.where}: {row.values['file']}", file, frame_shape, missing)
        if every and frames.shape[1:] != every[0].shape[1:]:
            raise DataError(f"{row.where}: {row.values['file']} has frames of shape {frames.shape[1:]}, expected {every[0].shape[1:]} as in {names[0]}")
        every.append(frames)
    return tuple(every)


def read(where: str, file: Path, frame_shape: tuple[int, ...] | None, missing: bool) -> Frames:
    """Reads (T, *frame_shape) float32, T >= 1, from a file in any of the formats; `where` is the start of messages about it.

    Flat frames of as many numbers are reshaped. Raises `DataError` for a damaged file, frames of another shape, values beyond float32 and,
    unless `missing`, NaN.
    """
    clip = _READERS[file.suffix](where, file)
    if clip.dtype.kind not in "fiu":
        raise DataError(f"{where}: values are {clip.dtype}, expected real numbers")
    if clip.ndim == 0 or clip.size == 0:
        raise DataError(f"{where}: shape {clip.shape}, expected (T, ...) with at least one frame")
    if frame_shape is not None:
        if clip.ndim <= 2 and clip.size == len(clip) * math.prod(frame_shape):
            clip = clip.reshape(len(clip), *frame_shape)
        if clip.shape[1:] != frame_shape:
            raise DataError(f"{where}: frames of shape {clip.shape[1:]}, expected {frame_shape} or {math.prod(frame_shape)} numbers")
    if clip.ndim == 1:
        raise DataError(f"{where}: shape {clip.shape}, expected (T, channels); (T, 1) for a single channel, or state frame_shape")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
        values = np.ascontiguousarray(clip, np.float32)
    if len(bad := np.argwhere(np.isinf(values))):
        raise DataError(f"{where}: frame {bad[0][0]} holds an infinite value or one beyond float32, expected finite numbers")
    if not missing and len(bad := np.argwhere(np.isnan(values))):
        raise DataError(f"{where}: frame {bad[0][0]} holds a missing value, expected none unless they are asked for (missing=True)")
    return values


def _text(where: str, path: Path) -> str:
    """The text of a file; `where` is the start of a message about it. A byte order mark, as spreadsheets write it, is dropped."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{where}:{line}: expected text in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{where}: expected a readable file: {error}") from error


def _table(where: str, path: Path) -> list[tuple[int, list[str]]]:
    """Line number and fields of every row that is not blank."""
    rows = csv.reader(io.StringIO(_text(where, path), newline=""), strict=True)
    try:
        return [(rows.line_num, [value.strip() for value in row]) for row in rows if row]
    except csv.Error as error:
        raise DataError(f"{where}:{rows.line_num}: expected comma-separated values: {error}") from error


def _read_numpy(where: str, path: Path) -> _Array:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return np.asarray(loaded)
            name = "frames" if "frames" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else None
            if name is None:
                raise DataError(f"{where}: arrays {', '.join(loaded.files) or 'none'}, expected a single one or one called frames")
            return np.asarray(loaded[name])
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where}: expected a readable NumPy file of numbers, without pickled objects: {error}") from error


def _read_csv(where: str, path: Path) -> _Array:
    table = _table(where, path)
    if table and any(table[0][1]) and not any(map(_is_number, filter(None, table[0][1]))):
        table = table[1:]  # a header
    rows: list[list[float]] = []
    for expected_line, (line, fields) in enumerate(table, start=table[0][0] if table else 1):
        if line != expected_line:  # skipping it would shift all later frames in time
            raise DataError(f"{where}:{expected_line}: a blank line, expected a frame on every line")
        if len(fields) != len(table[0][1]):
            raise DataError(f"{where}:{line}: {len(fields)} fields, expected {len(table[0][1])} as on line {table[0][0]}")
        try:
            rows.append([float(value) if value else math.nan for value in fields])
        except ValueError as error:
            raise DataError(f"{where}:{line}: expected numbers: {error}") from None
    return np.array(rows, np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_json(where: str, path: Path) -> _Array:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON, a missing value is null")

    text = _text(where, path)
    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON: {error}") from error
    frames = value.get("frames") if isinstance(value, dict) else value
    if not isinstance(frames, list):
        raise DataError(f"{where}: expected a list of frames, or an object with a list called 'frames'")
    shape = _shape(frames)
    if len(shape) > _DEEPEST:
        raise DataError(f"{where}: lists nested {len(shape)} deep, expected at most {_DEEPEST}")
    array = np.full(shape, np.nan)
    _fill(where, "frames", array, frames)
    return array


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of nested lists, from the deepest: a null stands for a number or for a list of them."""
    return (len(value), *max(map(_shape, value), key=len, default=())) if isinstance(value, list) else ()


def _fill(where: str, entry: str, array: _Array, value: Any) -> None:
    """Copies nested lists into an array of NaN."""
    if value is None:
        return
    if array.ndim == 0:
        if type(value) not in (int, float):
            raise DataError(f"{where}: {entry} is {value!r:.40}, expected a number or null")
        try:
            array[()] = value
        except OverflowError:
            array[()] = math.inf
        return
    if not isinstance(value, list) or len(value) != len(array):
        raise DataError(f"{where}: {entry} is {value!r:.40}, expected a list of {len(array)}, as long as its neighbours")
    for i, item in enumerate(value):
        _fill(where, f"{entry}[{i}]", array[i, ...], item)  # a view, of one number too


_READERS = {".npy": _read_numpy, ".npz": _read_numpy, ".csv": _read_csv, ".json": _read_json}
