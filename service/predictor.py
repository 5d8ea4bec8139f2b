"""The use cases, free of HTTP: classify a clip; open, advance, reset, resume and close a stream; put it away and take it up again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import structlog

from model import skeletons
from service import notes
from service.catalog import Catalog
from service.detector import TimedEvent
from service.errors import (
    AnswersForgotten,
    Draining,
    FingerprintMismatch,
    LayoutUnknown,
    Malformed,
    ModelNotFound,
    NoEvents,
    ServiceError,
    SessionNotFound,
    TakenOver,
)
from service.frames import FrameReader, Payload
from service.keeper import Keeper
from service.metrics import Metrics
from service.options import Options
from service.progress import Passage, Progress
from service.protocol import Answer, write_scores
from service.record import Record
from service.repository import Repository
from service.resampler import Floats, Times, read_times
from service.runner import Runner, Stretch, Suspect
from service.sessions import Cause, Owner, Rows, Session, Sessions
from service.settings import Settings
from service.store import Store
from service.tracing import Traces
from service.turn import Turn, give_back

log = structlog.get_logger("predictor")

Result = TypeVar("Result")

_LARGE = 2**20  # bytes; payloads above are read in a thread, so that the event loop goes on
_MANY = 2**16  # bytes; resampling more, which may give many times as many, is left to a thread for the same reason
LEAST_FPS, MOST_FPS = 0.001, 1000.0  # of clients whose rate is not the model's; with less, the times of frames outgrow all numbers


class Predictor:
    """Serves the models of a catalog. Use it as `async with`: what it starts, it stops."""

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics) -> None:
        self.catalog = catalog
        self.metrics = metrics
        self.sessions = Sessions(settings.sessions, settings.idle_s, self._session_ended, settings.age_s)
        self.draining = False
        self._settings = settings
        self._deadline_s = settings.deadline_s
        self.models = Repository(catalog, settings, metrics, self._evict)
        self.traces: Traces | None = None
        self._runners: dict[Session, Runner] = {}  # a session stays with the one that it began with, also when its version is replaced
        self._sweeper: asyncio.Task[None] | None = None
        self.keeper: Keeper | None = None  # None: sessions are in memory alone

    def keep_in(self, store: Store) -> None:
        """Sessions are kept in this store from the start on."""
        settings = self._settings
        frames, wait_s, refuses = settings.checkpoint_frames, settings.checkpoint_ms / 1000, settings.store_down == "refuse"
        self.keeper = Keeper(self, store, self.metrics, frames=frames, wait_s=wait_s, refuses=refuses)

    async def __aenter__(self) -> Predictor:
        if self.keeper is not None:
            await self.keeper.start()
        self.models.start()
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.draining = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self.models.stop()
        for session in self.sessions:
            self.sessions.end(session, "drained")
        if self.keeper is not None:
            await self.keeper.stop()

    # Sessions that are kept in a store

    async def find(self, session_id: str) -> Session:
        """The session, from the store if need be. Raises `SessionNotFound`, `SessionExpired`, `StoreUnavailable` or `FingerprintMismatch`."""
        if self.keeper is None or self.sessions.get(session_id) is not None:
            return self.sessions.find(session_id)
        try:
            return await self.keeper.find(session_id)
        except SessionNotFound:
            return self.sessions.find(session_id)  # which knows if it has expired

    async def resume(self, session_id: str) -> Session:
        """As `find`, for a connection that is going to stream it."""
        if self.keeper is None:
            return self.sessions.find(session_id)
        try:
            return await self.keeper.resume(session_id)
        except SessionNotFound:
            return self.sessions.find(session_id)

    async def through(self, session_id: str, step: Callable[[Session], Awaitable[Result]]) -> Result:
        """A step of a session that no connection streams; where there is a store, it has the session before the answer is given."""
        if self.keeper is None:
            return await step(self.sessions.find(session_id))
        self.keeper.check_open()
        try:
            return await self.keeper.through(session_id, step)
        except SessionNotFound:
            self.sessions.find(session_id)
            raise

    def check_store(self) -> None:
        """Raises `StoreUnavailable` where work is refused while the store is down."""
        if self.keeper is not None:
            self.keeper.check_open()

    def get(self, session_id: str) -> Session | None:
        return self.sessions.get(session_id)

    def live(self) -> list[Session]:
        return list(self.sessions)

    def record(self, session: Session) -> Record:
        """As it is between two messages; one that is under way counts as not begun."""
        runner = self._runners[session]
        return session.record(runner.manifest, runner.rows.gather([session.row])[0])

    def adopt(self, record: Record, epoch: int, *, renew: bool) -> Session:
        """The session of a record goes on here, on another version of its model if its own is gone and it may be renewed."""
        self._check_open()
        try:
            runner = self._runner_of(record.model, None, record)
        except FingerprintMismatch:
            if not renew:
                raise
            return self._renew(record, epoch)
        record.check(runner.manifest)
        options = self._checked(record.options, runner)
        self._check_room()
        session = _begun(runner, options, record.session)
        session.restore(record)
        session.epoch = epoch
        runner.rows.scatter([session.row], record.row[None])
        self._add(session, runner)
        return session

    def _renew(self, record: Record, epoch: int) -> Session:
        """The record's session on the version that new sessions get, with nothing of its past: its client sends the latest frames again."""
        runner = self.models.draw(record.model, None)
        options = self._checked(record.options, runner)
        self._check_room()
        session = _begun(runner, options, record.session)
        timed = session.progress.take_clock(record.progress)
        begin = record.next_frame if timed else max(0, record.next_frame - _horizon(runner))
        session.answers.begin(begin)
        session.epoch, session.created, session.renewed = epoch, record.created, (begin, record.next_frame)
        self._add(session, runner)
        log.info("session goes on with another model", session=session.digest, model=runner.name, version=runner.version, before=record.version)
        return session

    async def give_up(self, session: Session, error: ServiceError) -> None:
        """Ends this copy after the message under way, and tells who streams it."""
        if session.owner is not None:
            session.owner.stop(error)
        async with session.turn:
            self.sessions.end(session, "moved")

    # Models

    def runner(self, name: str, version: str | None = None) -> Runner:
        """The model at work; raises `ModelNotFound`, `ModelLoading` or `ModelNotReady`."""
        return self.models.find(name, version)

    def describe(self, name: str, version: str | None = None) -> dict[str, Any]:
        """What the model is, where it runs and how busy it is."""
        runner = self.runner(name, version)
        manifest = runner.manifest
        return {
            "name": runner.name,
            "version": runner.version,
            "versions": self.catalog.versions(name),
            "roles": self.catalog.roles(name),
            "device": runner.engine.device.to_dict(),
            "layouts": list(skeletons.reachable(manifest.layout)) if manifest.layout else [],
            "manifest": manifest.summary(),
            "memory": self.models.figures(runner),
            "live": runner.live_figures(),
        }

    # Clips

    async def predict(self, name: str, version: str | None, payload: Payload, options: Options, wait_s: float | None = None) -> Answer:
        """Runs a whole clip from the zero state; nothing of it remains. `wait_s` is the longest it may wait, where that is less than the settings say."""
        runner = self.runner(name, version)
        with runner.held():
            return await self.classify(runner, payload, options, wait_s)

    async def classify(self, runner: Runner, payload: Payload, options: Options, wait_s: float | None = None) -> Answer:
        """As `predict`, for a caller that holds the runner."""
        self._check_open()
        notes.note(model=runner.name, version=runner.version)
        deadline = self.deadline(wait_s)
        options = _settled(options, runner)
        reader = runner.reader(options.layout)
        frames = payload.read(reader) if payload.size <= _LARGE else await asyncio.to_thread(payload.read, reader)
        progress = Progress(runner.manifest, options.fps or runner.manifest.fps)
        if progress.plain and payload.t is None:
            scores = runner.table(await runner.run(Rows.ZERO, frames, deadline))
            return Answer(runner.manifest, options, 0, len(frames), scores if options.scores == "all" else scores[-1:])
        passage = await _prepared(progress, 0, frames, payload, 0)
        scores = runner.table(await runner.run(Rows.ZERO, passage.steps, deadline))
        if payload.size <= _LARGE:
            passage.commit(scores)
        else:
            await asyncio.to_thread(passage.commit, scores)
        self._count(runner, passage.events)
        return _answer(runner, options, 0, len(frames), passage.scores, passage.times, passage.events)

    # Streams

    def open(self, name: str, version: str | None, options: Options, session_id: str | None = None) -> Session:
        """A new session at frame 0, under an id that nobody can guess unless one is given.

        Raises `ModelNotFound`, `LayoutUnknown`, `Malformed`, `NoEvents` or `TooMany`.
        """
        self._check_open()
        runner = self.models.draw(name, version)
        options = self._checked(options, runner)
        self._check_room()
        session = _begun(runner, options, session_id)
        self._add(session, runner)
        return session

    async def snapshot(self, session: Session) -> Record:
        """The session's record, taken between two of its messages; the session goes on. Raises what `turn` raises."""
        async with self.turn(session, self.deadline()):
            return self.record(session)

    def restore(self, name: str, version: str | None, record: Record) -> Session:
        """A new session that goes on where the record's was, with the same bits. It has an id of its own: the other may live on, here or elsewhere.

        The model may be called otherwise here than where the record was made; its fingerprint decides. Nothing is taken before all is checked.
        Raises `ModelNotFound`, `FingerprintMismatch`, `TooMany`, or what `Record.check` raises.
        """
        self._check_open()
        runner = self._runner_of(name, version, record)
        record.check(runner.manifest)
        options = self._checked(record.options, runner)
        self._check_room()
        session = _begun(runner, options, None)
        session.restore(record)
        runner.rows.scatter([session.row], record.row[None])
        self._add(session, runner)
        log.info("session restored", session=session.digest, model=runner.name, version=runner.version, next_frame=session.next_frame)
        return session

    def touch(self, session: Session) -> None:
        """Keeps an idle session from expiring, as a message would."""
        session.used = time.monotonic()

    async def advance(self, session: Session, first: int, count: int | None, payload: Payload, options: Options, owner: Owner | None = None) -> Answer:
        """Takes frames [first, first + count) as the protocol's section 1 says; a message that fails changes nothing.

        `count` is None where only reading the payload tells. `owner` is the connection that asks, which may have been taken over.
        """
        deadline = self.deadline()
        if options.events and session.progress.detector is None:
            raise NoEvents(f"model {session.model} has no events: there are no rules for them in its manifest")
        async with self.turn(session, deadline, owner):
            return await self.take(session, first, count, payload, options, deadline)

    def reader(self, session: Session) -> FrameReader:
        """Reads the frames of a live session's client."""
        return self._runners[session].reader(session.options.layout)

    def launch(
        self, session: Session, first: int, count: int, payload: memoryview, options: Options, owner: Owner | None, landed: Landed, *, read: bool = False
    ) -> bool:
        """As `advance` for raw frames that are next in turn, without a task that waits: `landed` is called with the error or with what came of them.

        `read`: the session's reader has read them. Without an owner the oldest answers are forgotten where there is no room for these.
        False where there is more to it than that; nothing has happened then, and `advance` is to be asked. `Suspect` means the same, later.
        """
        runner = self._runners.get(session)
        if runner is None or self.draining or session.owner is not owner or first != session.next_frame:
            return False
        if not 0 < count <= (session.answers.limit if owner is None else session.answers.room):
            return False
        progress = session.progress
        if progress.resampler is not None or (options.events and progress.detector is None) or len(payload) > _LARGE:
            return False
        reader = runner.reader(session.options.layout)
        unread = reader.raw_bytes > 0 and not read
        if read:
            frames = payload
        elif unread:
            if len(payload) != count * reader.raw_bytes:
                return False
            frames = payload
        else:
            try:
                frames = reader.from_bytes(payload, first, count).data.cast("B")
            except ServiceError:
                return False
        if session.queued or not session.turn.take():
            return False
        session.queued = 1
        now = session.used = time.monotonic()
        flight = Flight(session.row, frames, count, now, now + self._deadline_s, unread)
        flight.predictor, flight.session, flight.runner, flight.landed, flight.first, flight.count = self, session, runner, landed, first, count
        if owner is None:
            flight.noted = notes.current()
        try:
            runner.launch(flight)
        except ServiceError:
            give_back(session)
            return False
        return True

    def deadline(self, wait_s: float | None = None) -> float:
        """Until when a message that came now may wait, on time.monotonic's clock."""
        return time.monotonic() + (self._settings.deadline_s if wait_s is None else min(wait_s, self._settings.deadline_s))

    def turn(self, session: Session, deadline: float, owner: Owner | None = None) -> Turn:
        """`async with` it: what others want of the session waits. Raises `SessionNotFound`, `TakenOver`, `Deadline`, `Overloaded` or `Draining`."""
        self._check_open()
        notes.note(session=session)
        return Turn(self.sessions, session, deadline, owner)

    async def take(self, session: Session, first: int, count: int | None, payload: Payload, options: Options, deadline: float) -> Answer:
        """As `advance`, for a caller that has the session's turn."""
        runner = self._runners[session]
        if count is not None and first + count <= session.next_frame:
            session.known(first, count)
            return self._stored(session, runner, first, first + count, options)
        reader = runner.reader(session.options.layout)
        frames = payload.read(reader, first) if payload.size <= _LARGE else await asyncio.to_thread(payload.read, reader, first)
        end = first + len(frames)
        session.warm_up(first)
        known = session.known(first, len(frames))
        if known == len(frames):
            return self._stored(session, runner, first, end, options)
        if session.progress.plain and payload.t is None:
            before = session.answers.get(first, session.next_frame) if known and options.scores == "all" else None  # raises before anything runs

            def commit(scores: bytes) -> None:
                session.answers.add(scores)
                self._changed(session)

            scores = runner.table(await runner.run(session.row, frames[known:], deadline, commit))
            if options.scores != "all":
                scores = scores[-1:]
            elif before is not None:
                scores = np.concatenate([before, scores])
            return Answer(runner.manifest, options, first, len(frames), scores)
        stored = self._stored(session, runner, first, session.next_frame, options) if known and options.scores == "all" else None
        events = self._events(session, first, session.next_frame, options)
        passage = await _prepared(session.progress, session.next_frame, frames[known:], payload, first)
        await self._run(session, runner, passage, deadline)
        answer = _answer(runner, options, first, len(frames), passage.scores, passage.times, events + passage.events)
        return answer if stored is None else stored.joined(answer)

    async def restart(
        self, session: Session, version: str | None, opening: Options, first: int, count: int | None, payload: Payload, options: Options, deadline: float
    ) -> Answer:
        """Begins a session anew at frame 0, opened with `opening`, if these frames run; else it stays as it was. The caller has its turn."""
        runner = self.models.draw(session.model, version)
        fresh = _begun(runner, self._checked(opening, runner), session.id)
        self._runners[fresh] = runner
        try:
            return await self.take(fresh, first, count, payload, options, deadline)
        finally:
            done = fresh.next_frame > 0 and session.ended is None  # even if the caller has left: what has run has taken effect
            spare = session if done else fresh
            self._runners[spare].rows.give(spare.row)
            del self._runners[fresh]
            if done:
                self._count_end(session, "restarted")
                session.become(fresh)
                if self.keeper is not None:
                    self.keeper.forget(session)
                self._runners[session] = runner
                self.metrics.sessions_opened.labels(session.model, session.version).inc()
                self.metrics.sessions_live.labels(session.model, session.version).inc()
                if session.owner is not None:
                    session.owner.stop(TakenOver("this stream was begun anew elsewhere", next_frame=session.next_frame))

    async def _run(self, session: Session, runner: Runner, passage: Passage, deadline: float) -> None:
        """Runs what was prepared; it takes effect as a whole, even if the caller has left by then."""

        def commit(scores: bytes) -> None:
            self._commit(session, runner, passage, scores)

        if len(passage.steps):
            await runner.run(session.row, passage.steps, deadline, commit)
        else:  # frames between two steps of the model
            commit(b"")

    def _commit(self, session: Session, runner: Runner, passage: Passage, scores: bytes) -> None:
        passage.commit(runner.table(scores))
        session.answers.add(passage.scores.tobytes(), passage.times)
        self._count(runner, passage.events)
        self._changed(session)

    def _changed(self, session: Session) -> None:
        if self.keeper is not None and session.ended is None and self.sessions.get(session.id) is session:
            self.keeper.changed(session.id, session.next_frame)

    async def reset(self, session: Session, at: int, owner: Owner | None = None) -> list[TimedEvent]:
        """Begins anew at frame `at`, which must be the next one; returns the end of the event that was open. Repeating it gives the same again."""
        async with self.turn(session, self.deadline(), owner):
            if session.reset(at):
                runner = self._runners[session]
                runner.rows.clear(session.row)
                self._count(runner, session.progress.reset(at))
                self._changed(session)
            detector = session.progress.detector
            return [] if detector is None else detector.of_reset(at)

    def acknowledge(self, session: Session, first: int) -> None:
        """Answers below `first` were received and need not be kept; an ack beyond the next frame means all of them."""
        session.used = time.monotonic()
        below = min(first, session.next_frame)
        session.answers.forget(below)
        if session.progress.detector is not None:
            session.progress.detector.forget(below)

    def kept(self, session: Session, options: Options) -> Answer | None:
        """Answers that a resuming client has not acknowledged, as one; None if there are none."""
        if session.answers.start == session.next_frame:
            return None
        answer = self._stored(session, self._runners[session], session.answers.start, session.next_frame, options)
        if session.progress.detector is not None:
            answer.events = session.progress.detector.decided(answer.first, session.next_frame, resets=True)
        return answer

    async def close(self, session: Session, cause: Cause, owner: Owner | None = None) -> None:
        """Ends the session after the message under way, if any; a connection that streams it is told, unless it is the `owner` that asks."""
        async with session.turn:
            self.sessions.check_live(session)
            self.end(session, cause, owner)

    def end(self, session: Session, cause: Cause, owner: Owner | None = None) -> None:
        """As `close`, for a caller that has the session's turn."""
        self.sessions.end(session, cause)
        self._tell_ended(session, owner)

    def attach(self, session: Session, owner: Owner) -> None:
        """Makes `owner` the connection that streams this session; the one before is told that it was taken over."""
        before, session.owner = session.owner, owner
        notes.note(session=session)
        if self.traces is not None:
            self.traces.attached(session, owner)
        log.debug("stream attached", model=session.model, next_frame=session.next_frame)
        if before is not None:
            before.stop(TakenOver("another connection has taken this session over", next_frame=session.next_frame))

    def detach(self, session: Session, owner: Owner) -> None:
        if session.owner is owner:
            session.owner = None
            session.used = time.monotonic()
        if self.traces is not None:
            self.traces.detached(session, owner)
        log.debug("stream detached", session=session.digest, model=session.model, next_frame=session.next_frame)

    def opened(self, session: Session) -> dict[str, Any]:
        """What a client learns when its session opens or is resumed."""
        runner = self._runners[session]
        manifest = runner.manifest
        value: dict[str, Any] = {
            "session": session.id,
            "next_frame": session.next_frame,
            "model": session.model,
            "version": session.version,
            "fingerprint": manifest.fingerprint,
            "task": manifest.task,
            "classes": list(manifest.classes),
            "frame_shape": list(runner.reader(session.options.layout).shape),
            "window": session.answers.limit,
            "horizon": _horizon(runner),
            "durability": None if self.keeper is None else self.keeper.level,
            "limits": {
                "message_bytes": self._settings.message_bytes,
                "body_bytes": self._settings.body_bytes,
                "idle_s": self._settings.idle_s,
                "deadline_s": self._settings.deadline_s,
            },
            "options": session.options.to_dict(),
        }
        if (origin := session.progress.origin) is not None:
            value["origin"] = origin
        if warning := stream_warning(runner):
            value["warning"] = warning
        return value

    async def drain(self) -> None:
        """Refuses new work and waits, for a while, until the work under way is done and saved."""
        self.draining = True
        end = time.monotonic() + self._settings.drain_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                await asyncio.gather(*(runner.idle() for runner in self.models))
        if self.keeper is not None:
            await self.keeper.drain(max(0.5, end - time.monotonic()))

    # Inside

    def _stored(self, session: Session, runner: Runner, first: int, end: int, options: Options) -> Answer:
        """The kept answer for frames [first, end); raises `AnswersForgotten`."""
        begin = first if options.scores == "all" else end - 1
        scores, times = session.answers.get(begin, end), session.answers.times(begin, end)
        return _answer(runner, options, first, end - first, scores, times, self._events(session, first, end, options))

    def _events(self, session: Session, first: int, end: int, options: Options) -> list[TimedEvent]:
        """Kept events that frames [first, end) decided; raises `AnswersForgotten`."""
        detector = session.progress.detector
        if detector is None or options.events is False:
            return []
        if first < min(detector.forgotten, end):
            raise AnswersForgotten(
                f"events of frames {first} to {detector.forgotten - 1} are no longer kept", kept_from=detector.forgotten, next_frame=session.next_frame
            )
        return detector.decided(first, end)

    def _count(self, runner: Runner, events: list[TimedEvent]) -> None:
        if events:
            self.metrics.events.labels(runner.name, runner.version).inc(len(events))

    def _runner_of(self, name: str, version: str | None, record: Record) -> Runner:
        """The asked version; else that of the record's fingerprint: the one of its name if there are several, or the highest."""
        if version is not None:
            return self.runner(name, version)
        self.runner(name)
        served = {one: self.runner(name, one) for one in self.catalog.versions(name)}
        fit = [one for one, runner in served.items() if runner.manifest.fingerprint == record.fingerprint]
        if not fit:
            raise FingerprintMismatch(
                f"the session record is of another model: no version of {name} has its fingerprint",
                fingerprint=record.fingerprint,
                served={one: runner.manifest.fingerprint for one, runner in served.items()},
            )
        return served[record.version if record.version in fit else fit[-1]]

    def _check_room(self) -> None:
        try:
            self.sessions.check_room()
        except ServiceError:
            self.metrics.sessions_refused.inc()
            raise

    def _add(self, session: Session, runner: Runner) -> None:
        session.epoch = max(session.epoch, 1 if self.keeper is not None else 0)
        self.sessions.add(session)
        self._runners[session] = runner
        self._changed(session)
        self.metrics.sessions_opened.labels(runner.name, runner.version).inc()
        self.metrics.sessions_live.labels(runner.name, runner.version).inc()
        notes.note(session=session)
        log.debug("session opened", model=runner.name, version=runner.version)

    def _checked(self, options: Options, runner: Runner) -> Options:
        """The options as settled for a stream; an unknown layout is refused before anything is taken."""
        options = _settled(options, runner)
        runner.reader(options.layout)
        return options

    def _check_open(self) -> None:
        if self.draining:
            raise Draining("the service is shutting down", retry_after=5)

    def _session_ended(self, session: Session, cause: Cause) -> None:
        self._runners.pop(session).rows.give(session.row)
        self._count_end(session, cause)
        if self.keeper is not None:
            self.keeper.ended(session, cause)
        log.debug("session ended", session=session.digest, model=session.model, cause=cause, frames=session.next_frame)

    def _count_end(self, session: Session, cause: Cause) -> None:
        self.metrics.sessions_live.labels(session.model, session.version).dec()
        self.metrics.sessions_ended.labels(session.model, session.version, cause).inc()

    async def _evict(self, runner: Runner) -> None:
        """Ends the sessions of a version whose time is over, each after its message under way."""
        error: ServiceError = ModelNotFound(f"version {runner.version} of model {runner.name} was unloaded", versions=[])
        if self.keeper is not None:  # whoever takes such a session up goes on with another version
            error = Draining(f"version {runner.version} of model {runner.name} is not served any more", retry_after=0)
        for session in [session for session, its in self._runners.items() if its is runner]:
            if session.owner is not None:
                session.owner.stop(error)
            async with session.turn:
                if self._runners.get(session) is runner:
                    if self.keeper is not None:
                        with contextlib.suppress(ServiceError):
                            await self.keeper.flush(session)
                    self.sessions.end(session, "drained")

    async def _sweep(self) -> None:
        pause = min(1.0, self._settings.idle_s / 4, (self._settings.age_s or self._settings.idle_s) / 4)
        while True:
            await asyncio.sleep(pause)
            for session in self.sessions.expire():
                self._tell_ended(session)

    def _tell_ended(self, session: Session, besides: Owner | None = None) -> None:
        if session.owner is None or session.owner is besides:
            return
        try:
            self.sessions.check_live(session)
        except ServiceError as error:
            session.owner.stop(error)


class Flight(Stretch):
    """The frames of one message, or of several that follow each other, on their way through the model; it has the session's turn."""

    __slots__ = ("count", "events", "first", "landed", "predictor", "runner", "session")

    predictor: Predictor
    session: Session
    runner: Runner
    landed: Landed
    first: int
    count: int
    events: list[TimedEvent]

    def done(self, error: BaseException | None) -> None:
        session = self.session
        self.events = []
        try:
            if error is None:
                if session.progress.plain:
                    session.answers.add(self.scores)
                    self.predictor._changed(session)
                else:
                    passage = session.progress.prepare(self.first, self.runner.table(self.scores), None)
                    self.predictor._commit(session, self.runner, passage, self.scores)
                    self.events = passage.events
            elif not isinstance(error, Suspect):
                self.runner.statistics.failed(int(1e9 * (time.monotonic() - self.queued)))
        except Exception as caught:
            error = caught
        give_back(session)
        self.landed(error, self)

    def answer(self, options: Options, first: int, count: int) -> Answer:
        """To all its frames, [first, first + count)."""
        return _answer(self.runner, options, first, count, self.runner.table(self.scores), None, self.events)

    def binary(self, first: int, count: int, every: bool, track: int) -> bytes:
        """The binary message that answers its frames [first, first + count): scores of each, or of the last."""
        size, end = self.runner.row_bytes, first + count
        begin = first if every else end - 1
        return write_scores(begin, end - begin, self.scores[(begin - self.first) * size : (end - self.first) * size], track)


Landed = Callable[[BaseException | None, Flight], None]


def stream_warning(runner: Runner) -> str:
    """What a client must know before it streams for hours; "" where the model was verified for it."""
    report = runner.manifest.stream
    if report is None:
        return "not verified for endless streams: this model was only tested on clips; reset it between actions"
    if report.declines:
        fall = f"accuracy declines from {report.accuracy_first:.1%} to {report.accuracy_last:.1%} along a stream"
        return f"not verified for endless streams: {fall}; reset the session between actions"
    return ""


def _horizon(runner: Runner) -> int:
    """Frames that warm the model up, as far as anybody measured it."""
    return 0 if runner.manifest.stream is None else runner.manifest.stream.horizon


def _begun(runner: Runner, options: Options, session_id: str | None) -> Session:
    """A session at frame 0 with a row of its own, in no table yet."""
    progress = Progress(runner.manifest, options.fps or runner.manifest.fps)
    return Session(runner.name, runner.version, runner.rows.take(), len(runner.manifest.classes), options, progress, session_id)


async def _prepared(progress: Progress, next_frame: int, frames: Floats, payload: Payload, first: int) -> Passage:
    """The steps of the frames that are new, from `next_frame` on; those of the message begin at `first`."""

    def prepare() -> Passage:
        known = next_frame - first
        t: Times | None = None if payload.t is None else read_times(payload.t, known + len(frames), first)[known:]
        return progress.prepare(next_frame, frames, t)

    resamples = payload.t is not None or progress.resampler is not None
    return await asyncio.to_thread(prepare) if resamples and payload.size > _MANY else prepare()


def _answer(runner: Runner, options: Options, first: int, count: int, scores: Floats, times: Times | None, events: list[TimedEvent]) -> Answer:
    """The answer as the options want it; `scores` and `times` are of all frames or of the last ones."""
    if options.scores != "all":
        scores, times = scores[-1:], times if times is None else times[-1:]
    return Answer(runner.manifest, options, first, count, scores, times, [] if options.events is False else events)


def _settled(options: Options, runner: Runner) -> Options:
    """The options with the model's own values filled in; refuses what this model cannot do."""
    manifest = runner.manifest
    if options.layout is not None and manifest.layout is None:
        raise LayoutUnknown(f"model {runner.name} takes no skeletons: it has no layout")
    if options.events and manifest.events is None:
        raise NoEvents(f"model {runner.name} has no events: there are no rules for them in its manifest")
    if options.fps is not None and options.fps != manifest.fps and not LEAST_FPS <= options.fps <= MOST_FPS:
        raise Malformed(f"fps {options.fps:g}: from {LEAST_FPS:g} to {MOST_FPS:g} frames a second are taken", fps=manifest.fps)
    events = manifest.events is not None and options.events is not False
    return dataclasses.replace(options, layout=options.layout or manifest.layout, fps=options.fps or manifest.fps, events=events)
