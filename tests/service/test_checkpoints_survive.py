"""Thousands of schedules against a store that loses, delays, repeats and reorders, crashes and forgets what it had not written to its disk; processes
that die, are cut off and come back. On virtual time, without sockets. Shown:

- nothing is announced durable that the disk has not, and an attach hands out at least all that was announced;
- no epoch is given to two owners, and whoever was taken over never overwrites;
- a write-through that returns has been written through;
- when all is well again everything is saved by itself, and whoever lost a session has been told.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from service.checkpoints import Checkpoints
from service.errors import ServiceError, SessionNotFound, StoreUnavailable
from service.store import Attached, Checkpoint, Outcome, StoreSettings, key
from service.store_memory import MemoryStore, Records
from tests.virtual_time import VirtualTimeLoop

SESSIONS = ("a", "b", "c")
TIMEOUT_S = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Weather:
    """How likely what is, of each call."""

    delay_s: float = 0.001  # at most, each way
    request_lost: float = 0.0
    answer_lost: float = 0.0
    late: float = 0.0  # arrives after its caller has given up
    twice: float = 0.0  # arrives once more, later
    fsync_s: float = 0.01  # between two


FINE = Weather()
FOUL = Weather(delay_s=0.5, request_lost=0.1, answer_lost=0.15, late=0.15, twice=0.15, fsync_s=0.7)
SLOW_DISK = Weather(fsync_s=5.0)


class World:
    """One store's machine: its memory, its disk, and the network to it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.weather = FINE
        self.up = True
        self.memory: Records = {}
        self.disk: Records = {}
        self.writes = 0
        self.on_disk = 0  # of the writes
        self.crashes = 0
        self.newest: dict[str, int] = {}  # epoch that an owner was last given, by session
        self.given: set[tuple[str, int]] = set()  # all of them
        self.durable: dict[str, int] = {}  # frames that were announced
        self.faults: list[str] = []
        self.synced = asyncio.Event()
        self.written = asyncio.Event()

    def expect(self, condition: bool, fault: str) -> None:
        """Where an exception would be taken for a failure of the store, which is survived."""
        if not condition:
            self.faults.append(fault)

    async def sync_for_ever(self) -> None:
        while True:
            await self.written.wait()
            await asyncio.sleep(self.weather.fsync_s)
            if self.up:
                self.written.clear()
                self.disk, self.on_disk = {one: dataclasses.replace(held) for one, held in self.memory.items()}, self.writes
                self.synced.set()
                self.synced = asyncio.Event()

    def crash(self) -> None:
        self.up = False
        self.crashes += 1
        self.memory.clear()
        self.memory.update({one: dataclasses.replace(held) for one, held in self.disk.items()})
        self.writes = self.on_disk

    async def call(self, reachable: Callable[[], bool], apply: Callable[[], T], *, confirm: bool) -> tuple[T, bool]:
        """The value, and whether the disk has it. Raises `StoreUnavailable` where no answer comes."""
        weather, chance = self.weather, self.chance
        end = asyncio.get_running_loop().time() + TIMEOUT_S

        def write() -> T:
            self.writes += 1
            self.written.set()
            return apply()

        def arrive() -> T | None:
            if not (self.up and reachable()):
                return None
            return write()

        try:
            async with asyncio.timeout_at(end):
                await asyncio.sleep(chance.uniform(0, weather.delay_s))
                if not self.up:
                    raise StoreUnavailable("refused")
                fate = chance.random()
                if not reachable() or fate < weather.request_lost:
                    await asyncio.sleep(10 * TIMEOUT_S)
                if fate < weather.request_lost + weather.late:
                    asyncio.get_running_loop().call_later(chance.uniform(TIMEOUT_S, 3 * TIMEOUT_S), arrive)
                    await asyncio.sleep(10 * TIMEOUT_S)
                if chance.random() < weather.twice:
                    asyncio.get_running_loop().call_later(chance.uniform(0, 3 * TIMEOUT_S), arrive)
                value, crashes = write(), self.crashes
                confirmed = not confirm or await self._on_disk(self.writes, crashes, end - 0.25 * TIMEOUT_S)
                await asyncio.sleep(chance.uniform(0, weather.delay_s))
                if self.crashes != crashes:
                    raise StoreUnavailable("cut off")
                if not reachable() or chance.random() < weather.answer_lost:
                    await asyncio.sleep(10 * TIMEOUT_S)
                return value, confirmed
        except TimeoutError:
            raise StoreUnavailable("did not answer in time") from None

    async def _on_disk(self, writes: int, crashes: int, until: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while self.on_disk < writes and self.crashes == crashes:
                    await self.synced.wait()
        return self.on_disk >= writes and self.crashes == crashes


class FarStore(MemoryStore):
    """The store as one process reaches it."""

    def __init__(self, world: World, owner: str) -> None:
        super().__init__(StoreSettings(owner=owner, durability="fsynced", timeout_s=TIMEOUT_S, idle_s=1e9), world.memory, clock=lambda: 0.0)
        self.world = world
        self.cut = False
        self.saving: list[tuple[str, int]] = []

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        ids = [(one.session_id, one.epoch) for one in checkpoints]  # one that was taken up anew is another to its keeper
        self.world.expect(not set(ids) & set(self.saving), "a session has two saves under way")
        self.saving += ids
        try:
            outcomes, confirmed = await self._call(lambda: [self._save_one(one) for one in checkpoints], confirm=True)
        finally:
            for one in ids:
                self.saving.remove(one)
        return [Outcome.UNCONFIRMED if one is Outcome.SAVED and not confirmed else one for one in outcomes]

    def _save_one(self, checkpoint: Checkpoint) -> Outcome:
        before = self.records.get(key(checkpoint.session_id))
        outcome = self._save(checkpoint)
        if outcome is Outcome.SAVED:
            newest = self.world.newest.get(checkpoint.session_id, 0)
            self.world.expect(checkpoint.epoch >= newest, "one that was taken over has overwritten")
            if before is not None and before.mark.epoch >= checkpoint.epoch:
                self.world.expect(not before.mark.ended, "what was ended is there again")
                if before.record is not None and before.mark.next_frame:
                    later = orjson.loads(checkpoint.record)[1:] >= orjson.loads(before.record)[1:]
                    self.world.expect(later or checkpoint.epoch > orjson.loads(before.record)[0], "an earlier record has replaced a later one")
        return outcome

    async def attach(self, session_id: str, *, create: bool = True) -> Attached:
        attached, confirmed = await self._call(lambda: _now(super(FarStore, self).attach(session_id, create=create)), confirm=True)
        if not confirmed:
            raise StoreUnavailable("not confirmed")
        return attached

    async def end(self, session_id: str, epoch: int) -> bool:
        return (await self._call(lambda: _now(super(FarStore, self).end(session_id, epoch)), confirm=True))[0]

    async def ping(self) -> None:
        await self._call(lambda: None, confirm=False)

    async def _call(self, apply: Callable[[], T], *, confirm: bool) -> tuple[T, bool]:
        return await self.world.call(lambda: not self.cut, apply, confirm=confirm)


def _now(work: Coroutine[Any, Any, T]) -> T:
    """The result of what waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("it waited")


@dataclass
class Stream:
    """A session as a process has it in memory."""

    epoch: int
    frame: int
    changes: int = 0

    def record(self) -> bytes:
        return orjson.dumps([self.epoch, self.frame, self.changes])


class Process:
    """A replica of the service."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.store = FarStore(world, name)
        self.streams: dict[str, Stream] = {}
        self.dead = False
        self.checkpoints = Checkpoints(self.store, self._take, self._saved, self._lost)

    def _take(self, session: str, sequence: int) -> Checkpoint | None:
        stream = self.streams[session]
        if self.world.chance.random() < 0.1:
            return None  # in the middle of a message
        return Checkpoint(session, stream.epoch, stream.frame, stream.record(), sequence)

    def _saved(self, session: str, frame: int) -> None:
        stream = self.streams[session]
        held = self.world.disk[key(session)]
        ours = (held.mark.epoch, held.mark.owner) == (stream.epoch, self.store.settings.owner) and held.mark.next_frame >= frame
        self.world.expect(ours or held.mark.epoch > stream.epoch or held.mark.ended, "announced what is not on the disk")
        if self.world.newest[session] == stream.epoch:  # else nobody listens to it any more
            self.world.durable[session] = max(self.world.durable[session], frame)

    def _lost(self, session: str, outcome: Outcome) -> None:
        self.world.expect(outcome is not Outcome.STALE, "it had saved something later itself")
        del self.streams[session]

    async def attach(self, session: str) -> None:
        try:
            attached = await self.store.attach(session)
        except (StoreUnavailable, SessionNotFound):
            return
        if self.dead:
            return
        assert (session, attached.epoch) not in self.world.given, "an epoch was given out twice"
        self.world.given.add((session, attached.epoch))
        if session in self.streams and self.streams[session].epoch > attached.epoch:
            return  # the answer to an earlier question
        frame, changes = (0, 0) if attached.record is None else orjson.loads(attached.record)[1:]
        if attached.epoch > self.world.newest.get(session, 0):
            self.world.newest[session] = attached.epoch
            assert frame >= self.world.durable.get(session, 0), "frames that were announced as durable are gone"
            self.world.durable[session] = frame
        self.checkpoints.forget(session)
        self.streams[session] = Stream(attached.epoch, frame, changes)

    async def end(self, session: str) -> None:
        stream = self.streams.pop(session)
        self.checkpoints.forget(session)
        with contextlib.suppress(StoreUnavailable):
            # once it is asked for, the frames are nobody's any more, whether or not the store still has them
            if self.world.newest[session] == stream.epoch:
                self.world.durable[session] = 0
            await self.store.end(session, stream.epoch)

    async def flush(self, session: str) -> None:
        stream = self.streams[session]
        wanted = (stream.frame, stream.changes)
        try:
            await self.checkpoints.flush(session)
        except ServiceError:
            return
        if self.streams.get(session) is stream and stream_has_changed(self, session):
            held = self.world.disk[key(session)]
            if held.mark.epoch == stream.epoch and not held.mark.ended:
                assert held.record is not None
                assert tuple(orjson.loads(held.record)[1:]) >= wanted, "written through, it was said"


class Schedule(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.loop = VirtualTimeLoop()
        self.failures: list[BaseException] = []
        self.loop.set_exception_handler(lambda _, told: self.failures.append(told.get("exception") or RuntimeError(told["message"])))
        self.processes: list[Process] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.number = 0

        async def make() -> None:
            self.world = World(random.Random(seed))
            self.tasks.add(asyncio.create_task(self.world.sync_for_ever()))
            for _ in range(2):
                await self._start()
            for session in SESSIONS:
                await self.processes[0].attach(session)

        self._run(make())

    async def _start(self) -> None:
        self.number += 1
        process = Process(self.world, f"process {self.number}")
        await process.checkpoints.__aenter__()
        self.processes.append(process)

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)
        self._raise_failures()

    def _raise_failures(self) -> None:
        for task in [task for task in self.tasks if task.done() and not task.cancelled()]:
            self.tasks.discard(task)
            if (error := task.exception()) is not None:
                raise error
        if self.failures:
            raise self.failures[0]
        assert not self.world.faults

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def spawn() -> None:
            self.tasks.add(asyncio.create_task(work))

        self._run(spawn())

    def _serving(self, session: str) -> list[Process]:
        return [process for process in self.processes if session in process.streams]

    @rule(session=st.sampled_from(SESSIONS), which=st.integers(0, 9), frames=st.integers(1, 12))
    def advance(self, session: str, which: int, frames: int) -> None:
        if serving := self._serving(session):

            async def work() -> None:
                process = serving[which % len(serving)]
                process.streams[session].frame += frames
                process.checkpoints.changed(session, process.streams[session].frame)

            self._run(work())

    @rule(session=st.sampled_from(SESSIONS), which=st.integers(0, 9))
    def reset(self, session: str, which: int) -> None:
        if serving := self._serving(session):

            async def work() -> None:
                process = serving[which % len(serving)]
                process.streams[session].changes += 1
                process.checkpoints.changed(session, process.streams[session].frame)

            self._run(work())

    @rule(session=st.sampled_from(SESSIONS), which=st.integers(0, 9))
    def reset_during_a_save(self, session: str, which: int) -> None:
        if self._serving(session):
            self.advance(session, which, 8)
            self.wait(0.05)  # as long as others are waited for
            self.reset(session, which)

    @rule(session=st.sampled_from(SESSIONS), which=st.integers(0, 9))
    def write_through(self, session: str, which: int) -> None:
        if serving := self._serving(session):
            self._spawn(serving[which % len(serving)].flush(session))

    @rule(session=st.sampled_from(SESSIONS), which=st.integers(0, 9))
    def take_over(self, session: str, which: int) -> None:
        self._spawn(self.processes[which % len(self.processes)].attach(session))

    @rule(session=st.sampled_from(SESSIONS), which=st.integers(0, 9))
    def end(self, session: str, which: int) -> None:
        if serving := self._serving(session):
            self._spawn(serving[which % len(serving)].end(session))

    @rule(seconds=st.sampled_from([0.0005, 0.02, 0.2, 1.0, 7.0]))
    def wait(self, seconds: float) -> None:
        self._run(asyncio.sleep(seconds))

    @rule(weather=st.sampled_from([FINE, FOUL, FOUL, SLOW_DISK]))
    def change_weather(self, weather: Weather) -> None:
        self.world.weather = weather

    @precondition(lambda self: self.world.up)
    @rule()
    def kill_the_store(self) -> None:
        self.world.crash()

    @precondition(lambda self: not self.world.up)
    @rule()
    def start_the_store(self) -> None:
        self.world.up = True

    @rule(which=st.integers(0, 9))
    def cut_or_heal(self, which: int) -> None:
        store = self.processes[which % len(self.processes)].store
        store.cut = not store.cut

    @rule(which=st.integers(0, 9))
    def kill_a_process(self, which: int) -> None:
        async def work() -> None:
            process = self.processes.pop(which % len(self.processes))
            process.dead = True
            await process.checkpoints.__aexit__(None, None, None)
            await self._start()

        self._run(work())

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.world.up, self.world.weather = True, FINE
            for process in self.processes:
                process.store.cut = False
            self._run(self._calm_down())
        finally:
            self.loop.run_until_complete(self._leave())
            self.loop.close()

    async def _calm_down(self) -> None:
        """All is well again: what is unsaved is saved; then each session takes one frame more, and whoever has lost it is told."""
        for _ in range(2):
            await asyncio.sleep(60)
            for process in self.processes:
                health = process.checkpoints.health()
                assert (health.degraded_since, health.unsaved) == (None, 0), "all is well, and it does not come back"
            for process in self.processes:
                for session, stream in process.streams.items():
                    stream.frame += 1
                    process.checkpoints.changed(session, stream.frame)
        await asyncio.sleep(60)
        serving = [session for process in self.processes for session in process.streams]
        assert len(serving) == len(set(serving)), "two processes serve a session, and each thinks that it is its own"
        for process in self.processes:
            for session, stream in process.streams.items():
                held = self.world.disk[key(session)]
                assert (held.mark.epoch, held.mark.owner) == (stream.epoch, process.store.settings.owner)
                assert held.record == stream.record(), "the newest is not what was saved"
                assert self.world.durable[session] == stream.frame, "it was saved and nobody was told"

    async def _leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for process in self.processes:
            await process.checkpoints.__aexit__(None, None, None)


def stream_has_changed(process: Process, session: str) -> bool:
    """Since it was attached: one that never changed was never saved."""
    entry = process.checkpoints._entries.get(session)
    return entry is not None and entry.changes > 0


# A failure is not made smaller: that takes longer than a test may.
Schedule.TestCase.settings = settings(
    max_examples=1000,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSchedules = Schedule.TestCase
