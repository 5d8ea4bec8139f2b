"""The way to a stream: a websocket, its handshake, `open`, `opened`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from service.client_errors import Unreachable, close_refusal, error_from, http_refusal, nobody_at
from service.errors import ServiceError

Socket = ClientConnection

# The window bounds what may arrive. With a bounded queue, answers that nobody reads any more would hold up the closing handshake until it times out.
_OPTIONS: dict[str, Any] = {"compression": None, "max_size": None, "max_queue": None}


class Wire(Protocol):
    """What carries one stream: a websocket, or one track of it. Raises `ConnectionClosed` where that was lost."""

    async def send(self, message: str | bytes) -> None: ...
    async def recv(self) -> str | bytes: ...
    def __aiter__(self) -> AsyncIterator[str | bytes]: ...
    async def close(self) -> None: ...


class Opener(Protocol):
    """Where wires come from."""

    async def open(self, options: Mapping[str, Any]) -> tuple[Wire, dict[str, Any]]:
        """A wire on which the server has said `opened`, and what it said; raises what it refuses or `Unreachable`."""


@dataclass(frozen=True)
class Dialer:
    """Opens sockets to one model's streams of the service at `url`, each for one stream. An `Opener`."""

    url: str
    path: str
    headers: dict[str, str]
    timeout_s: float

    async def open(self, options: Mapping[str, Any]) -> tuple[Wire, dict[str, Any]]:
        socket = await self.dial()
        return socket, await self.begin(socket, options)

    async def begin(self, wire: Wire, options: Mapping[str, Any]) -> dict[str, Any]:
        """Says `open` and returns `opened`; raises what the server refuses or `Unreachable`, and then the wire is closed."""
        try:
            async with asyncio.timeout(self.timeout_s):
                await wire.send(json.dumps({"type": "open", **options}))
                return await _opened(wire)
        except BaseException as error:
            await wire.close()
            if isinstance(error, TimeoutError):
                raise Unreachable(f"{self.url} did not open the stream within {self.timeout_s:g} s") from None
            if isinstance(error, ConnectionClosed):
                raise refusal(error) from None
            raise

    async def dial(self) -> Socket:
        """A websocket, on which nothing was said yet; raises `Unreachable`, or what its handshake is refused with."""
        address = f"ws{self.url.removeprefix('http')}{self.path}"
        try:
            return await connect(address, additional_headers=self.headers, open_timeout=self.timeout_s, **_OPTIONS)
        except InvalidStatus as error:
            raise http_refusal(error.response.status_code, bytes(error.response.body or b"")) from None
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise nobody_at(self.url, error) from None


async def _opened(wire: Wire) -> dict[str, Any]:
    while True:
        message = await wire.recv()
        value: dict[str, Any] = json.loads(message) if isinstance(message, str) else {}
        if value.get("type") in ("error", "draining"):
            raise error_from(value)
        if value.get("type") == "opened":
            return value


def refusal(closed: ConnectionClosed) -> ServiceError | Unreachable:
    """What a closed socket means; one that was simply lost has no code."""
    return close_refusal(closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else close_refusal(1006, "")
