"""One track of a websocket: a session, its messages in their order, its answers. Tracks of one websocket know nothing of each other."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from service import notes
from service.errors import AnswersForgotten, Malformed, ServiceError, TooMany
from service.frames import Payload
from service.options import Options, read_options
from service.predictor import Flight, Predictor
from service.protocol import (
    MOST_TRACKS,
    Answer,
    Close,
    Connection,
    Frames,
    Message,
    Open,
    Reset,
    join,
    may_join,
    write,
    write_answer,
    write_event,
    write_events,
)
from service.runner import Suspect
from service.sessions import Session

log = structlog.get_logger("tracks")

STALLED_S = 10.0  # a client that overran its window and so cannot be heard any more is told
LOOK_S = 1.0  # how often who waits for an ack looks whether it can come
TELL_S = 0.25  # least time between two words of how far the stream is durable: a client needs it to let go of frames, which does not hurry
TOGETHER = 32  # frames of messages that have piled up and are run as one
_DEFAULTS = Options(scores="all")


class Link(Protocol):
    """The websocket that a track is one of."""

    connection: Connection
    paused: bool  # it is not read for now, so that no ack can come

    send: Callable[[str | bytes], None]

    def released(self) -> None:
        """A message was answered: the websocket may have to be read again."""

    def ended(self, track: Track, error: ServiceError | None) -> None:
        """The track is at its end: closed by the client, or by an error that the client must be told of."""


class Track:
    """One stream. Its messages are put in as they are read; a task of its own handles them one after another, beside those of the other tracks.

    Raw frames that come when it has nothing else to do, which is nearly all there ever is, go to the model at once and are answered when they land;
    the task hears nothing of them.
    """

    def __init__(self, number: int, link: Link, predictor: Predictor, model: str) -> None:
        self.number = number
        self.credit = link.connection.credit(number)
        self._link = link
        self._predictor = predictor
        self._model = model
        self._options = self._all_scores = _DEFAULTS
        self._session: Session | None = None
        self._queue: deque[Message | ServiceError] = deque()
        self._arrived = asyncio.Event()
        self._acked = asyncio.Event()
        self._early_ack = 0  # that came before the session was opened
        self._closing = False
        self._idle = False  # whether the task waits for a message
        self._flying: list[Frames] = []  # messages that are with the model, without the task
        self._over = self._binary = False
        self._durable = self._told = 0  # frames below survive this process; the client knows it of these
        self._tell: asyncio.TimerHandle | None = None
        self._last: ServiceError | None = None
        self._stopped: ServiceError | None = None
        self.task: asyncio.Task[None] | None = None

    # ---- what the websocket does

    def start(self, message: Open, before: Track | None) -> asyncio.Task[None]:
        """Opens the stream once `before`, which had the same number, is done."""
        self.task = asyncio.create_task(self._run(message, None if before is None else before.task))
        return self.task

    def put(self, message: Message) -> None:
        if type(message) is Frames and self._idle and not self._flying and not self._queue and self._launch([message]):
            return
        self._queue.append(message)
        if not self._flying:
            self._arrived.set()
        if type(message) is Close:
            self._closing = True
            self._acked.set()

    def acknowledge(self, first: int) -> None:
        if self._session is None:
            self._early_ack = max(self._early_ack, first)
        else:
            self._predictor.acknowledge(self._session, first)
            self._acked.set()

    def finish(self, error: ServiceError) -> None:
        """Ends it with this error after the messages that came before. Nothing is heard any more, so nobody waits for an ack."""
        self._last = error
        self._queue.append(error)
        self._arrived.set()
        self._acked.set()

    def look_again(self) -> None:
        """The websocket is not read any more until something is answered: who waits for an ack must know."""
        self._acked.set()

    def durable(self, frame: int) -> None:
        """Every frame below survives this process."""
        self._durable = frame
        if self._tell is None:
            self._tell_durable()

    def _tell_durable(self) -> None:
        self._tell = None
        if self._told < self._durable and not self._over:
            self._told = self._durable
            self._link.send(write("durable", track=self.number, frame=self._told))
            self._tell = asyncio.get_running_loop().call_later(TELL_S, self._tell_durable)

    def warn(self, error: ServiceError) -> None:
        """Something is wrong that does not end the stream."""
        if not self._over:
            self._link.send(write("warning", track=self.number, warning=error.message, code=error.code, **error.facts))

    def stop(self, error: ServiceError) -> None:
        """Ends it at once: the session was taken over, closed elsewhere, or has expired."""
        if self._stopped is None and self.task is not None:
            self._stopped = error
            self.task.cancel()

    # ---- its task

    async def _run(self, message: Open, before: asyncio.Task[None] | None) -> None:
        error: ServiceError | None
        notes.branch(track=self.number)
        try:
            error = await self._serve(message, before)
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            error = self._stopped
        finally:
            self._over = True
            if self._tell is not None:
                self._tell.cancel()
            if self._session is not None:
                self._predictor.detach(self._session, self)
        self._link.ended(self, error)

    async def _serve(self, message: Open, before: asyncio.Task[None] | None) -> ServiceError | None:
        """Serves to the end; returns the error that was the end, or None after `close`."""
        try:
            if before is not None:
                await asyncio.wait({before})
            await self._work(await self._open(message))
        except ServiceError as error:
            return error
        except Exception:
            log.exception("track failed", model=self._model)
            return ServiceError()
        return None

    async def _open(self, message: Open) -> Session:
        session = await self._session_of(message)
        self._session = session
        self._all_scores = dataclasses.replace(self._options, scores="all")
        self._binary = self._options.answers == "binary"
        self._predictor.attach(session, self)
        self.credit.window = session.answers.limit
        opened = {**self._predictor.opened(session), "options": self._options.to_dict()}
        opened["limits"]["tracks"] = MOST_TRACKS
        self._link.send(write("opened", track=self.number, **opened))
        if session.renewed is not None:
            self._send_renewed(session, session.renewed)
        elif message.session is not None:
            self._send_kept(session, message.ack)
        if self._early_ack:
            self._predictor.acknowledge(session, self._early_ack)
        return session

    async def _session_of(self, message: Open) -> Session:
        if message.session is None:
            self._predictor.check_store()
            session = self._predictor.open(self._model, message.version, read_options(message.options, _DEFAULTS))
            self._options = session.options
            return session
        session = await self._predictor.resume(message.session)
        if session.model != self._model or message.version not in (None, session.version):
            raise Malformed(f"the session belongs to model {session.model}, version {session.version}")
        self._options = read_options(message.options, read_options({"scores": "all"}, session.options))
        for name in ("layout", "fps"):
            if getattr(self._options, name) != getattr(session.options, name):
                raise Malformed(f"{name} is fixed when a session opens; this one has {getattr(session.options, name)}")
        return session

    def _send_renewed(self, session: Session, renewed: tuple[int, int]) -> None:
        """Says that the model is another one, which the client's latest frames may warm up."""
        begin, end = renewed
        facts = {name: value for name, value in self._predictor.opened(session).items() if name in ("version", "fingerprint", "classes")}
        self._link.send(write("model_changed", track=self.number, frame=end, warm_from=begin, **facts))

    def _send_kept(self, session: Session, ack: int | None) -> None:
        """Sends again what the client may have missed."""
        if ack is not None:
            self._predictor.acknowledge(session, ack)
            if session.answers.start > ack:
                lost = AnswersForgotten(
                    f"answers of frames {ack} to {session.answers.start - 1} are no longer kept", first=ack, kept_from=session.answers.start
                )
                self._link.send(write("warning", track=self.number, warning=lost.message, code=lost.code, **lost.facts))
        if (answer := self._predictor.kept(session, self._options)) is not None:
            self._send(answer)

    async def _work(self, session: Session) -> None:
        """Handles messages in order; returns after `close`, raises what goes wrong."""
        while True:
            while not self._queue or self._flying:
                self._idle = True
                self._arrived.clear()
                await self._arrived.wait()
            self._idle = False
            message = self._queue.popleft()
            if type(message) is Frames:
                if self._queue and len(together := self._with_followers(session, message)) > 1:
                    await self._advance_together(session, together)
                else:
                    await self._advance(session, message)
            elif isinstance(message, ServiceError):
                raise message
            elif type(message) is Reset:
                for event in await self._predictor.reset(session, message.at, self):
                    if self._options.events:
                        self._link.send(write_event(event, self.number))
                self._done(message)
            elif type(message) is Close:
                if not message.keep:
                    await self._predictor.close(session, "closed", self)
                self._link.send(write("closed", track=self.number, next_frame=session.next_frame))
                return

    # ---- without its task

    def _launch(self, messages: list[Frames]) -> bool:
        """Whether these messages, each of which begins where the one before ends, are on their way to the model."""
        session, joined = self._session, messages[0] if len(messages) == 1 else join(messages)
        if session is None or joined.t is not None or type(joined.payload) is not memoryview:
            return False
        options = self._options if len(messages) == 1 else self._all_scores
        if not self._predictor.launch(session, joined.first, joined.count, joined.payload, options, self, self._land):
            return False
        self._flying = messages
        return True

    def _land(self, error: BaseException | None, flight: Flight) -> None:
        messages, self._flying = self._flying, []
        if self._over:
            return
        if error is None:
            self._answer_flight(messages, flight)
            if self._queue and not self._go_on():
                self._arrived.set()
            return
        if len(messages) > 1 or isinstance(error, Suspect):  # each of them gets what it deserves alone
            self._queue.extendleft(reversed(messages))
        elif isinstance(error, ServiceError):
            self._queue.appendleft(error)
        else:
            log.error("track failed", model=self._model, exc_info=error)
            self._queue.appendleft(ServiceError())
        self._arrived.set()

    def _go_on(self) -> bool:
        """Whether what has piled up meanwhile is on its way to the model."""
        message, session = self._queue[0], self._session
        if type(message) is not Frames or session is None:
            return False
        self._queue.popleft()
        together = self._with_followers(session, message)
        if not self._launch(together):
            self._queue.extendleft(reversed(together))
            return False
        return True

    def _answer_flight(self, messages: list[Frames], flight: Flight) -> None:
        if self._binary and not flight.events:
            every = self._options.scores == "all"
            for message in messages:
                self._link.send(flight.binary(message.first, message.count, every, self.number))
                self._done(message)
        elif len(messages) == 1:
            self._answer(messages[0], flight.answer(self._options, messages[0].first, messages[0].count))
        else:
            answer = flight.answer(self._all_scores, messages[0].first, sum(message.count for message in messages))
            for message in messages:
                self._answer(message, answer.part(message.first, message.count, self._options))

    # ---- with it

    def _with_followers(self, session: Session, message: Frames) -> list[Frames]:
        """Messages that have piled up behind this one and go on where it ends: run as one they cost little more than one."""
        together = [message]
        room = min(TOGETHER, session.answers.room) - message.count
        while self._queue and isinstance(follower := self._queue[0], Frames) and may_join(together[-1], follower) and follower.count <= room:
            room -= follower.count
            together.append(follower)
            self._queue.popleft()
        return together

    async def _advance_together(self, session: Session, messages: list[Frames]) -> None:
        """One run, an answer for each message. Where that fails nothing has changed, and each message gets what it deserves alone."""
        if messages[0].first == session.next_frame:
            joined = join(messages)
            try:
                answer = await self._predictor.advance(session, joined.first, joined.count, _payload(joined), self._all_scores, self)
            except ServiceError:
                pass
            else:
                for message in messages:
                    self._answer(message, answer.part(message.first, message.count, self._options))
                return
        for message in messages:
            await self._advance(session, message)

    def _answer(self, message: Frames, answer: Answer) -> None:
        self._send(answer)
        self._done(message)

    def _send(self, answer: Answer) -> None:
        """Events go first: a client that has the answer, and so acknowledges its frames, has their events too, wherever the connection broke."""
        if answer.events:
            for event in write_events(answer, self.number):
                self._link.send(event)
        self._link.send(write_answer(answer, self.number))

    def _done(self, message: Frames | Reset) -> None:
        link = self._link
        link.connection.answered(message, self.credit)
        if link.paused:
            link.released()

    async def _advance(self, session: Session, message: Frames) -> None:
        frames = message.first + message.count - session.next_frame
        if session.answers.room < frames:
            await self._acknowledgement(session, frames)
        answer = await self._predictor.advance(session, message.first, message.count, _payload(message), self._options, self)
        self._answer(message, answer)

    async def _acknowledgement(self, session: Session, frames: int) -> None:
        """Waits until enough kept answers are acknowledged to keep those of `frames` new ones; more than the limit need it empty.

        A client that overran its window cannot be heard and would wait for ever, and other tracks with it: those are not kept waiting at all.
        """
        stalled = 0.0
        while session.answers.room < min(frames, session.answers.limit) and not self._closing:  # no ack comes after `close`
            if self._last is not None:
                raise self._last
            alone_at_fault = self._link.connection.many and self.credit.frames > self.credit.window
            if stalled >= STALLED_S or alone_at_fault:
                raise TooMany(
                    f"{session.answers.limit} answers are not acknowledged and the window is overrun: acknowledge what you read",
                    next_frame=session.next_frame,
                )
            self._acked.clear()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._acked.wait()
            except TimeoutError:
                stalled = stalled + LOOK_S if self._link.paused else 0.0


def _payload(message: Frames) -> Payload:
    return Payload("json" if isinstance(message.payload, list) else "raw", message.payload, message.size, message.count, message.t)
