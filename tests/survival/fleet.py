"""Several services on one store, as processes that are killed, stopped and started again where they were."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.server_process import Server, running
from tests.valkey_process import free_port

SETTINGS = {"INDRNN_CHECKPOINT_FRAMES": "8", "INDRNN_CHECKPOINT_MS": "200", "INDRNN_WATCH_S": "0", "INDRNN_THREADS": "1"}


class Replica:
    """One service, always on the same port."""

    def __init__(self, number: int, models: Path, folder: Path, settings: dict[str, str]) -> None:
        self.number = number
        self.models = models
        self.port = free_port()
        self.server: Server | None = None
        self._folder = folder
        self._settings = {**SETTINGS, **settings}
        self._starts = 0
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self.server is not None

    def log(self) -> str:
        """Of all its processes."""
        return "".join(path.read_text() for path in sorted(self._folder.glob(f"replica-{self.number}-*")))

    async def start(self) -> None:
        self._starts += 1
        log = self._folder / f"replica-{self.number}-{self._starts:03d}"
        started = running(self.models, log, "--port", str(self.port), "--deadline-s", "60", **self._settings)
        self.server = await asyncio.to_thread(self._stack.enter_context, started)

    async def kill(self) -> None:
        """As a crash: it has no time for anything."""
        self.server = None
        await asyncio.to_thread(self._stack.close)

    async def stop(self) -> int:
        """As an orchestrator does, which waits for it; returns the exit status."""
        server, self.server = self.server, None
        assert server is not None
        status = await asyncio.to_thread(server.stop)
        await asyncio.to_thread(self._stack.close)
        return status


class Fleet:
    """Replicas, and whom a new connection goes to: one after another, as a plain balancer has it, past those that are known to be gone."""

    def __init__(self, count: int, models: Path, folder: Path, each: Sequence[dict[str, str]] = (), **settings: str) -> None:
        """`each`: settings of each replica besides those of all."""
        folder.mkdir(parents=True, exist_ok=True)
        own = each or [{}] * count
        self.replicas = [Replica(number, models, folder, {**settings, **own[number]}) for number in range(count)]
        self.out: set[int] = set()  # taken out of the balancer by hand
        self._turn = 0

    async def __aenter__(self) -> Fleet:
        await asyncio.gather(*(replica.start() for replica in self.replicas))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(replica.kill() for replica in self.replicas))

    def __getitem__(self, number: int) -> Replica:
        return self.replicas[number]

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.alive]

    def next(self) -> Replica:
        there = [replica for replica in self.replicas if replica.alive and replica.number not in self.out] or self.replicas
        self._turn += 1
        return there[self._turn % len(there)]

    def errors(self) -> list[str]:
        """Lines of the logs that tell of a fault of ours."""
        return [line for replica in self.replicas for line in replica.log().splitlines() if '"level":"error"' in line.replace(" ", "") or "Traceback" in line]

    async def fire(self, seconds: float, chance: random.Random, pause: tuple[float, float] = (2.0, 4.0)) -> int:
        """Kills a replica every few seconds, and starts it again a moment later; at least one is left. Returns how many were killed."""
        killed, starting, end = 0, set[asyncio.Task[None]](), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, chance.uniform(*pause)))
            there = self.alive
            if time.monotonic() >= end or len(there) < 2:
                continue
            victim = chance.choice(there)
            await victim.kill()
            killed += 1
            starting.add(asyncio.create_task(self._back(victim, chance.uniform(0.2, 1.0))))
        await asyncio.gather(*starting)
        return killed

    async def _back(self, replica: Replica, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await replica.start()


class Others:
    """Processor time that programs other than these tests take, from here on: while they take much, times say nothing about the service."""

    def __init__(self) -> None:
        self._began, self._all, self._own = time.monotonic(), *self._used()

    def cores(self) -> float:
        """How many cores they had. Ask once all replicas have ended: before, what those took is counted as others'."""
        everybody, own = self._used()
        return max(0.0, everybody - self._all - (own - self._own)) / (time.monotonic() - self._began)

    @staticmethod
    def _used() -> tuple[float, float]:
        ticks = Path("/proc/stat").read_text().splitlines()[0].split()
        return sum(int(ticks[column]) for column in (1, 2, 3, 8)) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])
