"""The websocket: reads messages for its tracks, is told when one of them is at its end, and may be stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from service.errors import Deadline, Draining, ServiceError, TooMany
from service.gate import SUBPROTOCOL, Gate
from service.predictor import Predictor
from service.protocol import Ack, Close, Connection, Frames, Message, Open, Refused, Reset, write
from service.sessions import KEPT_FRAMES
from service.tracks import Track

log = structlog.get_logger("streaming")

OPEN_WITHIN_S = 30.0  # a connection that opens nothing is closed


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
            stream.over.set()
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
                await asyncio.gather(*(stream.over.wait() for stream in self._streams))


class Stream:
    """One websocket with its tracks; the `Link` of each."""

    def __init__(self, websocket: WebSocket, predictor: Predictor, model: str) -> None:
        self.connection = Connection(KEPT_FRAMES)
        self.paused = False
        self.over = asyncio.Event()
        self._websocket = websocket
        self._predictor = predictor
        self._model = model
        self._tracks: dict[int, Track] = {}  # the latest of each number; one that is at its end is in none of the two
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._gone = False
        self._last: ServiceError | None = None
        self._end: asyncio.Future[ServiceError | None] = asyncio.get_running_loop().create_future()  # why it ends; None: all was closed

    def stop(self, error: ServiceError) -> None:
        """Ends the connection with this error, after the messages under way."""
        if self._last is not None:
            return
        self._last = error
        for track in self._tracks.values():
            track.finish(error)
        if not self._tasks:
            self._finish(error)

    async def run(self, admit: Callable[[], None]) -> None:
        """Serves until the client leaves, closes what it opened, errs, or is stopped."""
        try:
            admit()
            error = await self._serve()
            if error is not None:
                await self._refuse(error)
            elif not self._gone:
                await self._websocket.close(1000)
        except ServiceError as error:
            await self._refuse(error)
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("websocket failed", model=self._model)
            await self._refuse(ServiceError())

    async def _serve(self) -> ServiceError | None:
        """Reads until there is a reason to end, and returns it; then no track is at work any more."""
        reader = asyncio.create_task(self._read())
        try:
            waited_for: set[asyncio.Future[Any]] = {reader, self._end}
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
            return await self._end
        finally:
            tasks = {reader, *self._tasks}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _read(self) -> None:
        """Puts each message into its track. What cannot be read ends the connection, after the answers to what came before."""
        try:
            message = self.connection.open_by_query(self._websocket.query_params) or await self._first_message()
            while True:
                if isinstance(message, Frames | Reset | Close):
                    await self._put(message)
                elif isinstance(message, Ack):
                    self._tracks[message.track].acknowledge(message.first)
                elif isinstance(message, Open):
                    self._begin(message)
                elif isinstance(message, Refused):
                    await self._refuse_track(message)
                message = self.connection.receive(await self._receive())
        except ServiceError as error:
            self.stop(error)

    async def _first_message(self) -> Message | Refused | None:
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                return self.connection.receive(await self._receive())
        except TimeoutError:
            raise Deadline(f"no `open` within {OPEN_WITHIN_S:.0f} s") from None

    def _begin(self, message: Open) -> None:
        before = self._tracks.get(message.track)  # closed, but what came before may still be under way
        track = self._tracks[message.track] = Track(message.track, self, self._predictor, self._model)
        task = track.start(message, before)
        self._tasks.add(task)
        task.add_done_callback(self._track_done)
        if self._last is not None:
            track.finish(self._last)

    async def _put(self, message: Frames | Reset | Close) -> None:
        """Hands a message to its track; where that fills the connection, waits until enough is answered."""
        track = self._tracks[message.track]
        track.put(message)
        if self.connection.full(track.credit):
            self.paused = True
            track.look_again()
            while self.connection.full(track.credit):
                self._room.clear()
                await self._room.wait()
            self.paused = False

    async def _refuse_track(self, refused: Refused) -> None:
        if not self.connection.many:
            raise refused.error
        if self.connection.is_open(refused.track):
            self._tracks[refused.track].finish(refused.error)
        else:
            await self._tell(refused.error, refused.track)

    # ---- what its tracks tell

    async def send(self, message: str | bytes) -> None:
        if self._websocket.application_state is WebSocketState.DISCONNECTED:  # another track found the client gone; to send more is an error to Starlette
            raise WebSocketDisconnect(1006)
        await self._websocket.send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})

    def released(self) -> None:
        if self.paused:
            self._room.set()

    async def ended(self, track: Track, error: ServiceError | None) -> None:
        self.connection.ended(track.number, track.credit, refused=error is not None)
        if self._tracks.get(track.number) is track:
            del self._tracks[track.number]
        self.released()
        if not self.connection.many:
            self._finish(error)
        elif error is not None and error is not self._last:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may be gone already
                await self._tell(error, track.number)

    def lost(self) -> None:
        self._gone = True
        self._finish(None)

    def _track_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._last is not None and not self._tasks:
            self._finish(self._last)

    def _finish(self, error: ServiceError | None) -> None:
        if not self._end.done():
            self._end.set_result(error)

    # ---- the socket

    async def _receive(self) -> str | bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | None = message.get("text")
        data: bytes = message.get("bytes") or b""
        return data if text is None else text

    async def _tell(self, error: ServiceError, track: int | None) -> None:
        """Says what is wrong with a track; without one, with the connection. The session, if any, stays to be resumed."""
        self._predictor.metrics.errors.labels(error.code).inc()
        which = {} if track is None else {"track": track}
        await self.send(write("draining" if isinstance(error, Draining) else "error", **which, **error.to_dict()))

    async def _refuse(self, error: ServiceError) -> None:
        """Says what is wrong and closes with its code."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may be gone already
            await self._tell(error, None if self.connection.many else 0)
            await self._websocket.close(error.close_code, error.code)
