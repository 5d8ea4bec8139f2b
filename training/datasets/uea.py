"""The `.ts` format of the UEA and UCR time-series archives: multivariate series of equal or unequal length, with class labels."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.contract import DataSource
from training.datasets.clips import ClipSet, DataError, Frames

_ARCHIVE = "A. Bagnall et al., The UEA multivariate time series classification archive, 2018, arXiv:1811.00075"
_CHECK = "tests and benchmarks only until checked: "
_TERMS = {
    "BasicMotions": _CHECK + "no licence stated for the data, distributed with aeon (BSD-3-Clause)",
    "JapaneseVowels": _CHECK + "UCI source set, listed as CC BY 4.0",
    "Libras": _CHECK + "UCI source set, listed as CC BY 4.0",
    "PenDigits": _CHECK + "UCI source set, listed as CC BY 4.0",
    "RacketSports": _CHECK + "no licence stated for the data",
}
_KEYS = ("@problemName", "@timeStamps", "@missing", "@univariate", "@dimensions", "@equalLength", "@seriesLength", "@classLabel")


@dataclass
class _Header:
    """What the lines with `@` say; None where they say nothing."""

    name: str = ""
    classes: tuple[str, ...] = ()
    dimensions: int | None = None
    equal_length: bool | None = None
    length: int | None = None
    missing: bool | None = None
    seen: set[str] = field(default_factory=set)


def load(path: Path, test: Path | None = None, *, name: str | None = None, missing: bool = False, fps: float = 1.0, units: str = "as published") -> ClipSet:
    """Reads `.ts` or `.ts.gz`; clips are (T, channels), NaN where the file says `?`.

    Either `path` is the training file and `test` the test file, if any; or `path` is a folder and `name` the name of a set whose files
    NAME_TRAIN.ts and NAME_TEST.ts, perhaps `.gz`, it holds. The format knows neither rate nor units, so the caller states them; 1 means
    that time is counted in frames. Groups: "split" ("train", "test").

    Raises `DataError` naming file and line for whatever breaks the format or the file's own header, for time stamps and regression
    targets, which are not read, and for `?` unless `missing` is true.
    """
    if name is not None:
        path, test = _find(path, f"{name}_TRAIN"), _find(path, f"{name}_TEST")
    header, frames, labels = _read(path, missing)
    split = ["train"] * len(frames)
    if test is not None:
        other, more_frames, more_labels = _read(test, missing)
        if other.classes != header.classes or more_frames[0].shape[1] != frames[0].shape[1]:
            expected = f"{frames[0].shape[1]} dimensions, classes {' '.join(header.classes)}, as in {path}"
            raise DataError(f"{test}: {more_frames[0].shape[1]} dimensions, classes {' '.join(other.classes)}; expected {expected}")
        frames, labels, split = frames + more_frames, labels + more_labels, split + ["test"] * len(more_frames)
    title = header.name or path.name.partition(".")[0]
    return ClipSet(
        frames=tuple(frames),
        labels=np.array(labels, np.int64),
        classes=header.classes,
        groups={"split": np.array(split, np.str_)},
        fps=fps,
        units=units,
        source=DataSource(name=title, terms=_TERMS.get(title, "not known, ask the set's publisher"), citation=_ARCHIVE),
    )


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.ts", folder / f"{stem}.ts.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: expected a file {stem}.ts or {stem}.ts.gz, there is none")


def _read(path: Path, missing: bool) -> tuple[_Header, list[Frames], list[int]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{bad}: expected text in UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable .ts or .ts.gz file: {error}") from error
    header, in_data = _Header(), False
    frames: list[Frames] = []
    labels: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line, where = line.strip(), f"{path}:{number}"
        if not line or line.startswith("#"):
            continue
        if in_data:
            clip, label = _case(where, line, header, missing)
            frames.append(clip)
            labels.append(label)
        elif line.lower() == "@data":
            in_data = True
            if not header.classes:
                raise DataError(f"{where}: expected a line '@classLabel true LABEL ...' before the data")
        else:
            _obey(where, line, header)
    if not frames:
        raise DataError(f"{path}: holds no cases, expected a header, '@data' and one case per line")
    return header, frames, labels


def _obey(where: str, line: str, header: _Header) -> None:
    """Takes one header line into `header`."""
    word, *values = line.split()
    key = word.lower()
    if not key.startswith("@"):
        raise DataError(f"{where}: {line[:40]!r}, expected '@' lines up to '@data'")
    if key in header.seen:
        raise DataError(f"{where}: {word} occurs twice, expected it once")
    header.seen.add(key)
    match key:
        case "@problemname":
            header.name = " ".join(values)
        case "@timestamps":
            if _flag(where, word, values):
                raise DataError(f"{where}: time stamps are not read, expected '@timeStamps false' and plain values")
        case "@missing":
            header.missing = _flag(where, word, values)
        case "@univariate":
            if _flag(where, word, values):
                _set_dimensions(where, header, 1)
        case "@dimensions" | "@dimension":
            _set_dimensions(where, header, _count(where, word, values))
        case "@equallength":
            header.equal_length = _flag(where, word, values)
        case "@serieslength":
            header.length = _count(where, word, values)
        case "@classlabel":
            if not _flag(where, word, values[:1]) or len(values) < 2:
                raise DataError(f"{where}: expected '@classLabel true' and the labels; sets without class labels are not read")
            if len(set(values)) != len(values):
                raise DataError(f"{where}: expected class labels that differ from each other")
            header.classes = tuple(values[1:])
        case _:
            raise DataError(f"{where}: unknown header {word!r}, expected one of {', '.join(_KEYS)}")


def _set_dimensions(where: str, header: _Header, dimensions: int) -> None:
    if header.dimensions not in (None, dimensions):
        raise DataError(f"{where}: {dimensions} dimensions, expected {header.dimensions} as said before")
    header.dimensions = dimensions


def _flag(where: str, word: str, values: list[str]) -> bool:
    if len(values) != 1 or values[0].lower() not in ("true", "false"):
        raise DataError(f"{where}: expected '{word} true' or '{word} false'")
    return values[0].lower() == "true"


def _count(where: str, word: str, values: list[str]) -> int:
    if len(values) != 1 or not values[0].isdecimal() or int(values[0]) < 1:
        raise DataError(f"{where}: expected {word} and a whole number from 1")
    return int(values[0])


def _case(where: str, line: str, header: _Header, missing: bool) -> tuple[Frames, int]:
    """One line: dimensions separated by `:`, values by `,`, the label after the last `:`. Fixes what the header left open."""
    *dimensions, label = line.split(":")
    label = label.strip()
    header.dimensions = header.dimensions or len(dimensions)
    if len(dimensions) != header.dimensions or not dimensions:
        raise DataError(f"{where}: {len(dimensions)} dimensions, expected {header.dimensions} and a class label")
    if label not in header.classes:
        raise DataError(f"{where}: class label {label!r}, expected one of {' '.join(header.classes)}")
    channels = [_values(f"{where}: dimension {i}", text, header, missing) for i, text in enumerate(dimensions, start=1)]
    lengths = [len(channel) for channel in channels]
    if len(set(lengths)) > 1:
        raise DataError(f"{where}: dimensions of {' '.join(map(str, lengths))} values, expected equal lengths within a case")
    if header.equal_length:
        header.length = header.length or lengths[0]
        if lengths[0] != header.length:
            raise DataError(f"{where}: {lengths[0]} values a dimension, expected {header.length} in a set of equal lengths")
    return np.ascontiguousarray(np.stack(channels, axis=1), np.float32), header.classes.index(label)


def _values(where: str, text: str, header: _Header, missing: bool) -> npt.NDArray[np.float64]:
    absent = "?" in text
    try:
        values = np.array(text.replace("?", "nan").split(","), np.float64)
    except ValueError as error:
        raise DataError(f"{where}: expected numbers separated by commas: {error}") from None
    if absent or np.isnan(values).any():
        if header.missing is False:
            raise DataError(f"{where}: a value is missing, expected none by '@missing false'")
        if not missing:
            raise DataError(f"{where}: a value is missing, expected numbers only unless missing values are asked for (missing=True)")
    if (np.abs(values) > np.finfo(np.float32).max).any():
        raise DataError(f"{where}: expected values that float32 can hold")
    return values
