"""The websocket: a reader, a worker and a way to be stopped, between the protocol and the predictor."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from service.errors import AnswersForgotten, Deadline, Draining, Malformed, ServiceError, TooMany
from service.frames import Payload
from service.gate import SUBPROTOCOL, Gate
from service.options import Options, read_options
from service.predictor import Predictor
from service.protocol import Ack, Answer, Close, Connection, Frames, Message, Open, Reset, join, may_join, write, write_answer, write_error
from service.sessions import KEPT_FRAMES, Session

log = structlog.get_logger("streaming")

OPEN_WITHIN_S = 30.0  # a connection that opens nothing is closed
STALLED_S = 10.0  # a client that overran its window and so cannot be heard any more is closed
TOGETHER = 32  # frames of messages that have piled up and are run as one
_DEFAULTS = Options(scores="all")


class Sockets:
    """All open websockets, capped."""

    def __init__(self, predictor: Predictor, gate: Gate, most: int) -> None:
        self._predictor = predictor
        self._gate = gate
        self._most = most
        self._streams: set[Stream] = set()

    async def serve(self, websocket: WebSocket, model: str) -> None:
        """Serves one websocket to its end. Refusals come after the handshake, because browsers show no other."""
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        stream = Stream(websocket, self._predictor, model)
        self._streams.add(stream)
        self._predictor.metrics.sockets_live.inc()
        try:
            await stream.run(lambda: self._admit(websocket, offered))
        finally:
            stream.ended.set()
            self._streams.discard(stream)
            self._predictor.metrics.sockets_live.dec()

    def _admit(self, websocket: WebSocket, offered: list[str]) -> None:
        self._gate.check_origin(websocket.headers)
        self._gate.check_token(websocket.headers, offered)
        if len(self._streams) > self._most:
            raise TooMany(f"{self._most} websockets are open, no more are allowed", retry_after=5)

    async def drain(self, seconds: float) -> None:
        """Tells every client to go elsewhere, after the message under way, and waits until they are told."""
        for stream in list(self._streams):
            stream.stop(Draining("the service is shutting down", retry_after=5))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(stream.ended.wait() for stream in self._streams))


class Stream:
    """One websocket with its session."""

    def __init__(self, websocket: WebSocket, predictor: Predictor, model: str) -> None:
        self._websocket = websocket
        self._predictor = predictor
        self._model = model
        self._connection = Connection(KEPT_FRAMES)
        self._options = self._all_scores = _DEFAULTS
        self._session: Session | None = None
        self._queue: deque[Message | ServiceError] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._acked = asyncio.Event()
        self._draining: Draining | None = None
        self.ended = asyncio.Event()
        self._stopped: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()

    def stop(self, error: ServiceError) -> None:
        """Ends the connection: at once, or when draining after the messages under way."""
        if isinstance(error, Draining) and self._session is not None:
            self._draining = error
            self._acked.set()  # whoever waits for an ack waits no longer
            self._put(error)
        elif not self._stopped.done():
            self._stopped.set_result(error)

    async def run(self, admit: Callable[[], None]) -> None:
        """Serves until the client leaves, closes the session, errs, or is stopped."""
        try:
            admit()
            await self._until_stopped(self._open())
            await self._until_stopped(self._stream())
        except ServiceError as error:
            await self._refuse(error)
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("websocket failed", model=self._model)
            await self._refuse(ServiceError())
        finally:
            if self._session is not None:
                self._predictor.detach(self._session, self)

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits a coroutine unless `stop` comes first; then raises its error."""
        task = asyncio.create_task(work)
        try:
            waited_for: set[asyncio.Future[Any]] = {task, self._stopped}
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._stopped.result()
            task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _open(self) -> None:
        message = self._connection.open_by_query(self._websocket.query_params)
        if message is None:
            message = await self._first_message()
        session = self._session_of(message)
        self._session = session
        self._all_scores = dataclasses.replace(self._options, scores="all")
        self._predictor.attach(session, self)
        self._connection.window = session.answers.limit
        opened = {**self._predictor.opened(session), "options": self._options.to_dict()}
        await self._send(write("opened", track=0, **opened))
        if message.session is not None:
            await self._send_kept(session, message.ack)

    async def _first_message(self) -> Open:
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                message = self._connection.receive(await self._receive())
        except TimeoutError:
            raise Deadline(f"no `open` within {OPEN_WITHIN_S:.0f} s") from None
        assert isinstance(message, Open)  # the connection lets nothing else pass
        return message

    def _session_of(self, message: Open) -> Session:
        if message.session is None:
            session = self._predictor.open(self._model, message.version, read_options(message.options, _DEFAULTS))
            self._options = session.options
            return session
        session = self._predictor.sessions.find(message.session)
        if session.model != self._model or message.version not in (None, session.version):
            raise Malformed(f"the session belongs to model {session.model}, version {session.version}")
        self._options = read_options(message.options, read_options({"scores": "all"}, session.options))
        for name in ("layout", "fps"):
            if getattr(self._options, name) != getattr(session.options, name):
                raise Malformed(f"{name} is fixed when a session opens; this one has {getattr(session.options, name)}")
        return session

    async def _send_kept(self, session: Session, ack: int | None) -> None:
        """Sends again what the client may have missed."""
        if ack is not None:
            self._predictor.acknowledge(session, ack)
            if session.answers.start > ack:
                lost = AnswersForgotten(
                    f"answers of frames {ack} to {session.answers.start - 1} are no longer kept", first=ack, kept_from=session.answers.start
                )
                await self._send(write("warning", track=0, warning=lost.message, code=lost.code, **lost.facts))
        if (answer := self._predictor.kept(session, self._options)) is not None:
            await self._send(write_answer(answer))

    async def _stream(self) -> None:
        reader = asyncio.create_task(self._read())
        worker = asyncio.create_task(self._work())
        try:
            done, _ = await asyncio.wait({reader, worker}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (reader, worker):
                task.cancel()
            await asyncio.wait({reader, worker})

    async def _read(self) -> None:
        """Reads messages into the queue; what is wrong with one comes after the answers to those before it."""
        assert self._session is not None
        while True:
            while self._connection.crowded:  # the window is full: the socket is not read
                self._room.clear()
                await self._room.wait()
            data = await self._receive()
            try:
                message = self._connection.receive(data)
            except ServiceError as error:
                self._put(error)
                await asyncio.Event().wait()  # nothing after it counts; the worker ends the stream
            if isinstance(message, Ack):
                self._predictor.acknowledge(self._session, message.first)
                self._acked.set()
            else:
                self._put(message)

    async def _work(self) -> None:
        """Handles messages in order; returns after `close`, raises what goes wrong."""
        assert self._session is not None
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            message = self._queue.popleft()
            if isinstance(message, ServiceError):
                raise message
            if isinstance(message, Frames):
                if self._queue and len(together := self._with_followers(self._session, message)) > 1:
                    await self._advance_together(self._session, together)
                else:
                    await self._advance(self._session, message)
            elif isinstance(message, Reset):
                await self._predictor.reset(self._session, message.at, self)
            elif isinstance(message, Close):
                await self._predictor.close(self._session, "closed", self)
                await self._send(write("closed", track=0, next_frame=self._session.next_frame))
                await self._websocket.close(1000)
                return

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
                    await self._answer(message, answer.part(message.first, message.count, self._options))
                return
        for message in messages:
            await self._advance(session, message)

    async def _answer(self, message: Frames, answer: Answer) -> None:
        await self._send(write_answer(answer))
        self._connection.answered(message)
        self._room.set()

    async def _advance(self, session: Session, message: Frames) -> None:
        frames = message.first + message.count - session.next_frame
        if session.answers.room < frames:
            await self._acknowledgement(session, frames)
        answer = await self._predictor.advance(session, message.first, message.count, _payload(message), self._options, self)
        await self._answer(message, answer)

    async def _acknowledgement(self, session: Session, frames: int) -> None:
        """Waits until enough kept answers are acknowledged to keep those of `frames` new ones; more than the limit need it empty.

        A client that overran its window cannot be heard and would wait for ever.
        """
        stalled = 0.0
        while session.answers.room < min(frames, session.answers.limit):
            if self._draining is not None:
                raise self._draining
            self._acked.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self._acked.wait()
            except TimeoutError:
                stalled = stalled + 1.0 if self._connection.crowded else 0.0
                if stalled >= STALLED_S:
                    raise TooMany(
                        f"{session.answers.limit} answers are not acknowledged and the window is overrun: acknowledge what you read",
                        next_frame=session.next_frame,
                    ) from None

    def _put(self, message: Message | ServiceError) -> None:
        self._queue.append(message)
        self._arrived.set()

    async def _receive(self) -> str | bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | None = message.get("text")
        data: bytes = message.get("bytes") or b""
        return data if text is None else text

    async def _send(self, message: str | bytes) -> None:
        await self._websocket.send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})

    async def _refuse(self, error: ServiceError) -> None:
        """Says what is wrong and closes with its code; the session, if any, stays to be resumed."""
        self._predictor.metrics.errors.labels(error.code).inc()
        last = write("draining", track=0, **error.to_dict()) if isinstance(error, Draining) else write_error(error)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may be gone already
            await self._send(last)
            await self._websocket.close(error.close_code, error.code)


def _payload(message: Frames) -> Payload:
    return Payload("json" if isinstance(message.payload, list) else "raw", message.payload, message.size, message.count)
