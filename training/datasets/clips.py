"""`ClipSet`: what every reader returns and everything else in training takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from model.contract import DataSource

Frames = npt.NDArray[np.float32]


class DataError(ValueError):
    """A data file breaks its format. The message names the file, the line or entry where there is one, and what was expected."""


@dataclass(frozen=True)
class ClipSet:
    """Labelled sequences of one frame shape.

    `frames[i]` is (T_i, *frame_shape) float32 with T_i >= 1, NaN where a value is missing. `groups` holds columns of strings, one
    value per clip, by which clips may be split: "split" ("train", "test"), "subject", "view", ...
    """

    frames: tuple[Frames, ...]
    labels: npt.NDArray[np.int64]  # (N,), index into `classes`
    classes: tuple[str, ...]
    groups: dict[str, npt.NDArray[np.str_]]
    fps: float
    units: str
    source: DataSource
    layout: str | None = None  # a name in `model.skeletons`

    def __post_init__(self) -> None:
        if not self.frames:
            raise DataError(f"{self.source.name}: no clips")
        shape = self.frames[0].shape[1:]
        for i, clip in enumerate(self.frames):
            if clip.dtype != np.float32 or len(clip) < 1 or clip.shape[1:] != shape:
                raise DataError(f"{self.source.name}: clip {i} is {clip.dtype} {clip.shape}, expected float32 (T >= 1, {', '.join(map(str, shape))})")
        if self.labels.shape != (len(self),) or self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            found = f"{self.labels.shape} labels from {self.labels.min()} to {self.labels.max()}"
            raise DataError(f"{self.source.name}: {found}, expected {len(self)} in 0..{len(self.classes) - 1}")
        for name, column in self.groups.items():
            if len(column) != len(self):
                raise DataError(f"{self.source.name}: group {name!r} has {len(column)} values for {len(self)} clips")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        return self.frames[0].shape[1:]

    @property
    def missing(self) -> bool:
        """Whether any value is missing."""
        return any(bool(np.isnan(clip).any()) for clip in self.frames)

    def take(self, indices: Iterable[int] | npt.NDArray[np.integer]) -> ClipSet:
        """The clips at these indices, in this order; raises `DataError` when there are none."""
        chosen = np.fromiter(indices, np.int64)
        return replace(
            self,
            frames=tuple(self.frames[i] for i in chosen),
            labels=self.labels[chosen],
            groups={name: column[chosen] for name, column in self.groups.items()},
        )

    def where(self, group: str, values: Iterable[str]) -> ClipSet:
        """The clips whose value in `group` is one of `values`; raises `DataError` naming what there is when none match."""
        if group not in self.groups:
            raise DataError(f"{self.source.name}: no group {group!r}; there are: {', '.join(self.groups) or 'none'}")
        wanted = set(values)
        chosen = np.flatnonzero(np.isin(self.groups[group], sorted(wanted)))
        if not len(chosen):
            raise DataError(f"{self.source.name}: no clip with {group} in {sorted(wanted)}; there are: {', '.join(sorted(set(self.groups[group].tolist())))}")
        return self.take(chosen)
