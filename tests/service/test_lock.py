from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.lock import Lock


def test_one_at_a_time_in_the_order_of_asking() -> None:
    order: list[int] = []

    async def scenario() -> None:
        lock = Lock()
        assert lock.take()
        assert not lock.take()

        async def one(number: int) -> None:
            async with lock:
                assert lock.locked()
                order.append(number)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(number)) for number in range(5)]
        await asyncio.sleep(0)
        lock.release()
        assert not lock.take(), "it went to the first of those who wait"
        await asyncio.gather(*tasks)
        assert not lock.locked()
        with pytest.raises(RuntimeError, match="nobody has"):
            lock.release()

    asyncio.run(scenario())
    assert order == list(range(5))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["start", "cancel", "turn"])), max_size=40))
def test_those_who_leave_neither_keep_it_nor_lose_it(program: list[tuple[int, str]]) -> None:
    async def scenario() -> None:
        lock, holders, tasks = Lock(), 0, {}

        async def one() -> None:
            nonlocal holders
            async with lock:
                holders += 1
                assert holders == 1
                try:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                finally:
                    holders -= 1

        for number, what in program:
            if what == "start" and (number not in tasks or tasks[number].done()):
                tasks[number] = asyncio.create_task(one())
            elif what == "cancel" and number in tasks:
                tasks[number].cancel()
            else:
                await asyncio.sleep(0)
        results: list[Any] = await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert lock.take(), "nobody is left, so it is free"

    asyncio.run(scenario())
