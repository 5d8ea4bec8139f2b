"""One bidirectional stream of requests: those of a sequence run in order, different sequences and clips side by side, each is answered.

How much of a stream is under way is bounded: beyond that the stream is not read, so that HTTP/2 holds the client back. An answer counts until it
is sent, so a client that does not read its answers waits, and holds up nobody else; after a while its stream ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from service import notes
from service.errors import Draining, SlowReader
from service.grpc_tensors import sequence_of, size_of

MOST_REQUESTS = 256  # of a stream that are under way: read, and their answers not yet sent
MOST_BYTES = 16 * 2**20  # of them; a single request may have more
PATIENCE_S = 20.0  # with a client that does not read its answers

Answer = Callable[[Any, float], Awaitable[Any]]
Line = deque[tuple[Any, float, int]]  # requests of one sequence with the times at which they came and their sizes


class Stream:
    """`read` gives the next message or `end`, `write` sends one, `answer` makes one of a request and the time at which it came (time.monotonic).

    An error that `answer` raises ends the stream; what is wrong with one request only, it answers.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Any]], write: Callable[[Any], Awaitable[None]], end: object, answer: Answer, patience_s: float = PATIENCE_S
    ) -> None:
        self._read, self._write, self._end, self._answer, self._patience_s = read, write, end, answer, patience_s
        self._lines: dict[tuple[str, str, int | str], Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: deque[tuple[Any, int]] = deque()
        self._requests = self._bytes = 0
        self._changed = asyncio.Event()  # there is an answer to send, or nothing is under way any more
        self._room = asyncio.Event()
        # Tasks and what they raise have their frames, which have us: they are held no longer than needed, or all of that would wait for the collector.
        self._reader: asyncio.Task[None] | None = None
        self._sent: asyncio.Future[None] | None = None
        self._unsent: asyncio.Task[None] | None = None  # sends an answer that the client has not read for too long
        self._fault: BaseException | None = None
        self._draining = False

    def drain(self) -> None:
        """Reads nothing more; `run` raises `Draining` when everything that was read is answered."""
        self._draining = True
        if self._reader is not None:
            self._reader.cancel()

    async def run(self) -> None:
        """Serves until the client has said all and has all answers. Raises `Draining`, `SlowReader`, or what `answer` raised."""
        self._reader = self._start(self._take_all())
        if self._draining:
            self._reader.cancel()
        sender = asyncio.create_task(self._send_all())
        self._sent = asyncio.shield(sender)
        try:
            await self._sent
        except asyncio.CancelledError:
            if self._fault is None:  # it was us who were cancelled: the client has left
                sender.cancel()
                raise
            self._unsent = sender
        finally:
            self._reader = self._sent = None
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
        if self._fault is not None:
            raise self._fault
        if self._draining:
            raise Draining("the service is shutting down", retry_after=5)

    async def flushed(self) -> None:
        """When `run` has raised: waits until the client has taken what was being sent to it. Cancelled, it is sent no more."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            try:
                await asyncio.wait({unsent})
            finally:
                unsent.cancel()

    # Reading

    async def _take_all(self) -> None:
        while self._take(await self._read()):
            while self._requests >= MOST_REQUESTS or self._bytes >= MOST_BYTES:
                self._room.clear()
                await self._room.wait()

    def _take(self, message: Any) -> bool:
        """False at the end."""
        if message is self._end:
            return False
        size = size_of(message)
        self._requests += 1
        self._bytes += size
        request = (message, time.monotonic(), size)
        sequence = sequence_of(message)
        if sequence is None:
            self._start(self._run(deque([request])))
            return True
        key = (message.model_name, type(sequence).__name__, sequence)
        if (line := self._lines.get(key)) is not None:
            line.append(request)
        else:
            line = self._lines[key] = deque([request])
            self._start(self._run_sequence(key, line))
        return True

    def _start(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None and self._fault is None:
            self._fault = fault
        self._changed.set()

    # Running

    async def _run_sequence(self, key: tuple[str, str, int | str], line: Line) -> None:
        try:
            await self._run(line)
        finally:
            del self._lines[key]

    async def _run(self, line: Line) -> None:
        notes.branch()
        while line:
            message, came, size = line.popleft()
            answer = await self._answer(message, came)
            grown = answer.ByteSize()
            self._bytes += grown - size
            self._answers.append((answer, grown))
            self._changed.set()

    # Answering

    async def _send_all(self) -> None:
        """Sends answers until nothing is under way any more, or something went wrong."""
        while self._fault is None:
            while self._answers:
                await self._send(*self._answers.popleft())
            if not self._tasks:
                return
            self._changed.clear()
            await self._changed.wait()

    async def _send(self, answer: Any, size: int) -> None:
        timer = asyncio.get_running_loop().call_later(self._patience_s, self._give_up)
        try:
            await self._write(answer)
        finally:
            timer.cancel()
        self._requests -= 1
        self._bytes -= size
        self._room.set()

    def _give_up(self) -> None:
        if self._fault is None:
            self._fault = SlowReader(f"the client has not read an answer for {self._patience_s:g} s; its sequences stay")
        self._answers.clear()
        if self._sent is not None:
            self._sent.cancel()  # but not what is being sent, which cannot be taken back
