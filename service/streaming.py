"""The websocket: hands messages to its tracks as they come, is told when one of them is at its end, and may be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog
from starlette.websockets import WebSocket

from service import notes
from service.errors import Deadline, Draining, ServiceError, SlowReader, TooMany
from service.gate import SUBPROTOCOL, Gate
from service.predictor import Predictor
from service.protocol import Ack, Close, Connection, Frames, Message, Open, Refused, Reset, write
from service.sessions import KEPT_FRAMES
from service.tracks import Track
from service.websocket import accept

log = structlog.get_logger("streaming")

OPEN_WITHIN_S = 30.0  # a connection that opens nothing is closed
SLOW_S = 20.0  # a client that reads nothing for so long, though answers pile up, is left


class Socket(Protocol):
    """The client's end of a websocket. Nothing raises once the client is gone; what is sent then is lost."""

    def send(self, message: str | bytes) -> None: ...
    def close(self, code: int, reason: str = "") -> None: ...
    def abort(self) -> None:
        """Closes without waiting for what was sent to be read."""

    def pause(self) -> None:
        """Nothing more is read, so that the client has to wait, until `resume`."""

    def resume(self) -> None: ...


class Sockets:
    """All open websockets, capped."""

    def __init__(self, predictor: Predictor, gate: Gate, most: int) -> None:
        self._predictor = predictor
        self._gate = gate
        self._most = most
        self._streams: set[Stream] = set()

    async def serve(self, websocket: WebSocket, model: str) -> None:
        """Serves one websocket to its end. Refusals come after the handshake, because browsers show no other."""
        notes.begin(request=secrets.token_hex(8))
        if self._predictor.traces is not None:
            self._predictor.traces.begin(websocket.headers)
        offered = websocket.scope.get("subprotocols", [])
        stream = Stream(self._predictor, model)
        socket = accept(websocket.scope, stream, SUBPROTOCOL if SUBPROTOCOL in offered else None)
        await self.run(stream, socket, websocket.query_params, lambda: self._admit(websocket, offered))

    async def run(self, stream: Stream, socket: Socket, query: Mapping[str, str], admit: Callable[[], None]) -> None:
        self._streams.add(stream)
        self._predictor.metrics.sockets_live.inc()
        try:
            await stream.run(socket, query, admit)
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
    """One websocket with its tracks; the `Link` of each. What a socket hears it is told by `feed`, `congested` and `left`."""

    def __init__(self, predictor: Predictor, model: str) -> None:
        self.connection = Connection(KEPT_FRAMES)
        self.paused = False
        self.over = asyncio.Event()
        self._socket: Socket
        self.send: Callable[[str | bytes], None]  # the socket's own: a call less for each answer
        self._predictor = predictor
        self._model = model
        self._tracks: dict[int, Track] = {}  # the latest of each number; one that is at its end is in none of the two
        self._tasks: set[asyncio.Task[None]] = set()
        self._backlog: deque[str | bytes] = deque()  # came before the socket was paused
        self._deaf = False  # nothing that comes matters any more
        self._slow: asyncio.TimerHandle | None = None
        self._last: ServiceError | None = None
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # with its notes: messages come from outside of any task
        self._end: asyncio.Future[ServiceError | None] = self._loop.create_future()  # why it ends; None: all was closed

    def stop(self, error: ServiceError) -> None:
        """Ends the connection with this error, after the messages under way."""
        if self._last is not None:
            return
        self._last = error
        for track in self._tracks.values():
            track.finish(error)
        if not self._tasks:
            self._finish(error)

    async def run(self, socket: Socket, query: Mapping[str, str], admit: Callable[[], None]) -> None:
        """Serves until the client leaves, closes what it opened, errs, or is stopped."""
        self._socket, self.send = socket, socket.send
        patience = self._loop.call_later(OPEN_WITHIN_S, self._nothing_opened)
        try:
            admit()
            if (message := self.connection.open_by_query(query)) is not None:
                self._take(message)
            error = await self._end
        except ServiceError as refused:
            error = refused
        finally:
            self._deaf = True
            patience.cancel()
            if self._slow is not None:
                self._slow.cancel()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
        if error is None:
            self._socket.close(1000)
        else:
            self._tell(error, None if self.connection.many else 0)
            self._socket.close(error.close_code, error.code)
            if isinstance(error, SlowReader):
                self._socket.abort()  # what was sent before is in the way of what was said just now

    # ---- what the socket tells

    def feed(self, data: str | bytes) -> None:
        """A message came. What cannot be read ends the connection, after the answers to what came before."""
        if self._deaf:
            return
        if self.paused:
            self._backlog.append(data)
            return
        try:
            self._take(self.connection.receive(data))
        except ServiceError as error:
            self._deaf = True
            self.stop(error)
        except Exception:
            log.exception("websocket failed", model=self._model)
            self._finish(ServiceError())

    def congested(self, yes: bool) -> None:
        """The client does not read, so that answers pile up; or it does again."""
        if yes and self._slow is None:
            self._slow = self._loop.call_later(SLOW_S, self._too_slow)
            self._socket.pause()  # who does not hear answers has nothing to say
        elif not yes and self._slow is not None:
            self._slow.cancel()
            self._slow = None
            if not self.paused:
                self._socket.resume()

    def left(self) -> None:
        """The client is gone."""
        self._finish(None)

    # ---- reading

    def _take(self, message: Message | Refused | None) -> None:
        kind = type(message)
        if kind is Frames or kind is Reset or kind is Close:
            track = self._tracks[message.track]  # type: ignore[union-attr]
            track.put(message)  # type: ignore[arg-type]
            if self.connection.full(track.credit):
                self.paused = True
                self._socket.pause()
                track.look_again()
        elif isinstance(message, Ack):
            self._tracks[message.track].acknowledge(message.first)
        elif isinstance(message, Open):
            self._begin(message)
        elif isinstance(message, Refused):
            self._refuse_track(message)

    def _begin(self, message: Open) -> None:
        before = self._tracks.get(message.track)  # closed, but what came before may still be under way
        track = self._tracks[message.track] = Track(message.track, self, self._predictor, self._model)
        task = self._context.run(track.start, message, before)
        self._tasks.add(task)
        task.add_done_callback(self._track_done)
        if self._last is not None:
            track.finish(self._last)

    def _refuse_track(self, refused: Refused) -> None:
        if not self.connection.many:
            raise refused.error
        if self.connection.is_open(refused.track):
            self._tracks[refused.track].finish(refused.error)
        else:
            self._tell(refused.error, refused.track)

    def _nothing_opened(self) -> None:
        if not self.connection.begun:
            self._finish(Deadline(f"no `open` within {OPEN_WITHIN_S:.0f} s"))

    def _too_slow(self) -> None:
        self._finish(SlowReader(f"nothing was read for {SLOW_S:.0f} s though answers were waiting: read them, or ask for fewer"))

    # ---- what its tracks tell

    def released(self) -> None:
        """Reads on if that is possible now, first of all what had been read already."""
        if not self.paused or not self.connection.has_room():
            return
        self.paused = False
        while self._backlog and not self.paused:
            self.feed(self._backlog.popleft())
        if not self.paused and self._slow is None:
            self._socket.resume()

    def ended(self, track: Track, error: ServiceError | None) -> None:
        self.connection.ended(track.number, track.credit, refused=error is not None)
        if self._tracks.get(track.number) is track:
            del self._tracks[track.number]
        self.released()
        if not self.connection.many:
            self._finish(error)
        elif error is not None and error is not self._last:
            self._tell(error, track.number)

    def _track_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._last is not None and not self._tasks:
            self._finish(self._last)

    def _finish(self, error: ServiceError | None) -> None:
        if not self._end.done():
            self._end.set_result(error)

    def _tell(self, error: ServiceError, track: int | None) -> None:
        """Says what is wrong with a track; without one, with the connection. The session, if any, stays to be resumed."""
        self._predictor.metrics.errors.labels(error.code).inc()
        which: dict[str, Any] = {} if track is None else {"track": track}
        self.send(write("draining" if isinstance(error, Draining) else "error", **which, **error.to_dict()))
