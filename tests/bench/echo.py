"""The limit to compare with: a bare ASGI app on the same uvicorn that answers every message or request with ready bytes.

On a websocket it speaks just enough of the stream's protocol (`open`, acks, `close`) for the same load generator; nothing is parsed beyond that.

    python tests/bench/echo.py ANSWER_BYTES HTTP_BYTES [websockets-sansio|picows]    prints `Serving on URL` and serves until it is told to stop

With `picows` it is that library which reads websockets in the same process, and the app is not asked: what that stack alone gives.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEADER_BYTES = 16
ACK = 3
OPENED, CLOSED = '{"type":"opened"}', '{"type":"closed"}'


class Echo:
    """The app: a websocket answer has a header and `answer_bytes` of scores, an HTTP answer `http_bytes`."""

    def __init__(self, answer_bytes: int, http_bytes: int) -> None:
        self._answer: Message = {"type": "websocket.send", "bytes": bytes(HEADER_BYTES + answer_bytes)}
        headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % http_bytes)]
        self._begin: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        self._body: Message = {"type": "http.response.body", "body": bytes(http_bytes)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            await send(self._begin)
            await send(self._body)
            return
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            if data := message.get("bytes"):
                if data[1] != ACK:
                    await send(self._answer)
            else:
                await send({"type": "websocket.send", "text": CLOSED if "close" in message["text"] else OPENED})


def picows_protocol(answer_bytes: int) -> type[asyncio.Protocol]:
    """A websocket class for uvicorn that hands the connection over to picows, whose listener answers by itself."""
    from picows import WSAutoPingStrategy, WSFrame, WSListener, WSMsgType, WSTransport
    from picows.picows import WSProtocol  # type: ignore[attr-defined]  # compiled; its stubs leave it out

    answer = bytes(HEADER_BYTES + answer_bytes)
    silent = logging.getLogger("echo.picows")
    silent.setLevel(logging.CRITICAL)

    class Listener(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.BINARY:
                if frame.get_payload_as_bytes()[1] != ACK:
                    transport.send(WSMsgType.BINARY, answer)
            elif frame.msg_type == WSMsgType.TEXT:
                transport.send(WSMsgType.TEXT, (CLOSED if "close" in frame.get_payload_as_utf8_text() else OPENED).encode())
            elif frame.msg_type == WSMsgType.CLOSE:
                transport.disconnect()

    class Handover(asyncio.Protocol):
        def __init__(self, config: uvicorn.Config, server_state: object, app_state: object, _loop: object = None) -> None:
            self._transport: asyncio.Transport

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._transport = transport

        def data_received(self, data: bytes) -> None:
            """uvicorn's own parser has read the handshake and gives it here; picows reads it again."""
            timeout, interval, limit, buffer = 5, 10, 2**20, 2**14
            reader = WSProtocol(
                None, None, False, lambda request: Listener(), silent, True, timeout, False, interval, interval,
                WSAutoPingStrategy.PING_WHEN_IDLE, True, limit, None, buffer,
            )  # fmt: skip
            reader.connection_made(self._transport)
            reader.get_buffer(0)[: len(data)] = data

            def hand_over() -> None:
                self._transport.set_protocol(reader)
                reader.buffer_updated(len(data))

            asyncio.get_running_loop().call_soon(hand_over)  # when uvicorn has set this protocol

    return Handover


def main() -> None:
    answer_bytes, http_bytes, stack = int(sys.argv[1]), int(sys.argv[2]), (*sys.argv[3:], "websockets-sansio")[0]
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Echo(answer_bytes, http_bytes),
        loop="uvloop",
        http="httptools",
        ws=picows_protocol(answer_bytes) if stack == "picows" else stack,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
    )
    print(f"Serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
