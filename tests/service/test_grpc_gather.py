"""Requests that come one by one go together, in order; who is alone does not wait, and nobody waits for long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.grpc_gather import Gather


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Requests:
    """Work that lasts until it is let go of; `begun` says in which order."""

    def __init__(self, gather: Gather) -> None:
        self.gather, self.begun = gather, list[str]()
        self.gates: dict[str, asyncio.Event] = {}

    def start(self, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._run(name))

    async def _run(self, name: str) -> None:
        gate = self.gates[name] = asyncio.Event()
        await self.gather.join()
        with self.gather.under_way():
            self.begun.append(name)
            await gate.wait()


def case(patience_s: float, script: Any) -> None:
    async def run() -> None:
        requests = Requests(Gather(patience_s))
        await asyncio.wait_for(script(requests), 10)
        for gate in requests.gates.values():
            gate.set()
        await settled()
        last = requests.start("last")  # whatever happened, nobody is left who must be waited for
        await settled()
        assert requests.begun[-1] == "last"
        requests.gates["last"].set()
        await last

    asyncio.run(run())


def test_who_is_alone_does_not_wait() -> None:
    async def script(requests: Requests) -> None:
        for name in "abc":
            task = requests.start(name)
            await settled()
            assert requests.begun[-1] == name
            requests.gates[name].set()
            await task

    case(60, script)


def test_what_comes_meanwhile_goes_together_and_in_order() -> None:
    async def script(requests: Requests) -> None:
        tasks = [requests.start(name) for name in "abcd"]
        await settled()
        assert requests.begun == ["a"]
        requests.gates["a"].set()
        await settled()
        assert requests.begun == ["a", "b", "c", "d"]
        tasks.append(requests.start("e"))
        for name in "bc":
            requests.gates[name].set()
            await settled()
            assert requests.begun == ["a", "b", "c", "d"]  # not before all of the batch are answered
        requests.gates["d"].set()
        await settled()
        assert requests.begun[-1] == "e"
        requests.gates["e"].set()
        await asyncio.gather(*tasks)

    case(60, script)


def test_nobody_waits_for_long() -> None:
    async def script(requests: Requests) -> None:
        requests.start("long")
        await settled()
        others = [requests.start(name) for name in "bc"]
        await settled()
        assert requests.begun == ["long"]
        await asyncio.sleep(0.5)
        assert requests.begun == ["long", "b", "c"]
        for name in "bc":
            requests.gates[name].set()
        await asyncio.gather(*others)

    case(0.2, script)


@pytest.mark.parametrize("when", ["waiting", "called", "under way"])
def test_who_leaves_is_not_waited_for(when: str) -> None:
    async def script(requests: Requests) -> None:
        first, second = requests.start("a"), requests.start("b")
        await settled()
        if when == "waiting":
            second.cancel()
        requests.gates["a"].set()
        await first  # calls b
        if when == "under way":
            await settled()
            assert requests.begun == ["a", "b"]
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second

    case(60, script)


def test_a_request_that_fails_lets_the_next_go() -> None:
    async def script(requests: Requests) -> None:
        async def fail() -> None:
            await requests.gather.join()
            with requests.gather.under_way():
                raise ValueError

        failing, after = asyncio.create_task(fail()), requests.start("b")
        with pytest.raises(ValueError):
            await failing
        await settled()
        assert requests.begun == ["b"]
        requests.gates["b"].set()
        await after

    case(60, script)
