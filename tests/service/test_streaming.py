"""The websocket against a real server process."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from service import protocol
from tests.server_process import Server
from tests.toy_models import CHANNELS, SKELETON, example_frames

CLIP = example_frames(CHANNELS, 150, seed=11)
CUTS = (1, 7, 30, 31, 64, 65, 110, 150)


def stream_url(server: Server, query: str = "scores=all", model: str = "channels") -> str:
    return f"{server.ws}/v1/models/{model}/stream?{query}"


def receive(socket: ClientConnection) -> Any:
    message = socket.recv(timeout=60)
    return json.loads(message) if isinstance(message, str) else message


def step(socket: ClientConnection, first: int, frames: np.ndarray) -> Any:
    socket.send(protocol.write_frames(first, frames))
    return receive(socket)


def ack(socket: ClientConnection, first: int) -> None:
    socket.send(json.dumps({"type": "ack", "first": first}))


def closed_with(socket: ClientConnection) -> int | None:
    with pytest.raises(ConnectionClosed):
        socket.recv(timeout=60)
    return socket.close_code


def clip_scores(http: httpx.Client) -> Any:
    return http.post("/v1/models/channels/predict?scores=all", json={"frames": CLIP.tolist()}).json()["scores"]


def test_a_clip_over_rest_and_over_both_is_the_same_with_32_streams_beside(http: httpx.Client, server: Server) -> None:
    """Clip = REST chunks = uneven websocket chunks, cut and resumed in the middle over either, bit for bit."""

    async def beside(number: int, stop: asyncio.Event) -> None:
        frames = example_frames(CHANNELS, 20, seed=number)
        async with connect_async(stream_url(server, "scores=last&answers=binary")) as socket:
            await socket.recv()
            at = 0
            while not stop.is_set():
                count = 1 + (at + number) % 5
                await socket.send(protocol.write_frames(at, frames[:count]))
                await socket.recv()
                at += count
                await socket.send(protocol.HEADER.pack(1, 3, 0, 0, at))
            await socket.send('{"type": "close"}')
            assert json.loads(await socket.recv())["type"] == "closed"

    async def with_streams_beside() -> tuple[Any, Any, Any]:
        stop = asyncio.Event()
        streams = [asyncio.create_task(beside(number, stop)) for number in range(32)]
        try:
            return await asyncio.gather(
                *(asyncio.to_thread(run) for run in (lambda: clip_scores(http), lambda: rest_chunks(server), lambda: cut_and_resumed(server)))
            )
        finally:
            stop.set()
            await asyncio.gather(*streams)

    quiet = clip_scores(http)
    for scores in asyncio.run(with_streams_beside()):
        assert scores == quiet


def rest_chunks(server: Server) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        session = http.post("/v1/models/channels/sessions").json()["session"]
        scores = []
        for first, end in zip((0, *CUTS), CUTS, strict=False):
            answer = http.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": first, "frames": CLIP[first:end].tolist(), "ack": first})
            scores += answer.raise_for_status().json()["scores"]
        assert http.delete(f"/v1/sessions/{session}").json() == {"closed": True, "next_frame": 150}
    return scores


def cut_and_resumed(server: Server) -> Any:
    with connect(stream_url(server)) as socket:
        session = receive(socket)["session"]
        scores = step(socket, 0, CLIP[:7])["scores"] + step(socket, 7, CLIP[7:30])["scores"]
        ack(socket, 7)
        socket.send(protocol.write_frames(30, CLIP[30:33]))  # its answer is not awaited
        socket.socket.close()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        at = settled(http, session, (30, 33))
        answer = http.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": 30, "frames": CLIP[30:40].tolist()})
        assert at in (30, 33)
        scores += answer.raise_for_status().json()["scores"]
    with connect(stream_url(server, f"session={session}&ack=30")) as socket:
        opened, kept = receive(socket), receive(socket)
        assert (opened["next_frame"], kept["first"], kept["count"]) == (40, 30, 10)
        assert kept["scores"] == scores[30:40]
        ack(socket, 40)
        for first, end in zip((40, 41, 64, 101), (41, 64, 101, 150), strict=True):
            scores += step(socket, first, CLIP[first:end])["scores"]
            ack(socket, end)
        socket.send('{"type": "close"}')
        assert receive(socket) == {"type": "closed", "track": 0, "next_frame": 150}
        assert closed_with(socket) == 1000
    return scores


def settled(http: httpx.Client, session: str, places: tuple[int, ...]) -> int:
    """Waits until the server has noticed that the socket is gone."""
    for _ in range(500):
        facts = http.get(f"/v1/sessions/{session}").json()
        if not facts["streaming"]:
            break
        time.sleep(0.02)
    assert facts["next_frame"] in places
    return int(facts["next_frame"])


def test_json_and_binary_answers_are_the_same(server: Server) -> None:
    with connect(stream_url(server)) as one, connect(stream_url(server, "scores=all&answers=binary")) as other:
        receive(one), receive(other)
        one.send(json.dumps({"type": "frames", "first": 0, "frames": CLIP[:5].tolist()}))
        scores = np.array(receive(one)["scores"], np.float32)
        data = step(other, 0, CLIP[:5])
        assert protocol.HEADER.unpack_from(data) == (1, 2, 0, 5, 0)
        assert data[16:] == scores.tobytes()


def test_opened_says_what_is_in_force(server: Server) -> None:
    with connect(stream_url(server, "")) as socket:
        socket.send(json.dumps({"type": "open", "top_k": 1, "scores": "last"}))
        opened = receive(socket)
        assert opened["type"] == "opened"
        assert (opened["next_frame"], opened["window"], opened["frame_shape"], opened["version"]) == (0, 64, [3], "10")
        assert opened["options"] == {"layout": None, "fps": 30.0, "scores": "last", "answers": "json", "top_k": 1, "events": False}
        assert opened["limits"]["message_bytes"] == 2**20
        answer = step(socket, 0, CLIP[:2])
        assert (answer["type"], answer["track"], answer["frame"], len(answer["top"]), len(answer["scores"])) == ("scores", 0, 1, 1, 4)


def test_a_layout_is_fixed_at_open(server: Server) -> None:
    with connect(stream_url(server, "layout=kinect-v2", "skeleton")) as socket:
        opened = receive(socket)
        assert opened["frame_shape"] == [25, 3]
        assert "not verified for endless streams" in opened["warning"]
        assert step(socket, 0, np.zeros((1, 25, 3), np.float32))["count"] == 1
    with connect(stream_url(server, f"layout=body-13&session={opened['session']}", "skeleton")) as socket:
        assert receive(socket)["code"] == "malformed"
        assert closed_with(socket) == 4400
    assert SKELETON.layout == "body-13"


def test_the_later_socket_takes_over(server: Server) -> None:
    with connect(stream_url(server)) as first:
        session = receive(first)["session"]
        step(first, 0, CLIP[:5])
        with connect(stream_url(server, f"session={session}&ack=5")) as second:
            assert receive(second)["next_frame"] == 5
            error = receive(first)
            assert (error["code"], error["next_frame"]) == ("taken_over", 5)
            assert closed_with(first) == 4409
            assert step(second, 5, CLIP[5:6])["first"] == 5


def test_a_socket_is_told_when_its_session_is_closed_over_rest(http: httpx.Client, server: Server) -> None:
    with connect(stream_url(server)) as socket:
        session = receive(socket)["session"]
        assert step(socket, 0, CLIP[:3])["count"] == 3
        http.delete(f"/v1/sessions/{session}").raise_for_status()
        assert receive(socket)["code"] == "session_not_found"
        assert closed_with(socket) == 4404


def test_resuming_sends_again_what_was_not_acknowledged(server: Server) -> None:
    with connect(stream_url(server)) as socket:
        session = receive(socket)["session"]
        scores = step(socket, 0, CLIP[:40])["scores"] + step(socket, 40, CLIP[40:60])["scores"]
        ack(socket, 20)
        step(socket, 60, CLIP[60:61])
    with connect(stream_url(server, f"session={session}&ack=10")) as socket:
        receive(socket)
        warning, kept = receive(socket), receive(socket)
        assert (warning["type"], warning["code"], warning["first"], warning["kept_from"]) == ("warning", "answers_forgotten", 10, 20)
        assert (kept["first"], kept["count"]) == (20, 41)
        assert kept["scores"][:40] == scores[20:60]


def test_a_reset_has_its_place_in_the_order(http: httpx.Client, server: Server) -> None:
    with connect(stream_url(server)) as socket:
        receive(socket)
        socket.send(protocol.write_frames(0, CLIP[50:55]))
        socket.send(json.dumps({"type": "reset", "at": 5}))
        socket.send(protocol.write_frames(5, CLIP[:5]))
        receive(socket)
        assert receive(socket)["scores"] == clip_scores(http)[:5]


def test_what_comes_before_a_fault_is_answered_first(server: Server) -> None:
    with connect(stream_url(server)) as socket:
        receive(socket)
        for first in range(10):
            socket.send(protocol.write_frames(first, CLIP[first : first + 1]))
        socket.send("{")
        assert [receive(socket)["first"] for _ in range(10)] == list(range(10))
        assert receive(socket)["code"] == "malformed"
        assert closed_with(socket) == 4400


@pytest.mark.parametrize("scores", ["all", "last"])
def test_messages_that_pile_up_are_answered_one_by_one(http: httpx.Client, server: Server, scores: str) -> None:
    """They run together, which must not show: neither in their answers nor where one of them is at fault."""
    whole = clip_scores(http)
    with connect(stream_url(server, f"scores={scores}")) as socket:
        session = receive(socket)["session"]
        ends = [0, 1, 3, 4, 5, 10, 11, 12, 20, 21]
        for first, end in itertools.pairwise(ends):
            socket.send(protocol.write_frames(first, CLIP[first:end]))
        socket.send(protocol.write_frames(21, np.full((1, 3), np.nan, np.float32)))
        for first, end in itertools.pairwise(ends):
            answer = receive(socket)
            assert (answer["first"], answer["count"]) == (first, end - first)
            assert answer["scores"] == (whole[first:end] if scores == "all" else whole[end - 1])
        assert receive(socket)["code"] == "not_finite"
        assert closed_with(socket) == 4422
    assert http.get(f"/v1/sessions/{session}").json()["next_frame"] == 21


def test_a_client_that_acknowledges_nothing_is_not_read_beyond_its_window(http: httpx.Client, server: Server) -> None:
    with connect(stream_url(server)) as socket:
        session = receive(socket)["session"]
        for first in range(100):
            socket.send(protocol.write_frames(first, CLIP[first : first + 1]))
        assert [receive(socket)["first"] for _ in range(64)] == list(range(64))
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.3)
        assert http.get(f"/v1/sessions/{session}").json()["next_frame"] == 64
        ack(socket, 64)
        assert [receive(socket)["first"] for _ in range(36)] == list(range(64, 100))


def test_a_message_waits_while_it_would_push_out_answers_that_are_not_acknowledged(http: httpx.Client, server: Server) -> None:
    with connect(stream_url(server)) as socket:
        session = receive(socket)["session"]
        for first in (0, 40):
            socket.send(protocol.write_frames(first, CLIP[first : first + 40]))
        assert receive(socket)["count"] == 40
        ack(socket, 10)
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.3)
        assert http.get(f"/v1/sessions/{session}").json()["next_frame"] == 40
        ack(socket, 16)
        assert receive(socket)["first"] == 40


def test_a_client_that_reads_nothing_holds_up_itself_alone(http: httpx.Client, server: Server) -> None:
    """Its answers pile up to the window, then its socket is not read; other streams go on."""
    with connect(stream_url(server), max_queue=1, close_timeout=0.5) as slow, connect(stream_url(server)) as other:
        session = receive(slow)["session"]
        receive(other)
        for first in range(2000):
            try:
                slow.socket.settimeout(0.2)
                slow.send(protocol.write_frames(first, CLIP[:1]))
            except (TimeoutError, ConnectionClosed):
                break
        assert step(other, 0, CLIP[:1])["first"] == 0
        assert http.get(f"/v1/sessions/{session}").json()["next_frame"] <= 64


def test_an_overrun_window_is_explained(server: Server) -> None:
    with connect(stream_url(server)) as socket:
        receive(socket)
        for first in range(140):
            socket.send(protocol.write_frames(first, CLIP[:1]))
        for _ in range(64):
            receive(socket)
        assert receive(socket)["code"] == "too_many"
        assert closed_with(socket) == 4429


def test_tracks_of_a_connection_are_streams_of_their_own(http: httpx.Client, server: Server) -> None:
    """Three people: one leaves, one errs, one is left on a connection that stays open; and all of them the same bits as their clip."""
    whole = clip_scores(http)
    with connect(stream_url(server, "")) as socket:
        sessions = {}
        for track in (0, 1, 65535):
            socket.send(json.dumps({"type": "open", "track": track, "scores": "all"}))
            opened = receive(socket)
            assert (opened["type"], opened["track"], opened["next_frame"]) == ("opened", track, 0)
            sessions[track] = opened["session"]
        scores: dict[int, list[Any]] = {track: [] for track in sessions}
        for first, end in itertools.pairwise((0, 5, 12, 40)):
            for track in sessions:
                socket.send(protocol.write_frames(first, CLIP[first:end], track))
            for _ in sessions:
                answer = receive(socket)
                assert answer["first"] == first
                scores[answer["track"]] += answer["scores"]
        assert scores == dict.fromkeys(sessions, whole[:40])
        socket.send(json.dumps({"type": "close", "track": 0}))
        assert receive(socket) == {"type": "closed", "track": 0, "next_frame": 40}
        socket.send(protocol.write_frames(50, CLIP[50:51], 1))
        error = receive(socket)
        assert (error["track"], error["code"], error["next_frame"]) == (1, "gap", 40)
        assert step_of(socket, 65535, 40)["scores"] == whole[40:41]
        assert [http.get(f"/v1/sessions/{session}").status_code for session in sessions.values()] == [404, 200, 200]
        with connect(stream_url(server, f"session={sessions[1]}&ack=40")) as other:  # picked up elsewhere, over a connection of its own
            assert receive(other)["next_frame"] == 40
            assert step(other, 40, CLIP[40:41])["scores"] == whole[40:41]
        socket.send(json.dumps({"type": "close", "track": 65535}))
        assert receive(socket)["type"] == "closed"
        socket.send(json.dumps({"type": "open", "track": 1, "session": sessions[1], "ack": 41}))
        assert receive(socket)["next_frame"] == 41, "nobody was left, and the connection stayed"


def step_of(socket: ClientConnection, track: int, first: int) -> Any:
    socket.send(protocol.write_frames(first, CLIP[first : first + 1], track))
    return receive(socket)
