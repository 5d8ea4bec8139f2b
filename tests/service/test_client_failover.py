"""A stream over servers that die at any moment: a simulated service on virtual time, thousands of schedules, no sockets.

The service keeps one session. It holds it in memory, saves its record now and then, and promises at times that what was saved survives. Fate cuts the
connection or kills the server between any two steps; then a record comes back that is no older than what was promised, perhaps to a server that has
another version of the model. Whatever happens, every frame is answered once, in order, with the scores of a stream that nothing happened to.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosedError

from service import errors, protocol
from service.client import Answer, AsyncStream, Event, ModelChanged, Notice, Retry, Unreachable
from service.client_values import opening
from tests import virtual_time

WINDOW, HORIZON, MOST = 8, 5, 24
RETRY = Retry(give_up_s=1e6, keep_frames=MOST)  # fate is as unkind as it likes
IDLE_S = 0.2  # without a message; then the server saves what it has, as it does for real after milliseconds


class Fate:
    """What happens next: choices that were drawn, and after them nothing bad."""

    def __init__(self, choices: list[int]) -> None:
        self._choices = iter(choices)

    def one_in(self, count: int) -> bool:
        return self.below(count) == 1

    def below(self, count: int) -> int:
        return next(self._choices, 0) % count


def score(version: int, past: list[int]) -> int:
    """What the model says after these frames, of which it remembers the last few."""
    return 100_000 * version + sum(weight * value for weight, value in enumerate(reversed(past[-HORIZON:]), 1))


@dataclass
class State:
    """A session as a server has it, and as a record keeps it."""

    version: int
    next_frame: int = 0
    past: list[int] = field(default_factory=list)  # what the model remembers
    answers: dict[int, int] = field(default_factory=dict)  # since the ack
    ack: int = 0
    reset_at: int = 0
    renewed: tuple[int, int] | None = None


class Wire:
    """One connection as the client sees it."""

    def __init__(self) -> None:
        self.to_server: asyncio.Queue[str | bytes] = asyncio.Queue()
        self.to_client: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self.closed = False

    async def send(self, message: str | bytes) -> None:
        await asyncio.sleep(0)
        if self.closed:
            raise ConnectionClosedError(None, None)
        self.to_server.put_nowait(message)

    async def recv(self) -> str | bytes:
        message = await self.to_client.get()
        if message is None:
            self.to_client.put_nowait(None)
            raise ConnectionClosedError(None, None)
        return message

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while True:
            yield await self.recv()

    async def close(self) -> None:
        self.closed = True


class Died(Exception):
    """The server, or the connection, is no more."""


class Service:
    """All replicas together, of which one at a time has the session; an `Opener`."""

    def __init__(self, fate: Fate, updates: bool) -> None:
        self.fate = fate
        self.updates = updates
        self.version = 1
        self.memory: State | None = None
        self.records: list[State] = []  # that may come back; the first is what was promised
        self.promised = False
        self.sessions = 0
        self.faults: list[str] = []  # of the client
        self.cold: set[int] = set()  # frames that a model which is not yet warm may have answered
        self.kills = 0
        self.tasks: set[asyncio.Task[None]] = set()

    # ---- opening

    async def open(self, options: Mapping[str, Any]) -> tuple[Wire, dict[str, Any]]:
        await asyncio.sleep(0)
        match self.fate.below(12):
            case 1:
                raise Unreachable("refused")
            case 2:
                raise errors.Draining("going", retry_after=5)
            case 3:
                raise errors.Overloaded("busy", retry_after=1)
        if "session" in options:
            state = self._found(options)
        else:
            self.sessions += 1
            state = self.memory = State(self.version)
            self.records, self.promised = [], False
        wire = Wire()
        model = {"model": "m", "version": str(state.version), "fingerprint": f"f{state.version}", "task": "regression", "classes": ["a", "b"]}
        limits = {"limits": {"message_bytes": 1 << 20}, "options": {"fps": 30.0}, "durability": "memory", "horizon": HORIZON}
        opened = {"session": str(self.sessions), "next_frame": state.next_frame, "frame_shape": [1], "window": WINDOW, **model, **limits}
        if state.renewed is not None:
            begin, end = state.renewed
            self._say(wire, "model_changed", frame=end, warm_from=begin, **{name: model[name] for name in ("version", "fingerprint", "classes")})
        task = asyncio.create_task(self._serve(wire, state, "session" in options))
        self.tasks.add(task)
        return wire, opened

    def _found(self, options: Mapping[str, Any]) -> State:
        if self.memory is None:
            if not self.records:
                raise errors.SessionNotFound("no such session")
            self.memory = copy.deepcopy(self.records[self.fate.below(len(self.records))])
            self.records = [copy.deepcopy(self.memory)]
        state = self.memory
        if options["session"] != str(self.sessions):
            self.faults.append("another session was asked for")
        self._forget(state, options["ack"])
        if state.version != self.version:
            begin = min(max(0, state.next_frame - HORIZON), *state.answers, state.next_frame)
            self.cold |= set(range(begin, state.next_frame))
            state = self.memory = State(self.version, next_frame=begin, ack=begin, renewed=(begin, state.next_frame))
        return state

    # ---- serving

    async def _serve(self, wire: Wire, state: State, again: bool) -> None:
        try:
            if again and state.answers:
                self._answer(wire, state, min(state.answers), state.next_frame)
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        message = await wire.to_server.get()
                except TimeoutError:
                    self._save(state, wire)
                    continue
                if self.memory is not state:  # another connection has gone on elsewhere
                    return
                self._disturb(wire)
                self._take(wire, state, message)
                self._disturb(wire)
        except Died:
            wire.closed = True
            wire.to_client.put_nowait(None)

    def _disturb(self, wire: Wire) -> None:
        """Nothing, or the end of the server, of the connection, or of the server's time."""
        what = self.fate.below(40)
        if what in (1, 2):
            self.memory = None
            self.kills += 1
            if self.updates and self.fate.one_in(3):
                self.version += 1
        if what == 3:
            self._say(wire, "draining", retry_after=5)
        if 1 <= what <= 4:
            if self.fate.one_in(2):  # what was on its way is lost as well
                while not wire.to_client.empty():
                    wire.to_client.get_nowait()
            raise Died
        if what == 5 and self.memory is not None and self.memory.renewed is None:
            self.records.append(copy.deepcopy(self.memory))  # without a promise
        if what == 6:
            self._say(wire, "warning", warning="the store is down", code="store_unavailable")

    def _take(self, wire: Wire, state: State, message: str | bytes) -> None:
        if isinstance(message, str):
            value = json.loads(message)
            if value["type"] == "reset":
                self._reset(wire, state, value["at"])
            elif value["type"] == "close":
                self._say(wire, "closed")
            return
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        if kind == protocol.KIND_ACK:
            self._forget(state, first)
            return
        values = np.frombuffer(message, "<f4", offset=protocol.HEADER.size).astype(int).tolist()
        self._run(wire, state, first, count, values)

    def _run(self, wire: Wire, state: State, first: int, count: int, values: list[int]) -> None:
        if state.renewed is not None:
            begin, end = state.renewed
            state.renewed = None
            if begin <= first <= end:
                state.next_frame = state.ack = first
        if first > state.next_frame:
            self.faults.append(f"frame {first} was sent where {state.next_frame} is next")
        if first + count <= state.next_frame:
            self.faults.append(f"frames {first} to {first + count - 1} were sent, {state.next_frame} is next")
        if first + count - state.ack > WINDOW:
            self.faults.append(f"frame {first + count - 1} was sent, but {state.ack} was the last ack")
        for value in values[state.next_frame - first :]:
            state.past = [*state.past, value][-HORIZON:]
            state.answers[state.next_frame] = score(state.version, state.past)
            state.next_frame += 1
        if self.fate.one_in(4):
            self._save(state, wire)
        self._disturb(wire)
        self._answer(wire, state, first, first + count)

    def _answer(self, wire: Wire, state: State, first: int, end: int) -> None:
        """In one message or two, and perhaps with some that were sent before; the events of every seventh frame go ahead."""
        if self.fate.one_in(6) and state.answers:
            first = min(first, max(min(state.answers), first - 2))
        cut = first + self.fate.below(end - first)
        for begin, stop in ((first, cut), (cut, end)):
            for frame in range(begin, stop):
                if frame % 7 == 0:
                    self._say(wire, "event", event="start", label="a", score=float(state.version), frame=frame, decided=frame, time=frame / 30)
            if begin < stop:
                self._disturb(wire)
                scores = np.array([[state.answers[frame], frame] for frame in range(begin, stop)], "<f4")
                wire.to_client.put_nowait(protocol.write_scores(begin, stop - begin, scores.tobytes()))

    def _reset(self, wire: Wire, state: State, at: int) -> None:
        if at != state.next_frame:
            self.faults.append(f"a reset at {at}, where {state.next_frame} is next")
        state.past, state.reset_at = [], at

    def _forget(self, state: State, ack: int) -> None:
        state.ack = max(state.ack, min(ack, state.next_frame))
        state.answers = {frame: said for frame, said in state.answers.items() if frame >= state.ack}

    def _save(self, state: State, wire: Wire) -> None:
        """And promises it."""
        if self.memory is state and state.renewed is None:
            self.records = [copy.deepcopy(state)]
            self._say(wire, "durable", frame=state.next_frame)

    def _say(self, wire: Wire, kind: str, **fields: Any) -> None:
        wire.to_client.put_nowait(json.dumps({"type": kind, **fields}))

    def leave(self, wire: Any) -> None:
        pass


@dataclass
class Heard:
    """What the program was told."""

    answers: list[Answer] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    changes: list[ModelChanged] = field(default_factory=list)
    most_kept: int = 0


async def play(service: Service, program: list[int], slow: bool) -> Heard:
    """Sends pieces of so many frames, a reset where there is a 0, and reads all answers."""
    heard = Heard()

    def notice(told: Notice) -> None:
        if isinstance(told, ModelChanged):
            assert all(answer.frame < told.frame for answer in heard.answers)
            heard.changes.append(told)

    stream = AsyncStream(service, opening({}), RETRY, heard.events.append, notice)
    while True:
        try:
            await stream.open()
            break
        except (Unreachable, errors.Unavailable):
            stream = AsyncStream(service, opening({}), RETRY, heard.events.append, notice)

    async def send() -> None:
        for count in program:
            if count:
                await stream.send(np.arange(stream.next_frame, stream.next_frame + count, dtype=np.float32)[:, None])
            else:
                await stream.reset()

    sending = asyncio.create_task(send())
    while len(heard.answers) < sum(program):
        heard.answers.append(await anext(stream))
        ledger = stream._ledger
        heard.most_kept = max(heard.most_kept, ledger.next_frame - ledger._oldest)
        if slow:
            await asyncio.sleep(0.3)
    await sending
    await stream.close()
    for task in service.tasks:
        task.cancel()
    await asyncio.gather(*service.tasks, return_exceptions=True)
    return heard


def expected(program: list[int], version_at: Mapping[int, int]) -> list[int]:
    """The scores of a stream that nothing happened to."""
    scores: list[int] = []
    past: list[int] = []
    for count in program:
        past = past if count else []
        for _ in range(count):
            past.append(len(scores))
            scores.append(score(version_at[len(scores)], past))
    return scores


def check(program: list[int], choices: list[int], updates: bool, slow: bool) -> tuple[Service, Heard]:
    service = Service(Fate(choices), updates)
    heard = virtual_time.run(play(service, program, slow))
    total = sum(program)
    assert not service.faults, service.faults
    assert [answer.frame for answer in heard.answers] == list(range(total))
    versions, version = {}, 1
    for answer in heard.answers:
        if answer.changed is not None:
            assert answer.changed == heard.changes[0]
            assert answer.changed.frame == answer.frame
            version = int(heard.changes.pop(0).version)
        versions[answer.frame] = version
    assert not heard.changes
    wanted = expected(program, versions)
    for answer in heard.answers:
        assert answer.scores is not None
        if answer.frame not in service.cold:
            assert answer.scores[0] == wanted[answer.frame]
        else:
            assert int(answer.scores[0]) // 100_000 == versions[answer.frame]
    assert [event.frame for event in heard.events] == list(range(0, total, 7))
    assert heard.most_kept <= MOST + WINDOW
    return service, heard


schedules = st.lists(st.integers(0, 239), max_size=150)
programs = st.lists(st.integers(0, 6), min_size=1, max_size=40).filter(lambda program: sum(program) > 0)
PROGRAM = [1, 5, 0, 3, 2, 2, 6, 0, 0, 1, 1, 4, 6, 6, 3, 0, 2, 5, 5, 1] * 2


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs, schedules, st.booleans())
@example(PROGRAM, [], False)
def test_every_frame_is_answered_once_with_the_same_scores_whenever_servers_die(program: list[int], choices: list[int], slow: bool) -> None:
    service, _ = check(program, choices, updates=False, slow=slow)
    assert not service.cold


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs, schedules, st.booleans())
def test_the_same_while_versions_of_the_model_are_replaced(program: list[int], choices: list[int], slow: bool) -> None:
    check(program, choices, updates=True, slow=slow)


@pytest.mark.parametrize("updates", [False, True])
def test_many_deaths_in_one_stream(updates: bool) -> None:
    kills = changes = cold = 0
    for seed in range(100):
        choices = np.random.default_rng(seed).integers(0, 240, 400).tolist()
        service, heard = check(PROGRAM, choices, updates, slow=seed % 2 == 1)
        kills, cold = kills + service.kills, cold + len(service.cold)
        changes += sum(answer.changed is not None for answer in heard.answers)
    assert kills > 300
    assert (changes > 50 and cold > 0) if updates else changes == 0
