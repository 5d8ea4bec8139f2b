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
from service.client_socket import Dialer, Socket
from service.client_stream import AsyncStream
from service.client_values import OnEvent, Retry, StreamOptions, opening

_GOODBYE_S = 5.0  # how long a connection may take to let the last word out
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

    def stream(self, *, on_event: OnEvent | None = None, **options: Unpack[StreamOptions]) -> AsyncStream:
        """A stream on a new session, or on `session`; options as those of `AsyncClient.stream`. Nothing is sent before it is entered or opened."""
        stream = AsyncStream(self._carrier, opening(options), self._retry, on_event)
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
        self._socket: Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tracks: dict[int, _Track] = {}
        self._number = 0
        self._closed = False

    async def open(self, options: Mapping[str, Any]) -> tuple[_Track, dict[str, Any]]:
        async with self._dialling:
            if self._closed:
                raise StreamClosed("these tracks were closed")
            if self._socket is None:
                self._socket = await self._dialer.dial()
                self._reader = asyncio.create_task(self._read(self._socket))
            track = _Track(self, self._socket, self._free_number())
            self._tracks[track.number] = track
        return track, await self._dialer.begin(track, options)

    async def close(self) -> None:
        self._closed = True
        async with self._dialling:
            socket, reader = self._socket, self._reader
        if socket is not None:
            await socket.close()
        if reader is not None:
            await asyncio.wait({reader})

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
                number, last = _address(message)
                for track in [self._tracks.get(number)] if number else list(self._tracks.values()):
                    if track is not None:
                        track.put(message, last=last)
        except ConnectionClosed as closed:
            self._socket = None
            for track in list(self._tracks.values()):
                track.put(closed, last=True)


def _address(message: str | bytes) -> tuple[int, bool]:
    """A message's track, 0 where it names none, and whether it is the last for it."""
    if isinstance(message, bytes):
        return protocol.HEADER.unpack_from(message)[2], False
    value = json.loads(message)
    return value.get("track", 0), value.get("type") in ("closed", "error", "draining")


class _Track:
    """One track of a websocket, as if it were a websocket of its own. A `Wire`."""

    def __init__(self, carrier: _Carrier, socket: Socket, number: int) -> None:
        self.number = number
        self._carrier = carrier
        self._socket = socket
        self._inbox: asyncio.Queue[str | bytes | ConnectionClosed] = asyncio.Queue()
        self._over = False

    def put(self, message: str | bytes | ConnectionClosed, *, last: bool) -> None:
        self._inbox.put_nowait(message)
        if last:
            self._end()

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            version, kind, _, count, first = protocol.HEADER.unpack_from(message)
            await self._socket.send(protocol.HEADER.pack(version, kind, self.number, count, first) + message[protocol.HEADER.size :])
        else:
            await self._socket.send(f'{message[:-1]},"track":{self.number}}}')  # a JSON object that is not empty, and may be long

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
