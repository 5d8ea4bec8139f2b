"""One suite for every store: what `service.store.Store` promises is shown for each of them, the servers being real ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.errors import SessionNotFound
from service.store import MOST_EPOCH, MOST_FRAMES, MOST_IN_BATCH, Attached, Checkpoint, Outcome, Store, StoreSettings, key
from service.store_memory import MemoryStore, Records
from service.store_redis import RedisStore
from service.store_sqlite import SqliteStore
from tests.valkey_process import Valkey, free_port, join, running

SAVED, FENCED, STALE, ENDED = Outcome.SAVED, Outcome.FENCED, Outcome.STALE, Outcome.ENDED


class Place:
    """Where records lie; `owner` gives stores of different processes that share it."""

    def __init__(self, make: Callable[[StoreSettings], Store], settings: StoreSettings) -> None:
        self._make = make
        self.settings = settings
        self.made: list[Store] = []

    async def owner(self, **changes: Any) -> Store:
        store = self._make(dataclasses.replace(self.settings, owner=f"owner-{len(self.made)}", **changes))
        self.made.append(store)
        await store.start()
        return store

    def run(self, scenario: Callable[[Place], Awaitable[None]]) -> None:
        async def whole() -> None:
            try:
                async with asyncio.timeout(30):
                    await scenario(self)
            finally:
                for store in self.made:
                    await store.close()

        asyncio.run(whole())


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running(tmp_path_factory.mktemp("valkey"), "--appendonly", "yes", "--appendfsync", "always", "--save", "") as server:
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Valkey]]:
    """Two nodes, each with half of the slots."""
    with contextlib.ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--cluster-port")
        nodes = [stack.enter_context(running(tmp_path_factory.mktemp(f"node-{number}"), *options, str(free_port()))) for number in range(2)]
        join(nodes, [(0, 8191), (8192, 16383)])
        yield nodes


@pytest.fixture(params=["memory", "sqlite", "sqlite fsynced", "valkey", "valkey fsynced", "cluster", "cluster fsynced"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    kind, _, durability = request.param.partition(" ")
    settings = StoreSettings(durability=durability or "memory", prefix=f"{tmp_path.name}:", timeout_s=10)
    if kind == "memory":
        records: Records = {}
        return Place(lambda settings: MemoryStore(settings, records), settings)
    if kind == "sqlite":
        return Place(lambda settings: SqliteStore(settings, tmp_path / "sessions"), settings)
    if kind == "valkey":
        url = f"redis://127.0.0.1:{request.getfixturevalue('valkey').port}"
    else:
        url = f"redis+cluster://127.0.0.1:{request.getfixturevalue('cluster')[0].port}"
    return Place(RedisStore, dataclasses.replace(settings, url=url))


def at(frame: int, epoch: int = 1, session: str = "s", sequence: int = 0) -> Checkpoint:
    return Checkpoint(session, epoch, frame, f"{session}/{epoch}/{frame}/{sequence}".encode() + bytes(range(256)), sequence)


def test_attaching_counts_and_hands_out_the_record(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store = await place.owner()
        assert await store.load("s") is None
        assert await store.attach("s") == Attached(1, None)
        assert await store.load("s") == Attached(1, None)
        assert await store.save([at(8)]) == [SAVED]
        assert await store.attach("s") == Attached(2, at(8).record)
        assert await store.attach("s", create=False) == Attached(3, at(8).record)
        assert await store.load("s") == Attached(3, at(8).record)
        await store.ping()

    place.run(scenario)


def test_only_what_is_there_is_attached_without_create(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store = await place.owner()
        with pytest.raises(SessionNotFound):
            await store.attach("s", create=False)
        assert await store.load("s") is None  # and asking has left nothing behind

    place.run(scenario)


def test_whoever_was_taken_over_is_fenced_however_far_ahead(place: Place) -> None:
    async def scenario(place: Place) -> None:
        old, new = await place.owner(), await place.owner()
        await old.attach("s")
        assert await old.save([at(8)]) == [SAVED]
        assert await new.attach("s") == Attached(2, at(8).record)
        assert await old.save([at(1000)]) == [FENCED]
        assert await new.save([at(9, epoch=2)]) == [SAVED]
        assert await old.save([at(1000)]) == [FENCED]
        assert await new.load("s") == Attached(2, at(9, epoch=2).record)

    place.run(scenario)


def test_two_owners_at_one_frame(place: Place) -> None:
    """Both took the frame; the one that attached last keeps it, whoever saves first."""

    async def scenario(place: Place) -> None:
        for order in (0, 1):
            session = f"s{order}"
            old, new = await place.owner(), await place.owner()
            await old.attach(session)
            await new.attach(session)
            writes = [(old, at(5, 1, session), FENCED), (new, at(5, 2, session), SAVED)]
            for store, checkpoint, outcome in writes[::-1] if order else writes:
                assert await store.save([checkpoint]) == [outcome]
            assert await old.load(session) == Attached(2, at(5, 2, session).record)

    place.run(scenario)


def test_an_epoch_that_was_given_out_twice_is_the_last_ones(place: Place) -> None:
    """A store that lost the first attach gives epoch 1 out again."""

    async def scenario(place: Place) -> None:
        first, second = await place.owner(), await place.owner()
        await second.attach("s")
        assert await first.save([at(8)]) == [FENCED]
        assert await second.save([at(3)]) == [SAVED]
        assert await first.save([at(8)]) == [FENCED]
        assert await first.end("s", 1) is False
        assert await first.load("s") == Attached(1, at(3).record)

    place.run(scenario)


def test_many_attach_at_once_and_each_gets_an_epoch_of_its_own(place: Place) -> None:
    async def scenario(place: Place) -> None:
        stores = [await place.owner() for _ in range(4)]
        epochs = [one.epoch for one in await asyncio.gather(*(store.attach("s") for store in stores * 10))]
        assert sorted(epochs) == list(range(1, 41))
        outcomes = await asyncio.gather(*(store.save([at(50 - epoch, epoch)]) for store, epoch in zip(stores * 10, epochs, strict=True)))
        assert [outcome for (outcome,), epoch in zip(outcomes, epochs, strict=True) if epoch == 40] == [SAVED]
        assert all(outcome is FENCED for (outcome,), epoch in zip(outcomes, epochs, strict=True) if epoch < 40)
        assert await stores[0].load("s") == Attached(40, at(10, 40).record)

    place.run(scenario)


def test_frames_of_one_owner_never_go_back(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store = await place.owner()
        await store.attach("s")
        assert await store.save([at(8)]) == [SAVED]
        assert await store.save([at(7)]) == [STALE]
        assert await store.save([at(8)]) == [SAVED]  # once more after a timeout
        assert await store.load("s") == Attached(1, at(8).record)
        assert await store.save([at(MOST_FRAMES - 1)]) == [SAVED]  # numbers beyond what floating point can count
        assert await store.save([at(MOST_FRAMES - 2)]) == [STALE]
        assert await store.save([at(MOST_FRAMES)]) == [SAVED]

    place.run(scenario)


def test_a_reset_at_a_frame_is_not_undone_by_an_earlier_write_of_that_frame(place: Place) -> None:
    """The write before the reset timed out, and arrives after the one with the reset."""

    async def scenario(place: Place) -> None:
        store = await place.owner()
        await store.attach("s")
        before, reset = at(8, sequence=1), at(8, sequence=2)
        assert await store.save([reset]) == [SAVED]
        assert await store.save([before]) == [STALE]
        assert await store.load("s") == Attached(1, reset.record)
        assert await store.save([at(9, sequence=0)]) == [SAVED]  # frames decide first

    place.run(scenario)


def test_a_reset_during_a_cut_does_not_outlive_the_cut(place: Place) -> None:
    """The replica that was cut off took a reset; its client went on elsewhere from the frames before."""

    async def scenario(place: Place) -> None:
        cut, other = await place.owner(), await place.owner()
        await cut.attach("s")
        assert await cut.save([at(8, sequence=1)]) == [SAVED]
        assert await other.attach("s", create=False) == Attached(2, at(8, sequence=1).record)
        assert await cut.save([at(8, sequence=2)]) == [FENCED]
        assert await other.load("s") == Attached(2, at(8, sequence=1).record)

    place.run(scenario)


def test_a_new_owner_counts_from_where_it_likes(place: Place) -> None:
    """Its sequences are its own; a session that begins anew under its id counts frames from 0."""

    async def scenario(place: Place) -> None:
        old, new = await place.owner(), await place.owner()
        await old.attach("s")
        assert await old.save([at(8, sequence=500)]) == [SAVED]
        assert await new.attach("s") == Attached(2, at(8, sequence=500).record)
        assert await new.save([at(8, epoch=2, sequence=1)]) == [SAVED]
        assert await new.attach("s") == Attached(3, at(8, epoch=2, sequence=1).record)
        assert await new.save([at(0, epoch=3, sequence=2)]) == [SAVED]
        assert await new.save([at(8, epoch=2, sequence=3)]) == [FENCED]

    place.run(scenario)


def test_a_save_fills_a_store_that_knows_nothing(place: Place) -> None:
    async def scenario(place: Place) -> None:
        old, new = await place.owner(), await place.owner()
        assert await old.save([at(8, epoch=3)]) == [SAVED]
        assert await new.save([at(6, epoch=4)]) == [SAVED]  # had attached before the store lost it
        assert await old.save([at(9, epoch=3)]) == [FENCED]
        assert await new.attach("s") == Attached(5, at(6, epoch=4).record)

    place.run(scenario)


def test_what_was_ended_stays_ended(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store, other = await place.owner(), await place.owner()
        await store.attach("s")
        await store.save([at(8)])
        await other.attach("s")
        assert await store.end("s", 1) is False
        assert await other.load("s") == Attached(2, at(8).record)
        assert await other.end("s", 2) is True
        assert await other.end("s", 2) is True
        assert await other.load("s") is None
        assert await other.save([at(9, epoch=2)]) == [ENDED]  # was under way
        assert await store.save([at(9)]) == [ENDED]
        assert await store.touch(["s"]) == ["s"]
        with pytest.raises(SessionNotFound):
            await store.attach("s", create=False)
        assert await store.load("s") is None

    place.run(scenario)


def test_an_id_that_comes_again_counts_on(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store, other = await place.owner(), await place.owner()
        await store.attach("s")
        await store.save([at(8)])
        assert await store.end("s", 1) is True
        assert await other.attach("s") == Attached(2, None)
        assert await store.save([at(9)]) == [FENCED]
        assert await other.save([at(1, epoch=2)]) == [SAVED]

    place.run(scenario)


def test_ending_what_was_never_stored_keeps_late_writes_out(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store = await place.owner()
        assert await store.end("s", 1) is True
        assert await store.save([at(8)]) == [ENDED]

    place.run(scenario)


def test_neighbours_in_a_batch_are_independent(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store, other = await place.owner(), await place.owner()
        for session in ("fine", "over", "behind", "done"):
            await store.attach(session)
        await other.attach("over")
        await store.save([at(9, session="behind"), at(9, session="done")])
        await store.end("done", 1)
        batch = [at(8, session=session) for session in ("new", "over", "fine", "behind", "done")]
        assert await store.save(batch) == [SAVED, FENCED, SAVED, STALE, ENDED]
        for session, frame in {"new": 8, "fine": 8, "behind": 9}.items():
            assert await store.load(session) == Attached(1, at(frame, session=session).record)
        assert await store.save([]) == []

    place.run(scenario)


def test_a_full_batch_and_no_larger(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store = await place.owner()
        ids = [f"s{number}" for number in range(MOST_IN_BATCH)]
        assert await store.save([at(1, session=one) for one in ids]) == [SAVED] * MOST_IN_BATCH
        assert await store.touch(ids) == []
        assert await store.load(ids[-1]) == Attached(1, at(1, session=ids[-1]).record)
        with pytest.raises(ValueError, match="at most 256"):
            await store.save([at(1, session=one) for one in [*ids, "more"]])
        with pytest.raises(ValueError, match="more than once"):
            await store.save([at(1), at(2)])
        with pytest.raises(ValueError, match="more than once"):
            await store.touch(["s", "s"])

    place.run(scenario)


def test_any_id_and_any_bytes(place: Place) -> None:
    async def scenario(place: Place) -> None:
        store = await place.owner()
        for session in ("", "{a}{b}", "model:string:7 \n", "\udc80 ü 🙂", "x" * 10_000):
            for record in (b"", b"\x00\r\n$5\r\n", bytes(2**20)):
                assert await store.save([Checkpoint(session, 1, len(record), record)]) == [SAVED]
                assert await store.load(session) == Attached(1, record)

    place.run(scenario)


def test_records_expire(place: Place) -> None:
    """Unless they are saved or touched; and at an age, however busy."""

    async def idle(place: Place) -> None:
        store = await place.owner(idle_s=0.6)
        await store.save([at(1, session=session) for session in ("left", "touched", "saved")])
        for _ in range(3):
            await asyncio.sleep(0.3)
            assert await store.touch(["touched"]) == []
            assert await store.save([at(2, session="saved")]) == [SAVED]
        assert await store.touch(["left", "touched"]) == ["left"]
        assert await store.load("left") is None
        with pytest.raises(SessionNotFound):
            await store.attach("left", create=False)
        assert await store.load("touched") is not None
        assert await store.load("saved") is not None
        assert await store.attach("left") == Attached(1, None)

    async def old(place: Place) -> None:
        store = await place.owner(idle_s=60, age_s=0.7)
        await store.attach("old")
        for frame in range(1, 3):
            await asyncio.sleep(0.2)
            assert await store.touch(["old"]) == []
            assert await store.save([at(frame, session="old")]) == [SAVED]
        await asyncio.sleep(0.5)
        assert await store.touch(["old"]) == ["old"]
        assert await store.load("old") is None

    async def scenario(place: Place) -> None:
        await asyncio.gather(idle(place), old(place))

    place.run(scenario)


def test_what_cannot_be_counted_is_refused() -> None:
    for epoch in (0, -1, MOST_EPOCH + 1):
        with pytest.raises(ValueError, match="epoch"):
            Checkpoint("s", epoch, 0, b"")
    for wrong in ({"next_frame": -1}, {"next_frame": MOST_FRAMES + 1}, {"sequence": -1}, {"sequence": MOST_FRAMES + 1}):
        with pytest.raises(ValueError, match="from 0 to"):
            Checkpoint(**{"session_id": "s", "epoch": 1, "next_frame": 0, "record": b"", **wrong})


def test_a_key_does_not_give_the_id_away() -> None:
    assert key("s") == "043a718774c572bd8a25adbeb1bfcd5c0256ae11cecf9f9c3f925d0e52beaf89"
    assert "secret" not in repr(Checkpoint("s", 1, 0, b"secret"))
