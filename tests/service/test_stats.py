"""The page for people, of a real server and as text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from service import protocol
from service.stats import _duration, as_text
from tests.server_process import Server
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 6)


def work(server: Server, http: httpx.Client) -> None:
    """Two sessions, one of which ends; a clip, a refusal; and a websocket that is open no more."""
    for _ in range(2):
        session = http.post("/v1/models/channels/sessions").json()["session"]
        http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP.tolist()}).raise_for_status()
    http.delete(f"/v1/sessions/{session}").raise_for_status()
    http.post("/v1/models/channels/predict?version=9", json={"frames": CLIP.tolist()}).raise_for_status()
    assert http.get("/v1/models/nothing").status_code == 404
    with connect(f"{server.ws}/v1/models/channels/stream?scores=last") as stream:
        stream.recv(timeout=60)
        stream.send(protocol.write_frames(0, CLIP))
        stream.recv(timeout=60)
        assert http.get("/v1/stats").json()["sockets"] == 1


def test_the_page_tells_what_was_done(start: Callable[..., Any]) -> None:
    with start("--sessions", "3") as server, httpx.Client(base_url=server.url, timeout=60) as http:
        began = time.monotonic()
        work(server, http)
        for _ in range(2):
            http.post("/v1/models/channels/sessions")
        took_s = time.monotonic() - began
        value = http.get("/v1/stats").json()
        assert value["uptime_s"] > 0
        assert value["memory_bytes"] > 10 * 2**20
        assert value["requests_per_s_10s"] > 0
        assert value["sessions"] == {"live": 3, "opened": 4, "refused": 1, "ended": {"closed": 1}}
        assert value["errors"] == {"model_not_found": 1, "too_many": 1}
        models = {(model["name"], model["version"]): model for model in value["models"]}
        streamed, clip, idle = models["channels", "10"], models["channels", "9"], models["gappy", "1"]
        assert (streamed["device"], streamed["provider"], streamed["sessions"]) == ("cpu", "CPUExecutionProvider", 3)
        assert (streamed["frames"], clip["frames"], idle["frames"]) == (18, 6, 0)
        assert 0 < streamed["frames_per_s_10s"] <= 18 / min(took_s, 10) + 0.01, "over the time since the start, which was before the first of them"
        assert 0 < streamed["wait_p50_ms"] <= streamed["wait_p99_ms"]
        assert 0 < streamed["latency_p50_ms"] <= streamed["latency_p99_ms"]
        assert streamed["latency_p99_ms"] >= streamed["wait_p99_ms"] / 1.2  # within what buckets tell
        assert (streamed["batch_rows"], streamed["padding"]) == (1, 1)
        assert streamed["memory_bytes"] > 0
        assert streamed["state_bytes"] > 0
        assert streamed["load_s"] > 0
        assert (idle["latency_p99_ms"], idle["batch_rows"], idle["padding"], idle["frames_per_s_1min"]) == (None, None, None, 0)


def test_as_text_for_a_terminal(server: Server, http: httpx.Client) -> None:
    http.post("/v1/models/channels/predict", json={"frames": CLIP.tolist()}).raise_for_status()
    answer = http.get("/v1/stats", headers={"accept": "text/plain"})
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert lines[0].startswith("up ")
    (row,) = [line.split() for line in lines if line.startswith("channels") and line.split()[1] == "10"]
    assert row[2] == "cpu"
    assert len(row) == 13
    assert float(row[7]) > 0
    for accept in ("*/*", "application/json", "text/html"):
        assert http.get("/v1/stats", headers={"accept": accept}).headers["content-type"] == "application/json"


def test_rates_fall_when_nothing_is_done(start: Callable[..., Any]) -> None:
    with start() as server, httpx.Client(base_url=server.url, timeout=60) as http:
        http.post("/v1/models/channels/predict", json={"frames": CLIP.tolist()}).raise_for_status()

        def rate() -> float:
            (model,) = [model for model in http.get("/v1/stats").json()["models"] if (model["name"], model["version"]) == ("channels", "10")]
            return float(model["frames_per_s_1min"])

        first = rate()
        time.sleep(0.5)
        assert 0 < rate() < first


def test_the_page_is_behind_the_token(start: Callable[..., Any]) -> None:
    with start(INDRNN_TOKEN="open sesame") as server:
        assert httpx.get(f"{server.url}/v1/stats", timeout=60).status_code == 401
        assert httpx.get(f"{server.url}/v1/stats", headers={"authorization": "Bearer open sesame"}, timeout=60).status_code == 200


def test_the_table_is_in_columns() -> None:
    model = {
        "name": "m", "version": "1", "device": "cpu", "sessions": 3, "waiting": 0, "frames_per_s_10s": 90.25, "frames_per_s_1min": 15.0,
        "latency_p50_ms": 0.5, "latency_p99_ms": 12.25, "wait_p50_ms": None, "wait_p99_ms": None, "batch_rows": 2.5, "padding": 1.0,
    }  # fmt: skip
    value = {
        "uptime_s": 3725.0, "draining": True, "memory_bytes": 300 * 2**20, "sockets": 2, "requests_per_s_10s": 1.5, "requests_per_s_1min": 0.5,
        "sessions": {"live": 3, "opened": 7, "refused": 0, "ended": {"expired": 1, "closed": 3}}, "errors": {}, "models": [model, {**model, "name": "longer"}],
    }  # fmt: skip
    assert as_text(value) == (
        "up 1 h 2 min, draining, memory 300 MiB, websockets 2, requests 1.5/s (0.5/s over 1 min)\n"
        "sessions: 3 live, 7 opened, 0 refused, ended: 3 closed, 1 expired\n"
        "errors: none\n"
        "\n"
        "model   version  device  sessions  waiting  frames/s  (1 min)  p50 ms  p99 ms  wait p50  wait p99  batch  padding\n"
        "m       1        cpu            3        0     90.25     15.0     0.5   12.25         -         -    2.5      1.0\n"
        "longer  1        cpu            3        0     90.25     15.0     0.5   12.25         -         -    2.5      1.0\n"
    )
    assert json.dumps(value)


@pytest.mark.parametrize(("seconds", "spoken"), [(5.4, "5 s"), (65, "1 min 5 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min"), (100_000, "1 d 3 h")])
def test_durations_are_spoken(seconds: float, spoken: str) -> None:
    assert _duration(seconds) == spoken
