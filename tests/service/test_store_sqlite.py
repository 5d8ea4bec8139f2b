"""What only a store in a file can meet: other processes, damage, other files, a disk that does not answer."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError, StoreUnavailable
from service.store import MOST_IN_BATCH, Attached, Checkpoint, Outcome, StoreSettings
from service.store_sqlite import MOST_QUEUED, SqliteStore

ROOT = Path(__file__).resolve().parents[2]


def at(frame: int, epoch: int = 1, session: str = "s") -> Checkpoint:
    return Checkpoint(session, epoch, frame, f"record {frame}".encode())


def play(path: Path, scenario: Callable[[SqliteStore], Awaitable[Any]], **settings: Any) -> None:
    async def whole() -> None:
        store = SqliteStore(StoreSettings(**settings), path)
        try:
            async with asyncio.timeout(60):
                await scenario(store)
        finally:
            await store.close()

    asyncio.run(whole())


def test_sessions_outlive_the_process(tmp_path: Path) -> None:
    async def first(store: SqliteStore) -> None:
        await store.start()
        await store.save([at(8)])

    async def second(store: SqliteStore) -> None:
        await store.start()
        assert await store.attach("s", create=False) == Attached(2, b"record 8")

    play(tmp_path / "sessions", first)
    play(tmp_path / "sessions", second)


@pytest.mark.parametrize("durability", ["memory", "fsynced"])
def test_what_was_confirmed_outlives_a_kill(tmp_path: Path, durability: str) -> None:
    """A process that saves as fast as it can is killed; whatever it had said to be saved is there."""
    script = """
import asyncio, sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from service.store import Checkpoint, StoreSettings
from service.store_sqlite import SqliteStore

async def main():
    store = SqliteStore(StoreSettings(durability=sys.argv[2], owner='it'), Path(sys.argv[1]))
    await store.start()
    for frame in range(1, 10**6):
        await store.save([Checkpoint(f"s{number}", 1, frame, bytes(5000)) for number in range(5)])
        print(frame, flush=True)

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "sessions"), durability], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(30):
        last = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    confirmed = int((last + rest).split("\n")[-2])

    async def scenario(store: SqliteStore) -> None:
        await store.start()
        outcomes = await store.save([at(confirmed - 1, session=f"s{number}") for number in range(5)])
        assert outcomes == [Outcome.STALE] * 5, "the same owner has saved later ones"

    play(tmp_path / "sessions", scenario, owner="it")


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    """Each attaches the same session 200 times; no epoch is given out twice."""
    script = """
import asyncio, sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from service.store import StoreSettings
from service.store_sqlite import SqliteStore

async def main():
    store = SqliteStore(StoreSettings(timeout_s=20), Path(sys.argv[1]))
    await store.start()
    print("ready", flush=True)
    sys.stdin.readline()
    print(*[(await store.attach("s")).epoch for _ in range(200)])
    await store.close()

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "sessions")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    epochs = [int(word) for process in processes for word in process.communicate(timeout=60)[0].split()]
    assert sorted(epochs) == list(range(1, 401))


def test_many_begin_a_file_at_once(tmp_path: Path) -> None:
    async def at_once(path: Path) -> None:
        stores = [SqliteStore(StoreSettings(timeout_s=20), path) for _ in range(8)]
        await asyncio.gather(*(store.start() for store in stores))
        assert sorted([(await store.attach("s")).epoch for store in stores]) == list(range(1, 9))
        for store in stores:
            await store.close()

    for number in range(20):
        asyncio.run(at_once(tmp_path / str(number)))


def _begin_all(paths: list[Path], together: Barrier) -> None:
    async def begin(path: Path) -> None:
        store = SqliteStore(StoreSettings(timeout_s=20), path)
        await store.start()
        await store.close()

    for path in paths:
        together.wait(60)
        asyncio.run(begin(path))


def test_two_processes_begin_files_at_the_same_moment(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    paths = [tmp_path / str(number) for number in range(60)]
    processes = [spawn.Process(target=_begin_all, args=(paths, together)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    async def scenario(store: SqliteStore) -> None:
        await store.start()
        await store.save([at(8)])
        files = [tmp_path / name for name in os.listdir(tmp_path)]
        assert len(files) == 3
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}

    play(tmp_path / "sessions", scenario)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no database at all, but longer than a page of one would have to be " * 20, "cannot be read.*move it away"),
        ("CREATE TABLE cats (name TEXT)", "something else"),
        (f"PRAGMA application_id = {0x49524E4E}; PRAGMA user_version = 2; CREATE TABLE sessions (key BLOB)", "version 2, this service reads 1"),
        ("", "no file can be there"),
    ],
)
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path, content: bytes | str, told: str) -> None:
    path = tmp_path / "sessions"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        database = sqlite3.connect(path)
        database.executescript(content)
        database.close()
    else:
        path, told = tmp_path / "nowhere" / "sessions", "No such file or directory"
    before = path.read_bytes() if path.exists() else None

    async def scenario(store: SqliteStore) -> None:
        with pytest.raises(StartupError, match=told):
            await store.start()
        with pytest.raises(StoreUnavailable, match=told):
            await store.attach("s")

    play(path, scenario)
    assert (path.read_bytes() if path.exists() else None) == before


def test_damage_is_found_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "sessions"

    async def fill(store: SqliteStore) -> None:
        await store.start()
        await store.save([at(8, session=f"s{number}") for number in range(MOST_IN_BATCH)])

    async def scenario(store: SqliteStore) -> None:
        with pytest.raises(StartupError, match="move it away"):
            await store.start()

    play(path, fill)
    whole = path.read_bytes()
    assert len(whole) > 5 * 4096
    path.write_bytes(whole[: 2 * 4096] + os.urandom(2 * 4096) + whole[4 * 4096 :])
    play(path, scenario)


def test_a_file_that_another_locks_is_unavailable_and_then_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sessions"

    async def scenario(store: SqliteStore) -> None:
        await store.start()
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        begin = asyncio.get_running_loop().time()
        for call in (store.attach("s"), store.save([at(1)]), store.touch(["s"]), store.end("s", 1)):
            with pytest.raises(StoreUnavailable, match="locked"):
                await call
        assert asyncio.get_running_loop().time() - begin < 4 * 0.4 + 1
        fresh = SqliteStore(StoreSettings(timeout_s=0.3), path)
        with pytest.raises(StoreUnavailable):
            await fresh.start()
        other.execute("COMMIT")
        other.close()
        assert (await store.attach("s")).epoch == 1
        assert (await fresh.attach("s")).epoch == 2
        await fresh.close()

    play(path, scenario, timeout_s=0.3)


def test_a_disk_that_does_not_answer_holds_up_no_more_than_its_thread(tmp_path: Path) -> None:
    disk = threading.Event()

    async def scenario(store: SqliteStore) -> None:
        await store.start()
        loop = asyncio.get_running_loop()
        stuck = asyncio.create_task(store._call(lambda database: disk.wait(30)))
        begin = loop.time()
        outcomes = await asyncio.gather(stuck, *(store.save([at(1, session=f"s{number}")]) for number in range(100)), return_exceptions=True)
        assert loop.time() - begin < 2
        told = [str(outcome) for outcome in outcomes if isinstance(outcome, StoreUnavailable)]
        assert len(told) == 101
        assert sum("did not answer within" in one for one in told) == MOST_QUEUED
        assert sum("too slow" in one for one in told) == 101 - MOST_QUEUED
        disk.set()
        await asyncio.sleep(0.2)
        assert await store.load("s1") is None  # nobody waited for it any more
        assert await store.save([at(1)]) == [Outcome.SAVED]

    play(tmp_path / "sessions", scenario, timeout_s=0.3)


def test_the_expired_do_not_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store_sqlite._PURGE_S", 0.0)

    async def scenario(store: SqliteStore) -> None:
        await store.save([at(1, session="old")])
        await asyncio.sleep(0.3)
        await store.save([at(1, session="new")])
        database = sqlite3.connect(tmp_path / "sessions")
        assert database.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
        database.close()

    play(tmp_path / "sessions", scenario, idle_s=0.2)


def test_a_replica_is_not_to_be_had(tmp_path: Path) -> None:
    async def scenario(store: SqliteStore) -> None:
        with pytest.raises(StartupError, match="no replica"):
            await store.start()

    play(tmp_path / "sessions", scenario, durability="replicated")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async def scenario(store: SqliteStore) -> None:
        await store.start()
        await store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.ping()

    play(tmp_path / "sessions", scenario)
