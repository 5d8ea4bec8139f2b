"""The way to a stream, where something between the client and the service hangs up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest

from service.client_async import AsyncClient
from service.client_errors import NobodyThere
from tests.server_process import Server
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 5)


@asynccontextmanager
async def balancer(server: Server, hang_up: int, came: list[int]) -> AsyncIterator[str]:
    """Hangs up on the first websockets once they have asked, and hands on what comes after them."""
    there = urlsplit(server.url)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(2**16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        came.append(len(asked))
        if len(came) <= hang_up:
            writer.close()
            return
        back, on = await asyncio.open_connection(there.hostname, there.port)
        on.write(asked)
        await asyncio.gather(copy(reader, on), copy(back, writer))

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def stream_through(server: Server, hang_up: int, came: list[int]) -> list[int]:
    async with balancer(server, hang_up, came) as url, AsyncClient(url) as client, client.stream("channels") as stream:
        return [answer.frame async for answer in stream.play(np.array(CLIP))]


def test_a_handshake_that_is_hung_up_on_is_tried_once_more(server: Server) -> None:
    came: list[int] = []
    assert asyncio.run(stream_through(server, 1, came)) == list(range(len(CLIP)))
    assert len(came) == 2


def test_who_hangs_up_again_is_no_service(server: Server) -> None:
    came: list[int] = []
    with pytest.raises(NobodyThere, match="no service at http://127"):
        asyncio.run(stream_through(server, 9, came))
    assert len(came) == 2
