"""`Recordings`: long sequences in which actions start and end, what a network that runs on streams is trained and measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from model.contract import DataSource
from training.datasets.clips import ClipSet, DataError, Frames

Segments = npt.NDArray[np.int64]  # (k, 3): first frame, one past the last, label


@dataclass(frozen=True)
class Recordings:
    """Sequences of one frame shape, each with the actions that happen in it.

    `frames[i]` is (T_i, *frame_shape) float32 with T_i >= 1, NaN where a value is missing. `segments[i]` is (k_i, 3) int64, k_i >= 0: a row
    (first, end, label) says that the frames first..end-1 are one performance of `classes[label]`; rows are in order and do not overlap.
    Segments rather than a label per frame are the data, because two performances of one class may follow each other without a frame between.
    A frame in no segment is of class `nothing`; where `nothing` is None every frame is in a segment. `groups` are columns of strings, one
    value per recording, as in `ClipSet`. `times[i]`, where the source knows it, is when each frame was taken: (T_i,) float64 seconds,
    rising; `fps` is then the average.

    Raises `DataError` when parts do not fit together.
    """

    frames: tuple[Frames, ...]
    segments: tuple[Segments, ...]
    classes: tuple[str, ...]
    nothing: str | None  # one of `classes`
    groups: dict[str, npt.NDArray[np.str_]]
    fps: float
    units: str
    source: DataSource
    layout: str | None = None  # a name in `model.skeletons`
    times: tuple[npt.NDArray[np.float64], ...] | None = None

    def __post_init__(self) -> None:
        name = self.source.name
        if not self.frames:
            raise DataError(f"{name}: no recordings")
        if len(set(self.classes)) != len(self.classes):
            raise DataError(f"{name}: classes {', '.join(self.classes)}, expected each once")
        if self.nothing is not None and self.nothing not in self.classes:
            raise DataError(f"{name}: nothing is {self.nothing!r}, expected one of the classes: {', '.join(self.classes)}")
        if len(self.segments) != len(self):
            raise DataError(f"{name}: segments of {len(self.segments)} recordings, expected {len(self)}")
        for group, column in self.groups.items():
            if len(column) != len(self):
                raise DataError(f"{name}: group {group!r} has {len(column)} values for {len(self)} recordings")
        if self.times is not None and len(self.times) != len(self):
            raise DataError(f"{name}: times of {len(self.times)} recordings, expected {len(self)}")
        for i in range(len(self)):
            self._check(i)

    def _check(self, i: int) -> None:
        where, frames, segments = f"{self.source.name}: recording {i}", self.frames[i], self.segments[i]
        if frames.dtype != np.float32 or len(frames) < 1 or frames.shape[1:] != self.frame_shape:
            raise DataError(f"{where} is {frames.dtype} {frames.shape}, expected float32 (T >= 1, {', '.join(map(str, self.frame_shape))})")
        if segments.dtype != np.int64 or segments.ndim != 2 or segments.shape[1] != 3:
            raise DataError(f"{where}: segments are {segments.dtype} {segments.shape}, expected int64 (k, 3): first, end, label")
        before = 0
        for first, end, label in segments.tolist():
            if not 0 <= first < end <= len(frames):
                raise DataError(f"{where}: segment [{first}, {end}) of {len(frames)} frames, expected 0 <= first < end <= {len(frames)}")
            if first < before:
                raise DataError(f"{where}: segment [{first}, {end}) starts before the one in front of it ends ({before}), expected them in order and apart")
            if not 0 <= label < len(self.classes) or self.classes[label] == self.nothing:
                raise DataError(f"{where}: segment [{first}, {end}) has label {label}, expected one in 0..{len(self.classes) - 1} that is not nothing")
            before = end
        if self.nothing is None and (segments[:, 1] - segments[:, 0]).sum() != len(frames):
            raise DataError(f"{where}: frames outside all segments, expected none as there is no class for nothing")
        if self.times is not None and (self.times[i].shape != (len(frames),) or not (np.diff(self.times[i]) > 0).all() or not np.isfinite(self.times[i]).all()):
            raise DataError(f"{where}: times are {self.times[i].shape}, expected ({len(frames)},), each later than the one before")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        return self.frames[0].shape[1:]

    @property
    def missing(self) -> bool:
        """Whether any value is missing."""
        return any(bool(np.isnan(frames).any()) for frames in self.frames)

    @cached_property
    def labels(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The class of every frame, (T_i,) int64, index into `classes`."""
        outside = 0 if self.nothing is None else self.classes.index(self.nothing)
        labels = tuple(np.full(len(frames), outside, np.int64) for frames in self.frames)
        for row, segments in zip(labels, self.segments, strict=True):
            for first, end, label in segments.tolist():
                row[first:end] = label
            row.flags.writeable = False  # computed once and handed to everybody
        return labels

    def take(self, indices: Iterable[int] | npt.NDArray[np.integer]) -> Recordings:
        """The recordings at these indices, in this order; raises `DataError` when there are none."""
        chosen = np.fromiter(indices, np.int64)
        return replace(
            self,
            frames=tuple(self.frames[i] for i in chosen),
            segments=tuple(self.segments[i] for i in chosen),
            groups={name: column[chosen] for name, column in self.groups.items()},
            times=None if self.times is None else tuple(self.times[i] for i in chosen),
        )

    def where(self, group: str, values: Iterable[str]) -> Recordings:
        """The recordings whose value in `group` is one of `values`; raises `DataError` naming what there is when none match."""
        if group not in self.groups:
            raise DataError(f"{self.source.name}: no group {group!r}; there are: {', '.join(self.groups) or 'none'}")
        wanted = sorted(set(values))
        chosen = np.flatnonzero(np.isin(self.groups[group], wanted))
        if not len(chosen):
            raise DataError(f"{self.source.name}: no recording with {group} in {wanted}; there are: {', '.join(sorted(set(self.groups[group].tolist())))}")
        return self.take(chosen)

    def clips(self) -> ClipSet:
        """The segments cut out, recording by recording, so that networks for clips and for streams are trained on the same actions.

        Classes are those of the recordings without `nothing`. Groups are carried over; "recording" is added where it is not there, the
        number of the recording. Raises `DataError` when no recording has a segment.
        """
        cuts = [(i, *segment) for i, segments in enumerate(self.segments) for segment in segments.tolist()]
        classes = tuple(name for name in self.classes if name != self.nothing)
        recording = np.array([i for i, _, _, _ in cuts], np.int64)
        groups = {"recording": np.arange(len(self)).astype(np.str_)} | self.groups
        if not cuts:
            raise DataError(f"{self.source.name}: no segment in any of {len(self)} recordings, nothing to cut clips from")
        return ClipSet(
            frames=tuple(self.frames[i][first:end] for i, first, end, _ in cuts),
            labels=np.array([classes.index(self.classes[label]) for _, _, _, label in cuts], np.int64),
            classes=classes,
            groups={name: column[recording] for name, column in groups.items()},
            fps=self.fps,
            units=self.units,
            source=self.source,
            layout=self.layout,
        )
