"""The use cases, free of HTTP: classify a clip; open, advance, reset, resume and close a stream; put it away and take it up again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from model import skeletons
from service import notes
from service.detector import TimedEvent
from service.errors import (
    AnswersForgotten,
    NoEvents,
    ServiceError,
    TakenOver,
)
from service.frames import FrameReader, Payload
from service.house import House, begun, settled_options
from service.options import Options
from service.progress import Passage, Progress
from service.protocol import Answer, write_scores
from service.resampler import Floats, Times, read_times
from service.runner import Runner, Stretch, Suspect
from service.sessions import Owner, Rows, Session
from service.turn import give_back

_LARGE = 2**20  # bytes; payloads above are read in a thread, so that the event loop goes on
_MANY = 2**16  # bytes; resampling more, which may give many times as many, is left to a thread for the same reason


class Predictor(House):
    """Runs the frames of clips and of a house's sessions through their models."""

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
        options = settled_options(options, runner)
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
        fresh = begun(runner, self._checked(opening, runner), session.id)
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

    # Inside

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
