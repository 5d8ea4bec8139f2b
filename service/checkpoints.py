"""When which session is saved: write-behind to a store, in batches, the newest record of each. No I/O of its own, and no threads.

A session is due `frames` frames or `wait_s` after what was last saved of it, or at once for who waits in `flush`. Its record is taken by a callback at
the very moment of sending, so nothing but the names of changed sessions is kept while a store is slow or down: memory is bounded by their number, and
what is saved then is the newest. Of one session one save at a time is under way; an earlier one that was given up may still arrive at the store after
a later one, which `Checkpoint.sequence` tells it.

`saved(session_id, frame)` is called when all frames below are as durable as the store's settings say; `lost(session_id, outcome)` once when the session
is not this process's to save any more: another has taken it over, or it was ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import structlog

from service.backoff import Backoff
from service.errors import ServiceError, SessionNotFound, StoreUnavailable, TakenOver
from service.store import MOST_IN_BATCH, Checkpoint, Outcome, Store, key

log = structlog.get_logger("checkpoints")

Take = Callable[[str, int], Checkpoint | None]  # (session id, sequence): its record now, with that sequence; None while a message is under way

MOST_BYTES = 4 * 2**20  # of records in one batch: what is sent is held twice
MOST_FLIGHTS = 4  # saves under way; more than one, because confirming may take as long as a disk
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0
_GATHER = 0.25  # part of `wait_s` that a due session waits for others to go with: a round trip costs as much as several records
_AT_ONCE = 16  # records taken before other work gets its turn


@dataclass(slots=True, eq=False)
class _Entry:
    session_id: str
    next_frame: int = 0
    changes: int = 0  # how often the session was said to have changed
    confirmed: int = 0  # of these, how many are in the store
    taken_frame: int = 0  # of the newest record that was sent
    durable: int = 0  # as was announced
    since: float = 0.0  # when it first changed after that
    flying: bool = False
    waiters: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)  # until so many changes are confirmed


@dataclass(frozen=True, slots=True)
class Health:
    """How the store does, as seen from here."""

    degraded_since: float | None  # seconds since 1970 of the first failure in a row; None while all is well
    reason: str  # of the latest failure; "" while all is well
    unsaved: int  # sessions that changed since they were last saved
    oldest_s: float  # for how long the first of these waits


class Checkpoints:
    """Saves sessions behind their backs. Use it as `async with`; leaving gives up what is under way, so `drain` first."""

    def __init__(
        self,
        store: Store,
        take: Take,
        saved: Callable[[str, int], None],
        lost: Callable[[str, Outcome], None],
        *,
        frames: int = 8,
        wait_s: float = 0.2,
    ) -> None:
        self._store = store
        self._take = take
        self._saved = saved
        self._lost = lost
        self._frames = frames
        self._wait_s = wait_s
        self._entries: dict[str, _Entry] = {}
        self._unsaved: dict[str, _Entry] = {}  # oldest first
        self._waiting: dict[str, _Entry] = {}  # changed, not due yet; oldest first
        self._due: dict[str, _Entry] = {}
        self._due_at = 0.0  # when those due set out
        self._flights: set[asyncio.Task[None]] = set()
        self._sequence = 0
        self._backoff = Backoff(FIRST_RETRY_S, LAST_RETRY_S)
        self._retry_at = 0.0
        self._degraded_since: float | None = None
        self._reason = ""
        self._news = asyncio.Event()  # something for `_run` to look at
        self._landed = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Checkpoints:
        self._runner = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tasks = [task for task in (self._runner, *self._flights) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            _fail(entry, StoreUnavailable("the service is shutting down"))

    # Told by those who serve the sessions

    def changed(self, session_id: str, next_frame: int) -> None:
        """The session has taken frames, was reset, or its answers were acknowledged. Costs about a microsecond."""
        entry = self._entries.get(session_id)
        if entry is None:
            entry = self._entries[session_id] = _Entry(session_id)
        if entry.changes == entry.confirmed:
            entry.since = self._now()
            self._unsaved[session_id] = entry
        entry.next_frame = next_frame
        entry.changes += 1
        if not entry.flying:
            self._arm(entry)

    def forget(self, session_id: str) -> None:
        """The session has ended here, or begins anew; a save that is under way is not waited for."""
        entry = self._entries.pop(session_id, None)
        if entry is not None:
            for table in (self._unsaved, self._waiting, self._due):
                table.pop(session_id, None)
            _fail(entry, SessionNotFound("the session has ended"))

    async def flush(self, session_id: str) -> None:
        """Write-through: returns when all that changed so far is as durable as configured.

        Its record must be there to be taken. Raises `StoreUnavailable` at the first failure, at once while the store is known to be down; the session
        stays to be saved. Raises `TakenOver` or `SessionNotFound` where it is not ours any more.
        """
        entry = self._entries.get(session_id)
        if entry is None or entry.changes == entry.confirmed:
            return
        if (pause := self._retry_at - self._now()) > 0:
            raise StoreUnavailable(f"the store of sessions is down: {self._reason}", retry_after=max(1, round(pause)))
        done = asyncio.get_running_loop().create_future()
        entry.waiters.append((entry.changes, done))
        if not entry.flying:
            self._make_due(entry, at_once=True)
        try:
            async with asyncio.timeout(2 * self._store.settings.timeout_s):  # for a save under way, and ours
                await done
        except TimeoutError:
            raise StoreUnavailable("the store of sessions is too slow: the session was not saved in time") from None

    async def drain(self, within_s: float) -> list[str]:
        """Saves all that has changed, as long as that takes less; returns the sessions that could not be saved."""
        end = self._now() + within_s
        while self._unsaved:
            for entry in self._unsaved.values():
                if not entry.flying and entry.session_id not in self._due:
                    self._make_due(entry, at_once=True)
            self._landed.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._landed.wait()
            except TimeoutError:
                return list(self._unsaved)
        return []

    async def touch(self, session_ids: Sequence[str]) -> None:
        """Puts off the expiry of live sessions that do not change; those that the store has lost are saved again. Raises nothing."""
        for begin in range(0, len(session_ids), MOST_IN_BATCH):
            try:
                absent = await self._store.touch(session_ids[begin : begin + MOST_IN_BATCH])
            except StoreUnavailable as error:
                self._failed(error)
                return
            for entry in filter(None, map(self._entries.get, absent)):
                self.changed(entry.session_id, entry.next_frame)

    @property
    def degraded(self) -> bool:
        """Whether the latest that the store was asked for failed; asked for each step, which `health` is too slow for."""
        return self._degraded_since is not None

    def health(self) -> Health:
        oldest_s = self._now() - next(iter(self._unsaved.values())).since if self._unsaved else 0.0
        return Health(self._degraded_since, self._reason, len(self._unsaved), oldest_s)

    # Who sets out when

    def _arm(self, entry: _Entry) -> None:
        """Decides when a changed session that is not flying is due."""
        if entry.session_id in self._due:
            return
        if entry.waiters:
            self._make_due(entry, at_once=True)
        elif entry.next_frame - entry.taken_frame >= self._frames:
            self._make_due(entry)
        elif entry.session_id not in self._waiting:
            self._waiting[entry.session_id] = entry
            if len(self._waiting) == 1:
                self._news.set()

    def _make_due(self, entry: _Entry, *, at_once: bool = False) -> None:
        self._waiting.pop(entry.session_id, None)
        start = self._now() + (0.0 if at_once else self._wait_s * _GATHER)
        if not self._due or start < self._due_at:
            self._due_at = start
            self._news.set()
        self._due[entry.session_id] = entry

    async def _run(self) -> None:
        while True:
            pause = self._pause()
            if pause is None or pause > 0:
                try:
                    async with asyncio.timeout(pause):
                        await self._news.wait()
                except TimeoutError:
                    pass
            self._news.clear()
            self._set_out()

    def _pause(self) -> float | None:
        """Seconds until something sets out; None: when there is news."""
        if len(self._flights) >= self._most_flights():
            return None
        starts = [self._due_at] if self._due else []
        if self._waiting:
            starts.append(next(iter(self._waiting.values())).since + self._wait_s)
        if self._degraded_since is not None and not starts:
            starts.append(self._retry_at)
        return max(min(starts), self._retry_at) - self._now() if starts else None

    def _set_out(self) -> None:
        now = self._now()
        while self._waiting and (oldest := next(iter(self._waiting.values()))).since + self._wait_s <= now:
            self._make_due(oldest)
        if now < self._retry_at:
            return
        if self._degraded_since is not None and not (self._due or self._waiting):
            self._launch(self._probe())
        while self._due and now >= self._due_at and len(self._flights) < self._most_flights():
            batch = [self._due.pop(session_id) for session_id in list(self._due)[:MOST_IN_BATCH]]
            for entry in batch:
                entry.flying = True
            self._launch(self._fly(batch))

    def _launch(self, work: Coroutine[None, None, None]) -> None:
        flight = asyncio.create_task(work)
        self._flights.add(flight)
        flight.add_done_callback(self._flown)

    def _most_flights(self) -> int:
        return MOST_FLIGHTS if self._degraded_since is None else 1  # a store that is down is asked by one

    def _flown(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        self._news.set()
        self._landed.set()

    # One batch on its way

    async def _fly(self, batch: list[_Entry]) -> None:
        aboard: list[tuple[_Entry, int]] = []  # with the number of changes that its record has
        checkpoints: list[Checkpoint] = []
        size = 0
        for number, entry in enumerate(batch, 1):
            if (checkpoint := self._taken(entry)) is not None:
                aboard.append((entry, entry.changes))
                checkpoints.append(checkpoint)
                size += len(checkpoint.record)
            if size >= MOST_BYTES:
                for left in batch[number:]:
                    self._put_back(left, at_once=True)
                break
            if checkpoint is None:
                self._put_back(entry)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        outcomes = await self._send(checkpoints) if checkpoints else []
        for (entry, changes), checkpoint, outcome in zip(aboard, checkpoints, outcomes, strict=True):
            self._land(entry, changes, checkpoint, outcome)

    def _put_back(self, entry: _Entry, *, at_once: bool = False) -> None:
        entry.flying = False
        if self._is_live(entry) and entry.changes > entry.confirmed:
            self._make_due(entry, at_once=at_once)

    def _taken(self, entry: _Entry) -> Checkpoint | None:
        if not self._is_live(entry):
            return None
        self._sequence += 1
        try:
            checkpoint = self._take(entry.session_id, self._sequence)
        except Exception:
            log.exception("a session's record could not be made", session=key(entry.session_id)[:12])
            _fail(entry, ServiceError())
            entry.confirmed = entry.changes  # not tried again before it changes
            del self._unsaved[entry.session_id]
            return None
        if checkpoint is not None:
            entry.taken_frame = checkpoint.next_frame
        return checkpoint

    async def _send(self, checkpoints: list[Checkpoint]) -> list[Outcome]:
        try:
            outcomes = await self._store.save(checkpoints)
            if len(outcomes) != len(checkpoints):
                raise RuntimeError(f"{len(outcomes)} outcomes of {len(checkpoints)} checkpoints")
        except StoreUnavailable as error:
            self._failed(error)
        except Exception as error:
            log.exception("the store failed in a way that it should not")
            self._failed(StoreUnavailable(f"{type(error).__name__}, see the log"))
        else:
            if Outcome.UNCONFIRMED in outcomes:
                self._failed(StoreUnavailable(f"the store did not confirm that records are {self._store.settings.durability}"))
            else:
                self._succeeded()
            return outcomes
        return [Outcome.UNCONFIRMED] * len(checkpoints)

    def _land(self, entry: _Entry, changes: int, checkpoint: Checkpoint, outcome: Outcome) -> None:
        entry.flying = False
        if not self._is_live(entry):
            return
        if outcome is Outcome.UNCONFIRMED:
            _fail(entry, StoreUnavailable(f"the session was not saved: {self._reason}", retry_after=max(1, round(self._retry_at - self._now()))))
            self._make_due(entry)
        elif outcome is Outcome.SAVED:
            entry.confirmed = max(entry.confirmed, changes)
            for wanted, done in entry.waiters:
                if wanted <= changes and not done.done():
                    done.set_result(None)
            entry.waiters = [(wanted, done) for wanted, done in entry.waiters if not done.done()]
            self._unsaved.pop(entry.session_id, None)
            if entry.changes > entry.confirmed:
                entry.since = self._now()  # its wait begins when the save before has ended
                self._unsaved[entry.session_id] = entry
                self._arm(entry)
            if checkpoint.next_frame > entry.durable:
                entry.durable = checkpoint.next_frame
                _call(self._saved, entry.session_id, checkpoint.next_frame)
        else:
            _fail(entry, SessionNotFound("the session has ended") if outcome is Outcome.ENDED else TakenOver("another process has taken this session over"))
            self.forget(entry.session_id)
            _call(self._lost, entry.session_id, outcome)

    def _is_live(self, entry: _Entry) -> bool:
        return self._entries.get(entry.session_id) is entry

    # How the store does

    async def _probe(self) -> None:
        """Asks a store that failed how it does, where there is nothing to save that would show it."""
        try:
            await self._store.ping()
        except StoreUnavailable as error:
            self._failed(error)
        else:
            self._succeeded()

    def _failed(self, error: StoreUnavailable) -> None:
        self._reason = error.message
        if self._now() >= self._retry_at:  # else it set out before we knew
            self._retry_at = self._now() + self._backoff.failed()
        if self._degraded_since is None:
            self._degraded_since = time.time()
            log.warning("sessions cannot be saved; they are served from memory until the store is back", reason=error.message)

    def _succeeded(self) -> None:
        self._backoff.succeeded()
        self._retry_at, self._reason = 0.0, ""
        if self._degraded_since is not None:
            log.info("sessions are saved again", after_s=round(time.time() - self._degraded_since, 1))
            self._degraded_since = None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _fail(entry: _Entry, error: ServiceError) -> None:
    for _, done in entry.waiters:
        if not done.done():
            done.set_exception(error)
    entry.waiters = []


def _call(callback: Callable[..., None], *arguments: object) -> None:
    """A callback that fails is its owner's fault, and no reason to save nothing more."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback of checkpoints failed")
