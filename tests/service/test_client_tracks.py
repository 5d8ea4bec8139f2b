"""Several streams on one connection: against a real server, through a proxy that cuts, and against a server that follows a script."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from service import errors, protocol
from service.client import Answer, AsyncClient, AsyncTracks, Client, Event, StreamClosed, Unreachable
from tests.service.conftest import Server
from tests.service.test_client import QUICK, Frames, Proxy, check, run, uneven, whole
from tests.service.test_client_stream import ONE, Peer, against
from tests.toy_models import CHANNELS, GESTURES, example_frames, moving_frames


def frames_of(person: int, count: int = 200) -> Frames:
    return example_frames(CHANNELS, count, seed=100 + person)


async def visit(tracks: AsyncTracks, person: int, count: int = 200) -> list[Answer]:
    """Somebody comes, is there for so many frames, and goes."""
    async with tracks.stream() as stream:
        return [answer async for answer in stream.play(uneven(frames_of(person, count)))]


def test_people_come_and_go_on_one_connection(server: Server) -> None:
    """Eight of them, four at a time; each gets the answers of its own clip."""

    async def case() -> list[list[Answer]]:
        places = asyncio.Semaphore(4)

        async def come(person: int, tracks: AsyncTracks) -> list[Answer]:
            async with places:
                return await visit(tracks, person, 50 + 20 * person)

        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client:
            async with client.tracks("channels") as tracks:
                answers = await asyncio.gather(*(come(person, tracks) for person in range(8)))
            assert proxy.connections == 1
            return answers

    for person, answers in enumerate(run(case())):
        check(answers, whole(server.url, "channels", frames_of(person, 50 + 20 * person)))


@pytest.mark.parametrize("every", [7, 64])
def test_tracks_come_back_together_and_every_answer_is_delivered_once(server: Server, every: int) -> None:
    async def case() -> tuple[list[list[Answer]], int]:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.tracks("channels") as tracks:
            count = 0

            async def watch(person: int) -> list[Answer]:
                nonlocal count
                answers = []
                async with tracks.stream() as stream:
                    async for answer in stream.play(uneven(frames_of(person))):
                        answers.append(answer)
                        count += 1
                        if count % every == 0:
                            proxy.cut()
                    assert stream.reconnects > 0
                return answers

            return await asyncio.gather(*(watch(person) for person in range(3))), proxy.connections

    everybody, connections = run(case())
    for person, answers in enumerate(everybody):
        check(answers, whole(server.url, "channels", frames_of(person)))
    assert connections > 1


def test_a_fault_ends_its_stream_alone(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client, client.tracks("channels") as tracks, tracks.stream() as good, tracks.stream() as bad:
            await bad.send(frames_of(0, 3))
            await bad.send([[0.1, np.inf, 0.2]])
            assert [(await anext(bad)).frame for _ in range(3)] == [0, 1, 2]
            with pytest.raises(errors.NotFinite) as caught:
                await anext(bad)
            assert caught.value.facts["frame"] == 3
            with pytest.raises(errors.LayoutUnknown):
                await tracks.stream(layout="horse").open()
            async with tracks.stream(session=bad.session) as again:
                assert again.next_frame == 3
                assert [answer.frame async for answer in again.play(frames_of(0, 2))] == [3, 4]
            assert len([answer async for answer in good.play(frames_of(1, 70))]) == 70
            assert good.reconnects == 0

    run(case())


def test_a_session_may_be_left_and_taken_up_again_while_others_stream(server: Server) -> None:
    frames = frames_of(5, 60)

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as client, client.tracks("channels") as tracks, tracks.stream() as other:
            first = await tracks.stream().open()
            answers = [answer async for answer in first.play(frames[:30])]
            await first.close(keep=True)
            assert len([answer async for answer in other.play(frames_of(6, 5))]) == 5  # the server has read what came before, too
            facts = await client.session(first.session)
            assert (facts["next_frame"], facts["streaming"]) == (30, False)
            async with tracks.stream(session=first.session) as second:
                return answers + [answer async for answer in second.play(frames[30:])]

    check(run(case()), whole(server.url, "channels", frames))


def test_a_stream_that_is_taken_over_leaves_the_others(server: Server) -> None:
    async def case() -> None:
        async with (
            AsyncClient(server.url) as client,
            client.tracks("channels") as tracks,
            tracks.stream() as mine,
            tracks.stream() as other,
            client.stream("channels", session=mine.session),
        ):
            with pytest.raises(errors.TakenOver):
                await anext(mine)
            assert len([answer async for answer in other.play(frames_of(2, 5))]) == 5

    run(case())


def test_what_is_left_open_ends_with_its_tracks(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client:
            async with client.tracks("channels") as tracks:
                streams = [await tracks.stream().open() for _ in range(3)]
                sessions = [stream.session for stream in streams]
                del streams[0]
                gc.collect()  # its task holds it
            for session in sessions:
                with pytest.raises(errors.SessionNotFound):
                    await client.session(session)
            with pytest.raises(StreamClosed):
                await tracks.stream().open()
            with pytest.raises(StreamClosed):
                await streams[0].send(ONE)
            with pytest.raises(StreamClosed, match="once"):
                await streams[0].open()

    run(case())


def test_tracks_that_nobody_opened_need_no_server() -> None:
    async def case() -> None:
        async with AsyncClient("http://127.0.0.1:9", retry=QUICK) as client, client.tracks("channels") as tracks:
            with pytest.raises(Unreachable):
                await tracks.stream().open()
            with pytest.raises(TypeError, match="unknown option 'layuot'"):
                tracks.stream(layuot="coco-17")  # type: ignore[call-arg]

    run(case())


def test_the_plain_client_has_tracks(server: Server) -> None:
    with Client(server.url) as client, client.tracks("channels") as tracks:
        people = [tracks.stream().open() for _ in range(3)]
        for frame in range(10):  # a camera: one frame of everybody, then everybody's answer
            for person, stream in enumerate(people):
                stream.send(frames_of(person, 10)[frame])
            answers = [next(stream) for stream in people]
            assert [answer.frame for answer in answers] == [frame] * 3
        people.pop().close()
        for person, stream in enumerate(people):
            expected = whole(server.url, "channels", np.concatenate([frames_of(person, 10), frames_of(9, 2)]))
            last = list(stream.play(frames_of(9, 2)))[-1]
            np.testing.assert_array_equal(last.scores, expected[-1])


# ---- events


def gestures_of(person: int) -> Frames:
    return moving_frames(GESTURES, 300, seed=40 + person)


def told(url: str, person: int) -> tuple[Event, ...]:
    """What the whole clip tells."""
    with Client(url) as client:
        events = client.predict("gestures", gestures_of(person)).events
    assert {event.event for event in events} == {"start", "end"}
    return events


@pytest.mark.parametrize("every", [10_000, 50])
def test_everybody_hears_of_their_own_events_once_however_often_the_connection_is_lost(server: Server, every: int) -> None:
    async def case() -> tuple[list[list[Event]], list[list[Answer]]]:
        heard: list[list[Event]] = [[], [], []]
        answers: list[list[Answer]] = [[], [], []]
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.tracks("gestures") as tracks:

            async def watch(person: int) -> None:
                async with tracks.stream(on_event=heard[person].append) as stream:
                    async for answer in stream.play(uneven(gestures_of(person))):
                        answers[person].append(answer)
                        if answer.frame % every == every - 1:
                            proxy.cut()

            await asyncio.gather(*(watch(person) for person in range(3)))
        return heard, answers

    for person, (events, answers) in enumerate(zip(*run(case()), strict=True)):
        assert tuple(events) == told(server.url, person)
        assert [event for answer in answers for event in answer.events] == events
        assert all(event.decided == answer.frame for answer in answers for event in answer.events)


def test_a_reset_ends_what_is_open_and_the_listener_hears_why(server: Server) -> None:
    opening = next(event for event in told(server.url, 0) if event.event == "start")
    heard: list[Event] = []
    with Client(server.url) as client, client.stream("gestures", on_event=heard.append) as stream:
        list(stream.play(gestures_of(0)[: opening.decided + 1]))
        stream.reset()
    assert heard[0] == opening
    (end,) = heard[1:]
    assert (end.event, end.label, end.frame, end.cause) == ("end", opening.label, opening.decided + 1, "reset")


# ---- against a script


class Room(Peer):
    """A connection of tracks as the script sees it."""

    async def opens(self, next_frame: int = 0) -> int:
        """Answers the next `open`, passing over frames of other tracks; its track."""
        while isinstance(message := await self.socket.recv(), bytes):
            pass
        wish: dict[str, Any] = json.loads(message)
        assert wish["type"] == "open", wish
        model = {"model": "m", "version": "1", "task": "classification", "classes": ["a", "b"], "frame_shape": (3,)}
        limits = {"limits": {"message_bytes": 1 << 20}, "options": {"fps": 30.0}}
        await self.say("opened", track=wish["track"], session=f"s{wish['track']}", next_frame=next_frame, window=8, **model, **limits)
        return int(wish["track"])

    async def told(self) -> tuple[Any, ...]:
        """The next message: (track, "frames" | "ack", first), (track, type, ...)."""
        message = await self.socket.recv()
        if isinstance(message, str):
            value = json.loads(message)
            return value["track"], value["type"], value.get("keep", False)
        _, kind, track, _, first = protocol.HEADER.unpack_from(message)
        return track, "frames" if kind == protocol.KIND_FRAMES else "ack", first

    async def scores(self, track: int, first: int) -> None:
        await self.socket.send(protocol.HEADER.pack(protocol.VERSION, protocol.KIND_SCORES, track, 1, first) + bytes(8))


async def farewells(room: Room) -> None:
    with suppress(ConnectionClosed):
        while True:
            track, kind, _ = await room.told()
            if kind == "close":
                await room.say("closed", track=track)


def test_a_passing_refusal_of_one_track_is_followed_by_another_on_the_same_connection() -> None:
    async def script(peer: Peer) -> None:
        room = Room(peer.socket)
        one, two = await room.opens(), await room.opens()
        assert 0 < one != two > 0
        assert await room.told() == (one, "frames", 0)
        await room.say("error", track=one, code="deadline", error="too slow")
        again = await room.opens()
        assert again not in (one, two)
        assert await room.told() == (again, "frames", 0)
        await room.scores(one, 0)  # for a track that is no more
        await room.scores(two, 0)  # nobody asked for that
        await room.scores(again, 0)
        await farewells(room)

    async def case(client: AsyncClient) -> None:
        async with client.tracks("m") as tracks, tracks.stream() as first, tracks.stream() as second:
            await first.send(ONE)
            assert (await anext(first)).frame == 0
            assert (first.reconnects, second.reconnects) == (1, 0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(first), 0.05)

    against([script], case)


def test_what_names_no_track_is_for_all_of_them() -> None:
    async def drained(peer: Peer) -> None:
        room = Room(peer.socket)
        await room.opens()
        await room.opens()
        assert {await room.told(), await room.told()} == {(1, "frames", 0), (2, "frames", 0)}
        await room.say("draining", code="draining", error="the service is shutting down", retry_after=0)
        await peer.socket.close(1013)

    async def after(peer: Peer) -> None:
        room = Room(peer.socket)
        await room.opens()
        await room.opens()
        await room.say("error", code="malformed", error="this server is out of its mind")
        await asyncio.gather(peer.socket.close(4400), farewells(room))

    async def case(client: AsyncClient) -> None:
        async with client.tracks("m") as tracks, tracks.stream() as first, tracks.stream() as second:
            await first.send(ONE)
            await second.send(ONE)
            for stream in (first, second):
                with pytest.raises(errors.Malformed, match="out of its mind"):
                    await anext(stream)
                assert stream.reconnects == 1

    against([drained, after], case)


def test_a_connection_that_is_refused_refuses_its_tracks() -> None:
    async def script(peer: Peer) -> None:
        await peer.socket.recv()
        await peer.say("error", track=0, code="forbidden", error="not from there")
        await peer.socket.close(4403)

    async def case(client: AsyncClient) -> None:
        async with client.tracks("m") as tracks:
            with pytest.raises(errors.Forbidden, match="not from there"):
                await tracks.stream().open()

    against([script], case)


def test_a_track_that_is_left_is_closed_and_its_session_kept() -> None:
    heard: list[tuple[Any, ...]] = []
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        room = Room(peer.socket)
        await room.opens()
        heard.append(await room.told())
        left.set()
        await room.say("closed", track=heard[0][0])
        await farewells(room)

    async def case(client: AsyncClient) -> None:
        async with client.tracks("m") as tracks:
            stream = await tracks.stream().open()
            await stream.close(keep=True)
            await left.wait()

    against([script], case)
    assert heard == [(1, "close", True)]
