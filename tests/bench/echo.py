"""The limit to compare with: a bare ASGI app on the same uvicorn that answers every binary message of frames with one ready answer.

It speaks just enough of the stream's protocol (`open`, acks, `close`) for the same load generator; nothing is parsed beyond that.

    python tests/bench/echo.py ANSWER_BYTES     prints `Serving on URL` and serves until it is told to stop
"""

from __future__ import annotations

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
OPENED: Message = {"type": "websocket.send", "text": '{"type":"opened"}'}
CLOSED: Message = {"type": "websocket.send", "text": '{"type":"closed"}'}


class Echo:
    """The app; every answer has a header and `answer_bytes` of scores."""

    def __init__(self, answer_bytes: int) -> None:
        self._answer: Message = {"type": "websocket.send", "bytes": bytes(HEADER_BYTES + answer_bytes)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            if data := message.get("bytes"):
                if data[1] != ACK:
                    await send(self._answer)
            else:
                await send(CLOSED if "close" in message["text"] else OPENED)


def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Echo(int(sys.argv[1])),
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
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
