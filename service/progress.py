"""What a stream remembers beside its row of state: the resampler, the event detector, and the scores of its latest step.

A message is prepared, run, and only then committed: one that fails in between has changed nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.contract import Manifest
from model.events import EventState, Numbers
from service.detector import Detector, TimedEvent
from service.errors import WrongTime
from service.resampler import Floats, Resampled, ResamplerState, Times, resample, stream_times


class Progress:
    """Of one stream or clip whose frames come at `fps`, unless they carry their own times.

    `plain` streams, frames at the model's own rate and no events, have nothing to remember: their steps are their frames.
    """

    __slots__ = ("_fps", "_latest", "_moments", "_rate", "_shape", "detector", "plain", "resampler")

    def __init__(self, manifest: Manifest, fps: float) -> None:
        self._rate = manifest.fps
        self._shape = manifest.frame_shape
        self._fps = fps
        self._latest: Floats | None = None  # (classes,), of the last step
        self._moments: dict[int, float] = {}  # of timed streams: when the frames were that the next events may name
        self.detector = None if manifest.events is None else Detector(manifest.events, manifest.classes)
        self.resampler = None if fps == manifest.fps else ResamplerState()  # None: each frame is one step
        self.plain = self.resampler is None and self.detector is None

    @property
    def origin(self) -> float | None:
        """The `t` of frame 0; None where frames carry no times of their own, or none has come yet."""
        return None if self.resampler is None else self.resampler.origin

    @property
    def timed(self) -> bool:
        """Whether frames carry their own times."""
        return self.origin is not None

    def prepare(self, first: int, frames: Floats, t: Times | None) -> Passage:
        """The steps that the next frames (count, *frame_shape), from number `first` on, stand for; `t` (count,) are their times as the client has them.

        Changes nothing. Raises `WrongTime` or `TooLarge`.
        """
        if first and (t is not None) != self.timed:
            begun = "with" if self.timed else "without"
            raise WrongTime(f"frame {first}: this stream began {begun} t: send it with every frame or with none", frame=first)
        if self.resampler is None and t is None:
            return Passage(self, first, frames)
        state = self.resampler or ResamplerState()
        if t is None:
            return Passage(self, first, frames, resample(state, self._rate, np.arange(first, first + len(frames)) / self._fps, frames))
        state, times = stream_times(state, first, t)
        return Passage(self, first, frames, resample(state, self._rate, times, frames), times)

    def reset(self, at: int) -> list[TimedEvent]:
        """Begins anew at frame `at`; returns the end of what was open."""
        if self.resampler is not None:
            self.resampler = self.resampler.restarted()
        return [] if self.detector is None else self.detector.close(at, self.time_of)

    def time_of(self, frame: int) -> float:
        """Seconds since frame 0. Of a timed stream only what events may name is remembered; else it is the last frame's time."""
        if not self.timed:
            return frame / self._fps
        assert self.resampler is not None
        return self._moments.get(frame, self.resampler.time)

    def open_event(self) -> dict[str, Any] | None:
        return None if self.detector is None else self.detector.open_event(self.time_of)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what was decided but not acknowledged is not among them, it belongs to the answers."""
        return {
            "resampler": None if self.resampler is None else self.resampler.to_dict(),
            "detector": None if self.detector is None else self.detector.state.to_dict(),
            "latest": None if self._latest is None else self._latest.tolist(),
            "moments": list(self._moments.items()),
        }

    def restore(self, value: dict[str, Any]) -> None:
        """Goes on where a stream of this model and rate was when it gave `to_dict`."""
        self.resampler = None if value["resampler"] is None else ResamplerState.from_dict(value["resampler"], self._shape)
        self.plain = self.resampler is None and self.detector is None
        self._latest = None if value["latest"] is None else np.array(value["latest"], np.float32)
        self._moments = {int(frame): float(time) for frame, time in value["moments"]}
        if self.detector is not None:
            self.detector.state = EventState.from_dict(value["detector"])

    def take_clock(self, value: dict[str, Any]) -> bool:
        """Begins with the clock of another model's stream, as its `to_dict` has it; whether there is one: frames that carry their own times."""
        before = value["resampler"]
        if before is None or before["origin"] is None:
            return False
        self.resampler, self.plain = ResamplerState(origin=before["origin"], time=before["time"]), False
        return True

    def _commit(self, first: int, scores: Floats, resampled: Resampled | None, times: Times | None) -> tuple[Floats, list[TimedEvent]]:
        """Scores (steps, classes) -> scores of the client's frames (count, classes), and the events they decide."""
        answered, numbers = scores, np.arange(first, first + len(scores))
        if resampled is not None:
            answered, numbers = resampled.spread(scores, self._latest), first + resampled.owners
            self.resampler, self.plain = resampled.state, False
            self._latest = answered[-1].copy()
        if self.detector is None:
            return answered, []
        return answered, self._detect(self.detector, first, scores, numbers, times)

    def _detect(self, detector: Detector, first: int, scores: Floats, numbers: Numbers, times: Times | None) -> list[TimedEvent]:
        if times is None:
            return detector.advance(scores, numbers, self.time_of)
        moments, end = self._moments, first + len(times)

        def time_of(frame: int) -> float:
            return float(times[frame - first]) if first <= frame < end else moments[frame]

        events = detector.advance(scores, numbers, time_of)
        self._moments = {frame: time_of(frame) for frame in detector.state.frames}
        return events


class Passage:
    """The frames of one message on their way through the model: run `steps`, then `commit` their scores."""

    __slots__ = ("_first", "_progress", "_resampled", "events", "scores", "steps", "times")

    def __init__(self, progress: Progress, first: int, frames: Floats, resampled: Resampled | None = None, times: Times | None = None) -> None:
        self._progress = progress
        self._first = first
        self._resampled = resampled
        self.steps = frames if resampled is None else resampled.steps  # (steps, *frame_shape); there may be none
        self.times = times  # (count,) of frames that carry their own, seconds since frame 0
        self.scores: Floats  # (count, classes), once committed
        self.events: list[TimedEvent] = []

    def commit(self, scores: Floats) -> None:
        """Takes the scores (steps, classes) of `steps`; from here on the message has taken effect."""
        self.scores, self.events = self._progress._commit(self._first, scores, self._resampled, self.times)
