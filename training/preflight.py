"""What is looked at before the first step, so that a run that cannot work says so at once and touches nothing."""

from __future__ import annotations

import math

import numpy as np
import torch

from training import memory
from training.checkpoint import Subject
from training.config import Config, ConfigError
from training.datasets.clips import ClipSet, DataError


def check(config: Config, training: ClipSet, validation: ClipSet | None, device: torch.device, processes: int = 1) -> None:
    """Raises `DataError` or `ConfigError`, naming what to mend, for values, classes, shapes or sizes that training cannot take.

    Shapes of clips and the range of labels were looked at when the clips were read (`ClipSet`).
    """
    if config.model.head == "tokens":
        raise ConfigError("model.head = tokens: there is no reader of token sequences here; train such a network from Python")
    for name, clips in (("training", training), ("validation", validation)):
        if clips is not None:
            check_values(config, clips, name)
    if absent := sorted(set(range(len(training.classes))) - set(training.labels.tolist())):
        raise DataError(f"{training.source.name}: no training clip is left of class {training.classes[absent[0]]!r}")
    if validation is not None and (validation.frame_shape, validation.classes) != (training.frame_shape, training.classes):
        raise DataError(
            f"{training.source.name}: validation clips have frames {validation.frame_shape} and {len(validation.classes)} classes, "
            f"training clips {training.frame_shape} and {len(training.classes)}"
        )
    longest = min(config.train.max_frames, math.ceil(max(map(len, training.frames)) * config.augment.speed))
    memory.check(config, Subject.of(training), longest, device, processes)


def check_values(config: Config, clips: ClipSet, part: str) -> None:
    """Raises `DataError` for infinities, `ConfigError` for missing values that the model has no place for."""
    for i, clip in enumerate(clips.frames):
        if np.isfinite(clip).all():
            continue
        if np.isinf(clip).any():
            raise DataError(f"{clips.source.name}: {part} clip {i} (class {clips.classes[clips.labels[i]]!r}) has an infinite value: mend the recording")
        if not config.model.missing:
            raise ConfigError(f"{clips.source.name}: values are missing in {part} clips: set model.missing = true (the first is clip {i})")
