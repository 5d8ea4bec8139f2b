"""Sessions: which frames a stream has taken, its row of state, the answers it may ask for again; and the table of all of them."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from model.contract import Manifest
from model.events import EventState
from service.errors import AnswersForgotten, Empty, Gap, ServiceError, SessionExpired, SessionNotFound, TooMany
from service.lock import Lock
from service.options import Options
from service.progress import Progress
from service.record import Record
from service.resampler import Times

Floats = npt.NDArray[np.float32]
Cause = Literal["closed", "expired", "aged", "drained", "deleted", "restarted", "failed", "moved"]  # failed: what would have been its first frames

KEPT_FRAMES = 64
KEPT_BYTES = 256 * 1024
REMEMBERED = 10_000  # expired sessions whose clients are told so
_ID_BYTES = 24
_F4 = np.dtype("<f4")


class Rows:
    """State rows of one model in one array (capacity, width) with a free list. Row 0 is all zeros for ever: where every stream begins."""

    ZERO = 0

    def __init__(self, width: int) -> None:
        self._pool = np.zeros((64, width), np.float32)
        self._free = list(range(len(self._pool) - 1, 0, -1))
        self._taken: set[int] = set()

    @property
    def taken(self) -> int:
        return len(self._taken)

    @property
    def capacity(self) -> int:
        return len(self._pool) - 1

    def take(self) -> int:
        """A row of zeros, the caller's until it is given back."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._taken.add(row)
        self.clear(row)
        return row

    def give(self, row: int) -> None:
        """Raises `KeyError` for a row that is not taken: two streams must never share one."""
        self._taken.remove(row)
        self._free.append(row)

    def clear(self, row: int) -> None:
        self._pool[row] = 0

    def gather(self, rows: list[int]) -> Floats:
        """Copies (len(rows), width)."""
        return self._pool[rows]

    def copy(self, row: int) -> Floats:
        """(width,)"""
        return np.array(self._pool[row])

    def scatter(self, rows: list[int], values: Floats) -> None:
        """Writes values (len(rows), width)."""
        self._pool[rows] = values

    def _grow(self) -> None:
        size = len(self._pool)
        self._pool = np.concatenate([self._pool, np.zeros_like(self._pool)])
        self._free.extend(range(2 * size - 1, size - 1, -1))


class Answers:
    """Scores of the latest frames, and their times where frames carry them, kept until they are acknowledged, at most `limit` frames;
    the oldest are forgotten."""

    __slots__ = ("_blocks", "_row_bytes", "end", "limit", "start")

    def __init__(self, classes: int) -> None:
        self.limit = max(1, min(KEPT_FRAMES, KEPT_BYTES // (4 * classes)))
        self._row_bytes = 4 * classes
        self._blocks: deque[tuple[int, bytes, Times | None]] = deque()  # (first frame, scores (count, classes), times (count,)), without holes
        self.start = 0  # the oldest frame that is kept; `end` when none is
        self.end = 0  # one past the newest frame

    @property
    def room(self) -> int:
        """How many more frames can be kept without forgetting any."""
        return max(0, self.limit - (self.end - self.start))

    def begin(self, at: int) -> None:
        """Nothing is kept, and frame `at` is the next."""
        self._blocks.clear()
        self.start = self.end = at

    def restore(self, end: int, scores: Floats, times: Times | None) -> None:
        """Keeps the scores (count, classes) of the frames up to `end`, and nothing else."""
        self.end = end
        self.start = end - len(scores)
        self._blocks = deque([(end - len(scores), np.ascontiguousarray(scores, _F4).tobytes(), times)] if len(scores) else [])
        self.forget(end - self.limit)

    def add(self, scores: bytes, times: Times | None = None) -> None:
        """float32 scores (count, classes) in C order, and times (count,), of the next frames."""
        self._blocks.append((self.end, scores, times))
        self.end += len(scores) // self._row_bytes
        if self.end - self.start > self.limit:
            self.forget(self.end - self.limit)

    def forget(self, below: int) -> None:
        """Drops the answers of frames below this number."""
        blocks = self._blocks
        while blocks and blocks[0][0] < below:
            first, scores, times = blocks.popleft()
            if first + len(scores) // self._row_bytes > below:
                rest = below - first
                blocks.appendleft((below, scores[rest * self._row_bytes :], None if times is None else times[rest:].copy()))
        self.start = blocks[0][0] if blocks else self.end

    def get(self, first: int, end: int) -> Floats:
        """Scores (end - first, classes); raises `AnswersForgotten` unless all of them are kept."""
        if first == self.start and end == self.end and self._blocks:  # all of them, for a record: nothing is to be cut
            return np.frombuffer(b"".join([scores for _, scores, _ in self._blocks]), _F4).reshape(end - first, -1)
        size = self._row_bytes
        parts = [scores[part.start * size : part.stop * size] for part, scores, _ in self._parts(first, end)]
        return np.frombuffer(b"".join(parts), _F4).reshape(end - first, -1)

    def times(self, first: int, end: int) -> Times | None:
        """Times (end - first,) of frames that carry them, as `get`."""
        if first == self.start and end == self.end and self._blocks and self._blocks[0][2] is None:
            return None
        parts = [None if times is None else times[part] for part, _, times in self._parts(first, end)]
        return None if parts[0] is None else np.concatenate([times for times in parts if times is not None])

    def _parts(self, first: int, end: int) -> list[tuple[slice, bytes, Times | None]]:
        if first < self.start or end > self.end:
            raise AnswersForgotten(
                f"answers of frames {first} to {end - 1} are no longer kept, only from {self.start} on", kept_from=self.start, next_frame=self.end
            )
        parts = []
        for at, scores, times in self._blocks:
            count = len(scores) // self._row_bytes
            if at < end and at + count > first:
                parts.append((slice(max(first - at, 0), min(end - at, count)), scores, times))
        return parts


class Owner(Protocol):
    """The connection that streams a session, if any."""

    def stop(self, error: ServiceError) -> None:
        """Ends the connection with this error; must not raise."""

    def durable(self, frame: int) -> None:
        """Every frame below survives this process."""

    def warn(self, error: ServiceError) -> None:
        """Something is wrong that does not end the stream."""


class Session:
    """One stream. Whoever changes it holds `turn`, so that its messages take effect one after another."""

    def __init__(self, model: str, version: str, row: int, classes: int, options: Options, progress: Progress, session_id: str | None = None) -> None:
        self.id = session_id or secrets.token_urlsafe(_ID_BYTES)
        self.model = model
        self.version = version
        self.row = row
        self.options = options
        self.answers = Answers(classes)
        self.progress = progress
        self.turn = Lock()
        self.owner: Owner | None = None
        self.ended: Cause | None = None
        self.queued = 0  # messages that wait for the turn or have it
        self.created = time.time()
        self.began = self.used = time.monotonic()  # in this process, for expiry; `used` also moves on
        self.epoch = 0  # how often the stream was taken up from a record
        self.renewed: tuple[int, int] | None = None  # [from, to): frames of before that may warm another model up, until others come
        self._reset_at = 0

    @property
    def digest(self) -> str:
        return digest(self.id)

    @property
    def next_frame(self) -> int:
        return self.answers.end

    @property
    def resets_at(self) -> int:
        """Where the stream last began anew."""
        return self._reset_at

    def warm_up(self, first: int) -> None:
        """Frames that warm a new model up may begin where their client still has them."""
        if self.renewed is not None:
            begin, end = self.renewed
            self.renewed = None
            if self.next_frame == begin <= first <= end:
                self.answers.begin(first)

    def known(self, first: int, count: int) -> int:
        """How many of the frames [first, first + count) are already taken; raises `Empty` or `Gap`."""
        if count == 0:
            raise Empty("no frames: send at least one")
        if first > self.next_frame:
            raise self.gap(f"frames {self.next_frame} to {first - 1} are missing")
        return min(self.next_frame - first, count)

    def reset(self, at: int) -> bool:
        """Whether the row must be cleared now; False when this reset has been done. Raises `Gap` for another place than `next_frame`."""
        if at != self.next_frame:
            raise self.gap(f"a reset takes place at the next frame, {self.next_frame}, not at {at}")
        news, self._reset_at = self._reset_at != at, at
        return news

    def become(self, fresh: Session) -> None:
        """Goes on under this id as a stream that has only just begun; the row of before is the caller's to give back."""
        self.version, self.row, self.options, self.answers, self.progress = fresh.version, fresh.row, fresh.options, fresh.answers, fresh.progress
        self.created, self.began, self.epoch, self._reset_at = fresh.created, fresh.began, 0, 0

    def record(self, manifest: Manifest, digest: str, row: Floats) -> Record:
        """All that the stream is, with the copy of its `row` (width,); the caller has the turn. `manifest` is its model's, `digest` that one's."""
        answers, detector = self.answers, self.progress.detector
        kept = answers.start < answers.end
        return Record(
            session=self.id,
            model=self.model,
            version=self.version,
            fingerprint=manifest.fingerprint,
            manifest=digest,
            epoch=self.epoch,
            next_frame=self.next_frame,
            reset_at=self._reset_at,
            options=self.options,
            progress=self.progress.to_dict(),
            events=() if detector is None else tuple(detector.kept),
            forgotten=0 if detector is None else detector.forgotten,
            created=self.created,
            used=time.time() - (time.monotonic() - self.used),
            row=row,
            scores=answers.get(answers.start, answers.end) if kept else np.empty((0, len(manifest.classes)), np.float32),
            times=answers.times(answers.start, answers.end) if kept else None,
        )

    def restore(self, record: Record) -> None:
        """Goes on where the stream of a record was, which was checked against this session's model; the row is the caller's to write."""
        self.answers.restore(record.next_frame, record.scores, record.times)
        self.progress.restore(record.progress)
        if self.progress.detector is not None:
            self.progress.detector.restore(EventState.from_dict(record.progress["detector"]), record.events, record.forgotten)
        self.created, self.epoch, self._reset_at = record.created, record.epoch + 1, record.reset_at

    def gap(self, why: str) -> Gap:
        return Gap(f"{why}; the session's next frame is {self.next_frame}", next_frame=self.next_frame)

    def facts(self) -> dict[str, Any]:
        """What lists and answers show; never the id."""
        return {
            "digest": self.digest,
            "model": self.model,
            "version": self.version,
            "next_frame": self.next_frame,
            "kept_from": self.answers.start,
            "reset_at": self._reset_at,
            "options": self.options.to_dict(),
            "created": round(self.created, 3),
            "epoch": self.epoch,
            "idle_s": round(time.monotonic() - self.used, 3),
            "streaming": self.owner is not None,
            **({} if self.progress.detector is None else {"open_event": self.progress.open_event()}),
        }


class Sessions:
    """All live sessions, capped; idle ones, and those older than `age_s`, expire and are remembered for a while.

    `ended` is called exactly once for each that ends.
    """

    def __init__(self, cap: int, idle_s: float, ended: Callable[[Session, Cause], None], age_s: float | None = None) -> None:
        self._cap = cap
        self._idle_s = idle_s
        self._age_s = age_s
        self._ended = ended
        self._live: dict[str, Session] = {}
        self._expired: OrderedDict[str, Cause] = OrderedDict()  # by digest

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._live.values()))

    def check_room(self) -> None:
        """Raises `TooMany` when no further session may be opened."""
        if len(self._live) >= self._cap:
            raise TooMany(
                f"{len(self._live)} sessions are live, no more are allowed; close sessions that are done or wait for idle ones to expire", retry_after=5
            )

    def add(self, session: Session) -> None:
        self._live[session.id] = session
        self._expired.pop(session.digest, None)  # an id that a client chose may come again

    def get(self, session_id: str) -> Session | None:
        return self._live.get(session_id)

    def find(self, session_id: str) -> Session:
        """The live session; raises `SessionNotFound`, or `SessionExpired` while that is remembered."""
        session = self._live.get(session_id)
        if session is None:
            raise self._absent(session_id)
        return session

    def check_live(self, session: Session) -> None:
        """For those who waited for a session's turn: it may have ended meanwhile."""
        if session.ended is not None:
            raise self._absent(session.id)

    def end(self, session: Session, cause: Cause) -> None:
        """Ends a session, once. The caller holds its turn, or nobody does."""
        if session.ended is not None:
            return
        session.ended = cause
        del self._live[session.id]
        if cause in ("expired", "aged"):
            self._expired[session.digest] = cause
            while len(self._expired) > REMEMBERED:
                self._expired.popitem(last=False)
        self._ended(session, cause)

    def expire(self) -> list[Session]:
        """Ends the sessions that have been idle for too long or are too old, after a message under way.

        A session that a connection streams is not idle: pings tell that its client is there, and a connection that does not answer them is closed.
        """
        now = time.monotonic()
        over: list[tuple[Session, Cause]] = []
        for session in self._live.values():
            if session.turn.locked():
                continue
            if self._age_s is not None and now - session.began > self._age_s:
                over.append((session, "aged"))
            elif session.owner is None and now - session.used > self._idle_s:
                over.append((session, "expired"))
        for session, cause in over:
            self.end(session, cause)
        return [session for session, _ in over]

    def expires_in_s(self, session: Session) -> float | None:
        """Seconds until the session expires if nobody uses it; None where it does not."""
        now = time.monotonic()
        idle = [] if session.owner is not None else [session.used + self._idle_s - now]
        old = [] if self._age_s is None else [session.began + self._age_s - now]
        return max(0.0, round(min(idle + old), 3)) if idle or old else None

    def _absent(self, session_id: str) -> SessionNotFound:
        cause = self._expired.get(digest(session_id))
        if cause == "aged":
            return SessionExpired(f"the session expired at the age of {self._age_s:g} s; open a new one")
        if cause is not None:
            return SessionExpired(f"the session expired after {self._idle_s:g} s without a message; open a new one")
        return SessionNotFound("no such session: it was never opened here, or it was closed")


def digest(session_id: str) -> str:
    """A name for a session that does not give it away."""
    return hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
