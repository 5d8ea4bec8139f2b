"""The sessions of all models: opened, found, kept in a store or taken up from it, closed, expired, and told when their version goes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import structlog

from service import notes
from service.catalog import Catalog
from service.errors import (
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
from service.keeper import Keeper
from service.metrics import Metrics
from service.options import Options
from service.progress import Progress
from service.record import Record
from service.repository import Repository
from service.runner import Runner
from service.sessions import Cause, Owner, Session, Sessions
from service.settings import Settings
from service.store import Store
from service.tracing import Traces
from service.turn import Turn

log = structlog.get_logger("house")

Result = TypeVar("Result")

LEAST_FPS, MOST_FPS = 0.001, 1000.0  # of clients whose rate is not the model's; with less, the times of frames outgrow all numbers


class House:
    """Where sessions live. Use it as `async with`: what it starts, it stops."""

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

    async def __aenter__(self) -> Self:
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

    def runner(self, name: str, version: str | None = None) -> Runner:
        """The model at work; raises `ModelNotFound`, `ModelLoading` or `ModelNotReady`."""
        return self.models.find(name, version)

    def deadline(self, wait_s: float | None = None) -> float:
        """Until when a message that came now may wait, on time.monotonic's clock."""
        return time.monotonic() + (self._settings.deadline_s if wait_s is None else min(wait_s, self._settings.deadline_s))

    def turn(self, session: Session, deadline: float, owner: Owner | None = None) -> Turn:
        """`async with` it: what others want of the session waits. Raises `SessionNotFound`, `TakenOver`, `Deadline`, `Overloaded` or `Draining`."""
        self._check_open()
        notes.note(session=session)
        return Turn(self.sessions, session, deadline, owner)

    # Whose they are

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
        return session.record(runner.manifest, runner.manifest_digest, runner.rows.copy(session.row))

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
        session = begun(runner, options, record.session)
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
        session = begun(runner, options, record.session)
        timed = session.progress.take_clock(record.progress)
        again = max(_horizon(runner), len(record.scores))  # frames that warm it up, and those whose answers nobody may have had
        begin = record.next_frame if timed else max(0, record.next_frame - again)
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

    # From their beginning to their end

    def open(self, name: str, version: str | None, options: Options, session_id: str | None = None) -> Session:
        """A new session at frame 0, under an id that nobody can guess unless one is given.

        Raises `ModelNotFound`, `LayoutUnknown`, `Malformed`, `NoEvents` or `TooMany`.
        """
        self._check_open()
        runner = self.models.draw(name, version)
        options = self._checked(options, runner)
        self._check_room()
        session = begun(runner, options, session_id)
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
        session = begun(runner, options, None)
        session.restore(record)
        runner.rows.scatter([session.row], record.row[None])
        self._add(session, runner)
        log.info("session restored", session=session.digest, model=runner.name, version=runner.version, next_frame=session.next_frame)
        return session

    def touch(self, session: Session) -> None:
        """Keeps an idle session from expiring, as a message would."""
        session.used = time.monotonic()

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

    async def close(self, session: Session, cause: Cause, owner: Owner | None = None) -> None:
        """Ends the session after the message under way, if any; a connection that streams it is told, unless it is the `owner` that asks."""
        async with session.turn:
            self.sessions.check_live(session)
            self.end(session, cause, owner)

    def end(self, session: Session, cause: Cause, owner: Owner | None = None) -> None:
        """As `close`, for a caller that has the session's turn."""
        self.sessions.end(session, cause)
        self._tell_ended(session, owner)

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

    def _changed(self, session: Session) -> None:
        if self.keeper is not None and session.ended is None and self.sessions.get(session.id) is session:
            self.keeper.changed(session.id, session.next_frame)

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
        options = settled_options(options, runner)
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


def begun(runner: Runner, options: Options, session_id: str | None) -> Session:
    """A session at frame 0 with a row of its own, in no table yet."""
    progress = Progress(runner.manifest, options.fps or runner.manifest.fps)
    return Session(runner.name, runner.version, runner.rows.take(), len(runner.manifest.classes), options, progress, session_id)


def settled_options(options: Options, runner: Runner) -> Options:
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
