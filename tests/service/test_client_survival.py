"""Streams and steps over servers that go away: the wire, followed by scripts, and real services on one store that are killed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from service import client_stream, errors
from service.client import Answer, AsyncClient, AsyncStream, Client, ClientError, ModelChanged, Notice, Retry, Unreachable, Warned
from tests.server_process import Server, running
from tests.service.test_client import QUICK, Proxy, check, run, whole
from tests.service.test_client_stream import ONE, Peer, against, say_closed
from tests.toy_models import CHANNELS, example_frames, write_toy

STORED = {"durability": "memory", "horizon": 4, "fingerprint": "f1"}
NOBODY = "http://127.0.0.1:9"


async def opened(peer: Peer, next_frame: int, **facts: Any) -> dict[str, Any]:
    """Answers `open`, which it returns, as a server does that keeps sessions in a store."""
    wish: dict[str, Any] = json.loads(await peer.socket.recv())
    model = {"model": "m", "version": "1", "task": "classification", "classes": ["a", "b"], "frame_shape": [3]}
    limits = {"limits": {"message_bytes": 1 << 20}, "options": {"fps": 30.0}}
    await peer.say("opened", **{"session": "s", "next_frame": next_frame, "window": 8, **model, **limits, **STORED, **facts})
    return wish


async def frames_of(peer: Peer, count: int) -> list[tuple[Any, ...]]:
    """The next messages with frames, over whatever is acknowledged meanwhile."""
    heard: list[tuple[Any, ...]] = []
    while len(heard) < count:
        message = await peer.heard()
        if message[0] != "ack":
            heard.append(message)
    return heard


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.01)


async def back(stream: AsyncStream) -> None:
    await until(lambda: stream.reconnects > 0)


# The wire


def test_what_was_not_durable_is_sent_again_and_no_answer_is_delivered_twice() -> None:
    read = asyncio.Event()

    async def first(peer: Peer) -> None:
        await opened(peer, 0)
        await frames_of(peer, 6)
        await peer.answer(0, 6)
        await peer.say("durable", track=0, frame=2)
        await read.wait()
        peer.cut()

    async def second(peer: Peer) -> None:
        assert (await opened(peer, 3))["ack"] == 6
        assert await frames_of(peer, 3) == [("frames", frame, 1) for frame in (3, 4, 5)]
        await peer.answer(3, 3)
        await frames_of(peer, 1)
        await peer.answer(6, 1)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            assert stream.durability == "memory"
            for _ in range(6):
                await stream.send(ONE)
            frames = [(await anext(stream)).frame for _ in range(6)]
            read.set()
            await back(stream)
            await stream.send(ONE)
            assert [*frames, (await anext(stream)).frame] == list(range(7))

    against([first, second], case)


@pytest.mark.parametrize("told", [True, False])
def test_a_server_that_drains_is_left_at_once_whatever_it_says_of_later(told: bool) -> None:
    async def first(peer: Peer) -> None:
        await opened(peer, 0)
        await frames_of(peer, 1)
        if told:
            await peer.say("draining", retry_after=50)
        await peer.socket.close(1012)

    async def second(peer: Peer) -> None:
        await opened(peer, 0)
        await frames_of(peer, 1)
        await peer.answer(0, 1)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream, asyncio.timeout(5):
            await stream.send(ONE)
            assert (await anext(stream)).frame == 0

    against([first, second], case)


async def knows_no_session(peer: Peer) -> None:
    assert json.loads(await peer.socket.recv())["session"] == "s"
    await peer.say("error", code="session_not_found", error="no such session")
    await peer.socket.close(4404)


def test_a_session_that_no_store_has_heard_of_is_begun_anew() -> None:
    read = asyncio.Event()

    async def first(peer: Peer) -> None:
        await opened(peer, 0)
        await frames_of(peer, 2)
        await peer.answer(0, 1)
        await read.wait()
        peer.cut()

    async def third(peer: Peer) -> None:
        wish = await opened(peer, 0, session="t")
        assert "session" not in wish
        assert wish["version"] == "1"
        assert await frames_of(peer, 2) == [("frames", 0, 1), ("frames", 1, 1)]
        await peer.answer(0, 2)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            await stream.send(ONE)
            await stream.send(ONE)
            frames = [(await anext(stream)).frame]
            read.set()
            assert [*frames, (await anext(stream)).frame] == [0, 1]
            assert stream.session == "t"

    against([first, knows_no_session, third], case)


def test_what_was_durable_once_is_not_begun_anew() -> None:
    async def first(peer: Peer) -> None:
        await opened(peer, 0)
        await frames_of(peer, 1)
        await peer.say("durable", frame=1)
        await peer.answer(0, 1)
        await asyncio.sleep(0.05)
        peer.cut()

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            await stream.send(ONE)
            assert (await anext(stream)).frame == 0
            with pytest.raises(errors.SessionNotFound):
                await anext(stream)

    against([first, knows_no_session], case)


def test_another_model_is_warmed_up_before_anything_else_and_its_program_is_told() -> None:
    new = {"version": "2", "fingerprint": "f2", "classes": ["c", "d"]}
    read = asyncio.Event()

    async def first(peer: Peer) -> None:
        assert (await opened(peer, 0))["version"] == "1"
        await frames_of(peer, 8)
        await peer.answer(0, 8)
        await peer.say("durable", frame=8)
        await read.wait()
        await peer.say("draining", code="draining", error="version 1 is not served any more", retry_after=0)
        await peer.socket.close(1013)

    async def second(peer: Peer) -> None:
        wish = await opened(peer, 4, **new)
        assert "version" not in wish  # it is gone
        await asyncio.sleep(0.2)
        await peer.say("model_changed", track=0, frame=8, warm_from=4, **new)
        assert await frames_of(peer, 4) == [("frames", frame, 1) for frame in (4, 5, 6, 7)]
        await peer.answer(4, 4)
        await frames_of(peer, 1)
        await peer.answer(8, 1)
        await say_closed(peer)

    told: list[Notice] = []

    async def case(client: AsyncClient) -> None:
        async with client.stream("m", version="1", on_notice=told.append) as stream:
            for _ in range(8):
                await stream.send(ONE)
            answers = [await anext(stream) for _ in range(8)]
            read.set()
            await back(stream)
            await stream.send(ONE)
            answers.append(await anext(stream))
            assert [answer.frame for answer in answers] == list(range(9))
            assert {answer.label for answer in answers[:8]} <= {"a", "b"}
            assert answers[8].label in {"c", "d"}
            assert told == [answers[8].changed] == [ModelChanged(8, "2", "f2", 4, ("c", "d"))]
            assert (stream.version, stream.classes) == ("2", ("c", "d"))

    against([first, second], case)


def test_what_comes_where_another_model_might_be_told_is_not_lost() -> None:
    """A server that has the older version again says nothing of it, but sends what it kept."""

    async def first(peer: Peer) -> None:
        await opened(peer, 0)
        await frames_of(peer, 2)
        peer.cut()

    async def second(peer: Peer) -> None:
        await opened(peer, 2, version="0", fingerprint="f0")
        await peer.answer(0, 2)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            await stream.send(ONE)
            await stream.send(ONE)
            answers = [await anext(stream), await anext(stream)]
            assert [answer.changed for answer in answers] == [ModelChanged(0, "0", "f0", 0, ("a", "b")), None]

    against([first, second], case)


def test_a_model_that_takes_other_frames_cannot_go_on() -> None:
    async def first(peer: Peer) -> None:
        await opened(peer, 0)
        peer.cut()

    async def second(peer: Peer) -> None:
        await opened(peer, 0, frame_shape=[5], fingerprint="f2", version="2")

    async def case(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            with pytest.raises(ClientError, match="version 2 is served now and takes frames of shape"):
                await anext(stream)

    against([first, second], case)


def test_a_session_whose_model_is_gone_may_be_taken_up_by_a_program_without_its_frames() -> None:
    async def script(peer: Peer) -> None:
        await opened(peer, 16, version="2", fingerprint="f2")
        await peer.say("model_changed", frame=20, warm_from=16, version="2", fingerprint="f2", classes=["c", "d"])
        assert await frames_of(peer, 1) == [("frames", 20, 1)]
        await peer.answer(20, 1)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m", session="s") as stream:
            assert stream.next_frame == 20
            await stream.send(ONE)
            assert (await anext(stream)).changed == ModelChanged(20, "2", "f2", 20, ("c", "d"))

    against([script], case)


def test_a_store_that_is_down_is_a_warning_and_the_stream_goes_on_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then `send` waits and says why, and goes on when frames are durable."""
    monkeypatch.setattr(client_stream, "_STALLED_S", 0.2)
    told: list[Notice] = []
    waiting = asyncio.Event()

    async def script(peer: Peer) -> None:
        await opened(peer, 0)
        await peer.say("warning", track=0, warning="the store is down", code="store_unavailable")
        for frame in range(12):
            await frames_of(peer, 1)
            await peer.answer(frame, 1)
        await waiting.wait()
        await peer.say("durable", frame=6)
        await frames_of(peer, 1)
        await peer.answer(12, 1)
        await say_closed(peer)

    async def case(client: AsyncClient) -> None:
        async with client.stream("m", on_notice=told.append) as stream:
            for frame in range(12):
                await stream.send(ONE)
                assert (await anext(stream)).frame == frame
            sending = asyncio.create_task(stream.send(ONE))
            await until(lambda: len(told) >= 3)
            assert not sending.done()
            waiting.set()
            assert await sending == 12
            assert (await anext(stream)).frame == 12
            assert len(stream.warnings) == 2

    against([script], case, retry=Retry(keep_bytes=12 * 12))
    assert told[0] == Warned("store_unavailable", "the store is down")
    assert {notice.code for notice in told[1:] if isinstance(notice, Warned)} == {"not_durable"}


def test_another_program_that_takes_the_session_ends_the_stream_as_ever() -> None:
    async def script(peer: Peer) -> None:
        await opened(peer, 0)
        await peer.say("error", code="taken_over", error="another connection has taken the session over")
        await peer.socket.close(4409, "taken_over")

    async def case(client: AsyncClient) -> None:
        with pytest.raises(errors.TakenOver):
            async with client.stream("m") as stream:
                await anext(stream)

    against([script], case)


# Several addresses


@asynccontextmanager
async def scripted(script: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that follows the script on every connection; its address."""

    async def follow(socket: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            await script(Peer(socket))
            await socket.wait_closed()

    async with serve(follow, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@pytest.mark.parametrize("together", [False, True])
def test_a_stream_finds_the_server_that_is_there_and_leaves_the_one_that_drains(server: Server, together: bool) -> None:
    async def drains(peer: Peer) -> None:
        await peer.socket.recv()
        await peer.say("draining", retry_after=60)
        await peer.socket.close(1013)

    async def case() -> None:
        frames = example_frames(CHANNELS, 20)
        expected = whole(server.url, "channels", frames)
        async with scripted(drains) as going, AsyncClient([going, NOBODY, server.url], retry=QUICK) as client:
            for _ in range(6):  # each begins at an address of its own
                if together:
                    async with client.tracks("channels") as tracks:
                        try:
                            stream = await tracks.stream().open()
                        except errors.Draining:  # a track learns only when it is opened that the connection of all is going
                            stream = await tracks.stream().open()
                        check([answer async for answer in stream.play(frames)], expected)
                else:
                    async with client.stream("channels") as stream:
                        check([answer async for answer in stream.play(frames)], expected)

    run(case())


def test_calls_go_to_the_address_that_answers(server: Server) -> None:
    with Client([NOBODY, server.url]) as client:
        for _ in range(4):
            assert client.model("channels").version == "10"
        session = client.open_session("channels")["session"]
        assert client.advance(session, 0, example_frames(CHANNELS, 2)).frame == 1
    with Client([NOBODY, "http://127.0.0.1:1"]) as client, pytest.raises(Unreachable, match="no service at"):
        client.models()
    with pytest.raises(ClientError, match="empty list"):
        AsyncClient([])


# Steps


@asynccontextmanager
async def answering(*answers: tuple[int, dict[str, Any]] | None) -> AsyncIterator[tuple[str, list[str]]]:
    """An HTTP server that gives these answers in turn, the last for ever, closing the connection for None; its address, and what it was asked."""
    asked: list[str] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")), 0)
        await reader.readexactly(length)
        answer = answers[min(len(asked), len(answers) - 1)]
        asked.append(head.splitlines()[0])
        if answer is None:
            writer.transport.abort()
            return
        body = json.dumps(answer[1]).encode()
        writer.write(f"HTTP/1.1 {answer[0]} -\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


FINE = (200, {"frame": 0, "time": 0.0, "at": 4})
GOING = (503, {"code": "draining", "error": "going", "retry_after": 5})
DOWN = (503, {"code": "store_unavailable", "error": "down", "retry_after": 0})


def test_a_step_is_repeated_until_it_is_answered() -> None:
    async def case() -> None:
        async with answering(None, GOING, DOWN, (502, {}), FINE) as (url, asked), AsyncClient(url, retry=QUICK) as client:
            assert (await client.advance("s", 4, ONE)).frame == 0
            assert len(asked) == 5
            assert all("first=4" in line for line in asked)
        async with answering(None, GOING, DOWN, FINE) as (url, asked), AsyncClient(url, retry=QUICK) as client:
            await client.reset_session("s", 4)
            assert len(asked) == 4

    run(case())


def test_a_step_is_not_repeated_for_ever_nor_after_other_refusals() -> None:
    async def case() -> None:
        async with answering(DOWN) as (url, asked), AsyncClient(url, retry=Retry(0.3, 0.01, 0.05)) as client:
            with pytest.raises(errors.StoreUnavailable, match="down"):
                await client.advance("s", 4, ONE)
            assert len(asked) > 3
        for status, code, kind in ((409, "gap", errors.Gap), (503, "overloaded", errors.Overloaded), (404, "session_not_found", errors.SessionNotFound)):
            async with answering((status, {"code": code, "error": "no"})) as (url, asked), AsyncClient(url, retry=QUICK) as client:
                with pytest.raises(kind):
                    await client.advance("s", 4, ONE)
                assert len(asked) == 1

    run(case())


def test_what_may_have_happened_and_names_no_place_is_not_tried_elsewhere() -> None:
    async def case() -> None:
        async with answering(None) as (one, asked_one), answering(None) as (other, asked_other):
            for _ in range(4):
                async with AsyncClient([one, other], retry=QUICK) as client:
                    with pytest.raises(Unreachable, match="was lost"):
                        await client.open_session("m")
            assert len(asked_one) + len(asked_other) == 4
            async with AsyncClient([one, other], retry=Retry(0.1, 0.01, 0.05)) as client:
                with pytest.raises(Unreachable):
                    await client.advance("s", 0, ONE)
            assert min(len(asked_one), len(asked_other)) > 1

    run(case())


def test_steps_whose_answers_are_lost_are_answered_as_they_were(server: Server) -> None:
    frames = example_frames(CHANNELS, 60)

    async def case() -> list[Any]:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client:
            session = (await client.open_session("channels"))["session"]
            scores = []
            for first in range(0, 60, 3):
                if first % 2:
                    proxy.cut()  # the connection that would be used again
                    proxy.budget = 10  # the answer breaks off
                    asyncio.get_running_loop().call_later(0.05, setattr, proxy, "budget", None)
                scores.append((await client.advance(session, first, frames[first : first + 3], scores="all")).scores)
            assert proxy.connections > 20
            return scores

    np.testing.assert_array_equal(np.concatenate(run(case())), whole(server.url, "channels", frames))


# Real services on one store


def replica(stack: ExitStack, folder: Path, models: Path, name: str) -> Server:
    store = f"sqlite:///{folder / 'sessions.db'}"
    return stack.enter_context(running(models, folder / f"log-{name}", INDRNN_STORE=store, INDRNN_CHECKPOINT_MS="50", INDRNN_WATCH_S="0"))


def test_streams_and_steps_outlive_the_process_that_served_them(models: Path, tmp_path: Path) -> None:
    frames = [example_frames(CHANNELS, 150, seed) for seed in range(4)]

    async def camera(given: Any) -> AsyncIterator[Any]:
        for start in range(0, len(given), 3):
            await asyncio.sleep(0.02)
            yield given[start : start + 3]

    async def watch(stream: AsyncStream, given: Any) -> list[Answer]:
        async with stream:
            return [answer async for answer in stream.play(camera(given))]

    async def step(client: AsyncClient, given: Any) -> list[Any]:
        session = (await client.open_session("channels"))["session"]
        scores = []
        for start in range(0, len(given), 3):
            await asyncio.sleep(0.02)
            scores.append((await client.advance(session, start, given[start : start + 3], scores="all")).scores)
        return scores

    with ExitStack() as stack:
        servers = [replica(stack, tmp_path, models, name) for name in ("a", "b")]

        async def case() -> tuple[list[list[Answer]], list[Any]]:
            async with AsyncClient([server.url for server in servers]) as client, client.tracks("channels") as tracks:
                alone, together = [client.stream("channels") for _ in frames], [tracks.stream() for _ in frames]
                watching = asyncio.gather(*(watch(stream, given) for stream, given in zip(alone + together, frames * 2, strict=True)))
                stepping = asyncio.create_task(step(client, frames[0]))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(servers[0].stop, signal.SIGKILL)
                return await watching, await stepping

        watched, stepped = run(case())
        expected = [whole(servers[1].url, "channels", given) for given in frames]
    for answers, scores in zip(watched, expected * 2, strict=True):
        check(answers, scores)
    np.testing.assert_array_equal(np.concatenate(stepped), expected[0])


def test_streams_go_on_with_another_version_that_is_warm(tmp_path: Path) -> None:
    """One of two servers has version 1 alone, the other version 2: the first stops in the middle of a stream."""
    write_toy(tmp_path / "old", "channels", CHANNELS)
    write_toy(tmp_path / "new", "channels", dataclasses.replace(CHANNELS, seed=8), version="2")
    frames = example_frames(CHANNELS, 400)
    told: list[Notice] = []
    with ExitStack() as stack:
        old, new = (replica(stack, tmp_path, tmp_path / name, name) for name in ("old", "new"))
        before = whole(old.url, "channels", frames)

        async def case() -> list[Answer]:
            async with Proxy(old.url).serving() as proxy, AsyncClient(proxy.url) as client, client.stream("channels", on_notice=told.append) as stream:
                assert stream.version == "1"
                answers = []
                async for answer in stream.play(frames, chunk=2):
                    answers.append(answer)
                    if answer.frame == 301:
                        proxy.target = new.url
                        await asyncio.to_thread(old.stop)
                assert stream.version == "2"
                return answers

        answers = run(case())
        after = whole(new.url, "channels", frames)
    assert [answer.frame for answer in answers] == list(range(400))
    (changed,) = [notice for notice in told if isinstance(notice, ModelChanged)]
    assert [answer.frame for answer in answers if answer.changed] == [changed.frame]
    assert changed.version == "2"
    assert changed.frame - changed.warm_from >= 256
    scores = np.stack([answer.scores for answer in answers if answer.scores is not None])
    np.testing.assert_array_equal(scores[: changed.frame], before[: changed.frame])
    np.testing.assert_allclose(scores[changed.frame :], after[changed.frame :], atol=1e-3)
    assert np.abs(before - after)[changed.frame :].max() > 0.05  # it is another model
