"""Which clips are for what: reads the data a configuration names and divides it, training subjects never among test ones."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import ManifestError, decode
from training.config import Config, ConfigError, DataConfig
from training.datasets.clips import ClipSet, DataError
from training.datasets.recordings import Recordings
from training.folds import group_folds, stratified_folds, stratified_share

READERS = ("clip_folder", "finger_points", "nw_ucla", "recording_folder", "uea", "ui_prmd", "utkinect")


@dataclass(frozen=True)
class Splits:
    """`validation` is what choices are made on; None where the run is final and trains on it too. `test` may be absent."""

    training: ClipSet
    validation: ClipSet | None
    test: ClipSet | None

    def named(self, name: str) -> ClipSet:
        """ "training", "validation" or "test"; raises `DataError` when this run has no such part."""
        if name not in ("training", "validation", "test"):
            raise DataError(f"no split {name!r}; there are: training, validation, test")
        clips: ClipSet | None = getattr(self, name)
        if clips is None:
            raise DataError(f"this run has no {name} split")
        return clips

    def copies(self, name: str) -> npt.NDArray[np.bool_]:
        """Which clips of this part are in the training clips as well, number for number, (N,).

        Public data sets have such: a network may know them by heart, so they say nothing of clips it has not seen.
        """
        known = {clip.tobytes() for clip in self.training.frames}
        return np.array([clip.tobytes() in known for clip in self.named(name).frames])


def load(config: Config) -> Splits:
    """Reads the data and divides it; raises `ConfigError` and `DataError` as `read` and `split` do."""
    splits = split(config, read(config, config.data.options))
    if not config.data.evaluation_options:
        return splits
    evaluation = split(config, read(config, config.data.options | config.data.evaluation_options))
    if evaluation.training.classes != splits.training.classes or evaluation.training.frame_shape != splits.training.frame_shape:
        raise DataError(f"{splits.training.source.name}: with data.evaluation_options the clips have other classes or frames than the training clips")
    return Splits(splits.training, evaluation.validation, evaluation.test)


def read(config: Config, options: dict[str, Any]) -> ClipSet:
    """All clips of the configuration's data set, of recordings their segments; raises as `read_data` does."""
    found = read_data(config, options)
    return found.clips() if isinstance(found, Recordings) else found


def read_data(config: Config, options: dict[str, Any]) -> ClipSet | Recordings:
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
    found: ClipSet | Recordings = load_data(Path(data.path), **_arguments(load_data, options, data.reader))
    return found


def _arguments(load_data: Callable[..., ClipSet | Recordings], options: dict[str, Any], reader: str) -> dict[str, Any]:
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


def split(config: Config, clips: ClipSet) -> Splits:
    """Divides clips by the groups that the configuration names; raises `DataError` when a part would be empty."""
    is_test = _matches(clips, config.data.test)
    test = clips.take(np.flatnonzero(is_test)) if is_test.any() else None
    if is_test.all():
        raise DataError(f"{clips.source.name}: every clip is a test clip ({config.data.test}); nothing is left to train on")
    rest = clips.take(np.flatnonzero(~is_test))
    if config.final:
        return Splits(_complete(rest), None, test)
    held_out = _held_out(rest, config.data)
    if not held_out.any() or held_out.all():
        raise DataError(f"{clips.source.name}: data.validation {config.data.validation or ''} holds out {held_out.sum()} of {len(rest)} training clips")
    return Splits(_complete(rest.take(np.flatnonzero(~held_out))), rest.take(np.flatnonzero(held_out)), test)


def _held_out(clips: ClipSet, data: DataConfig) -> npt.NDArray[np.bool_]:
    """Which training clips are for validation, (N,) bool, by whichever way the configuration names."""
    if data.validation:
        return _matches(clips, data.validation)
    if data.validation_share:
        return stratified_share(clips.labels, data.validation_share)
    if not data.fold_by:
        return np.equal(stratified_folds(clips.labels, data.folds), data.fold)
    try:
        return np.equal(group_folds(_column(clips, data.fold_by), data.folds), data.fold)
    except ValueError as error:
        raise DataError(f"{clips.source.name}: {error}") from None


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


def _matches(clips: ClipSet, wanted: dict[str, list[str]]) -> np.ndarray:
    """Which clips have one of the values wanted in every group named; none where no group is named."""
    chosen = np.full(len(clips), bool(wanted))
    for group, values in wanted.items():
        column = _column(clips, group)
        if strange := sorted(set(values) - set(column.tolist())):
            raise DataError(f"{clips.source.name}: no clip has {group} {strange[0]!r}; there are: {', '.join(sorted(set(column.tolist())))}")
        chosen &= np.isin(column, values)
    return chosen


def _column(clips: ClipSet, group: str) -> np.ndarray:
    if group not in clips.groups:
        raise DataError(f"{clips.source.name}: no group {group!r}; there are: {', '.join(clips.groups) or 'none'}")
    return clips.groups[group]
