"""Keeps a predictor's sessions in a store: saved as they go on, taken up where another process left them, given up where another has them.

A live session is this process's copy; the store's record decides whose turn it is. So who resumes a stream looks at the store first, and who takes a
step that no connection guards is told the answer once the store has it. What a crash takes is what came after the last save: clients on websockets are
told by `durable` how far that is, and send the rest again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import structlog

from service.checkpoints import Checkpoints, Health
from service.errors import Gap, ServiceError, SessionNotFound, StoreUnavailable, TakenOver
from service.lock import Lock
from service.metrics import Metrics
from service.record import Record
from service.sessions import Cause, Session
from service.store import Attached, Checkpoint, Outcome, Store

log = structlog.get_logger("keeper")

LOOK_S = 0.25  # how often it is looked whether the store is down
TRIES = 5  # at a step whose session moves away each time
KEEP_S = 0.3  # part of the time to live after which idle sessions are said to be alive
_KEPT: tuple[Cause, ...] = ("drained", "moved", "expired")  # ends of a copy, not of the session; what expires here the store lets go as well

Result = TypeVar("Result")


class Home(Protocol):
    """Where the sessions live."""

    def get(self, session_id: str) -> Session | None: ...
    def record(self, session: Session) -> Record:
        """As it is between two messages; one that is under way counts as not begun."""

    def adopt(self, record: Record, epoch: int, *, renew: bool) -> Session:
        """The session of a record goes on here, on another version of its model if its own is gone and it may be renewed.

        Raises `FingerprintMismatch`, `ModelNotFound`, `TooMany` or what `Record.check` raises."""

    async def give_up(self, session: Session, error: ServiceError) -> None:
        """Ends this copy after the message under way, and tells who streams it."""

    def live(self) -> list[Session]: ...


class Keeper:
    """One predictor's sessions in one store. `refuses`: whether work is refused while the store is down, rather than done without it."""

    def __init__(self, house: Home, store: Store, metrics: Metrics, *, frames: int, wait_s: float, refuses: bool) -> None:
        self.store = store
        self.level = store.settings.durability
        self.refuses = refuses
        self._house = house
        self._metrics = metrics
        self._checkpoints = Checkpoints(store, self._take, self._saved, self._lost, frames=frames, wait_s=wait_s)
        self._locks: dict[str, tuple[Lock, int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.changed = self._checkpoints.changed  # (session id, next frame): called for every message

    async def start(self) -> None:
        """Raises `StartupError` where the store will never do; one that is only down now is waited for while the service runs."""
        try:
            await self.store.start()
        except StoreUnavailable as error:
            log.warning("the store of sessions is down", reason=error.message)
        await self._checkpoints.__aenter__()
        self._go(self._keep_alive())
        self._go(self._watch())
        self._metrics.store_degraded.set_function(lambda: float(self.down))
        self._metrics.store_unsaved.set_function(lambda: self.health().unsaved)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._checkpoints.__aexit__(None, None, None)
        await self.store.close()

    async def drain(self, within_s: float) -> None:
        """Saves what is not saved yet."""
        if left := await self._checkpoints.drain(within_s):
            log.warning("sessions could not be saved before the end", sessions=len(left))

    @property
    def down(self) -> bool:
        """Whether the store does not save what it is told to."""
        return self._checkpoints.degraded

    def health(self) -> Health:
        return self._checkpoints.health()

    def facts(self) -> dict[str, Any]:
        """For those who look after the service."""
        health = self.health()
        down = health.degraded_since is not None
        return {
            "durability": self.level,
            "state": "down" if down else "up",
            "unsaved": health.unsaved,
            **({"reason": health.reason, "down_since": round(health.degraded_since or 0, 3)} if down else {}),
        }

    def check_open(self) -> None:
        """Raises `StoreUnavailable` where work is refused while the store is down."""
        if self.refuses and self.down:
            raise StoreUnavailable("the store of sessions is down, and work without it is refused", retry_after=1)

    # ---- whose a session is

    async def find(self, session_id: str) -> Session:
        """The session, live here or taken up from the store; raises `SessionNotFound`, `StoreUnavailable` or what `Home.adopt` raises.

        A copy that is live here may have been taken over elsewhere without our knowing yet: `resume` asks, and a step finds out when it is saved.
        """
        session = self._house.get(session_id)
        return session if session is not None else await self._alone(session_id, self._take_up)

    async def resume(self, session_id: str) -> Session:
        """As `find`, for a connection that is going to stream it: certainly the latest copy there is, so only while the store is up."""
        return await self._alone(session_id, self._resume)

    async def is_stale(self, session: Session) -> bool:
        """Whether another process has taken it up since; then this copy is given up. Raises `StoreUnavailable` where nobody can say: to go on from a copy
        that may be an old one would ask the client for frames that it was told are safe."""
        held = await self.store.load(session.id)
        error: ServiceError = TakenOver("another process has taken this session over", next_frame=session.next_frame)
        if held is None:  # the store was emptied and is to be filled again, or the session was ended elsewhere: saving it tells
            self.changed(session.id, session.next_frame)
            try:
                await self.flush(session)
                return False
            except (TakenOver, SessionNotFound) as caught:
                error = caught
        elif held.epoch <= session.epoch:
            return False
        await self._house.give_up(session, error)
        return True

    def forget(self, session: Session) -> None:
        """Nothing is saved of it until it is owned again."""
        self._checkpoints.forget(session.id)

    async def own(self, session: Session) -> None:
        """A session under an id that a client chose, or begun anew under its id: whoever had it before, it is ours from now on. Raises `StoreUnavailable`."""
        self._checkpoints.forget(session.id)
        try:
            session.epoch = (await self.store.attach(session.id)).epoch
        except StoreUnavailable:
            if self.refuses:
                raise
        self.changed(session.id, session.next_frame)

    async def through(self, session_id: str, step: Callable[[Session], Awaitable[Result]]) -> Result:
        """A step of a session, which is as durable as configured before its answer is given. Raises what the step raises, or `StoreUnavailable`."""
        for _ in range(TRIES):
            session = await self.find(session_id)
            try:
                result = await step(session)
            except (Gap, TakenOver, SessionNotFound):
                if self._house.get(session_id) is session and not await self.is_stale(session):
                    raise
                continue
            try:
                await self.flush(session)
            except (TakenOver, SessionNotFound) as error:  # what was just run was of a copy that others had gone on from; theirs counts
                if session.ended not in (None, "moved"):
                    return result  # ended by this very step
                await self._house.give_up(session, error)
                continue
            return result
        raise TakenOver("the session is used in several places at once")

    async def flush(self, session: Session) -> None:
        """Waits until the session is as durable as configured, or until it is known that the store is down, which `down` says then.

        Raises `TakenOver`, `SessionNotFound`, or `StoreUnavailable` where it must be durable, and where the store is neither up nor down.
        """
        for attempt in range(1, TRIES + 1):
            try:
                return await self._checkpoints.flush(session.id)
            except StoreUnavailable:
                if self.refuses:
                    raise
                if self.down:
                    return
                if attempt == TRIES:  # else it is back already: an answer without a warning would promise what is not so
                    raise

    def ended(self, session: Session, cause: Cause) -> None:
        """The copy here has ended; with it the session itself, unless it only moves."""
        self._checkpoints.forget(session.id)
        if cause not in _KEPT:
            self._go(self._end(session.id, session.epoch))

    async def _end(self, session_id: str, epoch: int) -> None:
        try:
            await self.store.end(session_id, epoch)
        except StoreUnavailable as error:  # its record expires
            log.debug("an ended session stays in the store until it expires", reason=error.message)

    async def _take_up(self, session_id: str) -> Session:
        session = self._house.get(session_id)
        if session is not None:  # another request was quicker
            return session
        return self._adopt(await self.store.attach(session_id, create=False), renew=False)

    async def _resume(self, session_id: str) -> Session:
        session = self._house.get(session_id)
        if session is None or await self.is_stale(session):
            return self._adopt(await self.store.attach(session_id, create=False), renew=True)
        return session

    def _adopt(self, attached: Attached, *, renew: bool) -> Session:
        if attached.record is None:
            raise SessionNotFound("the session was opened, but nothing of it was saved")
        session = self._house.adopt(Record.from_bytes(attached.record), attached.epoch, renew=renew)
        self._metrics.sessions_taken_up.inc()
        log.info("session taken up", session=session.digest, model=session.model, next_frame=session.next_frame, epoch=session.epoch)
        return session

    async def _alone(self, session_id: str, work: Callable[[str], Awaitable[Session]]) -> Session:
        """One at a time for each id."""
        lock, users = self._locks.get(session_id, (Lock(), 0))
        self._locks[session_id] = (lock, users + 1)
        try:
            async with lock:
                return await work(session_id)
        finally:
            lock, users = self._locks[session_id]
            if users == 1:
                del self._locks[session_id]
            else:
                self._locks[session_id] = (lock, users - 1)

    # ---- what the checkpoints ask and tell

    def _take(self, session_id: str, sequence: int) -> Checkpoint | None:
        session = self._house.get(session_id)
        if session is None:
            return None
        record = self._house.record(session).to_bytes()
        self._metrics.store_bytes.inc(len(record))
        return Checkpoint(session_id, max(1, session.epoch), session.next_frame, record, sequence)

    def _saved(self, session_id: str, frame: int) -> None:
        session = self._house.get(session_id)
        self._metrics.store_saves.inc()
        if session is not None and session.owner is not None:
            session.owner.durable(frame)

    def _lost(self, session_id: str, outcome: Outcome) -> None:
        session = self._house.get(session_id)
        if session is not None:
            error: ServiceError = TakenOver("another process has taken this session over", next_frame=session.next_frame)
            if outcome is Outcome.ENDED:
                error = SessionNotFound("the session was ended elsewhere")
            self._go(self._house.give_up(session, error))

    async def _keep_alive(self) -> None:
        """Streams that are attached but say nothing do not expire, here or in the store."""
        pause = max(0.05, KEEP_S * self.store.settings.idle_s)
        while True:
            await asyncio.sleep(pause)
            now = time.monotonic()
            alive = [session.id for session in self._house.live() if session.owner is not None or now - session.used < pause]
            await self._checkpoints.touch(alive)

    async def _watch(self) -> None:
        """Tells streams that the store is down: they go on, but a crash would take more; or, where that is refused, they end."""
        told = False
        while True:
            await asyncio.sleep(LOOK_S)
            down = self.down
            if down and not told:
                error = StoreUnavailable("the store of sessions is down: until it is back, a crash loses what comes now", retry_after=1)
                for session in self._house.live():
                    if session.owner is not None and self.refuses:
                        session.owner.stop(error)
                    elif session.owner is not None:
                        session.owner.warn(error)
            told = down

    def _go(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
