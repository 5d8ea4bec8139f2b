"""Websockets inside uvicorn: its own protocol up to the answer to the handshake, picows from there on.

uvicorn hands each message to a task, and each answer back through another; picows, compiled, calls a function where a message is and takes an answer
where it stands. That is a third of the time, for code that is called for every frame.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, cast

from picows import (
    WSAutoPingStrategy,
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]
from starlette.types import Scope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

EXTENSION = "service.websocket"
CLOSING_S = 10.0  # a client that does not answer `close` is left
PING_S = 20.0  # a client that sent nothing for so long is asked whether it is there, and has as long to say so
INVALID_TEXT, TOO_LARGE, GOING_AWAY, PROTOCOL_ERROR = 1007, 1009, 1012, 1002

_log = logging.getLogger("picows.server")  # one line for each connection and each end of one
_log.setLevel(logging.CRITICAL)


class Hearer(Protocol):
    """What a websocket is served by."""

    def feed(self, data: str | bytes) -> None:
        """A message came."""

    def congested(self, yes: bool) -> None:
        """The client reads too slowly, or no longer does."""

    def left(self) -> None:
        """The client is gone."""


class Upgrade(WebSocketsSansIOProtocol):
    """A connection that asks to become a websocket: uvicorn's `ws` class."""

    _request = b""
    _socket: Socket | None = None

    def data_received(self, data: bytes) -> None:
        if not self._request:
            self._request = data
        super().data_received(data)

    async def run_asgi(self) -> None:
        self.scope["extensions"][EXTENSION] = cast(Any, self)
        await super().run_asgi()

    def accept(self, hearer: Hearer, subprotocol: str | None) -> Socket:
        """Answers the handshake; from here on the hearer is told what happens."""
        socket = self._socket = Socket(hearer, self)
        headers = {"Sec-WebSocket-Protocol": subprotocol} if subprotocol else None

        def answer(_: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
            return WSUpgradeResponseWithListener(WSUpgradeResponse.create_101_response(extra_headers=headers), socket)

        wire = WSProtocol(
            None, None, False, answer, _log, True, CLOSING_S, True, PING_S, PING_S, WSAutoPingStrategy.PING_WHEN_IDLE, True,
            self.config.ws_max_size, None, 16 * 1024,
        )  # fmt: skip
        self.handshake_complete = True
        if self.transport.is_closing():  # the client is gone already, which the protocol of before was told
            socket.lost()
            return socket
        wire.connection_made(self.transport)
        self.transport.set_protocol(wire)
        wire.get_buffer(0)[: len(self._request)] = self._request
        wire.buffer_updated(len(self._request))
        return socket

    def gone(self) -> None:
        """The connection is lost; uvicorn forgets it."""
        if not self.disconnected:
            super().connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._socket is not None:
            self._socket.lost()

    def shutdown(self) -> None:
        if self._socket is None:
            return super().shutdown()
        self._socket.close(GOING_AWAY)

    def close_later(self) -> None:
        """Leaves a client that does not answer `close`."""
        if self.close_timer is None:
            self.close_timer = self.loop.call_later(CLOSING_S, self.transport.abort)


class Socket(WSListener):
    """An open websocket. Nothing raises once the client is gone; what is sent then is lost."""

    def __init__(self, hearer: Hearer, upgrade: Upgrade) -> None:
        self._hearer = hearer
        self._upgrade = upgrade
        self._wire: WSTransport | None = None
        self._lost = self._closed = False
        self._parts: list[bytes] = []  # of a message that comes in several frames
        self._text = False

    def send(self, message: str | bytes) -> None:
        if self._wire is not None:
            self._wire.send(WSMsgType.TEXT if isinstance(message, str) else WSMsgType.BINARY, message)

    def close(self, code: int, reason: str = "") -> None:
        """Says goodbye and waits, for a while, until the client does as well."""
        if self._wire is None or self._closed:
            return
        self._closed = True
        self._wire.send_close(cast(WSCloseCode, code), reason)
        self._upgrade.close_later()
        self._upgrade.transport.resume_reading()  # its goodbye

    def abort(self) -> None:
        """Closes without waiting for what was sent to be read."""
        self._upgrade.transport.abort()

    def pause(self) -> None:
        """Nothing more is read, so that the client has to wait, until `resume`."""
        if self._wire is not None and not self._closed:
            self._upgrade.transport.pause_reading()

    def resume(self) -> None:
        if self._wire is not None:
            self._upgrade.transport.resume_reading()

    def lost(self) -> None:
        if not self._lost:
            self._lost = True
            self._wire = None
            self._hearer.left()

    # ---- what picows tells

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._wire = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        kind = frame.msg_type
        if kind == WSMsgType.BINARY and frame.fin and not self._parts:
            self._hearer.feed(frame.get_payload_as_bytes())
        elif kind == WSMsgType.CLOSE:
            self._goodbye(transport, frame)
        elif kind in (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.CONTINUATION):
            self._gather(kind, frame)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._upgrade.gone()
        self.lost()

    def pause_writing(self) -> None:
        self._hearer.congested(True)

    def resume_writing(self) -> None:
        self._hearer.congested(False)

    def _gather(self, kind: WSMsgType, frame: WSFrame) -> None:
        if (kind == WSMsgType.CONTINUATION) != bool(self._parts):
            return self._refuse(PROTOCOL_ERROR, "a message begins in the middle of another" if self._parts else "nothing to go on with")
        if not self._parts:
            self._text = kind == WSMsgType.TEXT
        self._parts.append(frame.get_payload_as_bytes())
        if sum(map(len, self._parts)) > self._upgrade.config.ws_max_size:
            return self._refuse(TOO_LARGE, "message too large")
        if not frame.fin:
            return
        whole, self._parts = b"".join(self._parts), []
        if not self._text:
            return self._hearer.feed(whole)
        try:
            text = whole.decode()
        except UnicodeDecodeError:
            return self._refuse(INVALID_TEXT, "text that is not UTF-8")
        self._hearer.feed(text)

    def _refuse(self, code: int, reason: str) -> None:
        """What breaks the rules of websockets ends the connection at once."""
        self.close(code, reason)
        self._upgrade.transport.close()
        self.lost()

    def _goodbye(self, transport: WSTransport, frame: WSFrame) -> None:
        if not self._closed:
            self._closed = True
            code = frame.get_close_code()
            transport.send_close(WSCloseCode.OK if code == WSCloseCode.NO_INFO else code)
        transport.disconnect()
        self.lost()


def accept(scope: Scope, hearer: Hearer, subprotocol: str | None) -> Socket:
    """Accepts the websocket of this scope; raises `RuntimeError` under a server that is not ours."""
    upgrade: Upgrade | None = scope["extensions"].get(EXTENSION)
    if upgrade is None:
        raise RuntimeError("websockets need uvicorn with ws=service.websocket.Upgrade, as `python -m service` starts it")
    return upgrade.accept(hearer, subprotocol)
