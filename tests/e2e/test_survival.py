"""Streams outlive the process that serves them: two real processes on one store, one of them killed without warning, asked to stop, or overtaken."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from service import protocol
from tests import toy_models
from tests.server_process import Server, running
from tests.toy_models import CHANNELS, GAPPY_GESTURES, example_frames, moving_frames

CLIP = example_frames(CHANNELS, 300, seed=31)
MOVING = moving_frames(GAPPY_GESTURES, 200, seed=32)
STORE = {"INDRNN_CHECKPOINT_FRAMES": "8", "INDRNN_CHECKPOINT_MS": "50", "INDRNN_WATCH_S": "0"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    toy_models.write_toy(directory, "gestures", GAPPY_GESTURES)
    toy_models.write_toy(directory, "channels", CHANNELS)
    return directory


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts services on one store."""
    with ExitStack() as stack:

        def more(number: int, directory: Path = models, **changes: str) -> Server:
            environment = {**STORE, "INDRNN_STORE": f"sqlite://{tmp_path / 'sessions'}", **changes}
            return stack.enter_context(running(directory, tmp_path / f"log-{number}", "--deadline-s", "60", **environment))

        yield more


class Stream:
    """A client on bare websockets: every answer it hears by frame, and how far the server is sure."""

    def __init__(self, server: Server, model: str, session: str | None = None, ack: int | None = None, **options: Any) -> None:
        self.socket: ClientConnection = connect(f"{server.ws}/v1/models/{model}/stream", legacy=True)
        self.scores: dict[int, list[float]] = {}
        self.events: list[Any] = []
        self.warnings: list[Any] = []  # that came while something else was waited for
        self.durable = 0
        fields = {name: value for name, value in {"session": session, "ack": ack, **options}.items() if value is not None}
        self.socket.send(json.dumps({"type": "open", **fields}))
        self.opened = self.until("opened")
        self.session: str = self.opened["session"]

    def hear(self, timeout: float = 60) -> Any:
        message = json.loads(self.socket.recv(timeout=timeout))
        if message["type"] == "scores":
            for i, scores in enumerate(message["scores"]):
                assert message["first"] + i not in self.scores
                self.scores[message["first"] + i] = scores
        elif message["type"] == "durable":
            assert message["frame"] > self.durable
            self.durable = message["frame"]
        elif message["type"] == "event":
            self.events.append(message)
        elif message["type"] == "warning":
            self.warnings.append(message)
        return message

    def until(self, kind: str) -> Any:
        if kind == "warning" and self.warnings:
            return self.warnings.pop(0)
        while (message := self.hear())["type"] != kind:
            pass
        return self.warnings.pop() if kind == "warning" else message

    def send(self, frames: np.ndarray, first: int) -> None:
        self.socket.send(protocol.write_frames(first, frames))

    def step(self, clip: np.ndarray, begin: int, end: int, pace: int = 3) -> None:
        """Sends frames and hears their answers."""
        for first in range(begin, end, pace):
            self.send(clip[first : min(first + pace, end)], first)
            while min(first + pace, end) - 1 not in self.scores:
                self.hear()
            self.socket.send(json.dumps({"type": "ack", "first": min(first + pace, end)}))

    def wait_durable(self, frame: int) -> None:
        while self.durable < frame:
            self.hear()


def whole(server: Server, model: str, clip: np.ndarray) -> Any:
    answer = httpx.post(
        f"{server.url}/v1/models/{model}/predict?scores=all", content=clip.astype("<f4").tobytes(), headers={"content-type": "application/octet-stream"}
    )
    return answer.raise_for_status().json()["scores"]


def assert_same(scores: dict[int, list[float]], expected: Any) -> None:
    assert sorted(scores) == list(range(len(expected)))
    assert [scores[frame] for frame in range(len(expected))] == expected


def test_a_killed_process_loses_no_frame_of_a_stream(start: Any) -> None:
    one, other = start(1), start(2)
    before = Stream(one, "channels")
    assert before.opened["durability"] == "memory"
    before.step(CLIP, 0, 100)
    before.wait_durable(100)
    before.step(CLIP, 100, 150)
    one.process.kill()
    heard = dict(before.scores)
    after = Stream(other, "channels", before.session, ack=150)
    next_frame = after.opened["next_frame"]
    assert 100 <= before.durable <= next_frame <= 150
    after.step(CLIP, next_frame, 300)
    for frame in range(next_frame, 150):
        assert after.scores[frame] == heard[frame], "what is computed again is the same"
    assert_same({**heard, **after.scores}, whole(other, "channels", CLIP))


def test_answers_that_were_computed_and_never_delivered_come_from_the_record(start: Any) -> None:
    one, other = start(1), start(2)
    before = Stream(one, "channels")
    before.step(CLIP, 0, 30)
    before.send(CLIP[30:60], 30)
    before.wait_durable(60)  # saved; of the answers the client acknowledges none
    one.process.kill()
    after = Stream(other, "channels", before.session, ack=30)
    assert after.opened["next_frame"] == 60
    after.until("scores")
    assert sorted(after.scores) == list(range(30, 60))
    after.step(CLIP, 60, 90)
    assert_same({**{frame: before.scores[frame] for frame in range(30)}, **after.scores}, whole(other, "channels", CLIP[:90]))


def test_a_process_that_is_asked_to_stop_saves_everything_first(start: Any) -> None:
    one, other = start(1, INDRNN_CHECKPOINT_FRAMES="1000", INDRNN_CHECKPOINT_MS="30000"), start(2)
    streams = [Stream(one, "channels") for _ in range(5)]
    for stream in streams:
        stream.step(CLIP, 0, 40)
        assert stream.durable == 0
    one.process.send_signal(signal.SIGTERM)
    for stream in streams:
        stream.until("draining")
        with pytest.raises(ConnectionClosed):
            stream.hear()
        assert stream.socket.close_code == 1013
    assert one.process.wait(30) == 0
    for stream in streams:
        after = Stream(other, "channels", stream.session, ack=40)
        assert after.opened["next_frame"] == 40
        after.step(CLIP, 40, 60)
        assert_same({**stream.scores, **after.scores}, whole(other, "channels", CLIP[:60]))


def test_a_restart_on_one_machine_resumes_events_and_resampled_streams(start: Any) -> None:
    one = start(1)
    reference = Stream(one, "gestures", fps=17.0)
    reference.step(MOVING, 0, 200)
    before = Stream(one, "gestures", fps=17.0)
    before.step(MOVING, 0, 90)
    before.wait_durable(90)
    one.process.kill()
    one.process.wait(30)
    two = start(2)
    after = Stream(two, "gestures", before.session, ack=90)
    after.step(MOVING, 90, 200)
    assert {**before.scores, **after.scores} == reference.scores
    assert [{**event, "track": 0} for event in [*before.events, *after.events]] == reference.events


def test_whoever_was_overtaken_is_told_and_writes_no_more(start: Any) -> None:
    one, other = start(1), start(2)
    before = Stream(one, "channels")
    before.step(CLIP, 0, 30)
    before.wait_durable(30)
    after = Stream(other, "channels", before.session, ack=30)
    after.step(CLIP, 30, 60)
    before.send(CLIP[30:39], 30)  # the one before knows nothing yet: it answers, and is refused when it saves
    assert before.until("error")["code"] == "taken_over"
    with pytest.raises(ConnectionClosed):
        before.hear()
    assert before.socket.close_code == 4409
    after.step(CLIP, 60, 90)
    assert_same({**{frame: before.scores[frame] for frame in range(30)}, **after.scores}, whole(other, "channels", CLIP[:90]))
    back = Stream(one, "channels", before.session, ack=90)  # and back again, where a stale copy has been
    assert back.opened["next_frame"] in range(after.durable, 91)


def test_rest_steps_may_go_to_any_process(start: Any) -> None:
    servers = [start(1), start(2), start(3)]
    session = httpx.post(f"{servers[0].url}/v1/models/channels/sessions?scores=all", json={}).raise_for_status().json()["session"]
    scores: list[Any] = []
    for number, first in enumerate(range(0, 90, 3)):
        body = {"first": first, "frames": CLIP[first : first + 3].tolist()}
        server = servers[number % 3] if number % 7 else servers[0]
        answer = httpx.post(f"{server.url}/v1/sessions/{session}/frames?scores=all", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        scores += answer.json()["scores"]
        repeated = httpx.post(f"{servers[(number + 1) % 3].url}/v1/sessions/{session}/frames?scores=all", json=body, timeout=60)
        assert repeated.json()["scores"] == answer.json()["scores"]
    assert scores == whole(servers[0], "channels", CLIP[:90])
    servers[0].process.kill()
    facts = httpx.get(f"{servers[1].url}/v1/sessions/{session}").json()
    assert facts["next_frame"] == 90
    assert httpx.delete(f"{servers[2].url}/v1/sessions/{session}").status_code == 200
    time.sleep(0.2)
    assert httpx.get(f"{servers[1].url}/v1/sessions/{session}").status_code == 404


def test_sequences_may_go_to_any_process(start: Any) -> None:
    servers = [start(1), start(2)]

    def infer(server: Server, first: int, **parameters: Any) -> httpx.Response:
        frames = CLIP[first : first + 3]
        inputs = [{"name": "frames", "datatype": "FP32", "shape": [1, *frames.shape], "data": frames.ravel().tolist()}]
        return httpx.post(f"{server.url}/v2/models/channels/infer", json={"inputs": inputs, "parameters": {"sequence_id": 7, **parameters}}, timeout=60)

    for turn in range(2):  # the second time it is begun anew, by the process that did not have it last
        scores: list[float] = []
        for number, first in enumerate(range(0, 60, 3)):
            answer = infer(servers[(number + turn) % 2], first, sequence_start=first == 0, sequence_end=first == 57 and turn == 1)
            assert answer.status_code == 200, answer.text
            scores += answer.json()["outputs"][0]["data"]
        expected = whole(servers[0], "channels", CLIP[:60])
        np.testing.assert_array_equal(np.float32(scores).reshape(60, -1), np.float32(expected))
    assert infer(servers[0], 0).status_code in (400, 404)


def test_a_version_that_is_gone_is_told_and_the_next_is_warmed_up(start: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    toy_models.write_toy(old, "channels", CHANNELS, version="1")
    toy_models.write_toy(new, "channels", dataclasses.replace(CHANNELS, units=CHANNELS.units + 8), version="2")
    one, other = start(1, old), start(2, new)
    before = Stream(one, "channels")
    before.step(CLIP, 0, 60)
    before.wait_durable(60)
    one.process.kill()
    after = Stream(other, "channels", before.session, ack=60)
    changed = after.until("model_changed")
    assert (changed["frame"], changed["version"]) == (60, "2")
    assert changed["warm_from"] == max(0, 60 - after.opened["horizon"])
    after.step(CLIP, changed["warm_from"], 90)
    fresh = whole(other, "channels", CLIP[changed["warm_from"] : 90])
    assert [after.scores[frame] for frame in range(changed["warm_from"], 90)] == fresh
