"""Streams that do not end, made of clips or of recordings: what a network that is never reset is trained and judged on.

A stream is made of stretches, one person before one camera. Inside a stretch clips follow each other by raw cuts, or the body moves from one
to the next, or a recording is played as it is. No network may tell the frames that are made here from those that a sensor saw: they have the
sensor's own jitter and a body's sway, and nothing jumps where an action begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from model import skeletons
from training.augment import Augment, Change, middle, resample
from training.config import ConfigError, StreamConfig
from training.datasets.clips import ClipSet, DataError, Frames
from training.datasets.recordings import Recordings, Segments
from training.splits import Data, cut

Form = Literal["cuts", "smooth", "whole", "repeats"]
Indices = npt.NDArray[np.int64]

FORMS: tuple[Form, ...] = ("cuts", "smooth", "whole", "repeats")
NO_CLASS = -1  # label of frames that belong to no class and do not count
SMOOTHED = 5  # frames of the running mean whose remainder is taken for jitter
SWAY = 0.025  # at most: deviation of a body that stands still, beside how far its joints are from its root (12 mm of 0.5 m)
SWAY_FRAMES = 8  # between two turns of it
SPEEDS = 1.15  # clips of one stretch differ in speed by up to this factor, beside what is drawn for all of it
NOISES = 1.5  # times `augment.noise`: the most that is drawn for a stretch


@dataclass(frozen=True)
class Stream:
    """A piece of a stream, or a finite one: frames (T, *frame shape), labels (T,), the class of each, `NO_CLASS` where it has none, and the
    actions in it, segments (k, 3): first frame, one past the last, label. `copied` (k,): which of them are clips the network was trained on."""

    frames: Frames
    labels: npt.NDArray[np.int64]
    segments: Segments
    copied: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Look:
    """What stays the same for a stretch: how the camera stands, the body's size and pace, how noisy the sensor is, how many frames are lost."""

    change: Change
    noise: float
    lost: float


@dataclass(frozen=True)
class _Piece:
    frames: Frames
    segments: Segments
    copied: bool = False

    def take(self, index: Indices, frames: Frames) -> _Piece:
        """With `frames` in place of those at `index`, rising; an action of which none is left is gone."""
        segments = self.segments.copy()
        segments[:, :2] = np.searchsorted(index, segments[:, :2])
        return replace(self, frames=frames, segments=segments[segments[:, 0] < segments[:, 1]])


class Streams:
    """Makes streams of clips, or of recordings and of the clips cut from them.

    `classes` are those of the clips and, last, that of the frames between actions, unless it is switched off (`streams.nothing`). Without
    `augment` clips are as they were recorded. `copies` (N,) tells which clips a network that is measured on these streams was trained on.
    Raises `ConfigError` or `DataError`, naming what to mend, where data and configuration do not go together.
    """

    def __init__(self, data: Data, config: StreamConfig, augment: Augment | None = None, copies: npt.NDArray[np.bool_] | None = None) -> None:
        self.config, self.augment = config, augment
        self.recordings = data if isinstance(data, Recordings) else None
        self.clips = cut(data)
        self._copies = np.zeros(len(self.clips), bool) if copies is None else copies
        self.classes = classes_of(self.clips, config)
        if self.recordings is not None and config.nothing and self.recordings.nothing not in (None, config.nothing):
            raise ConfigError(f"streams.nothing is {config.nothing!r}, the recordings call it {self.recordings.nothing!r}: give it one name")
        self.outside = len(self.clips.classes) if config.nothing else NO_CLASS
        self.groups = _grouped(self.clips, config.together)
        by_class = (group[self.clips.labels[group] == label] for group in self.groups for label in range(len(self.clips.classes)))
        self.repeats = [group for group in by_class if len(group) > 1]  # clips of one class in one group
        self.root = _root(self.clips.layout)
        self._jitters: dict[int, Frames] = {}
        self._deviation = _deviation(self.clips) if not self.root else np.zeros(1, np.float32)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that streams of this data are judged in."""
        return ("cuts", "smooth") if self.recordings is None else ("cuts", "smooth", "whole")

    def pieces(self, rng: np.random.Generator) -> Iterator[Stream]:
        """An endless stream, piece by piece: of each, what leads to an action, and the action."""
        while True:
            yield from map(self._labelled, self._stretch(rng))

    def stream(self, form: Form, number: int, *, seed: int, actions: int = 50) -> Stream:
        """One finite stream, nothing drawn but the order of clips and how they follow each other; of equal arguments the same.

        In the forms "cuts" and "smooth" it has so many actions of one group, the `number`-th (counted round and round). In the form "whole" it
        is the `number`-th recording as it is. In the form "repeats" somebody does one exercise: every clip of the `number`-th of `repeats`
        once, in their order and without a jump.
        """
        rng = np.random.default_rng((seed, number, FORMS.index(form)))
        if form == "whole":
            if self.recordings is None:
                raise DataError(f"{self.clips.source.name}: streams of the form whole need recordings, these are clips")
            i = number % len(self.recordings)
            return self._labelled(_Piece(self.recordings.frames[i], self._segments(i)))
        if form == "repeats":
            if not self.repeats:
                raise DataError(f"{self.clips.source.name}: streams of the form repeats need two clips of one class in one group of streams.together")
            group = self.repeats[number % len(self.repeats)]
            pieces = list(self._joined(group.tolist(), group, True, None, rng))
        else:
            group = self.groups[number % len(self.groups)]
            pieces = list(self._joined(self._drawn(group, actions, rng), group, form == "smooth", None, rng))
        starts = np.cumsum([0, *(len(piece.frames) for piece in pieces)])
        segments = [piece.segments + np.array([start, start, 0]) for piece, start in zip(pieces, starts, strict=False)]
        whole = self._labelled(_Piece(np.concatenate([piece.frames for piece in pieces]), np.concatenate(segments)))
        return replace(whole, copied=np.concatenate([np.full(len(piece.segments), piece.copied) for piece in pieces]))

    def _labelled(self, piece: _Piece) -> Stream:
        labels = np.full(len(piece.frames), self.outside, np.int64)
        for first, end, label in piece.segments.tolist():
            labels[first:end] = label
        return Stream(piece.frames, labels, piece.segments, np.full(len(piece.segments), piece.copied))

    def _stretch(self, rng: np.random.Generator) -> Iterator[_Piece]:
        c, look = self.config, self._look(rng)
        actions = int(rng.integers(c.stay[0], c.stay[1] + 1))
        if self.recordings is not None and rng.random() < c.whole:
            pieces = self._played(int(rng.integers(len(self.recordings))), actions, look, rng)
        else:
            smooth = rng.random() >= c.cuts
            group = self.groups[rng.integers(len(self.groups))]
            pieces = self._joined(self._drawn(group, actions, rng), group, smooth, look, rng)
        return pieces if look is None else self._seen(pieces, look, rng)

    def _look(self, rng: np.random.Generator) -> _Look | None:
        if self.augment is None:
            return None
        noise = rng.uniform(0, NOISES * self.augment.config.noise)
        return _Look(self.augment.draw(rng, self.clips.frame_shape), noise, rng.uniform(0, self.config.dropped))

    def _seen(self, pieces: Iterator[_Piece], look: _Look, rng: np.random.Generator) -> Iterator[_Piece]:
        """The pieces of a stretch as one camera sees them."""
        assert self.augment is not None
        centre: npt.NDArray[np.float32] | None = None
        rest: Frames | None = None
        for piece in pieces:
            if rest is None:  # of the whole stretch, as is the centre: a camera does not turn at every action
                rest = _rest(piece)
                centre = middle(piece.frames) if self.root else None
            if look.lost:
                kept = np.flatnonzero(rng.random(len(piece.frames)) >= look.lost)
                piece = piece.take(kept, piece.frames[kept])
            if len(piece.frames):
                yield replace(piece, frames=self.augment.disturb(self.augment.apply(look.change, piece.frames, centre, rest), rng, look.noise))

    def _joined(self, chosen: Iterable[int], group: Indices, smooth: bool, look: _Look | None, rng: np.random.Generator) -> Iterator[_Piece]:
        """Clips of a group one after another; with `smooth` the body moves from each to the next."""
        last: Frames | None = None
        for index in chosen:
            clip, speed = self.clips.frames[index], 1.0
            if look is not None and self.augment is not None:
                speed = look.change.speed * float(np.exp(rng.uniform(-1, 1) * np.log(SPEEDS)))
                clip = resample(self.augment.cut(clip, rng), speed)
            between = clip[:0]
            if smooth and last is not None:
                clip = clip + self._shift(clip[0], last)
                between = self._movement(last, clip[0], self._jitter(group, speed, rng), rng)
            last = clip[-1]
            segment = [[len(between), len(between) + len(clip), int(self.clips.labels[index])]]
            yield _Piece(np.concatenate([between, clip]), np.array(segment, np.int64), bool(self._copies[index]))

    def _drawn(self, group: Indices, actions: int, rng: np.random.Generator) -> Iterator[int]:
        """Clips of a group, never twice the same in a row where there are two, and of one class in a row as often as the configuration says."""
        chosen = -1
        for _ in range(actions):
            left = group[group != chosen] if len(group) > 1 else group
            if chosen >= 0 and self.config.repeat and rng.random() < self.config.repeat:
                same = left[self.clips.labels[left] == self.clips.labels[chosen]]
                left = same if len(same) else left
            chosen = int(left[rng.integers(len(left))])
            yield chosen

    def _played(self, recording: int, actions: int, look: _Look | None, rng: np.random.Generator) -> Iterator[_Piece]:
        """A recording from somewhere in it on, for so many actions or to its end."""
        assert self.recordings is not None
        frames, segments = self.recordings.frames[recording], self._segments(recording)
        start = int(rng.integers(len(frames)))
        ahead = segments[segments[:, 1] > start]
        stop = int(ahead[actions, 0]) if len(ahead) > actions else len(frames)
        ends = [end for end in ahead[:actions, 1].tolist() if end < stop]
        for first, end in itertools.pairwise([start, *ends, stop]):
            inside = ahead[(ahead[:, 0] < end) & (ahead[:, 1] > first)]
            inside = np.column_stack([np.clip(inside[:, :2] - first, 0, end - first), inside[:, 2]])
            piece = _Piece(frames[first:end], inside)
            if look is not None and look.change.speed != 1:
                played = resample(piece.frames, look.change.speed)
                piece = piece.take(np.rint(np.linspace(0, end - first - 1, len(played))).astype(np.int64), played)
            yield piece

    def _segments(self, recording: int) -> Segments:
        """Those of a recording, labels as in `classes`."""
        assert self.recordings is not None
        segments = self.recordings.segments[recording].copy()
        segments[:, 2] = [self.classes.index(self.recordings.classes[label]) for label in segments[:, 2]]
        return segments

    def _movement(self, start: Frames, end: Frames, jitter: Frames, rng: np.random.Generator) -> Frames:
        """The body goes over from one pose to another, both (*frame shape), and may hold them for a while."""
        c = self.config
        idle = int(rng.integers(0, c.idle + 1)) if rng.random() < c.pauses else 0
        before, blend = int(rng.integers(0, idle + 1)), int(rng.integers(c.blend[0], c.blend[1] + 1))
        share = np.linspace(0, 1, blend + 2, dtype=np.float32)[1:-1]
        share = np.concatenate([np.zeros(before, np.float32), share * share * (3 - 2 * share), np.ones(idle - before, np.float32)])
        steps, share = len(share), share.reshape(-1, *[1] * start.ndim)
        first = int(rng.integers(len(jitter)))
        moved: Frames = start * (1 - share) + end * share + self._sway(steps, start, rng) + jitter[(first + np.arange(steps)) % len(jitter)]
        return moved.astype(np.float32, copy=False)

    def _sway(self, steps: int, pose: Frames, rng: np.random.Generator) -> Frames:
        """What a body that holds still moves all the same, each number by itself; nothing at both ends, so that no action begins with a jump."""
        amplitude = rng.uniform(0, SWAY) * (self._radius(pose) if self.root else self._deviation)
        turns = rng.standard_normal((steps // SWAY_FRAMES + 2, *pose.shape), dtype=np.float32)
        place = np.arange(steps) / SWAY_FRAMES
        turn = place.astype(int)
        share = (place - turn).astype(np.float32)
        fade = np.minimum(1, np.minimum(np.arange(1, steps + 1), np.arange(steps, 0, -1)) / SWAY_FRAMES).astype(np.float32)
        share, fade = (one.reshape(-1, *[1] * pose.ndim) for one in (share * share * (3 - 2 * share), fade))
        sway: Frames = amplitude * fade * (turns[turn] * (1 - share) + turns[turn + 1] * share)
        return sway.astype(np.float32, copy=False)

    def _jitter(self, group: Indices, speed: float, rng: np.random.Generator) -> Frames:
        """A sensor's noise, as it is in a random clip of the group played at this speed; there and back, so that it may go on for ever."""
        clip = int(group[rng.integers(len(group))])
        if clip not in self._jitters:
            self._jitters[clip] = _remainder(self.clips.frames[clip])
        jitter = resample(self._jitters[clip], speed)
        return np.concatenate([jitter, jitter[::-1]])

    def _shift(self, pose: Frames, onto: Frames) -> Frames:
        """What moves the root of a pose to where that of another is; nothing where there is no root, or it is missing."""
        if not self.root:
            return np.zeros(1, np.float32)
        shift: Frames = np.nan_to_num(onto[self.root].mean(0) - pose[self.root].mean(0)).astype(np.float32)
        return shift

    def _radius(self, pose: Frames) -> float:
        """How far the joints of a body are from its root, on average (root mean square); 0 where too many are missing to say."""
        squares = ((pose - pose[self.root].mean(0)) ** 2).sum(-1)
        seen = squares[~np.isnan(squares)]
        return float(np.sqrt(seen.mean())) if len(seen) else 0.0


def classes_of(clips: ClipSet, config: StreamConfig | None) -> tuple[str, ...]:
    """The classes of a network: those of the clips and, where it is taught streams, that of the frames between them.

    Raises `ConfigError` where that is an action's name.
    """
    if config is None or not config.nothing:
        return clips.classes
    if config.nothing in clips.classes:
        raise ConfigError(f"streams.nothing is {config.nothing!r}, which is an action of {clips.source.name}: give frames between actions another name")
    return (*clips.classes, config.nothing)


def _grouped(clips: ClipSet, together: tuple[str, ...]) -> list[Indices]:
    """Indices of the clips that have the same values in these groups, in the order of the values."""
    if unknown := [name for name in together if name not in clips.groups]:
        raise ConfigError(f"streams.together names {unknown[0]!r}, which is no group of {clips.source.name}; there are: {', '.join(clips.groups) or 'none'}")
    values = [tuple(clips.groups[name][i] for name in together) for i in range(len(clips))]
    return [np.array([i for i, value in enumerate(values) if value == one], np.int64) for one in sorted(set(values))]


def _root(layout: str | None) -> list[int]:
    """Joints whose mean is where a body is: the hips. None without a skeleton."""
    if layout is None:
        return []
    names = skeletons.layout(layout)
    return [names.index("left_hip"), names.index("right_hip")]


def _rest(piece: _Piece) -> Frames:
    """The pose from which things are done: the mean of the frames outside actions, or that in which the action ends."""
    outside = np.ones(len(piece.frames), bool)
    for first, end, _ in piece.segments.tolist():
        outside[first:end] = False
    pose: Frames = piece.frames[outside].mean(0) if outside.any() else piece.frames[-1]
    return pose


def _deviation(clips: ClipSet) -> Frames:
    """Standard deviation of each number of a frame over all clips, missing values left out."""
    every = np.concatenate(clips.frames)
    seen = ~np.isnan(every)
    count = np.maximum(seen.sum(0), 1)
    centred = np.where(seen, every - np.where(seen, every, 0).sum(0) / count, 0)
    deviation: Frames = np.sqrt((centred**2).sum(0) / count).astype(np.float32)
    return deviation


def _remainder(clip: Frames) -> Frames:
    """What a clip's running mean leaves: jitter, with the strength it had. Zeros for clips too short for one, and where values are missing."""
    if len(clip) < SMOOTHED:
        return np.zeros_like(clip)
    margin = SMOOTHED // 2
    padded = np.concatenate([clip[:1].repeat(margin, 0), clip, clip[-1:].repeat(margin, 0)])
    mean = np.lib.stride_tricks.sliding_window_view(padded, SMOOTHED, axis=0).mean(-1)
    strength = np.sqrt(SMOOTHED / (SMOOTHED - 1))  # the mean has taken its share of the noise with it
    remainder: Frames = np.nan_to_num((clip - mean) * strength).astype(np.float32)
    return remainder
