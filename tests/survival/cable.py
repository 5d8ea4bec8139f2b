"""The way from one process to a server, which can be cut, or hold up all that is sent over it. No privileges are needed for that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self


class Cable:
    """Listens on a port of its own and passes bytes on to `port`, both ways. Runs on a thread of its own; use it as `with`."""

    def __init__(self, port: int) -> None:
        self.port = 0  # where to connect instead
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cable", daemon=True)
        self._passing: asyncio.Event
        self._cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def freeze(self) -> None:
        """Nothing comes through, and nobody is told: as packets that are dropped. What is sent meanwhile arrives once it is healed."""
        self._do(self._set(passing=False, cut=False))

    def cut(self) -> None:
        """Connections break, and none can be made."""
        self._do(self._set(passing=True, cut=True))

    def heal(self) -> None:
        self._do(self._set(passing=True, cut=False))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> None:
        self._passing = asyncio.Event()
        self._passing.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _set(self, *, passing: bool, cut: bool) -> None:
        self._cut = cut
        if passing:
            self._passing.set()
        else:
            self._passing.clear()
        if cut:
            for writer in list(self._writers):
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._cut:
                return
            await self._passing.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers |= {writer, far_writer}
            try:
                await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            finally:
                self._writers -= {writer, far_writer}
                far_writer.close()
        except OSError:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
            await self._passing.wait()
        finally:
            writer.close()
