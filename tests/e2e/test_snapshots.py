"""Sessions put away by one server process and taken up by another: over REST and websocket, by the Python client, refused where they must be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.client import Client
from service.errors import FingerprintMismatch, Forbidden, SessionExpired
from tests import toy_models
from tests.server_process import Server, running
from tests.toy_models import CHANNELS, GAPPY_GESTURES, moving_frames

TOKEN = "only for managers"
MANAGER = {"authorization": f"Bearer {TOKEN}"}
OCTETS = {"content-type": "application/octet-stream"}
FRAMES = moving_frames(GAPPY_GESTURES, 120, seed=1)
FRAMES[5:100:9, 2] = np.nan
JITTER = np.cumsum(np.random.default_rng(6).uniform(0.02, 0.08, 120)) + 1.7e9
JSON: list[Any] = [[None if value != value else value for value in frame] for frame in FRAMES.tolist()]
URL = "/v1/models/gestures/sessions"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    toy_models.write_toy(directory, "gestures", GAPPY_GESTURES)
    toy_models.write_toy(directory, "channels", CHANNELS)
    return directory


@pytest.fixture(scope="module")
def servers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """One where management is off, and one where it is on and bodies are small."""
    logs = tmp_path_factory.mktemp("logs")
    changes = {"INDRNN_MANAGEMENT_TOKEN": TOKEN, "INDRNN_BODY_BYTES": "20000"}
    with running(models, logs / "one", "--deadline-s", "60") as one, running(models, logs / "other", "--deadline-s", "60", **changes) as other:
        yield one, other


@pytest.fixture
def one(servers: tuple[Server, Server]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=servers[0].url, timeout=60) as client:
        yield client


@pytest.fixture
def other(servers: tuple[Server, Server]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=servers[1].url, timeout=60, headers=MANAGER) as client:
        yield client


def opened(http: httpx.Client, **options: Any) -> str:
    session: str = http.post(URL, json={"scores": "all", **options}).raise_for_status().json()["session"]
    return session


def step(http: httpx.Client, session: str, first: int, end: int, timed: bool = False) -> Any:
    t = {"t": JITTER[first:end].tolist()} if timed else {}
    return http.post(f"/v1/sessions/{session}/frames", json={"first": first, "frames": JSON[first:end], **t}).raise_for_status().json()


def saved(http: httpx.Client, session: str) -> bytes:
    answer = http.get(f"/v1/sessions/{session}/state").raise_for_status()
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["cache-control"] == "no-store"
    return answer.content


def refused(http: httpx.Client, data: bytes, status: int, code: str, url: str = URL) -> Any:
    before = http.get("/metrics").text
    answer = http.post(url, content=data, headers=OCTETS)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    live = [line for line in before.splitlines() if line.startswith("indrnn_sessions_live")]
    assert [line for line in http.get("/metrics").text.splitlines() if line.startswith("indrnn_sessions_live")] == live
    return answer.json()


@pytest.mark.parametrize(
    ("options", "timed"), [({}, False), ({"fps": 60}, False), ({"fps": 10, "top_k": 2}, False), ({}, True)], ids=["plain", "fast", "slow", "timed"]
)
@pytest.mark.parametrize("cut", [1, 47, 90])
def test_in_a_fresh_process_it_goes_on_with_the_same_bits(one: httpx.Client, other: httpx.Client, options: Any, timed: bool, cut: int) -> None:
    session = opened(one, **options)
    step(one, session, 0, cut, timed)
    data = saved(one, session)
    facts = one.get(f"/v1/sessions/{session}").json()
    answer = other.post(URL, content=data, headers=OCTETS)
    assert answer.status_code == 201, answer.text
    restored = answer.json()
    assert answer.headers["location"] == f"/v1/sessions/{restored['session']}"
    assert restored["session"] != session
    assert (restored["next_frame"], restored["options"], facts["epoch"]) == (cut, facts["options"], 0)
    there = other.get(f"/v1/sessions/{restored['session']}").json()
    assert (there["created"], there["kept_from"], there["open_event"], there["epoch"]) == (facts["created"], facts["kept_from"], facts["open_event"], 1)
    low = max(facts["kept_from"], cut - 20)
    for at, end in [(low, cut), (cut, 100), (95, 120)]:  # kept answers, new ones, and both
        assert step(other, restored["session"], at, end, timed) == step(one, session, at, end, timed)
    resets = [http.post(f"/v1/sessions/{name}/reset", json={"at": 120}).json() for http, name in ((one, session), (other, restored["session"]))]
    assert resets[0] == resets[1]
    assert saved(one, session) != data


def test_the_python_client_and_a_websocket_go_on(servers: tuple[Server, Server]) -> None:
    with Client(servers[0].url) as here, Client(servers[1].url, token=TOKEN) as there:
        with here.stream("gestures") as stream:
            expected = list(stream.play(FRAMES))
            assert here.touch_session(stream.session) is None  # its connection keeps it alive
        stream = here.stream("gestures").open()
        answers = list(stream.play(FRAMES[:50], chunk=7))
        record = here.save_session(stream.session)
        stream.close()
        opened = there.restore_session("gestures", record)
        assert opened["next_frame"] == 50
        assert 0 < (there.touch_session(opened["session"]) or 0) <= 600
        with there.stream("gestures", session=opened["session"], ack=50) as stream:
            answers += stream.play(FRAMES[50:], chunk=9)
        assert [answer.frame for answer in answers] == list(range(120))
        assert all(one.scores.tobytes() == two.scores.tobytes() and one.events == two.events for one, two in zip(answers, expected, strict=True))  # type: ignore[union-attr]
        assert sum(len(answer.events) for answer in answers) > 3
        with pytest.raises(Forbidden, match="management is off"):
            here.restore_session("gestures", record)
        with pytest.raises(FingerprintMismatch):
            there.restore_session("channels", record)


def test_only_managers_bring_records_in(one: httpx.Client, other: httpx.Client, servers: tuple[Server, Server]) -> None:
    data = saved(one, opened(one))
    refused(one, data, 403, "forbidden")
    with httpx.Client(base_url=servers[1].url, timeout=60) as anybody:
        refused(anybody, data, 403, "forbidden")
        assert anybody.get(f"/v1/sessions/{opened(anybody)}/state").status_code == 200  # whoever has the id has the session


def test_bad_records_are_refused_by_name(one: httpx.Client, other: httpx.Client) -> None:
    session = opened(one)
    step(one, session, 0, 60)
    data = saved(one, session)
    value = refused(other, data, 409, "fingerprint_mismatch", "/v1/models/channels/sessions")
    assert set(value["served"]) == {"1"}
    refused(other, data, 409, "fingerprint_mismatch", "/v1/models/channels/sessions?version=1")
    refused(other, data, 404, "model_not_found", "/v1/models/nobody/sessions")
    refused(other, data, 404, "model_not_found", f"{URL}?version=2")
    assert "top_k" not in refused(other, data, 400, "malformed", f"{URL}?top_k=3")["error"]
    for bad in (b"", b"{}", data[:-1], data + b"\0", data[: len(data) // 2], bytes(len(data))):
        refused(other, bad, 400, "malformed")
    for place in range(0, len(data), 97):
        refused(other, data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :], 400, "malformed")
    assert refused(other, data[:4] + b"\1" + data[5:], 400, "malformed")["formats"] == [2]
    refused(other, data + bytes(20_001), 413, "too_large")
    assert other.post(URL, content=data, headers=OCTETS).status_code == 201  # as it is, it is good


def test_nobody_elses_session_is_put_away(one: httpx.Client) -> None:
    assert one.get("/v1/sessions/nobody/state").json()["code"] == "session_not_found"
    assert one.post("/v1/sessions/nobody/touch").json()["code"] == "session_not_found"


def _touch_to_the_end(client: Client, session: str) -> None:
    for _ in range(100):
        client.touch_session(session)
        time.sleep(0.2)


def test_touching_keeps_a_session_alive_until_its_age_and_so_does_a_websocket(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path / "log", "--idle-s", "1", INDRNN_AGE_S="4") as server, Client(server.url) as client:
        silent = client.stream("channels").open()  # a websocket on which nothing is said
        touched, left = (client.open_session("channels")["session"] for _ in range(2))
        began = time.monotonic()
        while time.monotonic() < began + 3.4:  # far longer than it may be idle
            left_s = client.touch_session(touched)
            assert left_s is not None
            assert left_s <= 1
            time.sleep(0.2)
        assert [answer.frame for answer in silent.play(np.zeros((2, 3), np.float32))] == [0, 1]
        silent.close()
        with pytest.raises(SessionExpired, match="at the age of 4 s"):
            _touch_to_the_end(client, touched)
        assert time.monotonic() - began > 3.5
        with pytest.raises(SessionExpired, match="after 1 s without a message"):
            client.session(left)
        with httpx.Client(base_url=server.url) as http:
            ended = [line for line in http.get("/metrics").text.splitlines() if line.startswith("indrnn_sessions_ended_total{")]
        assert sorted(line.split('cause="')[1].split('"')[0] for line in ended) == ["aged", "closed", "expired"]
        assert all(line.endswith(" 1.0") for line in ended)


def test_the_api_page_tells_of_records(one: httpx.Client) -> None:
    paths = one.get("/openapi.json").json()["paths"]
    state = paths["/v1/sessions/{session_id}/state"]["get"]
    assert set(state["responses"]["200"]["content"]) == {"application/octet-stream"}
    assert set(paths["/v1/models/{name}/sessions"]["post"]["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert {"403", "409", "413"} <= set(paths["/v1/models/{name}/sessions"]["post"]["responses"])
    assert "post" in paths["/v1/sessions/{session_id}/touch"]
