"""From the client's frames in time to the model's steps: a causal resampler. Pure: a frozen state goes in, the next one comes out.

A model is trained at one rate and takes a step every 1/rate seconds of its clock. Frame 0 is a step and starts that clock. Later each frame
brings the steps that fall between the frame before it (left out) and itself (included), interpolated linearly between the two: none, one or
several. Nothing waits for a frame to come, so a step is at most one frame late.

- **Snapping.** A step that falls within a thousandth of a step of a frame is that frame, bit for bit, whatever rounding does to the times; a
  stream at twice the rate gives exactly every second frame.
- **Missing values.** Between a missing and a seen value the one that is nearer in time is taken, the later one when both are as near: half a
  joint cannot be made up, and holding the last value seen is the model's business.
- **Gaps.** Where more than `LONGEST_GAP_S` passed since the frame before, nothing is made up for the time between: the clock starts again at
  the frame after the gap, which is one step. So a client at less than half a frame a second gets one step for each frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import TooLarge, WrongTime

Floats = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

LONGEST_GAP_S = 2.0
LATEST_S = 1e12  # of a client's clock, either side of 0: a step is still told from the next one
MOST_BYTES = 2**28  # of the steps of one message: a slow client's few frames become many
_NEAR = 1e-3  # steps; times given as seconds since 1970 are good to 1e-5 of a step


@dataclass(frozen=True, slots=True)
class ResamplerState:
    """What the frames so far leave for the frames to come; as it is made, there was none."""

    origin: float | None = None  # the client's `t` of frame 0, where its frames carry `t`
    time: float = 0.0  # of the last frame, seconds since frame 0
    started: float = 0.0  # when the model's clock started, seconds since frame 0
    step: int = 0  # the next step of that clock
    last: Floats | None = None  # the last frame (*frame_shape); None: the next frame starts the clock

    def restarted(self) -> ResamplerState:
        """After a reset: the next frame starts the clock, time goes on."""
        return replace(self, step=0, last=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None among those of the last frame is a missing one."""
        last = None if self.last is None else [None if value != value else value for value in self.last.ravel().tolist()]
        return {"origin": self.origin, "time": self.time, "started": self.started, "step": self.step, "last": last}

    @classmethod
    def from_dict(cls, value: dict[str, Any], shape: tuple[int, ...]) -> ResamplerState:
        """`shape` is the model's frame shape."""
        last = value["last"]
        if last is not None:
            last = np.array([np.nan if one is None else one for one in last], np.float32).reshape(shape)
        return cls(**{**value, "last": last})


@dataclass(frozen=True, slots=True)
class Resampled:
    """The steps (steps, *frame_shape) that some frames bring, to which frame each belongs (counted from the first of them), and the state after them."""

    steps: Floats
    owners: Numbers  # (steps,)
    frames: int
    state: ResamplerState

    def spread(self, scores: Floats, before: Floats | None) -> Floats:
        """Scores (steps, classes) -> (frames, classes): of the last step at or before each frame; `before` (classes,) where that is an earlier one."""
        last = np.searchsorted(self.owners, np.arange(self.frames), side="right") - 1
        if last[0] >= 0:
            return scores[last]
        assert before is not None  # the first frame of a stream is a step
        return np.concatenate([before[None], scores])[last + 1]


def read_times(value: Any, count: int, first: int) -> Times:
    """What a client sent as `t` for `count` frames from number `first` on, (count,) seconds; raises `WrongTime` naming the frame."""
    if not isinstance(value, list) or len(value) != count:
        held = f"{len(value)} times" if isinstance(value, list) else f"no list of times but {value!r:.60}"
        raise WrongTime(f"t holds {held} for {count} frames: send one time in seconds for each", frame=first)
    for place, time in enumerate(value):
        if type(time) not in (int, float) or not abs(time) <= LATEST_S:
            raise WrongTime(f"frame {first + place}: t must be a number of seconds from {-LATEST_S:g} to {LATEST_S:g}, got {time!r:.60}", frame=first + place)
    return np.array(value, np.float64)


def stream_times(state: ResamplerState, first: int, t: Times) -> tuple[ResamplerState, Times]:
    """The client's `t` (count,) of frames from number `first` on -> the state that knows its origin, and seconds since frame 0.

    Raises `WrongTime` naming the frame where time does not go on.
    """
    state = replace(state, origin=float(t[0])) if first == 0 else state
    assert state.origin is not None
    times = t - state.origin
    before = np.concatenate([[-np.inf if first == 0 else state.time], times[:-1]])
    stalled = np.flatnonzero(~(times > before))
    if len(stalled):
        frame, place = first + int(stalled[0]), int(stalled[0])
        raise WrongTime(f"frame {frame}: t must increase from frame to frame, but {t[place]:.6f} comes after {state.origin + before[place]:.6f}", frame=frame)
    return state, times


def resample(state: ResamplerState, rate: float, times: Times, frames: Floats) -> Resampled:
    """Frames (count, *frame_shape) at seconds since frame 0 (count,), which increase -> the steps of a model of `rate` steps a second.

    However frames are cut into calls, the steps are the same bits. Raises `TooLarge` where they would be too many.
    """
    owners, shares, end = _schedule(state, rate, times.tolist(), MOST_BYTES // frames[0].nbytes)
    places = np.array(owners, np.int64)
    share = np.array(shares, np.float64)
    if (share == 1).all():
        steps = frames[places]
    else:
        before = np.concatenate([frames[:1] if state.last is None else state.last[None], frames])
        steps = _between(before[places], frames[places], share)
    return Resampled(steps, places, len(frames), replace(end, last=frames[-1].copy()))


def _schedule(state: ResamplerState, rate: float, times: list[float], most: int) -> tuple[list[int], list[float], ResamplerState]:
    """Of each step: the frame it belongs to, and how far it lies on the way to it from the frame before (1: it is that frame); and the state after them.

    A plain loop: streams come frame by frame, and for one frame it takes a tenth of the time of arrays.
    """
    owners: list[int] = []
    shares: list[float] = []
    before, started, step = state.time, state.started, state.step
    for frame, time in enumerate(times):
        if time - before > LONGEST_GAP_S or (frame == 0 and state.last is None):
            started = before = time
            step = 0
        now, then = (time - started) * rate, (before - started) * rate  # in steps of the clock
        made = math.floor(now + _NEAR) + 1  # steps of the clock up to this frame
        if len(owners) + made - step > most:
            raise TooLarge(f"at this rate these {len(times)} frames are more than {most} steps of the model: send fewer at once, long recordings in parts")
        for place in range(step, made):
            owners.append(frame)
            shares.append(1.0 if place >= now - _NEAR else (place - then) / (now - then))
        before, step = time, made
    return owners, shares, replace(state, time=before, started=started, step=step)


def _between(one: Floats, other: Floats, share: Times) -> Floats:
    """Linear interpolation, element by element: `share` (steps,) 0 is `one`, 1 is `other`, both (steps, *frame_shape)."""
    part = share.reshape(-1, *[1] * (one.ndim - 1))
    mixed: Floats = one + (other - one) * part.astype(np.float32)
    exact = share == 1
    if exact.any():
        mixed[exact] = other[exact]
    missing = np.isnan(mixed)
    return np.where(missing, np.where(part < 0.5, one, other), mixed) if missing.any() else mixed
