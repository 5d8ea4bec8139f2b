"""Lets requests that come one by one go to the model together.

gRPC's server hands requests over one at a time, and each would run alone: a run of one row takes nearly as long as one of ten.
So what comes while others are under way waits until those are answered, and goes on as one batch. Who is alone never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 0.002  # with those that are under way: a long clip may be among them


class Gather:
    """`await join()` before the work and `with under_way()` around it. All is for one event loop."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._under_way = 0
        self._line: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def join(self) -> None:
        """Waits for its turn, at most `patience_s`; who joins first goes first. The caller is under way then, and must say when it no longer is."""
        if not self._under_way and not self._line:
            self._under_way = 1
            return
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(self._patience_s, self._go)
        turn: asyncio.Future[None] = loop.create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn already
                self._leave()
            raise

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """From when `join` returned until the answer is there."""
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._under_way -= 1
        if not self._under_way and self._line:
            self._go()

    def _go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        line, self._line = self._line, []
        for turn in line:
            if not turn.done():  # else its caller has left
                self._under_way += 1
                turn.set_result(None)
