"""The way to a stream: a websocket, its handshake, `open`, `opened`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI

from service.client_addresses import Addresses
from service.client_errors import ELSEWHERE, Unreachable, close_refusal, error_from, http_refusal, nobody_at
from service.errors import ServiceError

Socket = ClientConnection
T = TypeVar("T")

_ONE_OF_MANY_S = 5.0  # how long one address of several is waited for

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

    def leave(self, wire: Any) -> None:
        """The server of this wire goes away: the next wire does not come from there, where there is another."""


@dataclass(frozen=True)
class Dialer:
    """Opens sockets to one model's streams of the service at `addresses`, each for one stream. An `Opener`."""

    addresses: Addresses
    path: str
    headers: dict[str, str]
    timeout_s: float

    async def open(self, options: Mapping[str, Any]) -> tuple[Wire, dict[str, Any]]:
        async def there(url: str) -> tuple[Wire, dict[str, Any]]:
            socket = await self._dial(url)
            return socket, await self.begin(socket, options)

        return await self._anywhere(there)

    async def dial(self) -> Socket:
        """A websocket, on which nothing was said yet; raises `Unreachable`, or what its handshake is refused with."""
        return await self._anywhere(self._dial)

    async def begin(self, wire: Wire, options: Mapping[str, Any]) -> dict[str, Any]:
        """Says `open` and returns `opened`; raises what the server refuses or `Unreachable`, and then the wire is closed."""
        try:
            async with asyncio.timeout(self._patience_s):
                await wire.send(json.dumps({"type": "open", **options}))
                return await _opened(wire)
        except BaseException as error:
            await wire.close()
            if isinstance(error, TimeoutError):
                raise Unreachable(f"{self.addresses.current} did not open the stream within {self._patience_s:g} s") from None
            if isinstance(error, ConnectionClosed):
                raise refusal(error) from None
            raise

    def leave(self, wire: Any = None) -> None:
        self.addresses.leave()

    @property
    def _patience_s(self) -> float:
        return self.timeout_s if len(self.addresses) == 1 else min(self.timeout_s, _ONE_OF_MANY_S)

    async def _anywhere(self, attempt: Callable[[str], Awaitable[T]]) -> T:
        """At the first address that does not refuse it for reasons of its own; raises what the last of them said."""
        *others, last = self.addresses.round()
        for url in others:
            try:
                return await self._at(url, attempt)
            except ELSEWHERE:
                pass
        return await self._at(last, attempt)

    async def _at(self, url: str, attempt: Callable[[str], Awaitable[T]]) -> T:
        self.addresses.use(url)
        return await attempt(url)

    async def _dial(self, url: str) -> Socket:
        try:
            try:
                return await self._shake_hands(url)
            except InvalidMessage:  # hung up on, as by a balancer whose replica has just gone: nothing was said yet, so that it may be said again
                return await self._shake_hands(url)
        except InvalidStatus as error:
            raise http_refusal(error.response.status_code, bytes(error.response.body or b"")) from None
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise nobody_at(url, error) from None

    async def _shake_hands(self, url: str) -> Socket:
        address = f"ws{url.removeprefix('http')}{self.path}"
        return await connect(address, additional_headers=self.headers, open_timeout=self._patience_s, **_OPTIONS)


async def _opened(wire: Wire) -> dict[str, Any]:
    while True:
        message = await wire.recv()
        value: dict[str, Any] = json.loads(message) if isinstance(message, str) else {}
        if value.get("type") in ("error", "draining"):
            raise told(value)
        if value.get("type") == "opened":
            return value


def told(message: Mapping[str, Any]) -> ServiceError:
    """What an `error` or `draining` of the server stands for."""
    return error_from({"code": "draining", "error": "the service is shutting down", **message} if message.get("type") == "draining" else message)


def refusal(closed: ConnectionClosed) -> ServiceError | Unreachable:
    """What a closed socket means; one that was simply lost has no code."""
    return close_refusal(closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else close_refusal(1006, "")
