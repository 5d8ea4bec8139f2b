"""Several tracks on one websocket, in memory: the real parts of the service, with two queues in place of a network.

One property above all: however the messages of tracks are interleaved, each track hears the same bits as it would on a socket of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service import protocol, tracks
from service.catalog import Catalog
from service.errors import Draining
from service.gate import Gate
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import Settings
from service.store import Store, StoreSettings
from service.store_memory import MemoryStore
from service.streaming import Sockets, Stream
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 200, seed=21)
WITHIN_S = 30.0


class Wire:
    """A client's end of one websocket, and the service's: the `Socket` of its stream."""

    def __init__(self, query: str, stream: Stream) -> None:
        self.query = dict(parse_qsl(query))
        self.stream = stream
        self.to_server: deque[str | bytes] = deque()
        self.to_client: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = self.paused = self.aborted = False
        self.served: asyncio.Task[None]

    # ---- the service's end

    def send(self, message: str | bytes) -> None:
        if not self.gone:
            self.to_client.put_nowait(json.loads(message) if isinstance(message, str) else message)

    def close(self, code: int, reason: str = "") -> None:
        self.send(json.dumps(code))

    def abort(self) -> None:
        self.aborted = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self._deliver()

    # ---- the client's

    def _deliver(self) -> None:
        while self.to_server and not self.paused:
            self.stream.feed(self.to_server.popleft())

    def say(self, message: bytes | None = None, /, **fields: Any) -> None:
        self.to_server.append(json.dumps(fields) if message is None else message)
        self._deliver()

    def frames(self, track: int, first: int, count: int = 1) -> None:
        self.say(protocol.write_frames(first, CLIP[first : first + count], track))

    def leave(self) -> None:
        if not self.gone:
            self.gone = True
            self.stream.left()

    async def hear(self) -> Any:
        """The next message: a dict, bytes, or the close code."""
        async with asyncio.timeout(WITHIN_S):
            return await self.to_client.get()

    async def until(self, track: int, kind: str) -> dict[str, Any]:
        """The next text message of this kind for a track; those for other tracks may come before."""
        while True:
            message = await self.hear()
            assert isinstance(message, dict), f"{message!r} came where {kind} was expected"
            if (message.get("track"), message["type"]) == (track, kind):
                return message

    async def silent(self) -> bool:
        await asyncio.sleep(0.05)
        return self.to_client.empty()


class House:
    """The service in memory."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.sockets = Sockets(predictor, Gate(Settings()), 100)
        self.runner = predictor.runner("channels")

    @asynccontextmanager
    async def wire(self, query: str = "") -> AsyncIterator[Wire]:
        stream = Stream(self.predictor, "channels")
        wire = Wire(query, stream)
        wire.served = asyncio.create_task(self.sockets.run(stream, wire, wire.query, lambda: None))
        await asyncio.sleep(0)
        try:
            yield wire
        finally:
            wire.leave()
            async with asyncio.timeout(WITHIN_S):
                await wire.served


@pytest.fixture(scope="module")
def catalog(models: Path) -> Catalog:
    return Catalog.load([models], "cpu", 1)


def serve(catalog: Catalog, scenario: Callable[[House], Awaitable[Any]], store: Store | None = None, **changes: Any) -> Any:
    async def run() -> Any:
        predictor = Predictor(catalog, Settings(**changes), Metrics())
        if store is not None:
            predictor.keep_in(store)
        async with predictor:
            result = await scenario(House(predictor))
            assert all(session.owner is None for session in predictor.sessions), "a websocket is gone and still owns a session"
            return result

    return asyncio.run(run())


async def opened(wire: Wire, *numbers: int, **options: Any) -> list[str]:
    """Opens tracks; their sessions."""
    for number in numbers:
        wire.say(type="open", track=number, **options)
    return [(await wire.until(number, "opened"))["session"] for number in numbers]


def scores(message: Any) -> npt.NDArray[np.float32]:
    return np.array(message["scores"], np.float32)


# ---- the property


MESSAGES = st.one_of(
    st.tuples(st.just("frames"), st.integers(1, 9)),
    st.tuples(st.just("json"), st.integers(1, 3)),
    st.just(("reset", 0)),
    st.just(("again", 0)),  # closes, and opens the same track for somebody else
)
PROGRAMS = st.lists(st.lists(MESSAGES, max_size=6), min_size=2, max_size=5)


def spoken(program: list[tuple[str, int]], track: int, options: dict[str, Any], named: bool) -> list[Any]:
    """The messages of one track, from `open` to `close`."""
    which: dict[str, Any] = {"track": track} if named else {}
    messages: list[Any] = [{"type": "open", **which, **options}]
    at, clip = 0, np.roll(CLIP, 13 * track, axis=0)
    for what, count in program:
        if what == "frames":
            messages.append(protocol.write_frames(at, clip[at : at + count], track if named else 0))
        elif what == "json":
            messages.append({"type": "frames", **which, "first": at, "frames": clip[at : at + count].tolist()})
        elif what == "reset":
            messages.append({"type": "reset", **which, "at": at})
        else:
            messages += [{"type": "close", **which}, {"type": "open", **which, **options}]
        at = 0 if what == "again" else at + count
    return [*messages, {"type": "close", **which}]


def plain(message: Any) -> Any:
    """A message without what tells sockets and sessions apart."""
    if isinstance(message, bytes):
        return message[:2] + message[4:]
    return {name: value for name, value in message.items() if name not in ("track", "session")}


async def alone(house: House, messages: list[Any]) -> list[Any]:
    """What a stream hears on sockets of its own, one for each of its sessions."""
    heard: list[Any] = []
    while messages:
        end = messages.index({"type": "close"}) + 1
        async with house.wire() as wire:
            say_all(wire, messages[:end])
            while (message := await wire.hear()) != 1000:
                heard.append(plain(message))
        messages = messages[end:]
    return heard


def say_all(wire: Wire, messages: list[Any]) -> None:
    for message in messages:
        if isinstance(message, bytes):
            wire.say(message)
        else:
            wire.say(**message)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS, st.data())
def test_interleaved_tracks_hear_the_same_bits_as_sockets_of_their_own(catalog: Catalog, programs: list[list[tuple[str, int]]], data: st.DataObject) -> None:
    options = [{"answers": data.draw(st.sampled_from(["json", "binary"])), "scores": data.draw(st.sampled_from(["all", "last"]))} for _ in programs]
    turns = data.draw(st.permutations([track for track, program in enumerate(programs) for _ in spoken(program, track, {}, True)]))
    pauses = data.draw(st.sets(st.integers(0, len(turns))))

    async def scenario(house: House) -> None:
        expected = [await alone(house, spoken(program, track, options[track], False)) for track, program in enumerate(programs)]
        waiting = [spoken(program, track, options[track], True) for track, program in enumerate(programs)]
        heard: list[list[Any]] = [[] for _ in programs]
        async with house.wire() as wire:
            for turn, track in enumerate(turns):
                say_all(wire, [waiting[track].pop(0)])
                if turn in pauses:
                    await asyncio.sleep(0)
            while [len(one) for one in heard] != [len(one) for one in expected]:
                message = await wire.hear()
                track = protocol.HEADER.unpack_from(message)[2] if isinstance(message, bytes) else message["track"]
                heard[track].append(plain(message))
            assert await wire.silent()
        assert heard == expected

    serve(catalog, scenario)


# ---- opening and closing


def test_frames_of_two_tracks_go_through_one_batch(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire, house.wire() as other:
            await opened(wire, 1, 2)
            await opened(other, 1)
            before = house.runner.batches_run, house.runner.rows_run
            wire.frames(1, 0)
            wire.frames(2, 0)
            other.frames(1, 0)
            await wire.until(1, "scores")
            await wire.until(2, "scores")
            await other.until(1, "scores")
            assert (house.runner.batches_run - before[0], house.runner.rows_run - before[1]) == (1, 3)

    serve(catalog, scenario)


def test_a_connection_of_tracks_stays_open_without_any(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            for person in range(3):
                await opened(wire, 0)
                wire.frames(0, 0)
                assert (await wire.until(0, "scores"))["first"] == 0
                wire.say(type="close", track=0)
                assert (await wire.until(0, "closed"))["next_frame"] == 1
                assert await wire.silent(), f"after person {person}"
                assert len(house.predictor.sessions) == 0

    serve(catalog, scenario)


def test_a_connection_that_named_no_track_ends_with_its_stream(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire("scores=last") as wire:
            assert (await wire.hear())["track"] == 0
            wire.say(type="close")
            assert (await wire.hear())["type"] == "closed"
            assert await wire.hear() == 1000
        async with house.wire("scores=last") as wire:
            wire.say(type="open", track=4)
            wire.say(type="close")
            await wire.until(0, "closed")
            wire.frames(4, 0)
            await wire.until(4, "scores")

    serve(catalog, scenario)


def test_close_may_keep_the_session_and_another_track_goes_on_with_it(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            (session,) = await opened(wire, 1)
            wire.frames(1, 0, 5)
            before = scores(await wire.until(1, "scores"))
            wire.say(type="close", track=1, keep=True)
            assert (await wire.until(1, "closed"))["next_frame"] == 5
            wire.say(type="open", track=2, session=session, ack=3)
            assert (await wire.until(2, "opened"))["next_frame"] == 5
            kept = await wire.until(2, "scores")
            assert kept["first"] == 3
            np.testing.assert_array_equal(scores(kept), before[3:])
            wire.frames(2, 5)
            after = scores(await wire.until(2, "scores"))
        async with house.wire("scores=all") as wire:
            wire.frames(0, 0, 6)
            np.testing.assert_array_equal(scores(await wire.until(0, "scores"))[5:], after)

    serve(catalog, scenario)


def test_tracks_are_capped_and_told_so(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            wire.say(type="open", track=0)
            most = (await wire.until(0, "opened"))["limits"]["tracks"]
            await opened(wire, *range(1, most))
            wire.say(type="open", track=most)
            refused = await wire.until(most, "error")
            assert (refused["code"], "not `closed` yet" in refused["error"]) == ("too_many", True)
            wire.say(type="close", track=7)
            await wire.until(7, "closed")
            await opened(wire, most)

    serve(catalog, scenario)


# ---- faults


def test_a_fault_ends_its_track_alone_and_its_session_may_be_resumed(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            first, _ = await opened(wire, 1, 2)
            wire.frames(1, 0, 3)
            wire.say(protocol.write_frames(3, np.full((1, 3), np.inf, np.float32), 1))
            wire.frames(1, 4)  # was under way when the client heard of it
            wire.frames(2, 0)
            await wire.until(1, "scores")
            error = await wire.until(1, "error")
            assert (error["code"], error["frame"]) == ("not_finite", 3)
            wire.say(type="open", track=1, session=first)
            while (message := await wire.hear())["track"] != 1:
                pass
            assert message["next_frame"] == 3, "what was under way was neither run nor complained of"
            await wire.until(1, "scores")
            wire.frames(2, 1)
            while (await wire.until(2, "scores"))["first"] != 1:
                pass

    serve(catalog, scenario)


def test_a_track_that_cannot_be_opened_leaves_the_others_alone(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            wire.say(type="open", track=1, session="x" * 32)
            assert (await wire.until(1, "error"))["code"] == "session_not_found"
            await opened(wire, 2)
            wire.say(type="open", track=3, version="99")
            assert (await wire.until(3, "error"))["code"] == "model_not_found"
            wire.frames(9, 0)
            wire.frames(9, 1)
            assert (await wire.until(9, "error"))["code"] == "track_not_open"
            wire.frames(2, 0)
            await wire.until(2, "scores")
            wire.say(type="open", track=2)
            assert "open already" in (await wire.until(2, "error"))["error"]
            await opened(wire, 1, 2, 3, 9)

    serve(catalog, scenario)


def test_what_cannot_be_read_ends_the_connection_after_the_answers_of_every_track(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1, 2)
            wire.frames(1, 0)
            wire.frames(2, 0)
            wire.say(type="dance", track=1)
            heard = [await wire.hear() for _ in range(3)]
            assert {message.get("track") for message in heard[:2]} == {1, 2}
            assert heard[2]["code"] == "malformed"
            assert "track" not in heard[2], "this one is about the connection"
            assert await wire.hear() == 4400
        assert len(house.predictor.sessions) == 2

    serve(catalog, scenario)


def test_a_message_that_cannot_be_read_does_not_wait_for_acks_that_cannot_come(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire("scores=last") as wire:
            wire.frames(0, 0, 64)
            wire.frames(0, 64)  # waits for an ack
            await wire.until(0, "scores")
            wire.say(type="dance")
            assert (await wire.hear())["code"] == "malformed"
            assert await wire.hear() == 4400

    serve(catalog, scenario)


def test_a_session_that_is_taken_over_or_closed_elsewhere_ends_its_track_alone(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire, house.wire() as thief:
            taken, closed, _ = await opened(wire, 1, 2, 3)
            await opened(thief, 7, session=taken)
            assert (await wire.until(1, "error"))["code"] == "taken_over"
            await house.predictor.close(house.predictor.sessions.find(closed), "deleted")
            assert (await wire.until(2, "error"))["code"] == "session_not_found"
            wire.say(type="open", track=4, session=taken)  # and back, from its own socket
            await wire.until(4, "opened")
            assert (await thief.until(7, "error"))["code"] == "taken_over"
            for track in (3, 4):
                wire.frames(track, 0)
                await wire.until(track, "scores")

    serve(catalog, scenario)


def test_an_old_track_expires_alone_and_an_idle_one_is_kept_alive_by_its_connection(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1)
            await asyncio.sleep(0.6)
            await opened(wire, 2)
            assert (await wire.until(1, "error"))["code"] == "session_expired"
            wire.frames(2, 0)
            assert (await wire.until(2, "scores"))["first"] == 0

    serve(catalog, scenario, idle_s=0.1, age_s=1.0)


def test_draining_ends_every_track_after_the_message_under_way(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire, house.wire() as empty:
            await opened(wire, 1, 2)
            await opened(empty, 1)
            empty.say(type="close", track=1)
            await empty.until(1, "closed")
            wire.frames(1, 0)
            wire.frames(2, 0)
            await asyncio.sleep(0)
            await house.sockets.drain(5)
            heard = []
            while (message := await wire.hear()) != 1013:
                heard.append((message["type"], message.get("track")))
            assert sorted(heard[:-1]) == [("scores", 1), ("scores", 2)]
            assert heard[-1] == ("draining", None)
            assert (await empty.hear())["retry_after"] == 5
            assert await empty.hear() == 1013

    serve(catalog, scenario)


def test_a_drain_that_a_track_meets_first_is_told_with_its_number(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1)
            house.predictor.draining = True
            wire.frames(1, 0)
            assert (await wire.until(1, "draining"))["retry_after"] == 5
            house.predictor.draining = False

    serve(catalog, scenario)
    assert Draining.close_code == 1013


def test_a_client_that_is_gone_leaves_its_sessions(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            sessions = await opened(wire, 1, 2, 3)
            assert all(house.predictor.sessions.find(session).owner is not None for session in sessions)
        assert all(house.predictor.sessions.find(session).owner is None for session in sessions)

    serve(catalog, scenario)


def test_tracks_that_find_their_client_gone_at_once_are_no_failures(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            sessions = await opened(wire, 1, 2, 3)
            for track in (1, 2, 3):  # each has an answer for nobody
                wire.frames(track, 0)
            wire.leave()
            async with asyncio.timeout(WITHIN_S):
                await wire.served
                await house.runner.idle()
        assert [house.predictor.sessions.find(session).next_frame for session in sessions] == [1, 1, 1]

    with capture_logs() as lines:
        serve(catalog, scenario)
    assert not [line for line in lines if line["log_level"] == "error"]


# ---- nobody waits for another's client


def test_a_track_whose_answers_are_not_acknowledged_holds_up_itself_alone(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1, 2)
            for first in range(0, 96, 32):
                wire.frames(1, first, 32)
            for first in range(100):
                wire.frames(2, first)
                assert (await wire.until(2, "scores"))["first"] == first
                wire.say(protocol.HEADER.pack(1, 3, 2, 0, first + 1))
            wire.say(type="ack", track=1, first=40)
            assert (await wire.until(1, "scores"))["first"] == 64

    serve(catalog, scenario)


def test_a_track_that_overruns_its_window_is_told_at_once_and_the_others_go_on(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            (session, _) = await opened(wire, 1, 2)
            for first in range(140):
                wire.frames(1, first)
            wire.frames(2, 0)
            async with asyncio.timeout(2):
                assert (await wire.until(1, "error"))["code"] == "too_many"
                assert (await wire.until(2, "scores"))["first"] == 0
            assert house.predictor.sessions.find(session).next_frame == 64
            wire.say(type="open", track=1, session=session, ack=64)
            assert (await wire.until(1, "opened"))["next_frame"] == 64
            wire.frames(1, 64)
            await wire.until(1, "scores")

    serve(catalog, scenario)


def test_a_track_that_waits_for_an_ack_already_is_told_at_once_too(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks, "LOOK_S", 1000.0)

    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1)
            wire.frames(1, 0, 64)
            await wire.until(1, "scores")
            wire.frames(1, 64)
            assert await wire.silent()
            wire.frames(1, 65, 64)
            assert (await wire.until(1, "error"))["code"] == "too_many"

    serve(catalog, scenario)


def test_an_ack_may_come_before_its_session_is_open(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            (session,) = await opened(wire, 1)
            wire.frames(1, 0, 64)
            await wire.until(1, "scores")
            wire.say(type="close", track=1, keep=True)
            wire.say(type="open", track=1, session=session)
            wire.say(type="ack", track=1, first=64)
            wire.frames(1, 64)
            await wire.until(1, "opened")
            assert (await wire.until(1, "scores"))["count"] == 64
            assert (await wire.until(1, "scores"))["first"] == 64

    serve(catalog, scenario)


def test_close_does_not_wait_for_acks(catalog: Catalog) -> None:
    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1)
            wire.frames(1, 0, 64)
            wire.frames(1, 64, 3)
            wire.say(type="close", track=1)
            assert (await wire.until(1, "closed"))["next_frame"] == 67

    serve(catalog, scenario)


def test_what_waits_on_a_connection_is_bounded_in_bytes(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes on as answers go out: all is answered, in spite of a bound far below what was sent."""
    monkeypatch.setattr(protocol, "MOST_WAITING", 100)

    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1, 2, 3)
            for first in range(20):
                for track in (1, 2, 3):
                    wire.frames(track, first)
            most, got = 0, 0
            while got < 60:
                message = await wire.hear()
                got += message["type"] == "scores"
                most = max(most, *(stream.connection.waiting for stream in house.sockets._streams))
            assert most < 200

    serve(catalog, scenario)


def test_how_far_a_stream_is_durable_is_told_at_once_and_then_now_and_then(catalog: Catalog) -> None:
    """However often it is saved: nobody hurries to let go of frames. What was saved last is told in the end."""

    async def scenario(house: House) -> None:
        async with house.wire() as wire:
            await opened(wire, 1)
            loop = asyncio.get_running_loop()
            told: list[tuple[float, int]] = []
            first, began = 0, loop.time()
            while loop.time() - began < 2.5 * tracks.TELL_S and first < len(CLIP):
                wire.frames(1, first)
                first += 1
                while (message := await wire.hear())["type"] == "durable":
                    told.append((loop.time(), message["frame"]))
                wire.say(type="ack", track=1, first=first)
                await asyncio.sleep(0.005)
            while told[-1][1] < first:
                message = await wire.until(1, "durable")
                told.append((loop.time(), message["frame"]))
            times, frames = zip(*told, strict=True)
            assert times[0] - began < tracks.TELL_S / 2
            assert min(np.diff(times)) > 0.9 * tracks.TELL_S
            assert list(frames) == sorted(set(frames))
            assert len(told) <= 4
            assert house.predictor.metrics.store_saves._value.get() > 3 * len(told)
            assert await wire.silent()

    serve(catalog, scenario, MemoryStore(StoreSettings()), checkpoint_frames=2, checkpoint_ms=10)
