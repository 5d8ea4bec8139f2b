"""Which runs of a model are short enough for the event loop. Knows no tensors, and no clock but what it is told."""

from __future__ import annotations

import math
from collections.abc import Collection

INLINE_S = 0.0015  # longest run that may hold up the event loop
TRIED = 2.0  # times as long a run may take on the thread to be tried on the event loop now and then
TRY = 8  # of so many runs in a row: the first finds nothing in the caches
AGAIN = 64  # runs on the thread between two tries; after each that failed twice as many,
SELDOM = 4096  # at most
LATELY_S = 0.01  # streams that came up in so long are as many as there are at once


class Inline:
    """Through the thread a short run takes half as long again, so the event loop makes it itself. How long a run takes here and how long there are two
    things: the thread wakes on another core, whose caches have nothing of the model.

    Where so many streams are active that a run of all of them would be too long, their smaller batches stay on the thread as well: event loop and model
    then work side by side. `frames` is the padded size of a batch, rows x steps.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._streams: set[int] = set()  # of this period
        self._before = 0  # how many there were in the last
        self._until = -math.inf  # end of this period

    def saw(self, streams: Collection[int], now: float) -> None:
        """A batch of these streams is about to run, here or there."""
        if now >= self._until:
            self._before = len(self._streams) if now < self._until + LATELY_S else 0
            self._streams, self._until = set(), now + LATELY_S
        self._streams.update(streams)

    @property
    def active(self) -> int:
        """Streams that are at it now."""
        return max(self._before, len(self._streams))

    def allows(self, rows: int, steps: int) -> bool:
        """Whether a batch that is all there is to do runs on the event loop; `ran_here` or `ran_there` tells how long it took."""
        size = self._of(rows * steps)
        active = self.active
        if active > rows and active * steps * size.frame_s > INLINE_S:
            return False
        return size.may(rows * steps)

    def ran_here(self, frames: int, seconds: float) -> None:
        self._of(frames).ran_here(frames, seconds)

    def ran_there(self, frames: int, seconds: float) -> None:
        self._of(frames).there_s = seconds / frames

    def takes(self, frames: int) -> float:
        """Seconds that a batch of this size takes on the thread, by the last of about its size; 0 where there was none."""
        size = self._of(frames)
        return frames * size.there_s if size.there_s < math.inf else 0.0

    def _of(self, frames: int) -> _Size:
        return self._sizes.setdefault(frames.bit_length(), _Size())


class _Size:
    """Batches of about one size."""

    __slots__ = ("again", "here_s", "there_s", "trying", "untried")

    def __init__(self) -> None:
        self.here_s = math.inf  # seconds per frame on the event loop, of the latest runs most
        self.there_s = math.inf  # of the last run on the thread, where the first goes
        self.untried = self.again = AGAIN  # runs since the last try, and runs between two
        self.trying = 0  # runs that are left of a try

    @property
    def frame_s(self) -> float:
        """Seconds that a frame takes here, at most."""
        return min(self.here_s, self.there_s)

    def may(self, frames: int) -> bool:
        if frames * self.here_s < INLINE_S:
            self.again = AGAIN
            return True
        if frames * self.there_s > TRIED * INLINE_S:
            return False
        if self.trying:
            return True
        self.untried += 1
        if self.untried < self.again:
            return False
        self.untried, self.again, self.trying, self.here_s = 0, min(2 * self.again, SELDOM), TRY, math.inf
        return True

    def ran_here(self, frames: int, seconds: float) -> None:
        frame_s = seconds / frames
        if self.trying:
            self.trying = self.trying - 1 if seconds < TRIED * INLINE_S else 0
            self.here_s = min(self.here_s, frame_s)
        elif self.here_s == math.inf:
            self.here_s = frame_s
        else:  # a run that was interrupted counts as one of twice the time: it says nothing of the next
            self.here_s += 0.25 * (min(frame_s, 2 * self.here_s) - self.here_s)
