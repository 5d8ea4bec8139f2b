from __future__ import annotations

import asyncio
from contextvars import Context

from service import notes


class Secret:
    """As a session: whoever knows its id has it."""

    def __init__(self) -> None:
        self.id = "secret"
        self.digest = "shown"


def test_notes_belong_to_the_task_that_began_them_and_to_those_it_starts() -> None:
    async def request(name: str) -> dict[str, object]:
        notes.begin(request=name)
        await asyncio.sleep(0)
        await asyncio.create_task(deeper(name))
        return notes.spoken()

    async def deeper(name: str) -> None:
        await asyncio.sleep(0)
        notes.note(model=f"of {name}")

    async def both() -> list[dict[str, object]]:
        return await asyncio.gather(request("a"), request("b"))

    def outside() -> None:
        assert asyncio.run(both()) == [{"request": "a", "model": "of a"}, {"request": "b", "model": "of b"}]
        assert notes.spoken() == {}

    Context().run(outside)


def test_branches_share_what_came_before_and_nothing_after() -> None:
    async def track(number: int) -> dict[str, object]:
        notes.branch(track=number)
        await asyncio.sleep(0)
        notes.note(model=str(number))
        return notes.spoken()

    async def connection() -> tuple[list[dict[str, object]], dict[str, object]]:
        notes.begin(request="c")
        return await asyncio.gather(track(1), track(2)), notes.spoken()

    tracks, own = asyncio.run(connection())
    assert tracks == [{"request": "c", "track": 1, "model": "1"}, {"request": "c", "track": 2, "model": "2"}]
    assert own == {"request": "c"}


def test_outside_of_any_work_nothing_is_noted() -> None:
    def outside() -> None:
        notes.note(model="m")
        assert notes.spoken() == {}

    Context().run(outside)


def test_a_session_is_shown_by_its_digest() -> None:
    assert notes.spoken({"session": Secret(), "rows": 3}) == {"session": "shown", "rows": 3}
