"""Hundreds of schedules of everything that may go wrong at once, without sockets: real predictors and streams in memory, one simulated store.

Processes die, between a save and its answer too; the store fails, is slow, delivers late or twice; connections break on either side first, so that
messages of an old one arrive after those of the new one; clients repeat messages, and split what they send again differently. Shown for every stream:
each frame's scores are the bits of the undisturbed run, wherever it was reset; no frame is asked for that the client had been told is safe; and when
all is well again, every frame is answered. SURVIVAL_SCHEDULES says how many schedules there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from service import protocol
from service.batcher import Batcher
from service.catalog import Catalog
from service.errors import Draining, Gap, ServiceError, SessionNotFound, StoreUnavailable, TakenOver
from service.frames import Payload
from service.gate import Gate
from service.metrics import Metrics
from service.options import Options
from service.predictor import Predictor
from service.protocol import Answer
from service.record import Record
from service.sessions import Session
from service.settings import Settings
from service.store import Attached, Checkpoint, Outcome, StoreSettings
from service.store_memory import MemoryStore, Records
from service.streaming import Sockets, Stream
from tests.toy_models import CHANNELS, example_frames, write_toy

SCHEDULES = int(os.environ.get("SURVIVAL_SCHEDULES", "150"))
REPLICAS, STREAMS, SESSIONS = 3, 2, 2
LENGTH = 120  # frames of each stream
TIMEOUT_S = 0.5
CLIPS = [example_frames(CHANNELS, LENGTH, seed=70 + number) for number in range(STREAMS + SESSIONS)]
ALL = Options(scores="all")


@cache
def catalog() -> Catalog:
    with TemporaryDirectory() as folder:
        write_toy(Path(folder), "channels", CHANNELS)
        return Catalog.load([Path(folder)], "cpu", 1)


@cache
def metrics() -> Metrics:
    """Of all processes: making them takes longer than a schedule."""
    return Metrics()


@cache
def undisturbed(clip: int, begin: int) -> list[bytes]:
    """Scores of the frames from `begin` on, where the stream begins anew."""
    engine = catalog().find("channels", None).engine
    frames = CLIPS[clip][begin:]
    scores, _ = engine.run_batch(frames[None], np.array([len(frames)]), np.zeros((1, CHANNELS.width), np.float32))
    return [row.astype("<f4").tobytes() for row in scores[0]]


class Clockwork(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps where all wait; what is for threads it does itself."""

    def __init__(self) -> None:
        self._clock = 0.0
        selector = selectors.SelectSelector()
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "everything waits for ever"
            self._clock += max(0.0, timeout)
            return select(0)

        selector.select = jump  # type: ignore[method-assign]
        super().__init__(selector)

    def time(self) -> float:
        return self._clock

    def run_in_executor(self, _executor: Any, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return asyncio.wrap_future(done, loop=self)


class Here:
    """In place of a batcher's way to its thread: the model runs between two turns of the event loop, so that a schedule is the same every time."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._thread = batcher._inbox
        self.get = batcher._inbox.get
        self._loop = asyncio.get_running_loop()
        batcher._inbox = self  # type: ignore[assignment]

    def put(self, batch: Any) -> None:
        if batch is None:
            self._thread.put(None)
        else:
            self._batcher._run(batch)
            self._loop.call_soon(self._batcher._land, batch)


@dataclass(frozen=True)
class Weather:
    """What becomes of calls to the store, each with a probability."""

    delay_s: float = 0.002  # at most, each way
    request_lost: float = 0.0
    answer_lost: float = 0.0
    late: float = 0.0  # arrives after its caller has given up
    twice: float = 0.0


FINE = Weather()
FOUL = Weather(delay_s=0.2, request_lost=0.08, answer_lost=0.15, late=0.1, twice=0.1)


class FarStore(MemoryStore):
    """The store as one process reaches it."""

    def __init__(self, world: World, owner: str) -> None:
        super().__init__(StoreSettings(owner=owner, timeout_s=TIMEOUT_S, idle_s=1e9), world.records, clock=lambda: 0.0)
        self.world = world
        self.cut = self.dead = False

    async def attach(self, session_id: str, *, create: bool = True) -> Attached:
        attached: Attached = await self._call(lambda: MemoryStore.attach(self, session_id, create=create))
        return attached

    async def load(self, session_id: str) -> Attached | None:
        attached: Attached | None = await self._call(lambda: MemoryStore.load(self, session_id))
        return attached

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        outcomes: list[Outcome] = await self._call(lambda: MemoryStore.save(self, checkpoints))
        return outcomes

    async def touch(self, session_ids: Sequence[str]) -> list[str]:
        absent: list[str] = await self._call(lambda: MemoryStore.touch(self, session_ids))
        return absent

    async def end(self, session_id: str, epoch: int) -> bool:
        ended: bool = await self._call(lambda: MemoryStore.end(self, session_id, epoch))
        return ended

    async def ping(self) -> None:
        await self._call(lambda: MemoryStore.ping(self))

    async def _call(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        weather, chance, loop = self.world.weather, self.world.chance, asyncio.get_running_loop()

        def arrive() -> Any:
            try:
                work().send(None)
            except StopIteration as done:
                return done.value
            raise AssertionError("it waited")

        def arrive_late() -> None:
            if not self.cut:  # what a dead process has sent arrives all the same
                with contextlib.suppress(ServiceError):
                    arrive()

        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.sleep(chance.uniform(0, weather.delay_s))
                fate = chance.random()
                if self.cut or self.dead or fate < weather.request_lost:
                    await asyncio.sleep(10 * TIMEOUT_S)
                if fate < weather.request_lost + weather.late:
                    loop.call_later(chance.uniform(TIMEOUT_S, 3 * TIMEOUT_S), arrive_late)
                    await asyncio.sleep(10 * TIMEOUT_S)
                if chance.random() < weather.twice:
                    loop.call_later(chance.uniform(0, 3 * TIMEOUT_S), arrive_late)
                value = arrive()
                await asyncio.sleep(chance.uniform(0, weather.delay_s))
                if self.cut or self.dead or chance.random() < weather.answer_lost:
                    await asyncio.sleep(10 * TIMEOUT_S)
                return value
        except TimeoutError:
            raise StoreUnavailable("the store did not answer in time") from None


class Replica:
    """One process of the service."""

    def __init__(self, world: World, number: int, down: Any) -> None:
        self.store = FarStore(world, f"process {number}")
        self.predictor = Predictor(catalog(), Settings(store_down=down, checkpoint_frames=4, checkpoint_ms=100, watch_s=0), world.metrics)
        self.predictor.keep_in(self.store)
        self.sockets = Sockets(self.predictor, Gate(Settings()), 1000)
        self.wires: set[Wire] = set()
        self.alive = True

    async def start(self) -> None:
        await self.predictor.__aenter__()
        for runner in self.predictor.models:
            Here(runner._batcher)

    async def kill(self) -> None:
        """Nothing that it does from now on reaches anybody."""
        self.alive = False
        self.store.dead = True
        for wire in list(self.wires):
            wire.die()
        await self.predictor.__aexit__()

    async def stop(self) -> None:
        """As at SIGTERM."""
        self.alive = False
        await self.predictor.drain()
        await self.sockets.drain(5)
        self.store.dead = True
        await self.predictor.__aexit__()


class Wire:
    """A websocket: the `Socket` of a stream of the service at one end, a client at the other. It may break on one side before the other knows."""

    def __init__(self, client: Client, replica: Replica) -> None:
        self.client: Client | None = client
        self.replica = replica
        self.stream = Stream(replica.predictor, "channels")
        self.held: deque[str | bytes] = deque()  # sent by the client, and held up on the way
        self.holding = self.paused = False
        self._arrived: deque[str | bytes] = deque()
        replica.wires.add(self)
        self.served = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        await self.replica.sockets.run(self.stream, self, {}, lambda: None)
        self.replica.wires.discard(self)

    # ---- the service's end

    def send(self, message: str | bytes) -> None:
        asyncio.get_running_loop().call_soon(self._hear, message)

    def _hear(self, message: str | bytes) -> None:
        if self.client is not None:
            self.client.hear(self, message)

    def close(self, code: int, reason: str = "") -> None:
        asyncio.get_running_loop().call_soon(self._closed)

    def _closed(self) -> None:
        if self.client is not None:
            self.client.lost(self)

    def abort(self) -> None:
        self._closed()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        while self._arrived and not self.paused:
            self.stream.feed(self._arrived.popleft())

    def die(self) -> None:
        """The process is gone: nothing that it says from now on arrives."""
        client, self.client = self.client, None
        if client is not None:
            client.lost(self)
        self.stream.left()

    # ---- the client's

    def say(self, message: bytes | None = None, /, **fields: Any) -> None:
        self.held.append(json.dumps(fields) if message is None else message)
        if not self.holding:
            self.deliver()

    def deliver(self) -> None:
        self._arrived.extend(self.held)
        self.held.clear()
        if not self.paused:
            self.resume()

    def leave(self, *, told: bool) -> None:
        """The client is gone; the service is told now, or believes for a while that it is still there."""
        self.client = None
        if told:
            self.stream.left()


class Client:
    """One stream as its user has it: sends what is wanted, hears what comes, comes back when its connection is lost."""

    def __init__(self, world: World, clip: int) -> None:
        self.world = world
        self.clip = clip
        self.session: str | None = None
        self.wanted = 0  # frames that are to be sent
        self.resets: list[int] = []
        self.answers: list[bytes] = []
        self.durable = 0
        self.wire: Wire | None = None
        self.target: Replica | None = None  # where it goes next, if not anywhere
        self.old: list[Wire] = []  # half open: the service does not know that they are left
        self.moves = 0
        self._ready = False
        self._due: deque[tuple[int, int]] = deque()  # answers that must come on this connection, in this order: [first, end) of each
        self._sent = self._acked = self._window = 0

    def expected(self, frame: int) -> bytes:
        begin = max([at for at in self.resets if at <= frame], default=0)
        return undisturbed(self.clip, begin)[frame - begin]

    def connect(self) -> None:
        if self.wire is not None or self.world.over:
            return
        replica, self.target = self.target, None
        self.wire = Wire(self, replica if replica is not None and replica.alive else self.world.any_replica())
        known = {} if self.session is None else {"session": self.session, "ack": len(self.answers)}
        self.wire.say(type="open", answers="binary", **known)

    def hear(self, wire: Wire, message: str | bytes) -> None:
        if wire is not self.wire:
            return
        if isinstance(message, bytes):
            return self._heard(message)
        value = json.loads(message)
        if value["type"] == "opened":
            self._opened(wire, value)
        elif value["type"] == "durable":
            self.durable = max(self.durable, value["frame"])
        elif value["type"] in ("error", "draining"):
            code = value.get("code", "draining")
            if code == "session_not_found" and not self.durable:
                self.session = None  # nothing was promised, and every frame is still here
            else:
                self.world.expect(code in ("draining", "store_unavailable", "taken_over", "gap", "overloaded"), f"{value}")
            self.lost(wire)

    def _opened(self, wire: Wire, opened: dict[str, Any]) -> None:
        self.session, self._window, place = opened["session"], opened["window"], opened["next_frame"]
        safe = min(len(self.answers), self.durable)
        self.world.expect(safe <= place <= self.wanted, f"frame {place} is asked for; {safe} were safe, {self.wanted} are to be sent")
        self._due = deque([(len(self.answers), place)] if place > len(self.answers) else [])  # what was computed and not heard comes first
        self._sent, self._acked, self._ready = place, len(self.answers), True
        if place in self.resets:
            wire.say(type="reset", at=place)
        self.go_on()

    def _heard(self, message: bytes) -> None:
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        scores = np.frombuffer(message, "<f4", offset=protocol.HEADER.size).reshape(count, -1)
        due = self._due.popleft() if self._due else None
        self.world.expect(kind == protocol.KIND_SCORES and (first, first + count) == due, f"an answer of {count} frames from {first} on, and {due} was due")
        for frame, row in enumerate(scores, first):
            self.world.expect(row.tobytes() == self.expected(frame), f"frame {frame} has other scores than undisturbed (resets {self.resets})")
            if frame == len(self.answers):
                self.answers.append(row.tobytes())
            self.world.expect(frame < len(self.answers), f"frame {frame} was answered before {len(self.answers)}")
        if self.wire is not None and self.world.chance.random() < 0.5:
            self._acked = max(self._acked, min([len(self.answers), *(first for first, _ in self._due)]))  # what was asked for again must be kept
            self.wire.say(type="ack", first=self._acked)
        self.go_on()

    def go_on(self) -> None:
        """Sends what is wanted and was not sent on this connection, in pieces of any size."""
        if not self._ready or self.wire is None:
            return
        chance = self.world.chance
        while self.wire is not None and (ready := min(self.wanted, self._acked + self._window) - self._sent) > 0:
            coming = [at - self._sent for at in self.resets if at > self._sent]
            count = min(ready, chance.randint(1, 7), *coming)
            self._say(self._sent, count)
            self._sent += count
            if self._sent in self.resets and self.wire is not None:
                self.wire.say(type="reset", at=self._sent)

    def _say(self, first: int, count: int) -> None:
        assert self.wire is not None
        self._due.append((first, first + count))
        self.wire.say(protocol.write_frames(first, CLIPS[self.clip][first : first + count]))

    def repeat(self, back: int, count: int) -> None:
        """Sends again what this connection has had: the same answers come again."""
        first = max(self._acked, self._sent - back)
        if self._ready and first < self._sent:
            self._say(first, min(count, self._sent - first))

    def lost(self, wire: Wire) -> None:
        if wire is self.wire:
            self.move(told=True)

    def move(self, *, told: bool) -> None:
        """The connection is of no use any more, for us."""
        if self.wire is None:
            return
        wire, self.wire, self._ready = self.wire, None, False
        wire.leave(told=told)
        if not told:
            self.old.append(wire)
        self.moves += 1
        asyncio.get_running_loop().call_later(self.world.chance.uniform(0.001, 0.2), self.connect)

    def reset(self) -> None:
        """The stream begins anew where it is now."""
        if self.wanted not in self.resets and self.wanted < LENGTH:
            self.resets.append(self.wanted)
            if self._ready and self.wire is not None and self._sent == self.wanted:
                self.wire.say(type="reset", at=self.wanted)


class Steps:
    """A session over REST: one step after another, each repeated until it is answered, by anyone. It is certain once it is answered without a warning."""

    def __init__(self, world: World, clip: int) -> None:
        self.world = world
        self.clip = clip
        self.session: str | None = None
        self.certain = self.place = 0
        self.turn = asyncio.Lock()

    async def step(self, count: int) -> None:
        """Does it, whatever it takes."""
        async with self.turn:
            end = min(LENGTH, self.place + count)
            while self.place < end and not self.world.over:
                await self._try(end)

    async def _try(self, end: int) -> None:
        replica, first = self.world.any_replica(), self.place
        predictor, keeper = replica.predictor, replica.predictor.keeper
        assert keeper is not None
        payload = Payload("raw", memoryview(CLIPS[self.clip][first:end].tobytes()), 0)

        async def work(session: Any) -> Answer:
            return await predictor.advance(session, first, end - first, payload, ALL)

        try:
            if self.session is None:
                predictor.check_store()
                session = predictor.open("channels", None, ALL)
                await keeper.flush(session)
                self.session = session.id
            answer = await predictor.through(self.session, work)
            warned = keeper.down
        except ServiceError as error:
            if not replica.store.dead:
                await self._refused(error)
            return
        if replica.store.dead or self.world.chance.random() < 0.1:
            return  # the answer got lost on its way
        for frame, row in enumerate(answer.scores, first):
            self.world.expect(row.tobytes() == undisturbed(self.clip, 0)[frame], f"frame {frame} of a step has other scores")
        self.place = end
        if not warned:
            self.certain = end

    async def _refused(self, error: ServiceError) -> None:
        if isinstance(error, Gap):
            self.place = error.facts["next_frame"]
            self.world.expect(self.place >= self.certain, f"frame {self.place} is asked for, and {self.certain} were certain")
        elif isinstance(error, SessionNotFound):
            self.world.expect(self.certain == 0, "the session is gone")
            self.session, self.place = None, 0
        elif not isinstance(error, StoreUnavailable | TakenOver | Draining):
            raise error
        await asyncio.sleep(0.05)


class World:
    """All of it."""

    def __init__(self, seed: int, down: str) -> None:
        self.chance = random.Random(seed)
        self.down = down
        self.metrics = metrics()
        self.weather = FINE
        self.records: Records = {}
        self.replicas: list[Replica] = []
        self.clients = [Client(self, number) for number in range(STREAMS)]
        self.steps = [Steps(self, STREAMS + number) for number in range(SESSIONS)]
        self.faults: list[str] = []
        self.over = False
        self._number = 0

    def expect(self, condition: bool, fault: str) -> None:
        """Where an exception would end up in a log."""
        if not condition:
            self.faults.append(fault)

    def any_replica(self) -> Replica:
        return self.chance.choice([replica for replica in self.replicas if replica.alive])

    async def start_one(self) -> None:
        self._number += 1
        replica = Replica(self, self._number, self.down)
        await replica.start()
        self.replicas.append(replica)


class Schedule(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32), down=st.sampled_from(["serve", "refuse"]))
    def begin(self, seed: int, down: str) -> None:
        self.world = World(seed, down)
        self.loop = Clockwork()
        self.failures: list[BaseException] = []
        self.loop.set_exception_handler(lambda _, told: self.failures.append(told.get("exception") or RuntimeError(told["message"])))
        self.tasks: set[asyncio.Task[None]] = set()

        async def make() -> None:
            for _ in range(REPLICAS):
                await self.world.start_one()
            for client in self.world.clients:
                client.connect()

        self._run(make())

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)
        self._check()

    def _check(self) -> None:
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if self.failures:
            raise self.failures[0]
        assert not self.world.faults, self.world.faults[0]

    def _now(self, work: Callable[[], Any]) -> None:
        async def run() -> None:
            work()
            await asyncio.sleep(0)

        self._run(run())

    @rule(which=st.integers(0, STREAMS - 1), count=st.integers(1, 30))
    def frames_come(self, which: int, count: int) -> None:
        client = self.world.clients[which]
        client.wanted = min(LENGTH, client.wanted + count)
        self._now(client.go_on)

    @rule(which=st.integers(0, STREAMS - 1))
    def reset(self, which: int) -> None:
        self._now(self.world.clients[which].reset)

    @rule(which=st.integers(0, STREAMS - 1), told=st.booleans())
    def lose_the_connection(self, which: int, told: bool) -> None:
        client = self.world.clients[which]
        self._now(lambda: client.move(told=told))

    @rule(which=st.integers(0, STREAMS - 1))
    def hold_messages_up(self, which: int) -> None:
        wire = self.world.clients[which].wire
        if wire is not None:
            wire.holding = not wire.holding
            if not wire.holding:
                self._now(wire.deliver)

    @rule(which=st.integers(0, STREAMS - 1), first=st.integers(0, LENGTH - 1), count=st.integers(1, 20))
    def send_again_on_an_old_connection(self, which: int, first: int, count: int) -> None:
        """What was under way when the connection was lost, and more of the same, arrives after the next connection has begun."""
        client = self.world.clients[which]
        if client.old:
            wire, end = client.old[-1], min(first + count, client.wanted)

            def late() -> None:
                if end > first:
                    wire.held.append(protocol.write_frames(first, CLIPS[client.clip][first:end]))
                wire.deliver()

            self._now(late)

    @rule(which=st.integers(0, STREAMS - 1), back=st.integers(1, 20), count=st.integers(1, 20))
    def repeat(self, which: int, back: int, count: int) -> None:
        self._now(lambda: self.world.clients[which].repeat(back, count))

    @rule(which=st.integers(0, SESSIONS - 1), count=st.integers(1, 20))
    def step(self, which: int, count: int) -> None:
        async def spawn() -> None:
            self.tasks.add(asyncio.create_task(self.world.steps[which].step(count)))

        self._run(spawn())

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05, 0.05, 0.2, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self._run(asyncio.sleep(seconds))

    @rule(weather=st.sampled_from([FINE, FOUL, FOUL]))
    def change_weather(self, weather: Weather) -> None:
        self.world.weather = weather

    @rule(which=st.integers(0, REPLICAS - 1))
    def cut_or_heal(self, which: int) -> None:
        store = self.world.replicas[which].store
        store.cut = not store.cut

    @rule(which=st.integers(0, STREAMS - 1), there=st.permutations(range(REPLICAS)), cut=st.booleans())
    def come_back_to_an_old_copy(self, which: int, there: list[int], cut: bool) -> None:
        """The replica that had the stream once has lost sight of the store, or not, when the one that has it now dies."""
        first, second, third = (self.world.replicas[number] for number in there)
        for replica in (first, second):
            self.world.clients[which].target = replica
            self.lose_the_connection(which, told=True)
            self.wait(0.2)
            self.frames_come(which, 5)
            self.wait(1.0)
        first.store.cut = third.store.cut = cut
        self.world.clients[which].target = first
        self.kill(self.world.replicas.index(second))
        self.wait(1.0)

    @rule(which=st.integers(0, REPLICAS - 1))
    def kill(self, which: int) -> None:
        async def work() -> None:
            await self.world.replicas.pop(which).kill()
            await self.world.start_one()

        self._run(work())

    @rule(which=st.integers(0, REPLICAS - 1))
    def stop(self, which: int) -> None:
        async def work() -> None:
            replica = self.world.replicas[which]
            await self.world.start_one()
            await replica.stop()
            self.world.replicas.remove(replica)

        self._run(work())

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self._run(self._calm_down())
            for client in self.world.clients:
                assert len(client.answers) == client.wanted, f"{len(client.answers)} of {client.wanted} frames were answered"
        finally:
            self.world.over = True
            self.loop.run_until_complete(self._leave())
            self.loop.close()

    async def _calm_down(self) -> None:
        """All is well again, and some frames more come."""
        world = self.world
        world.weather = FINE
        for replica in world.replicas:
            replica.store.cut = False
        for client in world.clients:
            client.wanted = min(LENGTH, client.wanted + 10)
            if client.wire is not None and client.wire.holding:
                client.wire.holding = False
                client.wire.deliver()
            client.go_on()
        last = [asyncio.ensure_future(steps.step(5)) for steps in world.steps]
        for _ in range(600):
            if all(len(client.answers) == client.wanted for client in world.clients):
                break
            await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            await asyncio.gather(*last, *self.tasks)

    async def _leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        for replica in self.world.replicas:
            await replica.kill()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.timeout(1800)
def test_any_schedule_leaves_every_stream_as_if_nothing_had_happened() -> None:
    run_state_machine_as_test(
        Schedule, settings=settings(max_examples=SCHEDULES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    )


class Uneven(MemoryStore):
    """Takes a while for each save; some fail at the very moment at which others are done."""

    failing: str | None = None

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        await asyncio.sleep(0.1)
        if self.failing in [one.session_id for one in checkpoints]:
            self.failing = None
            raise StoreUnavailable("once")
        return await super().save(checkpoints)


def test_a_step_whose_save_failed_while_the_store_was_well_again_at_once_is_saved_before_its_answer() -> None:
    """Nobody would warn the client: the store is up when the answer is written."""

    async def scenario() -> None:
        store = Uneven(StoreSettings(idle_s=1e9), clock=lambda: 0.0)
        predictor = Predictor(catalog(), Settings(watch_s=0, checkpoint_ms=60_000), metrics())
        predictor.keep_in(store)
        async with predictor:
            for runner in predictor.models:
                Here(runner._batcher)
            keeper = predictor.keeper
            assert keeper is not None
            failing, other = (predictor.open("channels", None, ALL) for _ in range(2))
            await asyncio.gather(keeper.flush(failing), keeper.flush(other))

            async def step(session: Session) -> None:
                payload = Payload("raw", memoryview(CLIPS[0][:1].tobytes()), 0)
                await predictor.through(session.id, lambda session: predictor.advance(session, 0, 1, payload, ALL))

            store.failing = failing.id
            first = asyncio.ensure_future(step(failing))
            for _ in range(20):
                await asyncio.sleep(0)  # so that it is under way before the other, in a save of its own
            await asyncio.gather(first, step(other))
            assert not keeper.down
            held = await store.load(failing.id)
            assert held is not None
            assert held.record is not None
            assert Record.from_bytes(held.record).next_frame == 1

    loop = Clockwork()
    try:
        loop.run_until_complete(scenario())
    finally:
        loop.close()
