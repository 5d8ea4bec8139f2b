"""A lock for coroutines that can also be taken without waiting, which asyncio's cannot."""

from __future__ import annotations

import asyncio
from collections import deque


class Lock:
    """Handed over in the order in which it was asked for. Of one event loop."""

    __slots__ = ("_held", "_waiters")

    def __init__(self) -> None:
        self._held = False
        self._waiters: deque[asyncio.Future[None]] = deque()

    def locked(self) -> bool:
        return self._held

    def take(self) -> bool:
        """Takes it if nobody has it, and says whether."""
        if self._held:
            return False
        self._held = True
        return True

    async def acquire(self) -> None:
        if self.take():
            return
        future = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._waiters.remove(future)
            else:  # it was handed over to somebody who has left
                self.release()
            raise

    def release(self) -> None:
        """Raises `RuntimeError` if nobody has it."""
        if not self._held:
            raise RuntimeError("a lock that nobody has cannot be released")
        for future in self._waiters:
            if not future.done():
                self._waiters.remove(future)
                future.set_result(None)  # stays held, by them
                return
        self._held = False

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()
