"""Several streams on one connection: a track for each person in view, opened and closed as people come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Self, Unpack
from weakref import WeakSet

from websockets.exceptions import ConnectionClosed

from service import protocol
from service.client_errors import StreamClosed
from service.client_notices import OnNotice
from service.client_socket import Dialer, Socket
from service.client_stream import AsyncStream
from service.client_values import OnEvent, Retry, StreamOptions, opening

_GOODBYE_S = 5.0  # how long a connection may take to let the last word out
_LAST = ("closed", "error", "draining")  # types of messages after which a track hears no other
_NUMBERS = range(1, 2**16)  # 0 is left to those who name no track: what comes for it is about the connection


class AsyncTracks:
    """Streams of one model that share a connection. Made by `AsyncClient.tracks`; use it as `async with`, which closes what is still open.

    Each stream is as one on a connection of its own: its answers, errors and end are its own, and it comes back to its session when the connection,
    which all of them dial again together, was lost.
    """

    def __init__(self, dialer: Dialer, retry: Retry) -> None:
        self._carrier = _Carrier(dialer)
        self._retry = retry
        self._streams: WeakSet[AsyncStream] = WeakSet()  # those that run are held by their tasks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def stream(self, *, on_event: OnEvent | None = None, on_notice: OnNotice | None = None, **options: Unpack[StreamOptions]) -> AsyncStream:
        """A stream on a new session, or on `session`; options as those of `AsyncClient.stream`. Nothing is sent before it is entered or opened."""
        stream = AsyncStream(self._carrier, opening(options), self._retry, on_event, on_notice)
        self._streams.add(stream)
        return stream

    async def close(self, *, keep: bool = False) -> None:
        """Ends all streams and their sessions, and the connection; `keep=True` leaves the sessions on the server."""
        try:
            await asyncio.gather(*(stream.close(keep=keep) for stream in self._streams))
        finally:
            await self._carrier.close()


class _Carrier:
    """One websocket for many tracks: dialled when the first is opened, and again when it was lost. An `Opener`."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._dialling = asyncio.Lock()
        self._socket: Socket | None = None  # for new tracks
        self._readers: dict[asyncio.Task[None], Socket] = {}
        self._tracks: dict[int, _Track] = {}
        self._number = 0
        self._closed = False

    async def open(self, options: Mapping[str, Any]) -> tuple[_Track, dict[str, Any]]:
        async with self._dialling:
            if self._closed:
                raise StreamClosed("these tracks were closed")
            if self._socket is None:
                self._socket = await self._dialer.dial()
                reader = asyncio.create_task(self._read(self._socket))
                self._readers[reader] = self._socket
                reader.add_done_callback(self._readers.pop)
            track = _Track(self, self._socket, self._free_number())
            self._tracks[track.number] = track
        return track, await self._dialer.begin(track, options)

    async def close(self) -> None:
        self._closed = True
        async with self._dialling:
            readers = dict(self._readers)
        if readers:
            await asyncio.gather(*(socket.close() for socket in readers.values()))
            await asyncio.wait(readers)

    def leave(self, wire: Any) -> None:
        """Nothing: a server that goes away tells the connection, not each track; what it tells a track alone is about that track's model."""

    def forget(self, track: _Track) -> None:
        if self._tracks.get(track.number) is track:
            del self._tracks[track.number]

    def _free_number(self) -> int:
        """Another each time, so that what still comes for a track that was left is not taken for the next one's."""
        while True:
            self._number = self._number % _NUMBERS[-1] + 1
            if self._number not in self._tracks:
                return self._number

    async def _read(self, socket: Socket) -> None:
        """Hands each message to its track; one without a track, and the end of the connection, to all."""
        try:
            while True:
                message = await socket.recv()
                number, kind = _address(message)
                for track in [self._tracks.get(number)] if number else list(self._tracks.values()):
                    if track is not None and track.socket is socket:
                        track.put(message, last=kind in _LAST)
                if not number and kind == "draining" and self._socket is socket:
                    self._socket = None  # what is opened from now on is opened elsewhere
                    self._dialer.leave()
        except ConnectionClosed as closed:
            if self._socket is socket:
                self._socket = None
            for track in list(self._tracks.values()):
                if track.socket is socket:
                    track.put(closed, last=True)


def _address(message: str | bytes) -> tuple[int, str]:
    """A message's track, 0 where it names none, and its type, "" where it is bytes."""
    if isinstance(message, bytes):
        return protocol.HEADER.unpack_from(message)[2], ""
    value = json.loads(message)
    return value.get("track", 0), value.get("type", "")


class _Track:
    """One track of a websocket, as if it were a websocket of its own. A `Wire`."""

    def __init__(self, carrier: _Carrier, socket: Socket, number: int) -> None:
        self.number = number
        self._carrier = carrier
        self.socket = socket
        self._inbox: asyncio.Queue[str | bytes | ConnectionClosed] = asyncio.Queue()
        self._over = False

    def put(self, message: str | bytes | ConnectionClosed, *, last: bool) -> None:
        self._inbox.put_nowait(message)
        if last:
            self._end()

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            version, kind, _, count, first = protocol.HEADER.unpack_from(message)
            await self.socket.send(protocol.HEADER.pack(version, kind, self.number, count, first) + message[protocol.HEADER.size :])
        else:
            await self.socket.send(f'{message[:-1]},"track":{self.number}}}')  # a JSON object that is not empty, and may be long

    async def recv(self) -> str | bytes:
        message = await self._inbox.get()
        if isinstance(message, ConnectionClosed):
            self._inbox.put_nowait(message)  # for whoever asks again
            raise type(message)(message.rcvd, message.sent, message.rcvd_then_sent)
        return message

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while True:
            yield await self.recv()

    async def close(self) -> None:
        """Leaves the track; where the server still has it open, its session stays there without it."""
        if not self._over:
            self._end()
            with suppress(ConnectionClosed, TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):
                    await self.send(json.dumps({"type": "close", "keep": True}))

    def _end(self) -> None:
        self._over = True
        self._carrier.forget(self)
