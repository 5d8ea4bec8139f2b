"""What only a server can meet: restarts, cuts, failovers, moving slots, passwords, TLS. Every server here is a real one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from service.errors import SessionNotFound, StartupError, StoreUnavailable
from service.store import Attached, Checkpoint, Outcome, StoreSettings, key
from service.store_redis import RedisStore
from service.store_server import LAST_PAUSE_S
from tests.valkey_process import READY_WITHIN_S, Valkey, free_port, join, need_program, running

AOF = ("--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0")
SAVED = Outcome.SAVED


def at(frame: int, epoch: int = 1, session: str = "s") -> Checkpoint:
    return Checkpoint(session, epoch, frame, f"{session} at {frame} ".encode() * 200)


def play(url: str, scenario: Callable[[RedisStore], Awaitable[Any]], **settings: Any) -> None:
    async def whole() -> None:
        store = RedisStore(StoreSettings(url=url, **settings))
        try:
            async with asyncio.timeout(60):
                await scenario(store)
        finally:
            await store.close()

    asyncio.run(whole())


async def until(done: Callable[[], Awaitable[bool]], within_s: float = READY_WITHIN_S) -> float:
    """Seconds until it is done; the store may be away meanwhile."""
    begin = time.monotonic()
    while time.monotonic() - begin < within_s:
        with contextlib.suppress(StoreUnavailable):
            if await done():
                return time.monotonic() - begin
        await asyncio.sleep(0.02)
    pytest.fail(f"not done within {within_s} s")


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running(tmp_path_factory.mktemp("valkey"), *AOF) as server:
        yield server


def url_of(server: Valkey) -> str:
    return f"redis://127.0.0.1:{server.port}"


def test_keys_do_not_give_ids_away_and_hold_one_slot(valkey: Valkey) -> None:
    async def scenario(store: RedisStore) -> None:
        await store.start()
        await store.save([at(8, session="a very secret id")])
        keys = valkey.cli("KEYS", "keys:*")
        assert f"keys:{{{key('a very secret id')}}}" in keys
        assert "secret" not in keys

    play(url_of(valkey), scenario, prefix="keys:")


def test_scripts_that_the_server_forgot_are_loaded_again(valkey: Valkey) -> None:
    async def scenario(store: RedisStore) -> None:
        for frame in range(3):
            assert valkey.cli("SCRIPT", "FLUSH") == "+OK\r\n"
            assert await store.save([at(frame)]) == [SAVED]
        assert valkey.cli("SCRIPT", "FLUSH") == "+OK\r\n"
        epochs = await asyncio.gather(*(store.attach("s") for _ in range(5)))
        assert sorted(one.epoch for one in epochs) == [2, 3, 4, 5, 6]  # none counted twice

    play(url_of(valkey), scenario, prefix="scripts:")


def test_one_batch_is_one_round_trip(valkey: Valkey) -> None:
    """After the first batch, which checks the server and loads the script."""

    async def scenario(store: RedisStore) -> None:
        batch = [at(8, session=f"s{number}") for number in range(256)]
        await store.save(batch)
        before = _commands(valkey)
        await store.save(batch)
        assert _commands(valkey) - before <= 2  # the script, and ours

    play(url_of(valkey), scenario, prefix="trips:")


def _commands(server: Valkey) -> int:
    told = dict(line.split(":", 1) for line in server.cli("INFO", "commandstats").split("\r\n") if ":" in line)
    return sum(int(value.split("calls=")[1].split(",")[0]) for name, value in told.items() if name in ("cmdstat_evalsha", "cmdstat_info", "cmdstat_ping"))


@pytest.mark.parametrize("durability", ["memory", "fsynced"])
def test_what_was_confirmed_outlives_a_kill_in_the_middle_of_batches(tmp_path: Path, durability: str) -> None:
    """Two writers save as fast as they can while the server is killed and started, twice; the stores come back by themselves."""
    with running(tmp_path, *AOF, "--appendfsync", "always" if durability == "fsynced" else "everysec") as server:

        async def scenario(store: RedisStore) -> None:
            confirmed: dict[str, int] = {}
            successes = failures = 0
            ending = False

            async def write(writer: int) -> None:
                nonlocal successes, failures
                frame = 0
                while not ending:
                    frame += 1
                    batch = [at(frame, session=f"{writer}/{number}") for number in range(64)]
                    try:
                        outcomes = await store.save(batch)
                    except StoreUnavailable:
                        failures += 1
                        await asyncio.sleep(0.01)
                        continue
                    assert outcomes == [SAVED] * 64
                    successes += 1
                    confirmed.update({one.session_id: one.next_frame for one in batch})

            async def more(wanted: int) -> bool:
                return successes >= wanted

            writers = [asyncio.create_task(write(number)) for number in range(2)]
            for _ in range(2):
                await asyncio.sleep(random.uniform(0.1, 0.3))
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
                await until(partial(more, successes + 4))
            ending = True
            await asyncio.gather(*writers)
            assert failures > 0, "the kill was never noticed: this test has shown nothing"
            assert len(confirmed) == 128
            for session, frame in confirmed.items():
                held = await store.load(session)
                assert held is not None
                assert held.record is not None
                assert int(held.record.split()[2]) >= frame

        play(url_of(server), scenario, durability=durability)


def test_a_server_that_does_not_answer_holds_nobody_up_and_is_used_again(tmp_path: Path) -> None:
    with running(tmp_path, *AOF) as server:

        async def scenario(store: RedisStore) -> None:
            await store.start()
            assert await store.save([at(1)]) == [SAVED]
            await asyncio.to_thread(server.freeze)
            begin = time.monotonic()
            calls = [store.save([at(2)]), store.attach("s"), store.load("s"), store.touch(["s"]), store.end("t", 1), store.ping()]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - begin < 0.4 + 1
            assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes), outcomes
            begin = time.monotonic()
            with pytest.raises(StoreUnavailable, match="did not answer in time") as caught:
                await store.attach("s")
            assert time.monotonic() - begin < 0.1, "it is known to be away: nobody waits"
            assert caught.value.facts["retry_after"] == 1
            await asyncio.to_thread(server.thaw)
            took = await until(lambda: _saved(store, at(3)))
            assert took < LAST_PAUSE_S + 1
            held = await store.load("s")
            assert held is not None
            assert held.record == at(3).record  # and not that of frame 2, which was under way

        play(url_of(server), scenario, timeout_s=0.4)


async def _saved(store: RedisStore, checkpoint: Checkpoint) -> bool:
    return await store.save([checkpoint]) == [SAVED]


def test_nobody_there(tmp_path: Path) -> None:
    async def scenario(store: RedisStore) -> None:
        with pytest.raises(StoreUnavailable, match="store at"):
            await store.start()
        for url in (f"redis+cluster://127.0.0.1:{free_port()}", f"redis+sentinel://127.0.0.1:{free_port()}/primary"):
            other = RedisStore(StoreSettings(url=url, timeout_s=1))
            with pytest.raises(StoreUnavailable):
                await other.start()
            with pytest.raises(StoreUnavailable):
                await other.save([at(1)])
            await other.close()

    play(f"redis://127.0.0.1:{free_port()}", scenario)


def test_a_call_given_up_does_not_mix_up_the_answers_of_the_next(valkey: Valkey) -> None:
    """Callers leave at random moments; whoever stays gets what it asked for."""

    async def scenario(store: RedisStore) -> None:
        await store.save([at(1, session=f"s{number}") for number in range(20)])
        chance = random.Random(1)

        async def one(number: int) -> None:
            await asyncio.sleep(chance.uniform(0, 0.02))
            held = await store.load(f"s{number}")
            assert held is not None
            assert held.record == at(1, session=f"s{number}").record

        for _ in range(20):
            tasks = [asyncio.create_task(one(number)) for number in range(20)]
            await asyncio.sleep(chance.uniform(0, 0.02))
            for task in tasks[::2]:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError)

    play(url_of(valkey), scenario, prefix="cancel:")


def test_passwords(tmp_path: Path) -> None:
    with running(tmp_path, *AOF, "--requirepass", "right & proper") as server:

        async def right(store: RedisStore) -> None:
            await store.start()
            assert await store.save([at(1)]) == [SAVED]

        async def wrong(store: RedisStore) -> None:
            with pytest.raises(StartupError, match=r"refuses us.*password in its URL") as caught:
                await store.start()
            assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
            with pytest.raises(StoreUnavailable, match="refuses us"):
                await store.save([at(1)])

        play(f"redis://:right%20%26%20proper@127.0.0.1:{server.port}", right)
        play(f"redis://:wrong@127.0.0.1:{server.port}", wrong)
        play(f"redis://somebody:wrong@127.0.0.1:{server.port}", wrong)
        play(url_of(server), wrong)


def test_a_server_that_is_too_old(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too old is moved up, past the server that there is: its own answer decides."""
    monkeypatch.setattr("service.store_server.OLDEST", (99, 0))

    async def scenario(store: RedisStore) -> None:
        with pytest.raises(StartupError, match=r"\d+\.\d+\.\d+, is too old: Redis 99.0 or Valkey 8 is needed"):
            await store.start()
        with pytest.raises(StoreUnavailable, match="too old"):
            await store.attach("s")

    play(url_of(valkey), scenario)


def test_a_server_that_cannot_keep_its_word_is_refused_at_the_start(tmp_path: Path, valkey: Valkey) -> None:
    async def refused(store: RedisStore) -> None:
        with pytest.raises(StartupError, match="keeps no append-only file"):
            await store.start()

    async def no_cluster(store: RedisStore) -> None:
        with pytest.raises(StartupError, match="no Cluster"):
            await store.start()

    async def replica(store: RedisStore) -> None:
        with pytest.raises(StartupError, match="is a replica"):
            await store.start()

    with running(tmp_path, "--appendonly", "no", "--save", "", "--replicaof", "127.0.0.1", str(valkey.port)) as server:
        play(url_of(server), replica)
        assert server.cli("REPLICAOF", "NO", "ONE") == "+OK\r\n"
        play(url_of(server), refused, durability="fsynced")
        play(f"redis+cluster://127.0.0.1:{server.port}", no_cluster)


def test_fsynced_is_said_when_it_is_on_the_disk(tmp_path: Path) -> None:
    """Nothing is confirmed that was not written to the disk; here it is told to write when it likes, and then that there is no file."""
    with running(tmp_path, *AOF, "--appendfsync", "everysec") as server:

        async def scenario(store: RedisStore) -> None:
            with pytest.raises(StartupError, match="appendfsync everysec, with which it confirms what is not on its disk"):
                await store.start()
            assert server.cli("CONFIG", "SET", "appendfsync", "always") == "+OK\r\n"
            await store.attach("s")
            assert await store.save([at(3)]) == [SAVED]
            assert server.cli("CONFIG", "SET", "appendfsync", "no") == "+OK\r\n"  # whenever the system likes: half a minute
            assert await store.save([at(4)]) == [Outcome.UNCONFIRMED]
            assert server.cli("CONFIG", "SET", "appendonly", "no") == "+OK\r\n"
            assert await store.save([at(5)]) == [Outcome.UNCONFIRMED]
            with pytest.raises(StoreUnavailable, match="confirm"):
                await store.attach("s")

        play(url_of(server), scenario, durability="fsynced", timeout_s=1.5)


def test_replicated_is_said_when_a_replica_has_it(tmp_path: Path) -> None:
    with running(tmp_path / "primary", *AOF) as primary, running(tmp_path / "replica", *AOF, "--replicaof", "127.0.0.1", str(primary.port)) as replica:

        async def scenario(store: RedisStore) -> None:
            await store.start()
            await until(lambda: _saved(store, at(1)))
            assert (await store.attach("s")).epoch == 2
            assert await store.save([at(2, 2)]) == [SAVED]
            assert at(2).record.decode() in replica.cli("HGET", f"indrnn:{{{key('s')}}}", "record")
            await asyncio.to_thread(replica.freeze)
            assert await store.save([at(3, 2)]) == [Outcome.UNCONFIRMED]
            with pytest.raises(StoreUnavailable, match="replicated"):
                await store.attach("s")
            await asyncio.to_thread(replica.thaw)
            await until(lambda: _saved(store, at(3, 3)))

        play(url_of(primary), scenario, durability="replicated", timeout_s=0.8)


def test_a_full_store_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    with running(tmp_path, *AOF, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:

        async def scenario(store: RedisStore) -> None:
            await store.save([at(1)])
            full = False
            for number in range(200):
                try:
                    await store.save([Checkpoint(f"big{number}", 1, 1, bytes(2**18))])
                except StoreUnavailable as error:
                    full = "memory" in error.message
                    break
            assert full
            assert await store.load("s") == Attached(1, at(1).record)
            assert server.cli("CONFIG", "SET", "maxmemory", "0") == "+OK\r\n"
            assert await _saved(store, at(2))

        play(url_of(server), scenario)


def test_a_failover_behind_sentinels(tmp_path: Path) -> None:
    """The primary dies; the Sentinels make the replica one; the store goes on there with what was replicated, and fences as before."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(running(tmp_path / "primary", *AOF))
        stack.enter_context(running(tmp_path / "replica", *AOF, "--replicaof", "127.0.0.1", str(primary.port)))
        ports = []
        for number in range(3):
            port = free_port()
            directory = tmp_path / f"sentinel-{number}"
            directory.mkdir()
            lines = ["monitor it 127.0.0.1 {primary} 2", "down-after-milliseconds it 300", "failover-timeout it 3000", "parallel-syncs it 1"]
            (directory / "sentinel.conf").write_text("".join(f"sentinel {line}\n".format(primary=primary.port) for line in lines))
            stack.enter_context(_sentinel(directory, port))
            ports.append(port)

        async def scenario(store: RedisStore) -> None:
            await until(lambda: _started(store))
            await until(lambda: _saved(store, at(7)))  # the replica is there
            assert (await store.attach("s")).epoch == 2
            assert await store.save([at(8, 2)]) == [SAVED]
            await until(lambda: _know_each_other(ports))
            await asyncio.to_thread(primary.kill)
            with pytest.raises(StoreUnavailable):
                await store.save([at(9, 2)])
            plain = RedisStore(StoreSettings(url=store.settings.url, owner=store.settings.owner))  # no replica is left to confirm anything
            assert await until(lambda: _saved(plain, at(9, 2))) < 15
            new = RedisStore(StoreSettings(url=store.settings.url))
            assert await new.attach("s") == Attached(3, at(9).record)
            assert await plain.save([at(100, 2)]) == [Outcome.FENCED]
            for one in (plain, new):
                await one.close()

        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        play(f"redis+sentinel://{hosts}/it", scenario, durability="replicated")

        async def a_sentinel(store: RedisStore) -> None:
            with pytest.raises(StartupError, match=r"is a Sentinel: name it in a URL redis\+sentinel"):
                await store.start()

        play(f"redis://127.0.0.1:{ports[0]}", a_sentinel)


async def _started(store: RedisStore) -> bool:
    await store.start()
    return True


@contextlib.contextmanager
def _sentinel(directory: Path, port: int) -> Iterator[Valkey]:
    server = Valkey(directory, port, ("--sentinel",), first=str(directory / "sentinel.conf"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


async def _know_each_other(sentinels: list[int]) -> bool:
    told = [Valkey(Path(), port).cli("INFO", "sentinel") for port in sentinels]
    return all("slaves=1" in one and "sentinels=3" in one for one in told)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Valkey, Valkey]]:
    """A Cluster of two nodes with half of the slots each, of which one goes on without the other."""
    options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", *AOF, "--cluster-port")
    directory = tmp_path_factory.mktemp("pair")
    with running(directory / "0", *options, str(free_port())) as first, running(directory / "1", *options, str(free_port())) as second:
        join([first, second], [(0, 8191), (8192, 16383)])
        yield first, second


def test_slots_that_move_from_node_to_node(pair: tuple[Valkey, Valkey]) -> None:
    """Sessions are saved while their slot is being moved, half moved, and moved: MOVED and ASK are followed, nothing is lost."""
    first, second = pair
    session = next(f"s{number}" for number in range(100) if _slot(f"s{number}") <= 8191)
    slot, name = str(_slot(session)), f"indrnn:{{{key(session)}}}"

    async def scenario(store: RedisStore) -> None:
        await store.start()
        assert await store.save([at(1, session=session)]) == [SAVED]
        one, other = (node.cli("CLUSTER", "MYID").split("\r\n")[1] for node in pair)
        assert second.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", one) == "+OK\r\n"
        assert first.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", other) == "+OK\r\n"
        assert await store.save([at(2, session=session)]) == [SAVED]  # still where it was
        assert first.cli("MIGRATE", "127.0.0.1", str(second.port), name, "0", "5000") == "+OK\r\n"
        assert await store.save([at(3, session=session)]) == [SAVED]  # ASK
        assert await store.load(session) == Attached(1, at(3, session=session).record)
        for node in (second, first):
            assert node.cli("CLUSTER", "SETSLOT", slot, "NODE", other) == "+OK\r\n"
        batch = [at(4, session=session), *(at(1, session=f"t{number}") for number in range(50))]
        assert await store.save(batch) == [SAVED] * 51  # MOVED
        assert (await store.attach(session)).epoch == 2
        assert name in second.cli("KEYS", "*")

    play(f"redis+cluster://127.0.0.1:{first.port}", scenario)


def _slot(session: str) -> int:
    return key_slot(f"indrnn:{{{key(session)}}}".encode())


def test_a_node_that_is_away_takes_only_its_own_sessions_with_it(pair: tuple[Valkey, Valkey]) -> None:
    first, second = pair

    async def scenario(store: RedisStore) -> None:
        await store.start()
        batch = [at(1, session=f"n{number}") for number in range(40)]
        assert await store.save(batch) == [SAVED] * 40
        here = [f"{{{key(one.session_id)}}}" in first.cli("KEYS", f"*{key(one.session_id)}*") for one in batch]
        assert 0 < sum(here) < 40
        await asyncio.to_thread(second.kill)
        begin = time.monotonic()
        outcomes = await store.save(batch)
        assert time.monotonic() - begin < store.settings.timeout_s + 1
        assert outcomes == [SAVED if there else Outcome.UNCONFIRMED for there in here]
        with pytest.raises(StoreUnavailable):
            await store.save([one for one, there in zip(batch, here, strict=True) if not there])
        await asyncio.to_thread(second.start)
        await until(lambda: _all_saved(store, batch))

    play(f"redis+cluster://127.0.0.1:{second.port},127.0.0.1:{first.port}", scenario)

    async def one_node(store: RedisStore) -> None:
        with pytest.raises(StartupError, match=r"a node of a Cluster: use a URL redis\+cluster"):
            await store.start()

    play(url_of(first), one_node)


async def _all_saved(store: RedisStore, batch: list[Checkpoint]) -> bool:
    return await store.save(batch) == [SAVED] * len(batch)


def test_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with: the store over TLS is NOT tested here")
    need_program()
    own, foreign = (_certificate(tmp_path / name) for name in ("own", "foreign"))
    options = ("--tls-cert-file", str(own / "cert"), "--tls-key-file", str(own / "key"), "--tls-auth-clients", "no", *AOF)
    with running(own, *options, tls=True) as server:

        async def trusted(store: RedisStore) -> None:
            await store.start()
            assert await store.save([at(1)]) == [SAVED]

        async def not_trusted(store: RedisStore) -> None:
            with pytest.raises(StoreUnavailable, match="certificate"):
                await store.start()

        async def plain(store: RedisStore) -> None:
            with pytest.raises(StoreUnavailable):
                await store.start()

        play(f"rediss://localhost:{server.port}?ssl_ca_certs={own / 'cert'}", trusted)
        play(f"rediss://localhost:{server.port}?ssl_ca_certs={foreign / 'cert'}", not_trusted)
        play(f"rediss://localhost:{server.port}", not_trusted)
        play(f"redis://localhost:{server.port}", plain, timeout_s=1)


def _certificate(directory: Path) -> Path:
    directory.mkdir()
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = ["openssl", *words.split(), "-keyout", str(directory / "key"), "-out", str(directory / "cert")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return directory


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://", "names no host"),
        ("redis://host:port", "cannot be read"),
        ("redis://one,two", "more than host"),
        ("redis://host/name", "more than host"),
        ("redis://host?max_connections=5", "unknown option max_connections"),
        ("redis+sentinel://host", "names no primary"),
        ("redis+sentinel://host/one/two", "names no primary"),
        ("redis+cluster://host/3", "names a database"),
    ],
)
def test_urls_that_cannot_be_read(url: str, told: str) -> None:
    with pytest.raises(StartupError, match=told):
        RedisStore(StoreSettings(url=url))


def test_a_session_that_another_made_is_not_found_under_another_prefix(valkey: Valkey) -> None:
    async def scenario(store: RedisStore) -> None:
        await store.save([at(1)])
        other = RedisStore(StoreSettings(url=store.settings.url, prefix="other:"))
        with pytest.raises(SessionNotFound):
            await other.attach("s", create=False)
        await other.close()

    play(url_of(valkey), scenario, prefix="one:")
