"""Events and time through a real server process: over REST and websocket, in every form of answer, cut, repeated, resumed and reset."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from service import protocol
from tests import toy_models
from tests.server_process import Server, running
from tests.toy_models import CHANNELS, GESTURES, moving_frames

CLIP = moving_frames(GESTURES, 120, seed=21)
JITTER = np.cumsum(np.random.default_rng(6).uniform(0.02, 0.08, 120)) + 1.7e9
NAMES = ("event", "label", "score", "frame", "decided", "time")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    toy_models.write_toy(models, "gestures", GESTURES)
    toy_models.write_toy(models, "channels", CHANNELS)
    with running(models, tmp_path_factory.mktemp("server") / "log", "--deadline-s", "60") as started:
        yield started


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def clip(http: httpx.Client, query: str = "", **fields: Any) -> Any:
    answer = http.post(f"/v1/models/gestures/predict?scores=all&{query}", json={"frames": CLIP.tolist(), **fields})
    return answer.raise_for_status().json()


def stream(server: Server, query: str) -> ClientConnection:
    return connect(f"{server.ws}/v1/models/gestures/stream?{query}")


def receive(socket: ClientConnection) -> Any:
    message = socket.recv(timeout=60)
    return json.loads(message) if isinstance(message, str) else message


def play(socket: ClientConnection, first: int, end: int, chunk: int, events: list[Any], t: npt.NDArray[np.float64] | None = None) -> list[Any]:
    """Sends frames, as binary messages or, with times, as text, and returns the answers.

    Before each answer `events` that its frames decide must come, and nothing else: one too many would be taken for the answer.
    """
    answers = []
    for at in range(first, end, chunk):
        frames = CLIP[at : min(at + chunk, end)]
        if t is None:
            socket.send(protocol.write_frames(at, frames))
        else:
            socket.send(json.dumps({"type": "frames", "first": at, "frames": frames.tolist(), "t": t[at : at + len(frames)].tolist()}))
        follow(socket, [event for event in events if at <= event["decided"] < at + len(frames)])
        answers.append(receive(socket))
        socket.send(json.dumps({"type": "ack", "first": at}))  # one message late: there is something to resume
    return answers


def follow(socket: ClientConnection, events: list[Any]) -> None:
    """These events come next."""
    for event in events:
        assert receive(socket) == {"type": "event", "track": 0, **event}


def close(socket: ClientConnection) -> None:
    """Nothing else has come."""
    socket.send('{"type": "close"}')
    assert receive(socket)["type"] == "closed"


@pytest.mark.parametrize("fps", [30.0, 20.0, 75.0])
@pytest.mark.parametrize("answers", ["json", "binary"])
def test_a_stream_tells_what_the_clip_tells(http: httpx.Client, server: Server, fps: float, answers: str) -> None:
    whole = clip(http, f"fps={fps}")
    assert {event["event"] for event in whole["events"]} == {"start", "end"}
    assert {tuple(event) for event in whole["events"]} == {NAMES}
    assert all(event["time"] == round(event["frame"] / fps, 6) for event in whole["events"])
    with stream(server, f"fps={fps}&answers={answers}&scores=all") as socket:
        assert receive(socket)["options"] == {"layout": None, "fps": fps, "scores": "all", "answers": answers, "top_k": 5, "events": True}
        told = play(socket, 0, 120, 7, whole["events"])
        close(socket)
    if answers == "json":
        assert "events" not in told[0]
        assert told[-1]["time"] == whole["time"]
        scores = np.concatenate([np.array(answer["scores"], np.float32) for answer in told])
    else:
        scores = np.concatenate([np.frombuffer(data, "<f4", offset=16).reshape(-1, 4) for data in told])
    np.testing.assert_array_equal(scores, np.array(whole["scores"], np.float32))


def test_each_event_comes_with_the_answer_of_the_frame_that_decided_it(http: httpx.Client, server: Server) -> None:
    whole = clip(http)
    least = GESTURES.events.least  # type: ignore[union-attr]
    assert any(event["event"] == "start" and event["decided"] == event["frame"] + least - 1 for event in whole["events"])
    with stream(server, "scores=none") as socket:
        receive(socket)
        assert [answer["frame"] for answer in play(socket, 0, 120, 1, whole["events"])] == list(range(120))
        close(socket)


@pytest.mark.parametrize("scores", ["all", "last"])
@pytest.mark.parametrize("timed", [False, True])
def test_messages_that_pile_up_are_told_apart(http: httpx.Client, server: Server, scores: str, timed: bool) -> None:
    """They run together, which must not show: each has its own answer, time and events."""
    whole = clip(http, "fps=20", **({"t": JITTER.tolist()} if timed else {}))
    cuts = [*range(0, 60, 3), 60]
    with stream(server, f"fps=20&scores={scores}") as socket:
        receive(socket)
        for first, end in itertools.pairwise(cuts):
            message = {"type": "frames", "first": first, "frames": CLIP[first:end].tolist()}
            socket.send(json.dumps({**message, "t": JITTER[first:end].tolist()} if timed else message))
        for first, end in itertools.pairwise(cuts):
            follow(socket, [event for event in whole["events"] if first <= event["decided"] < end])
            answer = receive(socket)
            assert (answer["first"], answer["count"]) == (first, end - first)
            assert answer["scores"] == (whole["scores"][first:end] if scores == "all" else whole["scores"][end - 1])
            assert answer["time"] == (pytest.approx(JITTER[end - 1] - JITTER[0], abs=1e-6) if timed else round((end - 1) / 20, 6))
        close(socket)


def test_a_camera_that_does_not_keep_its_rate(http: httpx.Client, server: Server) -> None:
    whole = clip(http, t=JITTER.tolist())
    assert whole["time"] == pytest.approx(JITTER[-1] - JITTER[0], abs=1e-6)
    assert all(event["time"] == pytest.approx(JITTER[event["frame"]] - JITTER[0], abs=1e-6) for event in whole["events"])
    even = clip(http, "fps=20")
    assert whole["scores"] != even["scores"]
    with stream(server, "scores=all") as socket:
        receive(socket)
        told = play(socket, 0, 120, 11, whole["events"], JITTER)
        close(socket)
        assert [scores for answer in told for scores in answer["scores"]] == whole["scores"]
        assert told[3]["time"] == pytest.approx(JITTER[43] - JITTER[0], abs=1e-6)
    session = http.post("/v1/models/gestures/sessions?scores=all").json()["session"]
    scores: list[Any] = []
    for at in range(0, 120, 13):
        body = {"first": at, "frames": CLIP[at : at + 13].tolist(), "t": JITTER[at : at + 13].tolist(), "ack": at}
        scores += http.post(f"/v1/sessions/{session}/frames", json=body).raise_for_status().json()["scores"]
    assert scores == whole["scores"]


def test_times_that_do_not_go_on_are_refused_and_change_nothing(http: httpx.Client, server: Server) -> None:
    whole = clip(http, t=JITTER.tolist())
    session = http.post("/v1/models/gestures/sessions?scores=all").json()["session"]

    def send(at: int, end: int, t: list[float]) -> httpx.Response:
        return http.post(f"/v1/sessions/{session}/frames", json={"first": at, "frames": CLIP[at:end].tolist(), "t": t})

    assert send(0, 50, JITTER[:50].tolist()).status_code == 200
    for t, frame in (([JITTER[49], JITTER[50]], 50), ([JITTER[50], JITTER[50]], 51)):
        refused = send(50, 52, t)
        assert (refused.status_code, refused.json()["code"], refused.json()["frame"]) == (422, "wrong_time", frame)
    with stream(server, f"session={session}&ack=50&scores=all") as socket:
        receive(socket)
        socket.send(json.dumps({"type": "frames", "first": 50, "frames": CLIP[50:51].tolist(), "t": [1.0]}))
        assert receive(socket)["code"] == "wrong_time"
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
        assert socket.close_code == 4422
    assert send(50, 120, JITTER[50:].tolist()).json()["scores"] == whole["scores"][50:]


def test_a_repeat_and_a_resume_tell_the_same_events(http: httpx.Client, server: Server) -> None:
    whole = clip(http, "fps=20")
    end = whole["events"][1]["decided"] + 3
    ack = end - 10
    missed = [event for event in whole["events"] if ack <= event["decided"] < end]
    assert missed
    with stream(server, "fps=20&scores=all") as socket:
        session = receive(socket)["session"]
        play(socket, 0, ack, 10, whole["events"])
        play(socket, ack, end, 10, whole["events"])
        socket.send(protocol.write_frames(ack - 5, CLIP[ack - 5 : end]))  # again, though some of it is acknowledged
        assert receive(socket)["code"] == "answers_forgotten"
    with stream(server, f"session={session}&ack={ack}&fps=20&scores=all") as socket:
        assert receive(socket)["next_frame"] == end
        follow(socket, missed)
        assert receive(socket)["first"] == ack
        socket.send(protocol.write_frames(ack, CLIP[ack:end]))
        follow(socket, missed)
        assert receive(socket)["first"] == ack
        play(socket, end, end + 20, 10, whole["events"])
    body = {"first": end + 15, "frames": CLIP[end + 15 : end + 70].tolist()}  # some of it known, none acknowledged
    first, again = (http.post(f"/v1/sessions/{session}/frames", json=body).raise_for_status().json() for _ in range(2))
    assert first == again
    assert first["events"] == [event for event in whole["events"] if end + 15 <= event["decided"] < end + 70]


def later(event: Any, frames: int) -> Any:
    """The same event so many frames later, at 30 frames a second."""
    frame = event["frame"] + frames
    return {**event, "frame": frame, "decided": event["decided"] + frames, "time": round(frame / 30, 6)}


def test_a_reset_ends_what_is_open(http: httpx.Client, server: Server) -> None:
    """Over REST and websocket; what follows begins anew, and numbers and time go on."""
    start = next(event for event in clip(http)["events"] if event["event"] == "start")
    at = start["decided"] + 1
    fresh = http.post("/v1/models/gestures/predict?scores=all", json={"frames": CLIP[at:].tolist()}).json()
    with stream(server, "scores=all") as socket:
        session = receive(socket)["session"]
        play(socket, 0, at, at, [start])
        facts = http.get(f"/v1/sessions/{session}").json()
        assert facts["open_event"] == {"label": start["label"], "score": start["score"], "frame": start["frame"], "time": start["time"]}
        socket.send(json.dumps({"type": "reset", "at": at}))
        wanted = {"event": "end", "label": start["label"], "score": start["score"], "frame": at, "decided": at, "time": round(at / 30, 6), "cause": "reset"}
        follow(socket, [wanted])
        told = play(socket, at, 120, 30, [later(event, at) for event in fresh["events"]])
        assert [scores for answer in told for scores in answer["scores"]] == fresh["scores"]
        assert http.get(f"/v1/sessions/{session}").json()["reset_at"] == at
    session = http.post("/v1/models/gestures/sessions").json()["session"]
    http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP[:at].tolist()}).raise_for_status()
    for _ in range(2):
        assert http.post(f"/v1/sessions/{session}/reset", json={"at": at}).json() == {"next_frame": at, "reset_at": at, "events": [wanted]}
    assert http.get(f"/v1/sessions/{session}").json()["open_event"] is None


def test_events_are_an_option(http: httpx.Client, server: Server) -> None:
    assert "events" not in clip(http, "events=false")
    with stream(server, "events=false&scores=none") as socket:
        assert receive(socket)["options"]["events"] is False
        play(socket, 0, 120, 30, [])
        close(socket)
    answer = http.post("/v1/models/channels/predict", json={"frames": CLIP.tolist()}).json()
    assert "events" not in answer
    session = http.post("/v1/models/channels/sessions").json()["session"]
    for query, opens in (("events=true", False), (f"session={session}&events=true", True)):
        with connect(f"{server.ws}/v1/models/channels/stream?{query}") as socket:
            if opens:  # it may be resumed, but answers with events there are none
                assert receive(socket)["type"] == "opened"
                socket.send(protocol.write_frames(0, CLIP[:1]))
            assert receive(socket)["code"] == "no_events"
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=60)
            assert socket.close_code == 4422


def test_the_manifest_tells_the_rules_and_metrics_count(http: httpx.Client) -> None:
    rules = http.get("/v1/models/gestures").json()["manifest"]["events"]
    assert rules == {"nothing": "rest", "enter": 0.5, "leave": 0.4, "least": 3, "gap": 2, "pooled": False}

    def counted() -> float:
        (line,) = [line for line in http.get("/metrics").text.splitlines() if line.startswith('indrnn_events_total{model="gestures",version="1"}')]
        return float(line.split()[-1])

    before, told = counted(), 0
    told = len(clip(http)["events"])
    assert told > 0
    assert counted() == before + told


def test_the_api_page_describes_events_and_times(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    schemas = page["components"]["schemas"]
    assert tuple(schemas["EventBody"]["properties"])[:6] == NAMES
    assert {"events", "time"} <= set(schemas["AnswerBody"]["properties"])
    for path in ("/v1/models/{name}/predict", "/v1/sessions/{session_id}/frames"):
        assert "t" in page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
