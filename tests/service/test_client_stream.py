"""A stream against a server that follows a script: what happens when a connection is lost, or a caller, at the worst moment."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from service import detector, errors, protocol
from service.client import AsyncClient, Client, ClientError, Event, Retry, StreamClosed, Unreachable
from tests.service.conftest import Server
from tests.service.test_client import QUICK, Proxy, run, whole
from tests.toy_models import CHANNELS, example_frames

Script = Callable[["Peer"], Awaitable[None]]
ONE = np.zeros((1, 3), np.float32)


class Peer:
    """One connection as the script sees it; `opened` is said by hand."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket

    async def open(self, next_frame: int, shape: tuple[int, ...] = (3,)) -> dict[str, Any]:
        """Answers `open`, which it returns."""
        wish: dict[str, Any] = json.loads(await self.socket.recv())
        model = {"model": "m", "version": "1", "task": "classification", "classes": ["a", "b"], "frame_shape": shape}
        limits = {"limits": {"message_bytes": 1 << 20}, "options": {"fps": 30.0}}
        await self.say("opened", session="s", next_frame=next_frame, window=8, **model, **limits)
        return wish

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def answer(self, first: int, count: int) -> None:
        scores = np.arange(2 * first, 2 * (first + count), dtype="<f4")
        await self.socket.send(protocol.HEADER.pack(protocol.VERSION, protocol.KIND_SCORES, 0, count, first) + scores.tobytes())

    async def heard(self) -> tuple[Any, ...]:
        """The next message: ("frames", first, count), ("ack", first), ("reset", at), ("close",)."""
        message = await self.socket.recv()
        if isinstance(message, str):
            return tuple(json.loads(message).values())
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        return ("frames", first, count) if kind == protocol.KIND_FRAMES else ("ack", first)

    def cut(self) -> None:
        self.socket.transport.abort()


def against(script: list[Script], case: Callable[[AsyncClient], Awaitable[None]], retry: Retry = QUICK, timeout_s: float = 30.0) -> None:
    """Runs a case against a server whose n-th connection follows the n-th script, to the end of each."""
    failures: list[BaseException] = []
    connections = 0

    async def follow(socket: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        try:
            await script[connections - 1](Peer(socket))
            await socket.wait_closed()
        except (AssertionError, IndexError) as failure:
            failures.append(failure)

    async def both() -> None:
        async with serve(follow, "127.0.0.1", 0, max_size=None, max_queue=1) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            async with AsyncClient(f"http://127.0.0.1:{port}", retry=retry, timeout_s=timeout_s) as client:
                await case(client)

    run(both())
    assert not failures, failures
    assert connections == len(script)


async def say_closed(peer: Peer) -> None:
    while await peer.heard() != ("close",):
        pass
    await peer.say("closed")


# Nothing is lost or doubled


def test_a_wait_that_is_cancelled_loses_neither_answer_nor_ack() -> None:
    acks: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.open(0)
        for frame in range(8):
            assert await peer.heard() == ("frames", frame, 1)
        for frame in range(8):
            await asyncio.sleep(0.003)
            await peer.answer(frame, 1)
        while (message := await peer.heard()) != ("close",):
            acks.append(message[1])
        await peer.say("closed")

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            for _ in range(8):
                await stream.send(ONE)
            frames: list[int] = []
            while len(frames) < 8:
                with suppress(TimeoutError):
                    frames.append((await asyncio.wait_for(anext(stream), 0.001)).frame)
            assert frames == list(range(8))

    against([script], case)
    assert acks[-1] == 8


def test_a_send_that_is_cancelled_during_a_replay_takes_no_number_twice() -> None:
    """The replay stands still because the server does not read; meanwhile callers come and go."""
    big = np.zeros((1, 3_000_000), np.float32)
    opened_again, go_on = asyncio.Event(), asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.open(0, big.shape[1:])
        for _ in range(3):
            await peer.heard()
        peer.cut()

    async def second(peer: Peer) -> None:
        await peer.open(0, big.shape[1:])
        opened_again.set()
        await go_on.wait()
        assert [await peer.heard() for _ in range(6)] == [("frames", frame, 1) for frame in range(6)]
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            for _ in range(3):
                await stream.send(big)
            await opened_again.wait()
            await asyncio.sleep(0.2)
            for _ in range(3):
                sending = asyncio.create_task(stream.send(big))
                await asyncio.sleep(0.01)
                sending.cancel()
                with suppress(asyncio.CancelledError):
                    await sending
            go_on.set()
            await asyncio.sleep(0.5)

    against([first, second], case)


def test_frames_that_are_sent_again_are_those_that_were_sent(server: Server) -> None:
    """A camera writes each frame into the same buffer."""
    frames = example_frames(CHANNELS, 30)
    buffer = np.empty((1, *CHANNELS.shape), np.float32)

    async def case() -> None:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.stream("channels") as stream:
            proxy.cut()
            for frame in frames:
                buffer[0] = frame
                await stream.send(buffer)
            scores = [(await anext(stream)).scores for _ in frames]
            np.testing.assert_array_equal(np.stack([one for one in scores if one is not None]), whole(server.url, "channels", frames))

    run(case())


def test_one_answer_for_each_message_also_when_the_connection_is_lost(server: Server) -> None:
    frames = example_frames(CHANNELS, 400)

    async def case() -> list[int]:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.stream("channels", scores="last") as stream:
            answered = []
            async for answer in stream.play(frames, chunk=8):
                answered.append(answer.frame)
                if len(answered) % 3 == 0:
                    proxy.cut()
            return answered

    assert run(case()) == list(range(7, 400, 8))


def test_a_message_that_was_under_way_may_take_effect_after_opened() -> None:
    """Then a reset that is sent again comes too late for its place; it was done, and the next `opened` says so."""

    async def first(peer: Peer) -> None:
        await peer.open(0)
        assert [await peer.heard(), await peer.heard()] == [("reset", 0), ("frames", 0, 2)]
        peer.cut()

    async def second(peer: Peer) -> None:
        await peer.open(0)
        assert [await peer.heard(), await peer.heard()] == [("reset", 0), ("frames", 0, 2)]
        await peer.say("error", code="gap", error="a reset takes place at the next frame", next_frame=2)
        await peer.socket.close(4409, "gap")

    async def third(peer: Peer) -> None:
        await peer.open(2)
        await peer.answer(0, 2)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            await stream.reset()
            await stream.send(np.zeros((2, 3)))
            assert [(await anext(stream)).frame for _ in range(2)] == [0, 1]

    against([first, second, third], case)


def test_answers_that_are_no_longer_kept_hold_up_nothing() -> None:
    async def script(peer: Peer) -> None:
        assert (await peer.open(20))["ack"] == 0
        await peer.say("warning", warning="answers of frames 0 to 19 are no longer kept", code="answers_forgotten", first=0, kept_from=20)
        while (message := await peer.heard())[0] != "frames":
            assert message == ("ack", 20)
        await peer.answer(20, 1)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m", session="s", ack=0) as stream:
            assert [answer.frame async for answer in stream.play(ONE)] == [20]
            assert stream.warnings == ["answers of frames 0 to 19 are no longer kept"]

    against([script], case)


def test_a_session_that_came_back_elsewhere_is_refused_and_its_socket_closed() -> None:
    gone = asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.open(0)
        peer.cut()

    async def second(peer: Peer) -> None:
        await peer.open(5)
        with suppress(ConnectionClosed):
            await peer.socket.recv()
        gone.set()

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            with pytest.raises(errors.Gap, match="came back at frame 5"):
                await anext(stream)
            await asyncio.wait_for(gone.wait(), 5)

    against([first, second], case)


# Events


START = Event("start", "a", 0.75, 1, 2, 1 / 30)
END = Event("end", "a", 0.5, 3, 3, 0.1, "reset")


async def say_event(peer: Peer, event: Event) -> None:
    await peer.say("event", track=0, **{name: value for name, value in vars(event).items() if value is not None})


def test_events_are_told_once_and_in_order_also_when_the_connection_is_lost() -> None:
    async def first(peer: Peer) -> None:
        await peer.open(0)
        assert await peer.heard() == ("frames", 0, 3)
        await peer.answer(0, 2)
        await say_event(peer, START)
        await lost.wait()
        peer.cut()  # before the answer that the event belongs to

    async def second(peer: Peer) -> None:
        await peer.open(3)
        await say_event(peer, START)  # with the answers that it kept
        await peer.answer(0, 3)
        while (message := await peer.heard())[0] != "frames":
            assert message[0] == "ack"
        await say_event(peer, END)
        await peer.answer(3, 1)
        await say_closed(peer)

    told: list[Event] = []
    lost = asyncio.Event()

    async def case(client: AsyncClient) -> None:
        async with client.stream("m", on_event=told.append) as stream:
            await stream.send(np.zeros((3, 3)))
            answers = [await anext(stream) for _ in range(2)]
            lost.set()
            answers.append(await anext(stream))
            await stream.send(ONE)
            answers.append(await anext(stream))
            assert [(answer.frame, answer.events) for answer in answers] == [(0, ()), (1, ()), (2, (START,)), (3, (END,))]

    against([first, second], case)
    assert told == [START, END]


def test_as_many_events_as_a_server_keeps_are_told_once() -> None:
    """At a low frame rate a frame is many steps of the model, each of which may decide something."""
    events = [Event("start" if number % 2 == 0 else "end", "a", 0.5, 0, 0, number / 1e4) for number in range(detector.KEPT_EVENTS)]

    async def first(peer: Peer) -> None:
        await peer.open(0)
        assert await peer.heard() == ("frames", 0, 1)
        for event in events:
            await say_event(peer, event)
        peer.cut()

    async def second(peer: Peer) -> None:
        await peer.open(1)
        for event in events:
            await say_event(peer, event)
        await peer.answer(0, 1)
        await say_closed(peer)

    told: list[Event] = []

    async def case(client: AsyncClient) -> None:
        async with client.stream("m", on_event=told.append) as stream:
            await stream.send(ONE)
            assert (await anext(stream)).events == tuple(events)

    against([first, second], case)
    assert told == events


def test_what_a_listener_raises_comes_out_of_the_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.open(0)
        assert await peer.heard() == ("frames", 0, 1)
        await say_event(peer, START)
        with suppress(ConnectionClosed):
            await peer.heard()

    def listener(event: Event) -> None:
        raise OSError(f"the log is full at {event.frame}")

    async def case(client: AsyncClient) -> None:
        stream = await client.stream("m", on_event=listener).open()
        await stream.send(ONE)
        with pytest.raises(OSError, match="full at 1"):
            await anext(stream)
        await stream.close()

    against([script], case)


# Closing


async def never_closed(peer: Peer) -> None:
    await peer.open(0)
    with suppress(ConnectionClosed):
        while True:
            await peer.heard()


def test_a_close_that_is_cancelled_leaves_nothing_running() -> None:
    async def case(client: AsyncClient) -> None:
        stream = await client.stream("m").__aenter__()
        before = asyncio.all_tasks()
        closing = asyncio.create_task(stream.close())
        await asyncio.sleep(0.1)
        assert not closing.done()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.wait_for(stream.close(), 5)
        assert not stream.connected
        assert not [task for task in asyncio.all_tasks() & before if "AsyncStream" in repr(task)]
        with pytest.raises(StreamClosed):
            await stream.send(ONE)

    against([never_closed], case)


def test_two_may_close_at_once_and_what_was_sent_goes_first() -> None:
    heard: list[tuple[Any, ...]] = []

    async def script(peer: Peer) -> None:
        await peer.open(0)
        while ("close",) not in heard:
            heard.append(await peer.heard())
        await asyncio.sleep(0.05)
        await peer.say("closed")

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            await stream.send(ONE)
            await asyncio.gather(stream.close(), stream.close())
            assert not stream.connected

    against([script], case)
    assert heard == [("frames", 0, 1), ("close",)]


def test_a_server_that_opens_nothing_is_not_waited_for() -> None:
    async def silent(peer: Peer) -> None:
        await peer.socket.wait_closed()

    async def case(client: AsyncClient) -> None:
        with pytest.raises(Unreachable, match=r"did not open the stream within 0\.2 s"):
            async with client.stream("m"):
                pass

    against([silent], case, timeout_s=0.2)


def test_answers_that_nobody_reads_do_not_hold_up_a_close() -> None:
    async def script(peer: Peer) -> None:
        await peer.open(0)
        for frame in range(8):
            assert await peer.heard() == ("frames", frame, 1)
        await peer.say("error", code="diverged", error="not finite")
        for frame in range(200):
            await peer.answer(frame, 1)
        with suppress(ConnectionClosed):
            await peer.heard()

    async def case(client: AsyncClient) -> None:
        stream = await client.stream("m").__aenter__()
        for _ in range(8):
            await stream.send(ONE)
        with pytest.raises(errors.Diverged):
            await asyncio.wait_for(anext(stream), 5)
        await asyncio.wait_for(stream.close(), 5)

    against([script], case)


# Without an event loop


def test_a_plain_stream_that_is_interrupted_ends_with_the_interrupt(server: Server) -> None:
    go_on = threading.Event()

    def camera() -> Iterator[Any]:
        yield ONE
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        go_on.wait(10)

    with Client(server.url) as client, client.stream("channels") as stream:
        try:
            with pytest.raises(KeyboardInterrupt):
                for _ in stream.play(camera()):
                    pass
        finally:
            go_on.set()
        assert stream.send(ONE) == 1


def test_a_plain_client_that_is_closed_says_so(server: Server) -> None:
    with Client(server.url) as client:
        stream = client.stream("channels")
        stream.__enter__()
    stream.close()
    for use in (client.models, lambda: stream.send(ONE)):
        with pytest.raises(ClientError, match="was closed"):
            use()
