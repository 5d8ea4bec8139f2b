"""When sessions are saved, on virtual time: what is due, together, again, and what is told. No sockets, no waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from service.checkpoints import LAST_RETRY_S, MOST_BYTES, Checkpoints
from service.errors import ServiceError, SessionNotFound, StoreUnavailable, TakenOver
from service.store import Checkpoint, Outcome, StoreSettings
from service.store_memory import MemoryStore
from tests import virtual_time


class Slow(MemoryStore):
    """Takes `delay_s` for each save, which are all written down; `broken` fails them."""

    def __init__(self, delay_s: float = 0.01, **settings: Any) -> None:
        super().__init__(StoreSettings(**settings))
        self.delay_s = delay_s
        self.broken: Exception | None = None
        self.unconfirmed = False
        self.saves: list[list[Checkpoint]] = []
        self.times: list[float] = []
        self.under_way = 0
        self.most_under_way = 0

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        self.saves.append(list(checkpoints))
        self.times.append(asyncio.get_running_loop().time())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.delay_s)
            if self.broken is not None:
                raise self.broken
            outcomes = await super().save(checkpoints)
            return [Outcome.UNCONFIRMED] * len(outcomes) if self.unconfirmed else outcomes
        finally:
            self.under_way -= 1


class Sessions:
    """The sessions of one process, and what it is told of them."""

    def __init__(self, store: MemoryStore, size: int = 10, **options: Any) -> None:
        self.frames: dict[str, int] = {}
        self.size = size
        self.busy: set[str] = set()
        self.epoch = 1
        self.durable: list[tuple[str, int]] = []
        self.ended: list[tuple[str, Outcome]] = []
        self.store = store
        self.checkpoints = Checkpoints(store, self._take, lambda *one: self.durable.append(one), lambda *one: self.ended.append(one), **options)

    def _take(self, session: str, sequence: int) -> Checkpoint | None:
        if session in self.busy:
            return None
        return Checkpoint(session, self.epoch, self.frames[session], bytes(self.size), sequence)

    def advance(self, session: str, frames: int = 1) -> None:
        self.frames[session] = self.frames.get(session, 0) + frames
        self.checkpoints.changed(session, self.frames[session])


def play(scenario: Any, store: MemoryStore | None = None, **options: Any) -> Sessions:
    sessions = Sessions(store or Slow(), **options)

    async def whole() -> None:
        async with asyncio.timeout(3600), sessions.checkpoints:
            await scenario(sessions)

    virtual_time.run(whole())
    return sessions


def frames_of(store: MemoryStore) -> list[list[tuple[str, int]]]:
    assert isinstance(store, Slow)
    return [[(one.session_id, one.next_frame) for one in save] for save in store.saves]


def test_due_after_so_many_frames() -> None:
    async def scenario(sessions: Sessions) -> None:
        for _ in range(7):
            sessions.advance("s")
        await asyncio.sleep(0.1)
        assert sessions.durable == []
        sessions.advance("s")
        await asyncio.sleep(0.09)
        assert sessions.durable == [("s", 8)]

    play(scenario)


def test_due_after_so_long() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.advance("s")
        await asyncio.sleep(0.15)
        sessions.advance("s")
        assert sessions.durable == []
        await asyncio.sleep(0.14)
        assert sessions.durable == [("s", 2)]
        await asyncio.sleep(60)
        assert len(sessions.store.saves) == 1  # nothing changed, nothing saved

    play(scenario)


def test_many_sessions_share_a_save_and_one_session_has_one_under_way() -> None:
    async def scenario(sessions: Sessions) -> None:
        for _ in range(300):
            for number in range(40):
                sessions.advance(f"s{number}")
            await asyncio.sleep(1 / 30)
        assert await sessions.checkpoints.drain(5) == []

    sessions = play(scenario, Slow(delay_s=0.5))
    store = sessions.store
    assert isinstance(store, Slow)
    spans = [(begin, begin + 0.5, {one.session_id for one in save}) for begin, save in zip(store.times, store.saves, strict=True)]
    for index, (_, end, ids) in enumerate(spans):
        for begin, _, others in spans[index + 1 :]:
            assert begin >= end or not ids & others, "a session was saved twice at once"
    assert max(dict(sessions.durable).values()) == 300
    assert dict(sessions.durable) == sessions.frames
    assert len(store.saves) <= 40  # 0.5 s each over 10 s, four at a time; without sharing it were 1500


def test_the_newest_is_saved_not_all_of_them() -> None:
    async def scenario(sessions: Sessions) -> None:
        for _ in range(1000):
            sessions.advance("s")
        await asyncio.sleep(0.5)

    store = Slow()
    play(scenario, store)
    assert frames_of(store) == [[("s", 1000)]]


def test_batches_have_an_end_in_number_and_in_bytes() -> None:
    async def scenario(sessions: Sessions) -> None:
        for number in range(600):
            sessions.advance(f"s{number}", 8)
        await asyncio.sleep(0.5)
        assert len(sessions.durable) == 600

    store = Slow()
    play(scenario, store)
    assert sorted(len(save) for save in store.saves) == [88, 256, 256]
    store = Slow()
    size = 256 * 1024
    play(scenario, store, size=size)
    assert max(len(save) for save in store.saves) <= MOST_BYTES / size
    assert store.most_under_way == 4


def test_flush_returns_when_it_is_saved() -> None:
    async def scenario(sessions: Sessions) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        sessions.advance("s")
        await sessions.checkpoints.flush("s")
        assert loop.time() - begin == pytest.approx(0.01)  # the store's time and no waiting
        assert sessions.durable == [("s", 1)]
        await sessions.checkpoints.flush("s")
        await sessions.checkpoints.flush("never heard of")
        assert len(sessions.store.saves) == 1

    play(scenario)


def test_flush_during_a_save_waits_for_the_next() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.advance("s", 8)
        await asyncio.sleep(0.051)  # its save is under way
        assert len(sessions.store.saves) == 1
        sessions.advance("s")
        await asyncio.gather(*(sessions.checkpoints.flush("s") for _ in range(3)))
        assert sessions.durable == [("s", 8), ("s", 9)]

    store = Slow()
    play(scenario, store)
    assert frames_of(store) == [[("s", 8)], [("s", 9)]]


def test_a_change_without_a_frame_is_saved_under_a_later_sequence() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.advance("s", 8)
        await sessions.checkpoints.flush("s")
        sessions.advance("s", 0)  # a reset
        await asyncio.sleep(0.5)
        assert sessions.durable == [("s", 8)]  # announced once

    store = Slow()
    play(scenario, store)
    (first,), (second,) = store.saves
    assert first.next_frame == second.next_frame
    assert first.sequence < second.sequence


def test_a_session_in_the_middle_of_a_message_is_taken_after_it() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.busy = {"s"}
        sessions.advance("s", 8)
        sessions.advance("t", 8)
        await asyncio.sleep(1)
        assert sessions.durable == [("t", 8)]
        sessions.busy = set()
        await asyncio.sleep(0.1)
        assert sessions.durable == [("t", 8), ("s", 8)]

    play(scenario)


def test_a_store_that_is_down_is_asked_ever_more_seldom_and_then_gets_the_newest() -> None:
    async def scenario(sessions: Sessions) -> None:
        store = sessions.store
        assert isinstance(store, Slow)
        assert sessions.checkpoints.health().degraded_since is None
        store.broken = StoreUnavailable("nobody answers")
        for _ in range(60 * 30):
            for session in "abc":
                sessions.advance(session)
            await asyncio.sleep(1 / 30)
        health = sessions.checkpoints.health()
        assert health.degraded_since is not None
        assert (health.reason, health.unsaved) == ("nobody answers", 3)
        assert health.oldest_s == pytest.approx(60, abs=1)
        assert 14 <= len(store.saves) <= 30, "5 s apart in the end"
        with pytest.raises(StoreUnavailable, match="nobody answers") as caught:
            await sessions.checkpoints.flush("a")
        assert 1 <= caught.value.facts["retry_after"] <= LAST_RETRY_S
        assert sessions.durable == []
        store.broken, down = None, len(store.saves)
        await asyncio.sleep(LAST_RETRY_S + 0.1)
        assert sorted(sessions.durable) == [(session, 1800) for session in "abc"]
        assert len(store.saves) == down + 1
        health = sessions.checkpoints.health()
        assert (health.degraded_since, health.reason, health.unsaved, health.oldest_s) == (None, "", 0, 0)

    play(scenario)


def test_a_store_that_failed_is_asked_again_though_nothing_is_to_be_saved() -> None:
    """Its only session ended while it was away: health must not stay as it was."""

    async def scenario(sessions: Sessions) -> None:
        store = sessions.store
        assert isinstance(store, Slow)
        store.broken = StoreUnavailable("away")
        sessions.advance("s", 8)
        await asyncio.sleep(1)
        sessions.checkpoints.forget("s")
        assert sessions.checkpoints.health().degraded_since is not None
        saves, store.broken = len(store.saves), None
        await asyncio.sleep(LAST_RETRY_S)
        assert sessions.checkpoints.health().degraded_since is None
        assert len(store.saves) == saves

    play(scenario)


def test_a_fault_of_the_store_itself_ends_nothing() -> None:
    async def scenario(sessions: Sessions) -> None:
        store = sessions.store
        assert isinstance(store, Slow)
        store.broken = ZeroDivisionError()
        sessions.advance("s")
        with pytest.raises(StoreUnavailable, match="ZeroDivisionError"):
            await sessions.checkpoints.flush("s")
        store.broken = None
        await asyncio.sleep(1)
        assert sessions.durable == [("s", 1)]

    play(scenario)


def test_what_is_not_confirmed_is_not_announced_and_saved_again() -> None:
    async def scenario(sessions: Sessions) -> None:
        store = sessions.store
        assert isinstance(store, Slow)
        store.unconfirmed = True
        sessions.advance("s")
        with pytest.raises(StoreUnavailable, match="not saved"):
            await sessions.checkpoints.flush("s")
        assert sessions.checkpoints.health().degraded_since is not None
        assert sessions.durable == []
        store.unconfirmed = False
        await asyncio.sleep(1)
        assert sessions.durable == [("s", 1)]

    play(scenario)


def test_a_flush_ends_though_the_store_does_not_answer() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.advance("s")
        with pytest.raises(StoreUnavailable, match="too slow"):
            await sessions.checkpoints.flush("s")
        assert asyncio.get_running_loop().time() == pytest.approx(4)

    play(scenario, Slow(delay_s=1e6, timeout_s=2))


def test_whoever_was_taken_over_is_told_once() -> None:
    async def scenario(sessions: Sessions) -> None:
        other = MemoryStore(StoreSettings(), sessions.store.records)
        sessions.advance("over", 8)
        sessions.advance("done", 8)
        sessions.advance("mine", 8)
        await asyncio.sleep(1)
        await other.attach("over")
        await sessions.store.end("done", 1)
        for session in ("over", "done", "mine"):
            sessions.advance(session)
        with pytest.raises(TakenOver):
            await sessions.checkpoints.flush("over")
        with pytest.raises(SessionNotFound):
            await sessions.checkpoints.flush("done")
        await sessions.checkpoints.flush("mine")
        assert sorted(sessions.ended) == [("done", Outcome.ENDED), ("over", Outcome.FENCED)]
        await asyncio.sleep(10)
        assert len(sessions.ended) == 2
        assert await other.save([Checkpoint("over", 2, 1, b"the other's")]) == [Outcome.SAVED]

    play(scenario)


def test_a_forgotten_session_is_not_saved_and_its_last_save_changes_nothing() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.advance("waiting")
        sessions.advance("flying", 8)
        await asyncio.sleep(0.021)
        flush = asyncio.create_task(sessions.checkpoints.flush("waiting"))
        await asyncio.sleep(0)
        sessions.checkpoints.forget("waiting")
        sessions.checkpoints.forget("flying")
        sessions.checkpoints.forget("unknown")
        with pytest.raises(SessionNotFound):
            await flush
        await asyncio.sleep(10)
        assert sessions.durable == []

    play(scenario)


def test_an_id_that_comes_again_is_not_touched_by_the_end_of_the_one_before() -> None:
    """The old one's save lands, fenced, when the new one is here already."""

    async def scenario(sessions: Sessions) -> None:
        sessions.advance("s", 8)
        await asyncio.sleep(0.021)
        sessions.checkpoints.forget("s")
        attached = await sessions.store.attach("s")
        sessions.frames["s"], sessions.epoch = 0, attached.epoch + 1
        await sessions.store.attach("s")
        sessions.advance("s", 1)
        await asyncio.sleep(1)
        assert sessions.ended == []
        assert sessions.durable == [("s", 1)]

    play(scenario)


def test_a_record_that_cannot_be_made_stops_no_other() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.checkpoints.changed("broken", 8)  # has no frames: taking it raises
        sessions.advance("fine", 8)
        with pytest.raises(ServiceError):
            await sessions.checkpoints.flush("broken")
        await asyncio.sleep(60)
        assert sessions.durable == [("fine", 8)]
        assert len(sessions.store.saves) == 1

    play(scenario)


def test_a_callback_that_fails_stops_no_saving() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.durable = None  # type: ignore[assignment]
        sessions.advance("s", 8)
        await asyncio.sleep(1)
        sessions.durable = []
        sessions.advance("s", 8)
        await asyncio.sleep(1)
        assert sessions.durable == [("s", 16)]

    play(scenario)


def test_drain_saves_all_and_names_what_it_could_not() -> None:
    async def scenario(sessions: Sessions) -> None:
        store = sessions.store
        assert isinstance(store, Slow)
        for number in range(1000):
            sessions.advance(f"s{number}")
        assert await sessions.checkpoints.drain(1) == []
        assert asyncio.get_running_loop().time() < 0.1
        assert len(sessions.durable) == 1000
        assert await sessions.checkpoints.drain(0) == []
        store.broken = StoreUnavailable("gone")
        sessions.advance("s1")
        assert await sessions.checkpoints.drain(1) == ["s1"]
        sessions.busy, store.broken = {"s1"}, None
        await asyncio.sleep(5)
        begin = len(store.saves)
        assert await sessions.checkpoints.drain(1) == ["s1"]
        assert len(store.saves) == begin

    play(scenario)


def test_touching_brings_back_what_the_store_has_lost() -> None:
    async def scenario(sessions: Sessions) -> None:
        store = sessions.store
        assert isinstance(store, Slow)
        ids = [f"s{number}" for number in range(300)]
        for session in ids:
            sessions.advance(session, 3)
        assert await sessions.checkpoints.drain(1) == []
        await sessions.checkpoints.touch(ids)
        await asyncio.sleep(1)
        saves = len(store.saves)
        store.records.clear()
        await sessions.checkpoints.touch(ids)
        await asyncio.sleep(1)
        assert len(store.records) == 300
        assert len(store.saves) == saves + 2

    play(scenario)


def test_leaving_ends_those_who_wait() -> None:
    async def scenario(sessions: Sessions) -> None:
        sessions.advance("s")
        waiting.append(asyncio.create_task(sessions.checkpoints.flush("s")))
        await asyncio.sleep(0.001)

    async def outcome() -> None:
        sessions = Sessions(Slow(delay_s=60))
        async with sessions.checkpoints:
            await scenario(sessions)
        with pytest.raises(StoreUnavailable, match="shutting down"):
            await waiting[0]

    waiting: list[asyncio.Task[None]] = []
    virtual_time.run(outcome())
