"""Which clips are for what: reads the data a configuration names and divides it, training subjects never among test ones."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import ManifestError, decode
from training.config import Config, ConfigError, DataConfig
from training.datasets.clips import ClipSet, DataError
from training.datasets.recordings import Recordings
from training.folds import group_folds, stratified_folds, stratified_share

PARTS = ("training", "validation", "test")
READERS = ("clip_folder", "finger_points", "nw_ucla", "recording_folder", "uea", "ui_prmd", "utkinect")


Data = ClipSet | Recordings


@dataclass(frozen=True)
class Splits:
    """`validation` is what choices are made on; None where the run is final and trains on it too. `test` may be absent.

    `recordings` are those that the clips of each part were cut from: "training", "validation", "test", as far as there are any. It is empty
    where the data are clips, and where clips of one recording are in several parts.
    """

    training: ClipSet
    validation: ClipSet | None
    test: ClipSet | None
    recordings: dict[str, Recordings] = field(default_factory=dict)

    def named(self, name: str) -> ClipSet:
        """ "training", "validation" or "test"; raises `DataError` when this run has no such part."""
        if name not in PARTS:
            raise DataError(f"no split {name!r}; there are: {', '.join(PARTS)}")
        clips: ClipSet | None = getattr(self, name)
        if clips is None:
            raise DataError(f"this run has no {name} split")
        return clips

    def whole(self, name: str) -> Data:
        """What streams of a part are made of: its recordings, or its clips where there are none."""
        return self.recordings.get(name) or self.named(name)

    def copies(self, name: str) -> npt.NDArray[np.bool_]:
        """Which clips of this part are in the training clips as well, number for number, (N,).

        Public data sets have such: a network may know them by heart, so they say nothing of clips it has not seen.
        """
        return _known(self.named(name), self.training)


def load(config: Config) -> Splits:
    """Reads the data and divides it; raises `ConfigError` and `DataError` as `read_data` and `split` do."""
    splits = split(config, read_data(config, config.data.options))
    if not config.data.evaluation_options:
        return splits
    evaluation = split(config, read_data(config, config.data.options | config.data.evaluation_options))
    if evaluation.training.classes != splits.training.classes or evaluation.training.frame_shape != splits.training.frame_shape:
        raise DataError(f"{splits.training.source.name}: with data.evaluation_options the clips have other classes or frames than the training clips")
    recordings = {name: part.recordings[name] for name, part in zip(PARTS, (splits, evaluation, evaluation), strict=True) if name in part.recordings}
    return Splits(splits.training, evaluation.validation, evaluation.test, recordings)


def read_data(config: Config, options: dict[str, Any]) -> Data:
    """The configuration's data set as its reader gives it; raises `ConfigError` for a wrong reader or option, `DataError` for faulty data."""
    data = config.data
    if data.reader not in READERS:
        raise ConfigError(f"data.reader {data.reader!r} is unknown; there are: {', '.join(READERS)}")
    if not data.path:
        raise ConfigError(f"data.path is not set: say where the data of {data.reader} lies, with --data PATH or --set data.path=PATH")
    load_data = importlib.import_module(f"training.datasets.{data.reader}").load
    known = [name for name in inspect.signature(load_data).parameters if name != "path"]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"data.options.{unknown[0]} is unknown to {data.reader}; there are: {', '.join(known) or 'none'}")
    found: Data = load_data(Path(data.path), **_arguments(load_data, options, data.reader))
    return found


def _arguments(load_data: Callable[..., Data], options: dict[str, Any], reader: str) -> dict[str, Any]:
    """Options as the reader's own types: a TOML list becomes a tuple, a table a `DataSource`, a string a path where one is wanted."""
    required = [p.name for p in inspect.signature(load_data).parameters.values() if p.default is p.empty and p.name != "path"]
    if absent := [name for name in required if name not in options]:
        raise ConfigError(f"data.options.{absent[0]} is missing: {reader} needs it")
    hints = typing.get_type_hints(load_data)
    arguments = {}
    for name, value in options.items():
        wants_path = Path in (hints[name], *typing.get_args(hints[name]))
        try:
            arguments[name] = Path(decode(value, str, f"data.options.{name}")) if wants_path else decode(value, hints[name], f"data.options.{name}")
        except ManifestError as error:
            raise ConfigError(str(error)) from None
    return arguments


def split(config: Config, data: Data) -> Splits:
    """Divides clips by the groups that the configuration names; recordings first, and then cut into clips, so that no recording is divided.

    Raises `DataError` when a part would be empty, `ConfigError` where streams would be made of recordings that are divided.
    """
    by_class = not config.final and (config.data.validation_share > 0 or (config.data.folds > 0 and not config.data.fold_by))
    if isinstance(data, Recordings) and by_class:  # every class alike: that can be done with clips alone
        if config.streams is not None:
            way = "data.validation_share" if config.data.validation_share else "data.folds"
            raise ConfigError(f"{way} divides the clips of each recording, and streams are made of whole ones: name groups in data.validation, or data.fold_by")
        data = data.clips()
    chosen = _divide(config, data)
    if config.data.drop_copies:
        if isinstance(data, Recordings):
            raise ConfigError("data.drop_copies is for clips: recordings are long, and none of them is another one's copy")
        chosen["training"] &= ~_known(data, data.take(np.flatnonzero(~chosen["training"])))
    parts = {name: data.take(np.flatnonzero(rows)) for name, rows in chosen.items()}
    clips = {name: cut(part) for name, part in parts.items()}
    recordings = {name: part for name, part in parts.items() if isinstance(part, Recordings)}
    return Splits(_complete(clips["training"]), clips.get("validation"), clips.get("test"), recordings)


def _divide(config: Config, data: Data) -> dict[str, npt.NDArray[np.bool_]]:
    """Which clips or recordings make up each part that there is, (N,) bool."""
    is_test, things = _matches(data, config.data.test), _things(data)
    if is_test.all():
        raise DataError(f"{data.source.name}: every {things} is a test {things} ({config.data.test}); nothing is left to train on")
    parts = {"training": ~is_test} | ({"test": is_test} if is_test.any() else {})
    if config.final:
        return parts
    rest = np.flatnonzero(~is_test)
    held_out = _held_out(data.take(rest), config.data)
    if not held_out.any() or held_out.all():
        raise DataError(f"{data.source.name}: data.validation {config.data.validation or ''} holds out {held_out.sum()} of {len(rest)} training {things}s")
    parts["training"], parts["validation"] = np.zeros((2, len(data)), bool)
    parts["training"][rest[~held_out]] = parts["validation"][rest[held_out]] = True
    return parts


def _held_out(data: Data, by: DataConfig) -> npt.NDArray[np.bool_]:
    """Which training clips or recordings are for validation, (N,) bool, by whichever way the configuration names."""
    if by.validation:
        return _matches(data, by.validation)
    if isinstance(data, ClipSet) and by.validation_share:
        return stratified_share(data.labels, by.validation_share)
    if isinstance(data, ClipSet) and not by.fold_by:
        return np.equal(stratified_folds(data.labels, by.folds), by.fold)
    column = _column(data, by.fold_by)
    try:
        # Recordings count by the clips in them: the folds are those of the clips.
        clips = np.repeat(column, [len(one) for one in data.segments]) if isinstance(data, Recordings) else column
        fold_of = dict(zip(clips.tolist(), group_folds(clips, by.folds).tolist(), strict=True))
    except ValueError as error:
        raise DataError(f"{data.source.name}: {error}") from None
    return np.array([fold_of.get(value, 0) == by.fold for value in column.tolist()])


def _known(clips: ClipSet, among: ClipSet) -> npt.NDArray[np.bool_]:
    """Which clips are among others as well, number for number, (N,)."""
    known = {clip.tobytes() for clip in among.frames}
    return np.array([clip.tobytes() in known for clip in clips.frames], bool)


def _complete(training: ClipSet) -> ClipSet:
    """The clips themselves; raises `DataError` when a class has none."""
    if absent := sorted(set(range(len(training.classes))) - set(training.labels.tolist())):
        raise DataError(f"{training.source.name}: no training clip is left of class {training.classes[absent[0]]!r}")
    return training


def describe(config: Config) -> str:
    """Which part of the data chose, in a sentence."""
    data = config.data
    held_out = " and ".join(f"{group} {', '.join(values)}" for group, values in data.validation.items())
    if data.validation_share:
        held_out = f"{100 * data.validation_share:g} % of every class"
    if data.folds:
        held_out = f"fold {data.fold + 1} of {data.folds}{f', divided by {data.fold_by}' if data.fold_by else ''},"
    if not held_out:
        return "nothing was chosen on data: no validation part is named"
    if config.final:
        return f"configuration chosen on {held_out} of the training data; this run trained on all training data, for a fixed number of epochs"
    return f"epoch and configuration chosen on {held_out} of the training data, held out"


def cut(data: Data) -> ClipSet:
    """The clips, of recordings those cut from them."""
    return data.clips() if isinstance(data, Recordings) else data


def _matches(data: Data, wanted: dict[str, list[str]]) -> npt.NDArray[np.bool_]:
    """Which clips or recordings have one of the values wanted in every group named; none where no group is named."""
    chosen = np.full(len(data), bool(wanted))
    for group, values in wanted.items():
        column = _column(data, group)
        if strange := sorted(set(values) - set(column.tolist())):
            there = ", ".join(sorted(set(column.tolist())))
            raise DataError(f"{data.source.name}: no {_things(data)} has {group} {strange[0]!r}; there are: {there}")
        chosen &= np.isin(column, values)
    return chosen


def _column(data: Data, group: str) -> npt.NDArray[np.str_]:
    if group not in data.groups:
        raise DataError(f"{data.source.name}: no group {group!r}; there are: {', '.join(data.groups) or 'none'}")
    return data.groups[group]


def _things(data: Data) -> str:
    return "recording" if isinstance(data, Recordings) else "clip"
