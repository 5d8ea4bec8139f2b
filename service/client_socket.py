"""The way to a stream's websocket: handshake, `open`, `opened`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from service.client_errors import Unreachable, close_refusal, error_from, http_refusal, nobody_at
from service.errors import ServiceError

Socket = ClientConnection

# The window bounds what may arrive. With a bounded queue, answers that nobody reads any more would hold up the closing handshake until it times out.
_OPTIONS: dict[str, Any] = {"compression": None, "max_size": None, "max_queue": None}


@dataclass(frozen=True)
class Dialer:
    """Opens sockets to one model's streams of the service at `url`."""

    url: str
    path: str
    headers: dict[str, str]
    timeout_s: float

    async def open(self, options: Mapping[str, Any]) -> tuple[Socket, dict[str, Any]]:
        """A socket on which the server has said `opened`, and what it said; raises what it refuses or `Unreachable`."""
        socket = await self._dial()
        try:
            async with asyncio.timeout(self.timeout_s):
                await socket.send(json.dumps({"type": "open", **options}))
                return socket, await _opened(socket)
        except BaseException as error:
            await socket.close()
            if isinstance(error, TimeoutError):
                raise Unreachable(f"{self.url} did not open the stream within {self.timeout_s:g} s") from None
            if isinstance(error, ConnectionClosed):
                raise refusal(error) from None
            raise

    async def _dial(self) -> Socket:
        address = f"ws{self.url.removeprefix('http')}{self.path}"
        try:
            return await connect(address, additional_headers=self.headers, open_timeout=self.timeout_s, **_OPTIONS)
        except InvalidStatus as error:
            raise http_refusal(error.response.status_code, bytes(error.response.body or b"")) from None
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise nobody_at(self.url, error) from None


async def _opened(socket: Socket) -> dict[str, Any]:
    while True:
        message = await socket.recv()
        value: dict[str, Any] = json.loads(message) if isinstance(message, str) else {}
        if value.get("type") in ("error", "draining"):
            raise error_from(value)
        if value.get("type") == "opened":
            return value


def refusal(closed: ConnectionClosed) -> ServiceError | Unreachable:
    """What a closed socket means; one that was simply lost has no code."""
    return close_refusal(closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else close_refusal(1006, "")
