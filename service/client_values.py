"""The values of the client: what it is given to send and to heed, an answer, a model."""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from service.client_notices import ModelChanged
from service.errors import WrongTime

Frames = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]
TOP = 5  # classes in an answer's `top`


@dataclass(frozen=True)
class Timed:
    """Frames (count, *frame_shape) that a camera took at their own times `t` (count,), or one frame and its time: what a source of `play` may give.

    Seconds on any clock, increasing from frame to frame.
    """

    frames: npt.ArrayLike
    t: npt.ArrayLike


Piece = npt.ArrayLike | Timed
Source = Frames | Iterable[Piece] | AsyncIterable[Piece]


@dataclass(frozen=True)
class Retry:
    """How a lost stream comes back: at once, then after pauses that double from `first_s` to `longest_s`, until `give_up_s` have passed without an answer.

    And what it keeps for that. Frames that would not survive the end of their server are kept in any case, at most `keep_frames` of them in `keep_bytes`: then
    `send` waits. What is left of both holds older frames, with which another version of the model is warmed up.
    """

    give_up_s: float = 60.0
    first_s: float = 0.1
    longest_s: float = 5.0
    keep_frames: int = 4096
    keep_bytes: int = 16 * 2**20

    def pause_s(self, attempt: int) -> float:
        """After attempt 0, 1, ...; up to half of it is chance, so that many clients do not come back at once."""
        return float(min(self.longest_s, self.first_s * 2.0 ** min(attempt, 60)) * random.uniform(0.5, 1.0))

    def frames(self, frame_bytes: int) -> int:
        """How many frames of this size are kept at most."""
        return max(1, min(self.keep_frames, self.keep_bytes // frame_bytes))


@dataclass(frozen=True)
class Model:
    """What a served model is; `info` is all that the service tells of it, `info["manifest"]` the manifest."""

    name: str
    version: str
    task: str
    frame_shape: tuple[int, ...]
    classes: tuple[str, ...]
    fps: float
    layout: str | None
    info: dict[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Model:
        manifest = value["manifest"]
        return cls(
            name=value["name"],
            version=value["version"],
            task=manifest["task"],
            frame_shape=tuple(manifest["frame_shape"]),
            classes=tuple(manifest["classes"]),
            fps=manifest["fps"],
            layout=manifest["layout"],
            info=value,
        )


@dataclass(frozen=True)
class Event:
    """Something has started or ended in a stream, as the model's rules decide."""

    event: Literal["start", "end"]
    label: str
    score: float  # mean over the frames that decided a start, or over what has ended
    frame: int  # where it happened
    decided: int  # when it was known
    time: float  # seconds of the stream at `frame`
    cause: str | None = None  # of an end: "reset" where the stream began anew in the middle of it

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Event:
        return cls(value["event"], value["label"], value["score"], value["frame"], value["decided"], value["time"], value.get("cause"))


@dataclass(frozen=True)
class Answer:
    """What the model says at one frame of a stream, or at the last frame of a clip or message.

    `label`, `score` and `top` (best first) exist for classification only. `scores` has shape (classes,); (count, classes) where a call
    asked for `scores="all"`; None where it asked for none. `events` are what its frames decided. `changed` says that it is the first of another model.
    """

    frame: int  # of the stream, as the client counts
    time: float  # seconds of the stream since its frame 0; NaN where another program sent the frame with a time of its own
    label: str | None
    score: float | None
    top: tuple[tuple[str, float], ...] = field(repr=False)
    scores: Scores | None = field(repr=False)
    events: tuple[Event, ...] = field(default=(), repr=False)
    changed: ModelChanged | None = field(default=None, repr=False)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        scores = value.get("scores")
        return cls(
            frame=value["frame"],
            time=value["time"],
            label=value.get("label"),
            score=value.get("score"),
            top=tuple((entry["label"], entry["score"]) for entry in value.get("top", ())),
            scores=None if scores is None else np.array(scores, np.float32),
            events=tuple(map(Event.from_json, value.get("events", ()))),
        )

    @classmethod
    def from_scores(cls, frame: int, time: float, scores: Scores, classes: tuple[str, ...]) -> Answer:
        """The answer that scores (classes,) stand for; without `classes` they are no classification."""
        if not classes:
            return cls(frame, time, None, None, (), scores)
        order = np.argsort(-scores, kind="stable")[:TOP]
        top = tuple((classes[index], float(scores[index])) for index in order.tolist())
        return cls(frame, time, *top[0], top, scores)


OnEvent = Callable[[Event], None]


class StreamOptions(TypedDict, total=False):
    """What a stream may be opened with, beside its model."""

    version: str | None  # of the model; None is the highest
    session: str | None  # to go on with; None is a new one
    ack: int | None  # with `session`: kept answers from this frame on are wanted again
    fps: float | None  # of the frames; None is the model's
    layout: str | None  # of the skeletons; None is the model's
    scores: Literal["last", "all"]  # an answer for the last frame of each `send` or, as is the rule, for each frame


def opening(options: StreamOptions) -> dict[str, Any]:
    """What the stream's `open` says; raises `TypeError` for an option there is none of."""
    if unknown := set(options) - StreamOptions.__optional_keys__:
        raise TypeError(f"unknown option {min(unknown)!r}; known: {', '.join(sorted(StreamOptions.__optional_keys__))}")
    return {"scores": "all", **{name: value for name, value in options.items() if value is not None}, "answers": "binary"}


async def pieces(source: Source, chunk: int, t: npt.ArrayLike | None = None) -> AsyncIterator[Piece]:
    """What a source gives, one after another; an array gives `chunk` frames at a time, with their times where `t` (count,) has them.

    Raises `TypeError` for times beside anything but an array.
    """
    if t is not None and not isinstance(source, np.ndarray):
        raise TypeError("t goes with an array of frames; an iterable gives Timed(frames, t)")
    if isinstance(source, AsyncIterable):
        async for piece in source:
            yield piece
    elif isinstance(source, np.ndarray):
        times = None if t is None else as_times(t, len(source))
        for start in range(0, len(source), chunk):
            some = source[start : start + chunk]
            yield some if times is None else Timed(some, times[start : start + chunk])
    else:
        for piece in source:
            yield piece


def as_times(t: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
    """The times of `count` frames, (count,) seconds; of one frame a number will do. Raises `WrongTime`."""
    try:
        times = np.atleast_1d(np.array(t, np.float64))
    except (TypeError, ValueError):
        raise WrongTime(f"t must be numbers of seconds, got {t!r:.60}") from None
    if times.shape != (count,):
        raise WrongTime(f"t has the shape {times.shape} for {count} frames: give one time in seconds for each")
    if not np.isfinite(times).all():
        raise WrongTime(f"t must be finite numbers of seconds, got {times[~np.isfinite(times)][0]}")
    return times
