"""The Python client: clips, sessions and live streams of a running service, asynchronous (`AsyncClient`) and plain (`Client`).

    with Client("http://127.0.0.1:8000") as client:
        print(client.predict("rehab-exercises", frames).label)
        with client.stream("rehab-exercises") as stream:
            for answer in stream.play(chunks):
                print(answer.frame, answer.label, answer.score)

A stream outlives its socket: when the connection is lost the client comes back to the same session, sends again what the server has not
taken, and delivers every answer once, in order. What the service refuses is raised as the classes of `service.errors`, with `code` and `facts`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from service import errors, protocol
from service.errors import ServiceError

Frames = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]
Source = Frames | Iterable[npt.ArrayLike] | AsyncIterable[npt.ArrayLike]
ScoresOption = Literal["last", "all", "none"]
T = TypeVar("T")

TOP = 5  # classes in an answer's `top`
_GOODBYE_S = 5.0  # how long a server may take to confirm `close`
_COME_BACK_CODES = (1000, 1001, 1005, 1006, 1011, 1012, 1013, 1014)  # connections closed with these are tried again, others were refused
_COME_BACK_STATUSES = (502, 503, 504)  # the same for handshakes: a proxy without its server
_PASSING = (errors.Unavailable, errors.TooMany, errors.Deadline)  # refusals that end by themselves; nothing was changed by what was refused


class ClientError(Exception):
    """The service could not be reached or does not speak the protocol; what the service itself refuses is a `ServiceError`."""


class Unreachable(ClientError):
    """No connection: nothing listens there, or the connection was lost and did not come back within the retries."""


class StreamClosed(ClientError):
    """The stream was closed; it takes and gives nothing any more."""


@dataclass(frozen=True)
class Retry:
    """How a lost stream comes back: pauses double from `first_s` to `longest_s`; `attempts` in a row without an answer are the end."""

    attempts: int = 10
    first_s: float = 0.1
    longest_s: float = 5.0

    def pause_s(self, attempt: int) -> float:
        """Before attempt 0, 1, ...; up to half of it is chance, so that many clients do not come back at once."""
        return float(min(self.longest_s, self.first_s * 2.0**attempt) * random.uniform(0.5, 1.0))


@dataclass(frozen=True)
class Model:
    """What a served model is; `info` is all that the service tells of it, `info["manifest"]` the manifest."""

    name: str
    version: str
    task: str
    frame_shape: tuple[int, ...]
    classes: tuple[str, ...]
    fps: float
    layout: str | None
    info: dict[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Model:
        manifest = value["manifest"]
        return cls(
            name=value["name"],
            version=value["version"],
            task=manifest["task"],
            frame_shape=tuple(manifest["frame_shape"]),
            classes=tuple(manifest["classes"]),
            fps=manifest["fps"],
            layout=manifest["layout"],
            info=value,
        )


@dataclass(frozen=True)
class Answer:
    """What the model says at one frame of a stream, or at the last frame of a clip or message.

    `label`, `score` and `top` (best first) exist for classification only. `scores` has shape (classes,); (count, classes) where a call
    asked for `scores="all"`; None where it asked for none.
    """

    frame: int  # of the stream, as the client counts
    time: float  # seconds of the stream since its frame 0
    label: str | None
    score: float | None
    top: tuple[tuple[str, float], ...] = field(repr=False)
    scores: Scores | None = field(repr=False)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        scores = value.get("scores")
        return cls(
            frame=value["frame"],
            time=value["time"],
            label=value.get("label"),
            score=value.get("score"),
            top=tuple((entry["label"], entry["score"]) for entry in value.get("top", ())),
            scores=None if scores is None else np.array(scores, np.float32),
        )


def error_from(value: Mapping[str, Any]) -> ServiceError:
    """The service's error as it was raised there: the class by its `code`, with message and facts; a newer code than ours keeps its name."""
    facts = {key: fact for key, fact in value.items() if key not in ("type", "track", "code", "error")}
    code, message = value.get("code", "internal"), str(value.get("error", "no reason given"))
    kind = _CLASSES.get(code)
    if kind is None:
        error = ServiceError(message, **facts)
        error.code = code  # type: ignore[misc]
        return error
    return kind(message, **facts)


def _tree(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_CLASSES = {kind.code: kind for kind in _tree(ServiceError)}


# ---- what a stream keeps until the server has it for good


@dataclass(frozen=True)
class _Chunk:
    first: int
    frames: Frames

    @property
    def end(self) -> int:
        return self.first + len(self.frames)

    def message(self, next_frame: int) -> bytes | None:
        """What a server that has taken `next_frame` frames still needs of it."""
        known = max(0, next_frame - self.first)
        return protocol.write_frames(self.first + known, self.frames[known:]) if known < len(self.frames) else None


@dataclass(frozen=True)
class _Reset:
    first: int  # its place: frames before it belong to the old movement

    @property
    def end(self) -> int:
        return self.first

    def message(self, next_frame: int) -> str | None:
        return json.dumps({"type": "reset", "at": self.first}) if next_frame <= self.first else None  # repeating one does nothing


class AsyncStream:
    """One session on a websocket that comes back when it is lost. Made by `AsyncClient.stream`; use it as `async with`.

    Frames sent whose answers are not yet read are at most `window`: beyond it `send` waits until answers are read, so read while you
    send, as `play` does. Every answer is delivered once and in order, whatever happens to the connection.

    Everything raises `ServiceError` (what the server refuses), `Unreachable` (the connection did not come back), `StreamClosed`.
    """

    def __init__(self, dial: Callable[[], Awaitable[ClientConnection]], options: dict[str, Any], retry: Retry) -> None:
        self.session = ""
        self.model = self.version = self.task = ""
        self.classes: tuple[str, ...] = ()
        self.frame_shape: tuple[int, ...] = ()
        self.fps = 0.0
        self.window = 1  # frames
        self.warnings: list[str] = []  # what the server says one should know of this model or stream
        self.reconnects = 0
        self._dial, self._options, self._retry = dial, options, retry
        self._socket: ClientConnection | None = None  # while new messages may be written to it
        self._wire = asyncio.Lock()  # what is written keeps its order
        self._turn = asyncio.Lock()  # one `send` at a time
        self._kept: deque[_Chunk | _Reset] = deque()
        self._inbox: deque[Answer] = deque()
        self._most = 1  # frames in a message
        self._next = 0  # number of the next frame to send
        self._received = 0  # answers of frames below are in the inbox or were read
        self._read = 0  # answers of frames below were read
        self._acked = 0
        self._durable: int | None = None  # frames below survive the server's end; None: it promises nothing, its memory counts
        self._attempt = 0  # to come back, since the last answer
        self._not_before = 0.0  # the server asked to wait until then, on time.monotonic's clock
        self._reason = "it is lost again whenever it is back"
        self._failure: Exception | None = None
        self._closing = False
        self._news = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._socket is not None

    @property
    def next_frame(self) -> int:
        """Number of the next frame: how many have been handed to `send` over the session's life."""
        return self._next

    # ---- opening and closing

    async def __aenter__(self) -> Self:
        socket, opened = await self._attach(self._options)
        self._next = opened["next_frame"]
        self._received = self._read = self._acked = min(self._options.get("ack", self._next), self._next)
        self._pump = asyncio.create_task(self._run(socket, self._next))
        try:
            await self._until(lambda: self.connected)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self, *, keep: bool = False) -> None:
        """Ends the stream and its session; `keep=True` leaves the session on the server, where its id opens it again until it expires."""
        pump, self._pump = self._pump, None
        if pump is None:
            return
        self._closing = True
        if not keep:
            await self._say_goodbye(pump)
        pump.cancel()
        with suppress(asyncio.CancelledError):
            await pump
        self._failure = self._failure or StreamClosed("this stream was closed")
        self._news.set()

    async def _say_goodbye(self, pump: asyncio.Task[None]) -> None:
        """Asks the server to end the session and waits for it; a server that is away forgets the session by itself."""
        if self._socket is not None:
            with suppress(ConnectionClosed, TimeoutError):
                await asyncio.wait_for(self._write(json.dumps({"type": "close"})), _GOODBYE_S)
                await asyncio.wait([pump], timeout=_GOODBYE_S)

    async def _attach(self, options: Mapping[str, Any]) -> tuple[ClientConnection, dict[str, Any]]:
        """A socket on which the server has said `opened`, and what it said; raises what it refuses or `Unreachable`."""
        socket = await self._dial()
        try:
            await socket.send(json.dumps({"type": "open", **options}))
            opened = await _opened(socket)
        except ConnectionClosed as closed:
            raise _refusal(closed) from None
        except BaseException:
            await socket.close()
            raise
        self._note(opened)
        return socket, opened

    def _note(self, opened: dict[str, Any]) -> None:
        self.session, self.window = opened["session"], opened["window"]
        self.model, self.version, self.task = opened["model"], opened["version"], opened["task"]
        self.classes, self.frame_shape = tuple(opened["classes"]), tuple(opened["frame_shape"])
        self.fps = opened["options"]["fps"]
        frame_bytes = 4 * math.prod(self.frame_shape)
        self._most = max(1, min(self.window, (opened["limits"]["message_bytes"] - protocol.HEADER.size) // frame_bytes))
        if (warning := opened.get("warning")) and warning not in self.warnings:
            self.warnings.append(warning)

    # ---- the pump: reads what comes, comes back when the socket is lost

    async def _run(self, socket: ClientConnection, next_frame: int) -> None:
        try:
            while not await self._serve(socket, next_frame):
                socket, next_frame = await self._come_back()
            self._failure = StreamClosed("the stream was closed")
        except Exception as error:
            self._failure = error
        finally:
            self._news.set()

    async def _serve(self, socket: ClientConnection, next_frame: int) -> bool:
        """Reads one socket to its end. True: closed as agreed; False: lost, to come back; raises what the server refuses for good."""
        began = time.monotonic()
        replay = asyncio.create_task(self._replay(socket, next_frame))
        try:
            if await self._listen(socket):
                return True
        except _PASSING as error:
            self._wait(error)
        finally:
            self._socket = None
            replay.cancel()
            await asyncio.gather(replay, return_exceptions=True)
            await socket.close()
        if time.monotonic() - began > self._retry.longest_s:
            self._attempt = 0
        return self._closing

    async def _listen(self, socket: ClientConnection) -> bool:
        """Acts on messages. True: the last one came; False: the connection was lost; raises what the server refuses."""
        try:
            async for message in socket:
                if self._take(message):
                    return True
        except ConnectionClosed as closed:
            refusal = _refusal(closed)
            if isinstance(refusal, ServiceError) and not self._closing:
                raise refusal from None
        return False

    def _wait(self, error: ServiceError) -> None:
        self._reason, self._not_before = str(error), time.monotonic() + error.facts.get("retry_after", 0)

    async def _replay(self, socket: ClientConnection, next_frame: int) -> None:
        """Sends again what a server that has taken `next_frame` frames has not got; only then may new messages follow."""
        async with self._wire:
            self._acked = self._read
            await socket.send(_ack(self._read))
            for item in list(self._kept):
                if (message := item.message(next_frame)) is not None:
                    await socket.send(message)
            self._socket = socket
            self._news.set()

    async def _come_back(self) -> tuple[ClientConnection, int]:
        """Attaches to the session again; raises `Unreachable` after the last attempt, or what the server refuses."""
        while self._attempt < self._retry.attempts:
            await asyncio.sleep(max(self._retry.pause_s(self._attempt), self._not_before - time.monotonic()))
            self._attempt += 1
            try:
                socket, opened = await self._attach({**self._options, "session": self.session, "ack": self._read})
            except _PASSING as error:
                self._wait(error)
            except Unreachable as error:
                self._reason = str(error)
            else:
                self._check_known(opened["next_frame"])
                self.reconnects += 1
                return socket, opened["next_frame"]
        raise Unreachable(f"the connection was lost and {self._attempt} attempts to come back failed: {self._reason}")

    def _check_known(self, next_frame: int) -> None:
        """Raises `Gap` where the server has lost frames that are no longer kept here, or has frames that were never sent from here."""
        oldest = self._kept[0].first if self._kept else self._next
        if not oldest <= next_frame <= self._next:
            raise errors.Gap(f"the session came back at frame {next_frame}, this client has frames {oldest} to {self._next}", next_frame=next_frame)

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
            case "durable":
                self._durable = value["frame"]
                self._forget()
        return bool(value.get("type") == "closed")

    def _take_scores(self, message: bytes) -> None:
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        if kind != protocol.KIND_SCORES or not count:
            return
        scores = np.frombuffer(message, "<f4", offset=protocol.HEADER.size).reshape(count, -1)
        for frame, row in enumerate(scores, first):
            if frame >= self._received:  # else answered before a connection was lost
                self._inbox.append(self._answer(frame, row))
        self._received = max(self._received, first + count)
        self._attempt = 0
        self._news.set()

    def _answer(self, frame: int, scores: Scores) -> Answer:
        if self.task != "classification":
            return Answer(frame, frame / self.fps, None, None, (), scores)
        order = np.argsort(-scores, kind="stable")[:TOP]
        top = tuple((self.classes[index], float(scores[index])) for index in order.tolist())
        return Answer(frame, frame / self.fps, *top[0], top, scores)

    # ---- sending and reading

    async def send(self, frames: npt.ArrayLike) -> int:
        """Hands over frames (count, *frame_shape), or one (*frame_shape); NaN is missing. Returns the number of the first.

        Waits while `window` frames are sent whose answers are not read. More frames than that go in several messages.
        """
        array = self._checked(frames)
        async with self._turn:
            first = self._next
            for start in range(0, len(array), self._most):
                piece = array[start : start + self._most]
                await self._room(len(piece))
                await asyncio.shield(self._put(_Chunk(self._next, piece)))  # numbered and written, or neither
            return first

    async def reset(self) -> None:
        """Forgets the movement so far: the next frame is the first of a new one. Numbering goes on."""
        async with self._turn:
            await asyncio.shield(self._put(_Reset(self._next)))

    async def _room(self, count: int) -> None:
        """Waits until `count` more frames fit into the window. The server counts from the last ack, so one is sent where that is in the way."""
        await self._until(lambda: self._next + count - self._read <= self.window)
        if self._next + count - self._acked > self.window:
            await self._acknowledge()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Answer:
        """The next answer; waits for it without end while the stream is open. Stops when the stream was closed."""
        try:
            await self._until(lambda: bool(self._inbox))
        except StreamClosed:
            raise StopAsyncIteration from None
        return await self._pop()

    async def play(self, source: Source, *, chunk: int = 1) -> AsyncGenerator[Answer, None]:
        """Sends a whole source and yields its answers, until the last; what the source raises comes out here.

        `source` is an array of frames, sent `chunk` at a time, or an iterable, best asynchronous, of chunks as for `send`; its own pace is kept.
        """
        feeder = asyncio.create_task(self._feed(_chunks(source, chunk)))
        feeder.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                await self._until(lambda: bool(self._inbox) or (feeder.done() and (self._received >= self._next or feeder.exception() is not None)))
                if not self._inbox:
                    break
                yield await self._pop()
            await feeder
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(self, chunks: AsyncIterator[npt.ArrayLike]) -> None:
        async for piece in chunks:
            await self.send(piece)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds; raises the stream's failure where it can no longer come to hold."""
        while not holds():
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()

    async def _pop(self) -> Answer:
        answer = self._inbox.popleft()
        self._read = answer.frame + 1
        self._forget()
        self._news.set()
        if self._read - self._acked >= max(1, self.window // 4):
            await self._acknowledge()
        return answer

    async def _acknowledge(self) -> None:
        self._acked = self._read
        await self._write(_ack(self._acked))

    async def _put(self, item: _Chunk | _Reset) -> None:
        """Keeps and writes in one: a replay in between would send it twice or not at all."""
        if self._failure is not None:
            raise self._failure
        async with self._wire:
            self._kept.append(item)
            self._next = item.end
            message = item.message(item.first)
            if self._socket is not None and message is not None:
                with suppress(ConnectionClosed):  # the pump will see it too, and come back
                    await self._socket.send(message)

    async def _write(self, message: str | bytes) -> None:
        async with self._wire:
            if self._socket is not None:
                with suppress(ConnectionClosed):
                    await self._socket.send(message)

    def _forget(self) -> None:
        """Drops what the server will never need again: answered, and durable where the server promises that."""
        safe = self._read if self._durable is None else min(self._read, self._durable)
        while self._kept and self._kept[0].end <= safe and (isinstance(self._kept[0], _Chunk) or len(self._kept) > 1):
            self._kept.popleft()

    def _checked(self, frames: npt.ArrayLike) -> Frames:
        array = np.ascontiguousarray(frames, np.float32)
        if array.shape == self.frame_shape:
            array = array[None]
        if array.shape[1:] != self.frame_shape:
            raise errors.WrongShape(f"expected frames of shape (count, {', '.join(map(str, self.frame_shape))}), got {array.shape}")
        if not len(array):
            raise errors.Empty("no frames: send at least one")
        return array


async def _opened(socket: ClientConnection) -> dict[str, Any]:
    while True:
        message = await socket.recv()
        value: dict[str, Any] = json.loads(message) if isinstance(message, str) else {}
        if value.get("type") in ("error", "draining"):
            raise error_from(value)
        if value.get("type") == "opened":
            return value


def _ack(first: int) -> bytes:
    return protocol.HEADER.pack(protocol.VERSION, protocol.KIND_ACK, 0, 0, first)


def _refusal(closed: ConnectionClosed) -> ServiceError | Unreachable:
    """What a closed connection means: a refusal by its close code, or a loss after which one may come back."""
    code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
    if code in _COME_BACK_CODES:
        return Unreachable(f"the connection was closed with {code} {reason}".rstrip())
    kind = next((kind for kind in _CLASSES.values() if kind.code == reason or kind.close_code == code), ServiceError)
    return kind(reason or f"the connection was closed with {code}")


async def _chunks(source: Source, chunk: int) -> AsyncIterator[npt.ArrayLike]:
    if isinstance(source, AsyncIterable):
        async for piece in source:
            yield piece
    elif isinstance(source, np.ndarray):
        for start in range(0, len(source), chunk):
            yield source[start : start + chunk]
    else:
        for piece in source:
            yield piece


# ---- the clients


class AsyncClient:
    """Talks to one service. Use it as `async with`.

    Calls raise the service's errors as classes of `service.errors`, and `Unreachable`.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout_s: float = 30.0, retry: Retry | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r} is no address of a service; it looks like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        self._retry = retry or Retry()
        self._http = httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """A summary of each: name, version, frame shape, ..."""
        return list((await self._call("GET", "/v1/models"))["models"])

    async def model(self, name: str, version: str | None = None) -> Model:
        return Model.from_json(await self._call("GET", f"/v1/models/{_part(name)}", version=version))

    async def predict(
        self, name: str, frames: npt.ArrayLike, *, version: str | None = None, layout: str | None = None, scores: ScoresOption = "last", top_k: int = TOP
    ) -> Answer:
        """Classifies a clip (count, *frame_shape) on its own; NaN is missing."""
        query = {"version": version, "layout": layout, "scores": scores, "top_k": top_k}
        return Answer.from_json(await self._call("POST", f"/v1/models/{_part(name)}/predict", frames, **query))

    def stream(
        self,
        name: str,
        *,
        version: str | None = None,
        session: str | None = None,
        ack: int | None = None,
        fps: float | None = None,
        layout: str | None = None,
        scores: Literal["last", "all"] = "all",
    ) -> AsyncStream:
        """A stream on a new session, or on `session`; then `ack` asks for its kept answers from that frame on."""
        given = {"version": version, "session": session, "ack": ack, "fps": fps, "layout": layout, "scores": scores, "answers": "binary"}
        address = f"ws{self.url.removeprefix('http')}/v1/models/{_part(name)}/stream"
        return AsyncStream(lambda: self._dial(address), _given(given), self._retry)

    # Sessions over REST: for programs that post frames now and then.

    async def open_session(self, name: str, *, version: str | None = None, layout: str | None = None) -> dict[str, Any]:
        """A new session; `session` in the result is its id, `next_frame` the number of its first frame."""
        return await self._call("POST", f"/v1/models/{_part(name)}/sessions", version=version, layout=layout)

    async def session(self, session: str) -> dict[str, Any]:
        return await self._call("GET", f"/v1/sessions/{_part(session)}")

    async def advance(
        self, session: str, first: int, frames: npt.ArrayLike, *, ack: int | None = None, scores: ScoresOption = "last", top_k: int = TOP
    ) -> Answer:
        """Sends frames (count, *frame_shape) of which the first has number `first`; may be repeated when the answer was lost."""
        query = {"first": first, "ack": ack, "scores": scores, "top_k": top_k}
        return Answer.from_json(await self._call("POST", f"/v1/sessions/{_part(session)}/frames", frames, **query))

    async def reset_session(self, session: str, at: int) -> None:
        await self._call("POST", f"/v1/sessions/{_part(session)}/reset", json_body={"at": at})

    async def close_session(self, session: str) -> None:
        await self._call("DELETE", f"/v1/sessions/{_part(session)}")

    async def _call(self, method: str, path: str, frames: npt.ArrayLike | None = None, json_body: Any = None, **query: Any) -> dict[str, Any]:
        body: dict[str, Any] = {} if json_body is None else {"json": json_body}
        if frames is not None:
            body = {"content": np.ascontiguousarray(frames, "<f4").tobytes(), "headers": {"Content-Type": "application/octet-stream"}}
        try:
            response = await self._http.request(method, path, params=_given(query), **body)
        except httpx.TimeoutException:
            raise Unreachable(f"{self.url} did not answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise Unreachable(self._unreachable(error)) from None
        if response.is_success:
            return dict(response.json()) if response.content else {}
        raise _http_error(response.status_code, response.content)

    async def _dial(self, address: str) -> ClientConnection:
        try:
            return await connect(address, additional_headers=self._headers, compression=None, max_size=None, open_timeout=self._timeout_s)
        except InvalidStatus as error:
            refused = _http_error(error.response.status_code, bytes(error.response.body or b""))
            if isinstance(refused, ServiceError) or error.response.status_code not in _COME_BACK_STATUSES:
                raise refused from None
            raise Unreachable(str(refused)) from None
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise Unreachable(self._unreachable(error)) from None

    def _unreachable(self, error: Exception) -> str:
        return f"no service at {self.url} ({str(error) or type(error).__name__}); start it with `python -m service`, or name another address"


def _http_error(status: int, body: bytes) -> ServiceError | ClientError:
    try:
        value = json.loads(body)
        return error_from({"code": value["code"], **value})
    except (ValueError, KeyError, TypeError):
        return ClientError(f"answered with status {status}, not by this service: {body[:200].decode(errors='replace')!r}")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _part(name: str) -> str:
    return quote(name, safe="")


class Client:
    """`AsyncClient` for programs without an event loop: the same calls, run on a thread of its own. Use it as `with`."""

    def __init__(self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout_s: float = 30.0, retry: Retry | None = None) -> None:
        self._client = AsyncClient(url, token=token, timeout_s=timeout_s, retry=retry)
        self._loop = _LoopThread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._loop.running:
            self._loop.call(self._client.close())
            self._loop.stop()

    def models(self) -> list[dict[str, Any]]:
        return self._loop.call(self._client.models())

    def model(self, name: str, version: str | None = None) -> Model:
        return self._loop.call(self._client.model(name, version))

    def predict(self, name: str, frames: npt.ArrayLike, **options: Any) -> Answer:
        return self._loop.call(self._client.predict(name, frames, **options))

    def stream(self, name: str, **options: Any) -> Stream:
        return Stream(self._loop, self._client.stream(name, **options))

    def open_session(self, name: str, **options: Any) -> dict[str, Any]:
        return self._loop.call(self._client.open_session(name, **options))

    def session(self, session: str) -> dict[str, Any]:
        return self._loop.call(self._client.session(session))

    def advance(self, session: str, first: int, frames: npt.ArrayLike, **options: Any) -> Answer:
        return self._loop.call(self._client.advance(session, first, frames, **options))

    def reset_session(self, session: str, at: int) -> None:
        self._loop.call(self._client.reset_session(session, at))

    def close_session(self, session: str) -> None:
        self._loop.call(self._client.close_session(session))


class Stream:
    """`AsyncStream` for programs without an event loop. Use it as `with`."""

    def __init__(self, loop: _LoopThread, stream: AsyncStream) -> None:
        self._loop = loop
        self.inner = stream  # its figures (`session`, `next_frame`, `window`, `warnings`, ...) may be read from here

    def __enter__(self) -> Self:
        self._loop.call(self.inner.__aenter__())
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def session(self) -> str:
        return self.inner.session

    @property
    def next_frame(self) -> int:
        return self.inner.next_frame

    def close(self, *, keep: bool = False) -> None:
        self._loop.call(self.inner.close(keep=keep))

    def send(self, frames: npt.ArrayLike) -> int:
        """As `AsyncStream.send`; with one thread, read the answers before `window` frames are out."""
        return self._loop.call(self.inner.send(frames))

    def reset(self) -> None:
        self._loop.call(self.inner.reset())

    def __iter__(self) -> Iterator[Answer]:
        return self

    def __next__(self) -> Answer:
        try:
            return self._loop.call(self.inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def play(self, source: Frames | Iterable[npt.ArrayLike], *, chunk: int = 1) -> Iterator[Answer]:
        """As `AsyncStream.play`; an iterable is read on a thread of its own, so it may wait for a camera."""
        answers = self.inner.play(source if isinstance(source, np.ndarray) else _off_loop(iter(source)), chunk=chunk)
        try:
            while True:
                yield self._loop.call(_next_of(answers))
        except StopAsyncIteration:
            return
        finally:
            if self._loop.running:  # else the client was closed while this generator lay about
                self._loop.call(answers.aclose())


async def _off_loop(source: Iterator[Any]) -> AsyncIterator[Any]:
    end = object()
    while (piece := await asyncio.to_thread(next, source, end)) is not end:
        yield piece


async def _next_of(answers: AsyncIterator[Answer]) -> Answer:
    return await anext(answers)


async def _end_all_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _LoopThread:
    """An event loop on a daemon thread, to which other threads hand coroutines."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it there and waits; a wait that is interrupted (Ctrl-C) ends it there too."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends what still runs there, such as streams that nobody closed, then the loop."""
        self.call(_end_all_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
