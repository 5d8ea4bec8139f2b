"""A stream that outlives its socket: one session on one connection after another."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, Self

import numpy.typing as npt
from websockets.exceptions import ConnectionClosed

from service import errors, protocol
from service.client_errors import ClientError, StreamClosed, Unreachable
from service.client_inbox import Inbox
from service.client_ledger import Ledger, as_frames
from service.client_notices import Notices, OnNotice, Served
from service.client_patience import Patience
from service.client_socket import Opener, Wire, refusal, told
from service.client_values import Answer, Event, OnEvent, Piece, Retry, Source, Timed, as_times, pieces
from service.errors import ServiceError

_TEXT, _TEXT_NUMBER, _TEXT_TIME = 128, 20, 32  # bytes of a message as JSON, at most: for itself, for a number with its brackets, for a time
_GOODBYE_S = 5.0  # how long a server may take to confirm `close`
_CHANGE_S = 2.0  # how long after `opened` a server may take to say that its model is another one; it says so at once
_GLANCE_S = 0.05  # the same where that is not likely, and waiting is a delay
_LEAST_S = 0.1  # that an attempt may take, however late it comes
_STALLED_S = 5.0  # how long a program may wait for the store before it is told why
# Refusals that end by themselves; nothing was changed by what was refused. A gap is one of them: a message under way when the connection was
# lost may take effect after `opened`, so that what was sent again comes too late; the next `opened` counts it.
_PASSING = (errors.Unavailable, errors.TooMany, errors.Deadline, errors.Gap)


class AsyncStream:
    """One session on a connection that comes back when it is lost. Made by `AsyncClient.stream` and `AsyncTracks.stream`; use it as `async with`,
    or `open` it and `close` it.

    Frames sent whose answers are not yet read are at most `window`: beyond it `send` waits until answers are read, so read while you
    send, as `play` does. Every answer is delivered once and in order, whatever happens to the connection.

    Where sessions are kept in a store, a server may die at any moment: the stream goes on elsewhere, and its program notices a pause. For that frames
    are kept until the store has them, see `Retry`; if that takes long `send` waits.

    Events, of models that have rules for them, are in the answer of the frame that decided them. `on_event` hears of the same, each once and in order, as
    soon as they arrive, and of what a reset has ended although no frame follows. `on_notice` hears `Warned`, and `ModelChanged` before the first answer of
    the other model, which has it as `changed` as well. What listeners raise ends the stream and comes out here.

    Everything raises `ServiceError` (what the server refuses), `Unreachable` (the connection did not come back), `StreamClosed`.
    """

    def __init__(self, opener: Opener, options: Mapping[str, Any], retry: Retry, on_event: OnEvent | None = None, on_notice: OnNotice | None = None) -> None:
        self.session = ""
        self.frame_shape: tuple[int, ...] = ()
        self.fps = 0.0
        self.window = 1  # frames
        self.durability: str | None = None  # of what the server calls durable; None: sessions end with it
        self.reconnects = 0
        self.connected = False
        self._opener, self._options, self._retry = opener, options, retry
        self._notices = Notices(on_notice)
        self._ledger = Ledger()
        self._inbox = Inbox(on_event, self._notices)
        self._turn = asyncio.Lock()  # one `send` at a time
        self._most = self._most_timed = 1  # frames in a message, and in one that carries their times
        self._patience = Patience(retry)
        self._began = 0.0  # the present connection
        self._early: str | bytes | None = None  # that was read while another was looked for
        self._failure: Exception | None = None
        self._closing = False
        self._news = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def next_frame(self) -> int:
        """Number of the next frame: how many have been handed to `send` over the session's life."""
        return self._ledger.next_frame

    @property
    def model(self) -> str:
        return self._inbox.served.name

    @property
    def version(self) -> str:
        """Of the model, as its server has it now."""
        return self._inbox.served.version

    @property
    def task(self) -> str:
        return self._inbox.served.task

    @property
    def classes(self) -> tuple[str, ...]:
        return self._inbox.served.classes

    @property
    def warnings(self) -> list[str]:
        """What one should know of this model or stream, each once."""
        return self._notices.warnings

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
        changed = await self._expect_change(wire, _GLANCE_S) if "session" in self._options and opened.get("durability") else None
        begin = changed["frame"] if changed else opened["next_frame"]
        read, every = min(self._options.get("ack", begin), begin), self._options.get("scores") != "last"
        self._ledger = Ledger(begin, read, opened["window"], every=every, origin=opened.get("origin"))
        self._inbox.begin(Served.from_opened(opened), read)
        self._note(opened)
        self._ledger.resume(begin)
        if changed:
            self._renew(changed)
        self._pump = asyncio.create_task(self._run(wire))
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
        self.frame_shape, self.fps = tuple(opened["frame_shape"]), opened["options"]["fps"]
        self.durability = opened.get("durability")
        numbers_bytes = 4 * math.prod(self.frame_shape)
        self._ledger.agree(self.durability is not None, opened.get("horizon", 0), self._retry.frames(numbers_bytes))
        room, text_bytes = opened["limits"]["message_bytes"], _TEXT_NUMBER * math.prod(self.frame_shape) * len(self.frame_shape) + _TEXT_TIME
        self._most = max(1, min(self.window, (room - protocol.HEADER.size) // numbers_bytes))
        self._most_timed = max(1, min(self.window, (room - _TEXT) // text_bytes))
        if (warning := opened.get("warning")) and warning not in self.warnings:
            self._notices.warn(warning)

    # ---- the pump: one connection after another

    async def _run(self, wire: Wire) -> None:
        try:
            while not await self._serve(wire):
                wire = await self._come_back()
            self._failure = StreamClosed("the stream was closed")
        except Exception as error:
            self._failure = error
        finally:
            self._news.set()

    async def _serve(self, wire: Wire) -> bool:
        """Uses one wire to its end. True: closed as agreed; False: lost, to come back; raises what the server refuses for good."""
        self._began = self._now()
        try:
            return await self._converse(wire) or self._closing
        finally:
            await wire.close()

    async def _converse(self, wire: Wire) -> bool:
        writer = asyncio.create_task(self._write(wire))
        self.connected = True
        self._news.set()
        try:
            return await self._listen(wire)
        except _PASSING as error:
            self._lost(error)
            if isinstance(error, errors.Draining):
                self._opener.leave(wire)
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
        early, self._early = self._early, None
        if early is not None and self._take(early):
            return True
        try:
            async for message in wire:
                if self._take(message):
                    return True
        except ConnectionClosed as closed:
            error = refusal(closed)
            if isinstance(error, ServiceError) and not self._closing:
                raise error from None
            self._lost(error)
        return False

    def _lost(self, error: Exception) -> None:
        if self._now() - self._began > self._retry.longest_s:  # it was back, though nothing was answered
            self._patience.succeeded()
        self._patience.failed(error, self._now())

    # ---- coming back

    async def _come_back(self) -> Wire:
        """Attaches to the session again; raises `Unreachable` when it takes too long, or what the server refuses."""
        while (pause := self._patience.pause_s(self._now())) is not None:
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(max(_LEAST_S, self._patience.left_s(self._now()))):
                    wire, opened = await self._open_again()
            except (*_PASSING, Unreachable) as error:
                self._patience.failed(error, self._now())
            except TimeoutError:
                self._patience.failed(Unreachable("no answer"), self._now())
            else:
                try:
                    await self._reconcile(wire, opened)
                except BaseException:
                    await wire.close()
                    raise
                return wire
        raise Unreachable(f"the connection {self._patience.given_up()}")

    async def _open_again(self) -> tuple[Wire, dict[str, Any]]:
        options = {name: value for name, value in self._options.items() if name != "version"}  # that it began with; by now it may be gone
        options["scores"] = "all"  # of the answers it kept the server would else send the last alone
        try:
            return await self._opener.open({**options, "session": self.session, "ack": self._ledger.read})
        except errors.SessionExpired:
            raise
        except errors.SessionNotFound:
            if not self._ledger.whole:
                raise
            return await self._opener.open({**options, "version": self.version})  # its server died before the store had heard of it

    async def _reconcile(self, wire: Wire, opened: dict[str, Any]) -> None:
        """Finds what the server of this wire needs, which may have less than the one before, and another model."""
        if tuple(opened["frame_shape"]) != self.frame_shape:
            raise ClientError(f"version {opened['version']} is served now and takes frames of shape {opened['frame_shape']}: open a new stream")
        served = Served.from_opened(opened)
        self._note(opened)
        plain = served.is_like(self._inbox.served) and opened["next_frame"] >= self._ledger.durable
        changed = None if plain else await self._expect_change(wire, _CHANGE_S)
        self._inbox.connect(served, opened["next_frame"])
        if changed is None:
            self._ledger.resume(opened["next_frame"])
        else:
            self._renew(changed)
        self.reconnects += 1

    async def _expect_change(self, wire: Wire, within_s: float) -> dict[str, Any] | None:
        """The `model_changed` that comes right after an `opened`, before anything may be sent. Where another message comes, that is heard later."""
        try:
            async with asyncio.timeout(within_s):
                message = await wire.recv()
        except (TimeoutError, ConnectionClosed):
            return None
        if isinstance(message, str):
            value: dict[str, Any] = json.loads(message)
            if value.get("type") == "model_changed":
                return value
        self._early = message
        return None

    def _renew(self, message: Mapping[str, Any]) -> None:
        """Another model begins with nothing: it is shown what is left of its past."""
        begin = self._ledger.renew(message["frame"], message["warm_from"])
        self._inbox.change(message, begin)
        if begin > (lost := self._ledger.received):
            self._notices.warn(f"answers of frames {lost} to {begin - 1} went with the model that gave them", "answers_forgotten")
            self._ledger.forgo(begin)

    # ---- what comes

    def _take(self, message: str | bytes) -> bool:
        """Acts on one message; whether it was the last."""
        if isinstance(message, bytes):
            if self._inbox.take_scores(message, self._ledger, self.fps):
                self._patience.succeeded()
            self._news.set()
            return False
        value = json.loads(message)
        match value.get("type"):
            case "error" | "draining":
                raise told(value)
            case "warning":
                self._notices.warn(value["warning"], value.get("code", ""))
                self._ledger.forgo(value.get("kept_from", 0))
            case "event":
                self._inbox.take_event(Event.from_json(value))
            case "durable":
                self._ledger.secure(value["frame"])
            case "model_changed":  # of a session that another program has streamed before, whose frames are not here
                self._inbox.change(value, value["frame"])
        self._news.set()
        return bool(value.get("type") == "closed")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

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
        """Waits until `count` more frames fit into the window of a stream that is open, and what was sent before needs not all be kept."""

        def fits() -> bool:
            return self._failure is None and not self._closing and self._ledger.fits(count)

        while not fits():
            with suppress(TimeoutError):
                async with asyncio.timeout(_STALLED_S):
                    await self._until(fits)
            if self._ledger.brims(count) and not fits():
                why = "sending waits: the store of sessions has not confirmed the frames sent so far, and no more of them can be kept here"
                self._notices.warn(why, "not_durable")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Answer:
        """The next answer; waits for it without end while the stream is open. Stops when the stream was closed."""
        try:
            await self._until(lambda: bool(self._inbox.answers))
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
                await self._until(lambda: bool(self._inbox.answers) or over())
                if not self._inbox.answers:
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
        answer = self._inbox.answers.popleft()
        self._ledger.mark_read(answer.frame)
        self._news.set()
        return answer
