"""What is looked at before the first step, so that a run that cannot work says so at once and touches nothing."""

from __future__ import annotations

import math

import numpy as np
import torch

from training import memory
from training.checkpoint import Subject
from training.config import Config, ConfigError, StreamConfig
from training.datasets.clips import ClipSet, DataError
from training.datasets.recordings import Recordings
from training.splits import Data, cut
from training.streams import Streams


def check(config: Config, training: Data, validation: Data | None, device: torch.device, processes: int = 1) -> None:
    """Raises `DataError` or `ConfigError`, naming what to mend, for values, classes, shapes or sizes that training cannot take.

    Shapes of clips and the range of labels were looked at when the clips were read (`ClipSet`, `Recordings`).
    """
    if config.model.head == "tokens":
        raise ConfigError("model.head = tokens: there is no reader of token sequences here; train such a network from Python")
    for name, data in (("training", training), ("validation", validation)):
        if data is not None:
            check_values(config, data, name)
    clips = cut(training)
    if absent := sorted(set(range(len(clips.classes))) - set(clips.labels.tolist())):
        raise DataError(f"{clips.source.name}: no training clip is left of class {clips.classes[absent[0]]!r}")
    if validation is not None and (validation.frame_shape, validation.classes) != (training.frame_shape, training.classes):
        raise DataError(
            f"{training.source.name}: validation clips have frames {validation.frame_shape} and {len(validation.classes)} classes, "
            f"training clips {training.frame_shape} and {len(training.classes)}"
        )
    if config.streams is not None:
        check_streams(config.streams, training, validation)
        longest = config.streams.frames
    else:
        longest = min(config.train.max_frames, math.ceil(max(map(len, clips.frames)) * config.augment.speed))
    subject = Subject.of(clips, config.streams)
    rules = config.export.events
    if rules is not None and rules.nothing is not None and rules.nothing not in subject.classes:
        raise ConfigError(f"export.events.nothing is {rules.nothing!r}, none of the network's classes: {', '.join(subject.classes)}")
    memory.check(config, subject, longest, device, processes)


def check_streams(config: StreamConfig, training: Data, validation: Data | None) -> None:
    """Raises `DataError` or `ConfigError` where no streams can be made of these clips or recordings."""
    for data in (training, validation):
        if data is None:
            continue
        made = Streams(data, config)
        if data is training and max(map(len, made.groups)) == 1 < len(made.groups):
            together = " and ".join(config.together)
            raise DataError(f"{data.source.name}: no two training clips have the same {together}, so none can follow another: name fewer streams.together")


def check_values(config: Config, data: Data, part: str) -> None:
    """Raises `DataError` for infinities, `ConfigError` for missing values that the model has no place for."""
    kind = "recording" if isinstance(data, Recordings) else "clip"
    for i, frames in enumerate(data.frames):
        if np.isfinite(frames).all():
            continue
        if np.isinf(frames).any():
            of = f" (class {data.classes[data.labels[i]]!r})" if isinstance(data, ClipSet) else ""
            raise DataError(f"{data.source.name}: {part} {kind} {i}{of} has an infinite value: mend the recording")
        if not config.model.missing:
            raise ConfigError(f"{data.source.name}: values are missing in {part} {kind}s: set model.missing = true (the first is {kind} {i})")
