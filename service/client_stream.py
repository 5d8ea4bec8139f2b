"""A stream that outlives its socket: one session on one connection after another."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from websockets.exceptions import ConnectionClosed

from service import errors, protocol
from service.client_errors import StreamClosed, Unreachable, error_from
from service.client_ledger import Ledger, as_frames
from service.client_socket import Opener, Wire, refusal
from service.client_values import Answer, Event, OnEvent, Piece, Retry, Source, Timed, as_times, pieces
from service.detector import KEPT_EVENTS
from service.errors import ServiceError

_TEXT, _TEXT_NUMBER, _TEXT_TIME = 128, 20, 32  # bytes of a message as JSON, at most: for itself, for a number with its brackets, for a time
_GOODBYE_S = 5.0  # how long a server may take to confirm `close`
# Refusals that end by themselves; nothing was changed by what was refused. A gap is one of them: a message under way when the connection was
# lost may take effect after `opened`, so that what was sent again comes too late; the next `opened` counts it.
_PASSING = (errors.Unavailable, errors.TooMany, errors.Deadline, errors.Gap)


class AsyncStream:
    """One session on a connection that comes back when it is lost. Made by `AsyncClient.stream` and `AsyncTracks.stream`; use it as `async with`,
    or `open` it and `close` it.

    Frames sent whose answers are not yet read are at most `window`: beyond it `send` waits until answers are read, so read while you
    send, as `play` does. Every answer is delivered once and in order, whatever happens to the connection.

    Events, of models that have rules for them, are in the answer of the frame that decided them. `on_event` hears of the same, each once and in order, as
    soon as they arrive, and of what a reset has ended although no frame follows; what it raises ends the stream and comes out here.

    Everything raises `ServiceError` (what the server refuses), `Unreachable` (the connection did not come back), `StreamClosed`.
    """

    def __init__(self, opener: Opener, options: Mapping[str, Any], retry: Retry, on_event: OnEvent | None = None) -> None:
        self.session = ""
        self.model = self.version = self.task = ""
        self.classes: tuple[str, ...] = ()
        self.frame_shape: tuple[int, ...] = ()
        self.fps = 0.0
        self.window = 1  # frames
        self.warnings: list[str] = []  # what the server says one should know of this model or stream
        self.reconnects = 0
        self.connected = False
        self._opener, self._options, self._retry, self._on_event = opener, options, retry, on_event
        self._ledger = Ledger()
        self._turn = asyncio.Lock()  # one `send` at a time
        self._inbox: deque[Answer] = deque()
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)  # that were told; a server that comes back says again what it kept
        self._undelivered: deque[Event] = deque()  # whose answer has not come yet
        self._most = self._most_timed = 1  # frames in a message, and in one that carries their times
        self._attempt = 0  # to come back, since the last answer
        self._not_before = 0.0  # the server asked to wait until then, on time.monotonic's clock
        self._reason = "it is lost again whenever it is back"
        self._failure: Exception | None = None
        self._closing = False
        self._news = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def next_frame(self) -> int:
        """Number of the next frame: how many have been handed to `send` over the session's life."""
        return self._ledger.next_frame

    # ---- opening and closing

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> Self:
        """Opens the session; once only."""
        if self._pump is not None:
            raise StreamClosed("a stream is opened once; ask for another")
        wire, opened = await self._opener.open(self._options)
        self._note(opened)
        begin = opened["next_frame"]
        read, every = min(self._options.get("ack", begin), begin), self._options.get("scores") != "last"
        self._ledger = Ledger(begin, read, self.window, every=every, origin=opened.get("origin"))
        self._pump = asyncio.create_task(self._run(wire, begin))
        try:
            await self._until(lambda: self.connected)
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self, *, keep: bool = False) -> None:
        """Ends the stream and its session; `keep=True` leaves the session on the server, where its id opens it again until it expires.

        A server that is away, or does not answer soon, forgets the session by itself.
        """
        if self._pump is None:
            return
        self._closing = True
        try:
            if self.connected and not keep:
                self._ledger.close()
                self._news.set()
                await asyncio.wait([self._pump], timeout=_GOODBYE_S)
        finally:  # whoever cannot wait for the goodbye leaves nothing running
            self._pump.cancel()
            self._failure = self._failure or StreamClosed("this stream was closed")
            self._news.set()
        await asyncio.wait([self._pump])

    def _note(self, opened: dict[str, Any]) -> None:
        self.session = opened["session"]
        self.window = self._ledger.window = opened["window"]
        self.model, self.version, self.task = opened["model"], opened["version"], opened["task"]
        self.classes, self.frame_shape = tuple(opened["classes"]), tuple(opened["frame_shape"])
        self.fps = opened["options"]["fps"]
        room, numbers = opened["limits"]["message_bytes"], math.prod(self.frame_shape)
        self._most = max(1, min(self.window, (room - protocol.HEADER.size) // (4 * numbers)))
        self._most_timed = max(1, min(self.window, (room - _TEXT) // (_TEXT_NUMBER * numbers * len(self.frame_shape) + _TEXT_TIME)))
        if (warning := opened.get("warning")) and warning not in self.warnings:
            self.warnings.append(warning)

    # ---- the pump: one connection after another

    async def _run(self, wire: Wire, next_frame: int) -> None:
        try:
            while not await self._serve(wire, next_frame):
                wire, next_frame = await self._come_back()
            self._failure = StreamClosed("the stream was closed")
        except Exception as error:
            self._failure = error
        finally:
            self._news.set()

    async def _serve(self, wire: Wire, next_frame: int) -> bool:
        """Uses one wire to its end. True: closed as agreed; False: lost, to come back; raises what the server refuses for good."""
        began = time.monotonic()
        try:
            self._ledger.resume(next_frame)
            if await self._converse(wire):
                return True
        finally:
            await wire.close()
        if time.monotonic() - began > self._retry.longest_s:
            self._attempt = 0
        return self._closing

    async def _converse(self, wire: Wire) -> bool:
        writer = asyncio.create_task(self._write(wire))
        self.connected = True
        self._news.set()
        try:
            return await self._listen(wire)
        except _PASSING as error:
            self._wait(error)
            return False
        finally:
            self.connected = False
            writer.cancel()
            await asyncio.wait([writer])

    async def _write(self, wire: Wire) -> None:
        """The only one who writes to the wire, so that nothing is cut off, doubled or overtaken by whoever is cancelled elsewhere."""
        with suppress(ConnectionClosed):  # who listens sees it too
            while True:
                while (message := self._ledger.message()) is None:
                    self._news.clear()
                    await self._news.wait()
                await wire.send(message)

    async def _listen(self, wire: Wire) -> bool:
        """Acts on messages. True: the last one came; False: the connection was lost; raises what the server refuses."""
        try:
            async for message in wire:
                if self._take(message):
                    return True
        except ConnectionClosed as closed:
            error = refusal(closed)
            if isinstance(error, ServiceError) and not self._closing:
                raise error from None
        return False

    def _wait(self, error: ServiceError) -> None:
        self._reason, self._not_before = str(error), time.monotonic() + error.facts.get("retry_after", 0)

    async def _come_back(self) -> tuple[Wire, int]:
        """Attaches to the session again; raises `Unreachable` after the last attempt, or what the server refuses."""
        while self._attempt < self._retry.attempts:
            await asyncio.sleep(max(self._retry.pause_s(self._attempt), self._not_before - time.monotonic()))
            self._attempt += 1
            try:  # all scores: of the answers it kept the server would else send the last alone
                wire, opened = await self._opener.open({**self._options, "scores": "all", "session": self.session, "ack": self._ledger.read})
            except _PASSING as error:
                self._wait(error)
            except Unreachable as error:
                self._reason = str(error)
            else:
                self._note(opened)
                self.reconnects += 1
                return wire, opened["next_frame"]
        raise Unreachable(f"the connection was lost and {self._attempt} attempts to come back failed: {self._reason}")

    def _take(self, message: str | bytes) -> bool:
        """Acts on one message; whether it was the last."""
        if isinstance(message, bytes):
            self._take_scores(message)
            return False
        value = json.loads(message)
        match value.get("type"):
            case "error" | "draining":
                raise error_from(value)
            case "warning":
                self.warnings.append(value["warning"])
                self._ledger.forgo(value.get("kept_from", 0))
            case "event":
                self._take_event(Event.from_json(value))
            case "durable":
                self._ledger.secure(value["frame"])
        self._news.set()
        return bool(value.get("type") == "closed")

    def _take_scores(self, message: bytes) -> None:
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        if kind != protocol.KIND_SCORES or not count:
            return
        scores = np.frombuffer(message, "<f4", offset=protocol.HEADER.size).reshape(count, -1)
        classes = self.classes if self.task == "classification" else ()
        for frame in self._ledger.take(first, count):
            time = self._ledger.time(frame)
            answer = Answer.from_scores(frame, frame / self.fps if time is None else time, scores[frame - first], classes)
            self._inbox.append(dataclasses.replace(answer, events=self._events_until(frame)) if self._undelivered else answer)
        self._attempt = 0
        self._news.set()

    def _take_event(self, event: Event) -> None:
        if event not in self._events:
            self._events.append(event)
            self._undelivered.append(event)
            if self._on_event is not None:
                self._on_event(event)

    def _events_until(self, frame: int) -> tuple[Event, ...]:
        """Those that were decided at or before the frame and belong to no answer yet."""
        events = []
        while self._undelivered and self._undelivered[0].decided <= frame:
            events.append(self._undelivered.popleft())
        return tuple(events)

    # ---- sending and reading

    async def send(self, frames: npt.ArrayLike, t: npt.ArrayLike | None = None) -> int:
        """Hands over frames (count, *frame_shape), or one (*frame_shape); NaN is missing. Returns the number of the first.

        `t` (count,), or one number, is when the camera took them, where it keeps no rate: seconds on any clock, increasing, with every frame of a stream
        or with none; else `WrongTime`. Waits while `window` frames are sent whose answers are not read. More frames than that go in several messages.
        """
        array = as_frames(frames, self.frame_shape)
        times = None if t is None else as_times(t, len(array))
        most = self._most if times is None else self._most_timed
        async with self._turn:
            self._ledger.check(times)
            first = self.next_frame
            for start in range(0, len(array), most):
                piece = array[start : start + most]
                await self._room(len(piece))
                self._ledger.put(piece, None if times is None else times[start : start + most])
                self._news.set()
            return first

    async def reset(self) -> None:
        """Forgets the movement so far: the next frame is the first of a new one. Numbering goes on."""
        async with self._turn:
            await self._room(0)
            self._ledger.reset()
            self._news.set()

    async def _room(self, count: int) -> None:
        """Waits until `count` more frames fit into the window of a stream that is open."""
        await self._until(lambda: self._failure is None and not self._closing and self._ledger.fits(count))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Answer:
        """The next answer; waits for it without end while the stream is open. Stops when the stream was closed."""
        try:
            await self._until(lambda: bool(self._inbox))
        except StreamClosed:
            raise StopAsyncIteration from None
        return self._pop()

    async def play(self, source: Source, *, chunk: int = 1, t: npt.ArrayLike | None = None) -> AsyncGenerator[Answer, None]:
        """Sends a whole source and yields its answers, until the last; what the source raises comes out here.

        `source` is an array of frames, sent `chunk` at a time, with their times `t` where the camera keeps no rate; or an iterable, best asynchronous, of
        chunks as for `send`, each a `Timed` where it has times; its own pace is kept.
        """
        feeder = asyncio.create_task(self._feed(pieces(source, chunk, t)))
        feeder.add_done_callback(lambda _: self._news.set())

        def over() -> bool:
            return feeder.done() and (self._ledger.received >= self.next_frame or feeder.exception() is not None)

        try:
            while True:
                await self._until(lambda: bool(self._inbox) or over())
                if not self._inbox:
                    break
                yield self._pop()
            await feeder
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(self, chunks: AsyncIterator[Piece]) -> None:
        async for piece in chunks:
            await (self.send(piece.frames, piece.t) if isinstance(piece, Timed) else self.send(piece))

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds; raises the stream's failure where it can no longer come to hold."""
        while not holds():
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()

    def _pop(self) -> Answer:
        answer = self._inbox.popleft()
        self._ledger.mark_read(answer.frame)
        self._news.set()
        return answer
