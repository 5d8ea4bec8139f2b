"""The Python client: clips, sessions and live streams of a running service, asynchronous (`AsyncClient`) and plain (`Client`).

    with Client("http://127.0.0.1:8000") as client:
        print(client.predict("rehab-exercises", frames).label)
        with client.stream("rehab-exercises") as stream:
            for answer in stream.play(chunks):
                print(answer.frame, answer.label, answer.score)
        with client.tracks("rehab-exercises") as tracks:  # several people on one connection
            person = tracks.stream(on_event=print).open()

A stream outlives its socket, and its server where sessions are kept in a store: the client comes back to the same session, sends again what the
server has not taken, and delivers every answer once, in order. What the service refuses is raised as the classes of `service.errors`, with `code` and `facts`.

Here is the plain client, and every name that programs import.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar, Unpack

import numpy as np
import numpy.typing as npt

from service.client_async import AsyncClient
from service.client_errors import ClientError, StreamClosed, Unreachable, error_from
from service.client_notices import ModelChanged, Notice, OnNotice, Warned
from service.client_stream import AsyncStream
from service.client_tracks import AsyncTracks
from service.client_values import TOP, Answer, Event, Frames, Model, OnEvent, Piece, Retry, StreamOptions, Timed

__all__ = [
    "TOP", "Answer", "AsyncClient", "AsyncStream", "AsyncTracks", "Client", "ClientError", "Event", "Model", "ModelChanged", "Notice", "OnEvent", "OnNotice",
    "Retry", "Stream", "StreamClosed", "StreamOptions", "Timed", "Tracks", "Unreachable", "Warned", "error_from",
]  # fmt: skip

T = TypeVar("T")


class Client:
    """`AsyncClient` for programs without an event loop: the same calls, run on a thread of its own. Use it as `with`."""

    def __init__(
        self, url: str | Sequence[str] = "http://127.0.0.1:8000", *, token: str | None = None, timeout_s: float = 30.0, retry: Retry | None = None
    ) -> None:
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

    def stream(self, name: str, *, on_event: OnEvent | None = None, on_notice: OnNotice | None = None, **options: Unpack[StreamOptions]) -> Stream:
        return Stream(self._loop, self._client.stream(name, on_event=on_event, on_notice=on_notice, **options))

    def tracks(self, name: str) -> Tracks:
        return Tracks(self._loop, self._client.tracks(name))

    def open_session(self, name: str, **options: Any) -> dict[str, Any]:
        return self._loop.call(self._client.open_session(name, **options))

    def session(self, session: str) -> dict[str, Any]:
        return self._loop.call(self._client.session(session))

    def advance(self, session: str, first: int, frames: npt.ArrayLike, **options: Any) -> Answer:
        return self._loop.call(self._client.advance(session, first, frames, **options))

    def reset_session(self, session: str, at: int) -> None:
        self._loop.call(self._client.reset_session(session, at))

    def touch_session(self, session: str) -> float | None:
        return self._loop.call(self._client.touch_session(session))

    def close_session(self, session: str) -> None:
        self._loop.call(self._client.close_session(session))

    def save_session(self, session: str) -> bytes:
        return self._loop.call(self._client.save_session(session))

    def restore_session(self, name: str, record: bytes, *, version: str | None = None) -> dict[str, Any]:
        return self._loop.call(self._client.restore_session(name, record, version=version))


class Tracks:
    """`AsyncTracks` for programs without an event loop. Use it as `with`."""

    def __init__(self, loop: _LoopThread, tracks: AsyncTracks) -> None:
        self._loop = loop
        self._tracks = tracks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stream(self, *, on_event: OnEvent | None = None, on_notice: OnNotice | None = None, **options: Unpack[StreamOptions]) -> Stream:
        return Stream(self._loop, self._tracks.stream(on_event=on_event, on_notice=on_notice, **options))

    def close(self, *, keep: bool = False) -> None:
        if self._loop.running:  # else they ended with their client
            self._loop.call(self._tracks.close(keep=keep))


class Stream:
    """`AsyncStream` for programs without an event loop. Use it as `with`, or `open` it and `close` it. Listeners are called on the client's thread."""

    def __init__(self, loop: _LoopThread, stream: AsyncStream) -> None:
        self._loop = loop
        self.inner = stream  # its figures (`session`, `next_frame`, `window`, `warnings`, ...) may be read from here

    def __enter__(self) -> Self:
        return self.open()

    def open(self) -> Self:
        self._loop.call(self.inner.open())
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
        if self._loop.running:  # else it ended with its client
            self._loop.call(self.inner.close(keep=keep))

    def send(self, frames: npt.ArrayLike, t: npt.ArrayLike | None = None) -> int:
        """As `AsyncStream.send`; with one thread, read the answers before `window` frames are out."""
        return self._loop.call(self.inner.send(frames, t))

    def reset(self) -> None:
        self._loop.call(self.inner.reset())

    def __iter__(self) -> Iterator[Answer]:
        return self

    def __next__(self) -> Answer:
        try:
            return self._loop.call(self.inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def play(self, source: Frames | Iterable[Piece], *, chunk: int = 1, t: npt.ArrayLike | None = None) -> Iterator[Answer]:
        """As `AsyncStream.play`; an iterable is read on a thread of its own, so it may wait for a camera."""
        answers = self.inner.play(source if isinstance(source, np.ndarray) else _off_loop(iter(source)), chunk=chunk, t=t)
        turn = asyncio.Lock()
        try:
            while True:
                yield self._loop.call(_next_of(answers, turn))
        except StopAsyncIteration:
            return
        finally:
            if self._loop.running:  # else the client was closed while this generator lay about
                self._loop.call(_end(answers, turn))


async def _off_loop(source: Iterator[Any]) -> AsyncIterator[Any]:
    end = object()
    while (piece := await asyncio.to_thread(next, source, end)) is not end:
        yield piece


async def _next_of(answers: AsyncIterator[Answer], turn: asyncio.Lock) -> Answer:
    async with turn:
        return await anext(answers)


async def _end(answers: AsyncGenerator[Answer, None], turn: asyncio.Lock) -> None:
    async with turn:  # a wait that Ctrl-C interrupted may still be on its way out
        await answers.aclose()


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
        if not self.running:
            coroutine.close()
            raise ClientError("this client was closed")
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
