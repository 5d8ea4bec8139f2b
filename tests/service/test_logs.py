"""Log lines of a real server: each with the ids of what it belongs to, none with a session's own id."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from service import protocol
from service.sessions import digest
from tests.server_process import Server
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 6)


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.errors().splitlines()]


def work(server: Server) -> tuple[str, str, httpx.Response]:
    """A step over REST and one over a websocket; the ids of both sessions, and the answer to the first."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        session = http.post("/v1/models/channels/sessions").json()["session"]
        answer = http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP.tolist()})
        http.post("/v1/models/channels/predict?version=9", json={"frames": CLIP.tolist()}).raise_for_status()
    with connect(f"{server.ws}/v1/models/channels/stream?scores=last") as stream:
        streamed = json.loads(stream.recv(timeout=60))["session"]
        stream.send(protocol.write_frames(0, CLIP))
        stream.recv(timeout=60)
    return session, streamed, answer


def test_lines_have_the_ids_of_their_request_and_session(start: Callable[..., Any]) -> None:
    with start("--log-level", "debug") as server:
        session, streamed, answer = work(server)
        assert server.stop() == 0
        found = lines(server)
        assert session not in server.errors()
        assert streamed not in server.errors()
    (step,) = [line for line in found if line["event"] == "request" and line["route"] == "/v1/sessions/{session_id}/frames"]
    assert (step["request"], step["session"], step["status"]) == (answer.headers["x-request-id"], digest(session), 200)
    assert step["level"] == "debug"
    assert step["ms"] > 0
    (clip,) = [line for line in found if line.get("route") == "/v1/models/{name}/predict"]
    assert (clip["model"], clip["version"]) == ("channels", "9")
    assert "session" not in clip
    assert len({line["request"] for line in found if line["event"] == "request"}) == 3
    assert [line["event"] for line in found if line.get("session") == digest(session)] == ["session opened", "request", "request", "session ended"]


def test_a_websocket_has_an_id_as_well(start: Callable[..., Any]) -> None:
    with start("--log-level", "debug") as server:
        _, streamed, _ = work(server)
        assert server.stop() == 0
        found = [line for line in lines(server) if line.get("session") == digest(streamed)]
    assert [line["event"] for line in found] == ["session opened", "stream attached", "stream detached", "session ended"]
    assert len({line["request"] for line in found[:3]}) == 1
    assert [line.get("track") for line in found[:3]] == [0, 0, 0]
    assert found[2]["next_frame"] == 6


def test_tracks_of_one_websocket_share_its_id_and_have_their_numbers(start: Callable[..., Any]) -> None:
    with start("--log-level", "debug") as server:
        with connect(f"{server.ws}/v1/models/channels/stream") as stream:
            sessions = []
            for track in (1, 2):
                stream.send(json.dumps({"type": "open", "track": track}))
                sessions.append(json.loads(stream.recv(timeout=60))["session"])
        assert server.stop() == 0
        found = [[line for line in lines(server) if line.get("session") == digest(session)] for session in sessions]
    for number, of_track in enumerate(found, start=1):
        assert [line["event"] for line in of_track] == ["session opened", "stream attached", "stream detached", "session ended"]
        assert {line["track"] for line in of_track[:3]} == {number}
    assert len({line["request"] for of_track in found for line in of_track[:3]}) == 1


@pytest.mark.parametrize("level", ["info", "warning"])
def test_work_that_goes_well_says_nothing(start: Callable[..., Any], level: str) -> None:
    with start("--log-level", level) as server:
        before = server.errors()
        work(server)
        assert server.errors() == before
