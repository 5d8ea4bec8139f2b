"""What a run is fed with and judged by: cut clips, each from the zero state, or streams, whose state is carried from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from model.network import Network
from training.augment import Augment
from training.batches import Batch, Weighting, collate, epoch_batches, stream_batches, training_batches
from training.checkpoint import Subject
from training.config import Config, StreamConfig
from training.datasets.clips import ClipSet, Frames
from training.distributed import Group
from training.evaluate import evaluate, evaluate_streams
from training.loss import class_weights
from training.splits import Data, cut
from training.streams import Stream, Streams

VALIDATION_SEED = 20190910  # of validation streams: the same for every seed of training, so that runs are compared on the same streams


class Feed(Protocol):
    """Batches to fit on, and what an epoch has come to."""

    subject: Subject
    per_epoch: int  # batches
    carries: bool  # whether a batch goes on where the one before ended

    @property
    def outline(self) -> object:
        """What batches are made by: equal for processes that have the same data."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch; of an equal number the same."""

    def samples(self) -> list[tuple[Tensor, Tensor]]:
        """Frames and lengths as they were recorded, evenly drawn, to measure the features on."""

    def validate(self, network: Network, group: Group) -> dict[str, float] | None:
        """Figures on the validation part, `validation_loss` and `validation_accuracy`, by which is chosen, among them; None where there is none."""


def feed(config: Config, training: Data, validation: Data | None) -> Feed:
    """What the configuration asks for. Without a `streams` section recordings are cut into clips."""
    if config.streams is not None:
        return StreamFeed(config, config.streams, training, validation)
    return ClipFeed(config, cut(training), cut(validation) if validation is not None else None)


class ClipFeed:
    """Every clip once an epoch, changed at random; judged by the score at the last frame of each validation clip."""

    carries = False

    def __init__(self, config: Config, training: ClipSet, validation: ClipSet | None) -> None:
        self.config, self.training, self.validation = config, training, validation
        self.subject = Subject.of(training)
        self.per_epoch = epoch_batches(training, config.train.batch, config.train.max_frames)
        self.augment = Augment(config.augment, training.layout)
        t = config.train
        self.weighting = Weighting(early=t.early, last=config.model.head == "last", classes=class_weights(training.labels, len(training.classes), t))

    @property
    def outline(self) -> object:
        return [_outline(clips) for clips in (self.training, self.validation) if clips is not None]

    def epoch(self, number: int) -> Iterator[Batch]:
        t = self.config.train
        return training_batches(self.training, t.batch, self.augment, t.max_frames, (self.config.seed, number), self.weighting)

    def samples(self) -> list[tuple[Tensor, Tensor]]:
        return _samples(self.training.frames)

    def validate(self, network: Network, group: Group) -> dict[str, float] | None:
        if self.validation is None:
            return None
        found = evaluate(network, self.validation, group)
        return {"validation_loss": found.loss, "validation_accuracy": found.accuracy, "validation_frame_accuracy": found.frame_accuracy}


class StreamFeed:
    """Streams side by side, new ones each epoch; judged by actions on validation streams of every form, drawn once and for all."""

    carries = True

    def __init__(self, config: Config, streams: StreamConfig, training: Data, validation: Data | None) -> None:
        self.config = config
        self.training = Streams(training, streams, Augment(config.augment, training.layout))
        self.subject = Subject.of(self.training.clips, streams)
        self.per_epoch = streams.steps
        self.validation = None if validation is None else validation_streams(Streams(validation, streams))
        t, clips = config.train, self.training.clips
        classes = class_weights(clips.labels, len(clips.classes), t)
        self.weighting = Weighting(
            early=t.early, classes=classes, nothing=streams.nothing_weight, least_pause=streams.least_pause, action=streams.action_frames
        )

    @property
    def outline(self) -> object:
        judged_by = [len(stream.frames) for streams in (self.validation or {}).values() for stream in streams]
        return _outline(self.training.clips), [len(frames) for frames in self.training.recordings.frames] if self.training.recordings else [], judged_by

    def epoch(self, number: int) -> Iterator[Batch]:
        return stream_batches(self.training, self.config.train.batch, (self.config.seed, number), self.weighting)

    def samples(self) -> list[tuple[Tensor, Tensor]]:
        """Of clips rather than of streams: where clips are cut together a body jumps by metres, which would drown what moves in them."""
        recordings, steps = self.training.recordings, self.training.config.frames
        if recordings is None:
            return _samples(self.training.clips.frames)
        return _samples([frames[i : i + steps] for frames in recordings.frames for i in range(0, len(frames), steps)])

    def validate(self, network: Network, group: Group) -> dict[str, float] | None:
        if self.validation is None:
            return None
        found = {form: evaluate_streams(network, streams, group) for form, streams in self.validation.items()}
        figures = {
            "loss": [one.loss for one in found.values()],
            "accuracy": [one.accuracy for one in found.values()],
            "frame_accuracy": [one.frame_accuracy for one in found.values()],
            "nothing_accuracy": [one.nothing_accuracy for one in found.values() if not np.isnan(one.nothing_accuracy)],
        }
        means = {f"validation_{name}": float(np.mean(values)) for name, values in figures.items() if values}
        return means | {f"validation_{form}": one.accuracy for form, one in found.items()}


def validation_streams(streams: Streams) -> dict[str, list[Stream]]:
    """Of each form so many streams as the configuration says; of recordings as they are, each once."""
    count, actions = streams.config.validation
    counts = {form: count if form != "whole" else len(streams.recordings or ()) for form in streams.forms}
    return {form: [streams.stream(form, i, seed=VALIDATION_SEED, actions=actions) for i in range(n)] for form, n in counts.items()}


def _samples(frames: Sequence[Frames], at_most: int = 512) -> list[tuple[Tensor, Tensor]]:
    chosen = np.linspace(0, len(frames) - 1, min(at_most, len(frames))).astype(int)
    batches = [collate([frames[i] for i in chosen[j : j + 64]], [0] * len(chosen[j : j + 64])) for j in range(0, len(chosen), 64)]
    return [(batch.frames, batch.lengths) for batch in batches]


def _outline(clips: ClipSet) -> tuple[list[int], list[int]]:
    return [len(clip) for clip in clips.frames], clips.labels.tolist()
