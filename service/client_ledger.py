"""The books of a stream, in numbers of frames: what to write next, what to keep for a lost connection, which answers are new. No I/O."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service import protocol
from service.client_values import Frames
from service.errors import Empty, Gap, WrongShape, WrongTime
from service.resampler import Times


def as_frames(frames: npt.ArrayLike, shape: tuple[int, ...]) -> Frames:
    """Frames (count, *shape), of one frame (*shape) too. A copy: they may be sent again when the caller has long reused his buffer."""
    array = np.array(frames, np.float32, order="C")
    if array.shape == shape:
        array = array[None]
    if array.shape[1:] != shape:
        raise WrongShape(f"expected frames of shape (count, {', '.join(map(str, shape))}), got {array.shape}")
    if not len(array):
        raise Empty("no frames: send at least one")
    return array


@dataclass(frozen=True)
class _Chunk:
    first: int
    frames: Frames
    t: Times | None = None  # (count,), where frames carry their times

    @property
    def end(self) -> int:
        return self.first + len(self.frames)

    def over(self, safe: int) -> bool:
        """Whether a server that has the frames below `safe` for good has all of it."""
        return self.end <= safe

    def message(self, taken: int) -> str | bytes | None:
        """What a server that has taken frames below `taken` still needs of it."""
        known = max(0, taken - self.first)
        if known >= len(self.frames):
            return None
        if self.t is not None:
            return protocol.write_timed_frames(self.first + known, self.frames[known:], self.t[known:])
        return protocol.write_frames(self.first + known, self.frames[known:])


@dataclass(frozen=True)
class _Reset:
    first: int  # its place: frames before it belong to the old movement

    @property
    def end(self) -> int:
        return self.first

    def over(self, safe: int) -> bool:
        """Only what follows a reset shows that it was done: frames before it say nothing of it."""
        return self.first < safe

    def message(self, taken: int) -> str | None:
        return json.dumps({"type": "reset", "at": self.first}) if taken <= self.first else None  # repeating one does nothing


class Ledger:
    """One stream over all its connections; each begins with `resume`, and `message` is what to write to it.

    Frames below `read` were answered and the answers read, below `received` answered, below `next_frame` handed over. Those are kept that a server may
    still ask for, and as many before them as another model needs to be warmed up, but for these there may be no room.
    """

    def __init__(self, next_frame: int = 0, read: int = 0, window: int = 1, *, every: bool = True, origin: float | None = None) -> None:
        self.window = window
        self.origin = origin  # the `t` of frame 0, where frames carry their times
        self.next_frame = next_frame
        self.read = self.received = read
        self._begin = next_frame
        self._every = every  # answers are for each frame; else for the last of each message
        self._unread = 0  # answers
        self._durable: int | None = None  # frames below survive the server's end; None: it promises nothing, its memory counts
        self._horizon = 0  # frames before those
        self._most = sys.maxsize  # frames that are kept
        self._kept: deque[_Chunk | _Reset] = deque()  # until the server has it for good
        self._waiting: deque[_Chunk | _Reset] = deque()  # to be written to this connection
        self._from = next_frame  # frames below need not be sent on this connection
        self._taken = next_frame  # frames below are known to the server of this connection
        self._acked = 0  # what it was told to be read
        self._farewell = self._closed = False
        self._last_t = -math.inf
        self._times: dict[int, float] = {}  # of frames that are kept, seconds since frame 0

    # ---- what the program does

    def fits(self, count: int) -> bool:
        """Whether `count` more frames may be handed over."""
        return self.next_frame + count - self.read <= self.window and not self.brims(count)

    def brims(self, count: int) -> bool:
        """Whether `count` more frames are too many to be kept, until the server promises that earlier ones survive its end."""
        return self._durable is not None and self.next_frame + count - self._safe > self._most

    def check(self, t: Times | None) -> None:
        """Raises `WrongTime` where the next frames may not have these times, or may not come without."""
        frame = self.next_frame
        if frame and (t is not None) != (self.origin is not None):
            begun = "without" if self.origin is None else "with"
            raise WrongTime(f"frame {frame}: this stream began {begun} t: send it with every frame or with none", frame=frame)
        if t is None:
            return
        before = np.concatenate([[self._last_t], t[:-1]])
        if len(stalled := np.flatnonzero(~(t > before))):
            place = int(stalled[0])
            frame += place
            raise WrongTime(f"frame {frame}: t must increase from frame to frame, but {t[place]:.6f} comes after {before[place]:.6f}", frame=frame)

    def put(self, frames: Frames, t: Times | None = None) -> None:
        """Hands over frames (count, *shape), with times that `check` has let pass."""
        if t is not None:
            self.origin = float(t[0]) if self.origin is None else self.origin
            self._last_t = float(t[-1])
            self._times.update(zip(range(self.next_frame, self.next_frame + len(t)), (t - self.origin).tolist(), strict=True))
        self._put(_Chunk(self.next_frame, frames, t))

    def time(self, frame: int) -> float | None:
        """Seconds since frame 0 of a frame that has not been read; NaN where it was handed over elsewhere. None where frames carry no times."""
        return None if self.origin is None else self._times.get(frame, math.nan)

    def reset(self) -> None:
        if self._kept and self._kept[-1] == _Reset(self.next_frame):
            return  # a second one at the same place does nothing
        self._put(_Reset(self.next_frame))

    def mark_read(self, frame: int) -> None:
        """The oldest unread answer, that of `frame`, was read."""
        self._unread -= 1
        self.read = frame + 1
        self._settle()

    def close(self) -> None:
        """After what was handed over comes the farewell, and nothing after it."""
        self._farewell = True

    # ---- what the connection does

    def agree(self, durable: bool, horizon: int, most: int) -> None:
        """What `opened` says: whether the server will promise that frames survive its end, and with how many frames another model is warmed up.

        `most` is how many frames are kept at most; a window of them in any case.
        """
        if not durable:
            self._durable = None
        elif self._durable is None:
            self._durable = self._oldest  # what a server has in memory it may not have stored
        self._horizon, self._most = horizon, max(most, self.window)

    def resume(self, next_frame: int) -> None:
        """A new connection to a server that has taken `next_frame` frames, which may be fewer than it has answered before.

        Raises `Gap` where it has lost frames that are no longer kept here, or has frames that were never sent from here.
        """
        self._check_reach(next_frame)
        self._from = self._taken = next_frame
        self._acked = 0
        self._waiting = deque(self._kept)

    def renew(self, next_frame: int, warm_from: int) -> int:
        """A new connection to a server that has taken `next_frame` frames, but none of them with the model that it has now: that begins with nothing.

        It may be shown the frames from `warm_from` on again. Returns the first that it will be shown: it takes no frame before a reset and none that is
        no longer here. Raises `Gap` as `resume` does.
        """
        self._check_reach(next_frame)
        known = min(next_frame, self.received)
        resets = [item.first for item in self._kept if isinstance(item, _Reset) and item.first <= known]
        begin = min(next_frame, max(warm_from, self._oldest, *resets))
        self._from = self._taken = self._acked = begin
        self._waiting = deque(item for item in self._kept if item.first > begin or isinstance(item, _Chunk))  # it need not be told to begin anew
        return begin

    def message(self) -> str | bytes | None:
        """The next message to write; None: nothing for now."""
        if self._closed:
            return None
        if self._owes_ack():
            self._acked = self._readable
            return protocol.HEADER.pack(protocol.VERSION, protocol.KIND_ACK, 0, 0, self._acked)
        while self._waiting and not self._overdrawn:
            if (message := self._waiting.popleft().message(self._from)) is not None:
                return message
        if self._farewell and not self._waiting:
            self._closed = True
            return json.dumps({"type": "close"})
        return None

    def take(self, first: int, count: int) -> list[int]:
        """Answers of frames [first, first + count) came; returns the frames whose answers are new and were asked for."""
        end = first + count
        new = list(range(max(first, self.received), end))
        if not self._every:  # a server that comes back sends all it kept
            ends = {self._begin, *(item.end for item in self._kept)}
            new = [frame for frame in new if frame + 1 in ends]
        self._unread += len(new)
        self._taken = max(self._taken, end)
        self.received = max(self.received, end)
        self._settle()
        return new

    def forgo(self, kept_from: int) -> None:
        """Answers of frames below `kept_from` will not come any more."""
        self.received = max(self.received, kept_from)
        self._settle()

    def secure(self, frame: int) -> None:
        """The server promises that frames below survive its end. That holds on later connections too."""
        self._durable = frame if self._durable is None else max(frame, self._durable)
        self._settle()

    @property
    def durable(self) -> int:
        """Frames below are."""
        return self._durable or 0

    @property
    def whole(self) -> bool:
        """Whether all frames of the session are still here, because its server never promised to keep any: it can be begun anew."""
        return self._begin == self._oldest == 0 and self._durable == 0

    # ---- inside

    def _put(self, item: _Chunk | _Reset) -> None:
        self._kept.append(item)
        self._waiting.append(item)
        self.next_frame = item.end
        self._settle()

    def _check_reach(self, next_frame: int) -> None:
        if not self._oldest <= next_frame <= self.next_frame:
            have = f"this client has frames {self._oldest} to {self.next_frame}"
            raise Gap(f"the session came back at frame {next_frame}, {have}", next_frame=next_frame)

    @property
    def _oldest(self) -> int:
        """The first frame that is here."""
        return self._kept[0].first if self._kept else self.next_frame

    @property
    def _safe(self) -> int:
        """Frames below are not asked for by any server, unless it is for warming up."""
        return self.read if self._durable is None else min(self.read, self._durable)

    @property
    def _readable(self) -> int:
        """The ack that the server understands: one that came back at an older frame answers again what was read before."""
        return min(self.read, self._taken)

    @property
    def _overdrawn(self) -> bool:
        """Whether the next item lies beyond the credit, which the server counts from the last ack."""
        return self._waiting[0].end - self._acked > self.window

    def _owes_ack(self) -> bool:
        unsaid = self._readable - self._acked
        return unsaid >= max(1, self.window // 4) or (unsaid > 0 and bool(self._waiting) and self._overdrawn)

    def _settle(self) -> None:
        """Drops what no server will need again: answered, durable where the server promises that, and too old or too much to warm up a model."""
        if not self._unread:
            self.read = self.received
        safe = self._safe
        until = min(safe, max(safe - self._horizon, self.next_frame - self._most))
        while self._kept and self._kept[0].over(safe) and self._kept[0].end <= until:
            item = self._kept.popleft()
            if isinstance(item, _Chunk) and item.t is not None:
                for frame in range(item.first, item.end):
                    del self._times[frame]
