"""The process: how it starts, refuses to start, guards itself and ends."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from service import protocol
from tests.server_process import ROOT, Server
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 20)


def refuse(*options: str, **environment: str) -> str:
    """Runs a service that must not start and returns what it says."""
    command = [sys.executable, "-W", "error", "-m", "service", *options]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "", **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end(start: Callable[..., Any], number: int) -> None:
    with (
        start() as server,
        connect(f"{server.ws}/v1/models/channels/stream?scores=all") as stream,
        connect(f"{server.ws}/v1/models/channels/stream") as waiting,
    ):
        stream.recv(timeout=60)
        stream.send(protocol.write_frames(0, CLIP))
        assert json.loads(stream.recv(timeout=60))["type"] == "scores"
        assert server.stop(number) == 0
        draining = json.loads(stream.recv(timeout=60))
        assert (draining["type"], draining["code"], draining["retry_after"]) == ("draining", "draining", 5)
        with pytest.raises(ConnectionClosed):
            stream.recv(timeout=60)
        assert stream.close_code == 1013
        assert json.loads(waiting.recv(timeout=60))["type"] == "draining"
        assert "Traceback" not in server.errors()
        assert "Error" not in server.errors()


def test_who_comes_while_the_last_work_is_done_is_told_that_it_is_not_ready(start: Callable[..., Any]) -> None:
    clip = example_frames(CHANNELS, 400_000, seed=3).astype("<f4").tobytes()
    with start("--deadline-s", "60", INDRNN_DRAIN_S="30") as server, ThreadPoolExecutor() as pool:
        headers = {"content-type": "application/octet-stream"}
        long = pool.submit(httpx.post, f"{server.url}/v1/models/channels/predict", content=clip, headers=headers, timeout=60)
        while not httpx.get(f"{server.url}/v1/models/channels").json()["live"]["waiting"]:
            assert not long.done()
        server.process.send_signal(signal.SIGTERM)
        answers = []
        while not long.done():
            try:
                answers.append(httpx.get(f"{server.url}/health/ready"))
            except httpx.HTTPError:  # the socket closes at last
                break
        assert long.result().status_code == 200, "work under way is finished"
        assert server.process.wait(30) == 0
    codes = [answer.json().get("code", answer.json().get("status")) for answer in answers]
    assert "draining" in codes
    assert set(codes[codes.index("draining") :]) == {"draining"}
    assert {answer.status_code for answer in answers[codes.index("draining") :]} == {503}


def test_the_token_is_asked_for(start: Callable[..., Any]) -> None:
    with start(INDRNN_TOKEN="open sesame", INDRNN_MANAGEMENT_TOKEN="master key!") as server:
        _rest_tokens(server)
        _websocket_tokens(server)
        assert "sesame" not in server.errors()


def _rest_tokens(server: Server) -> None:
    right, manager = {"authorization": "Bearer open sesame"}, {"authorization": "Bearer master key!"}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for headers in ({}, {"authorization": "Bearer open"}, {"authorization": "Basic open sesame"}):
            answer = http.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["code"], answer.headers["www-authenticate"]) == (401, "unauthenticated", "Bearer")
        assert http.get("/v1/models?token=open%20sesame").status_code == 401
        for path in ("/docs", "/openapi.json", "/metrics", "/", "/nothing"):
            assert http.get(path).status_code == 401
        assert http.get("/health/live").status_code == 200
        assert http.get("/health/ready").json() == {"status": "ready"}
        assert "models" in http.get("/health/ready", headers=right).json()
        session = http.post("/v1/models/channels/sessions", headers=right).json()["session"]
        assert http.get("/v1/sessions", headers=right).json()["code"] == "forbidden"
        listed = http.get("/v1/sessions", headers=manager).json()["sessions"]
        assert session not in json.dumps(listed)
        assert http.delete(f"/v1/sessions/{listed[0]['digest']}", headers=right).status_code == 404
        assert http.delete(f"/v1/sessions/{listed[0]['digest']}", headers=manager).status_code == 200


def _websocket_tokens(server: Server) -> None:
    url = f"{server.ws}/v1/models/channels/stream?scores=all"
    with connect(url) as stream:
        assert json.loads(stream.recv(timeout=60))["code"] == "unauthenticated"
        with pytest.raises(ConnectionClosed):
            stream.recv(timeout=60)
        assert stream.close_code == 4401
    with connect(url, additional_headers={"Authorization": "Bearer open sesame"}) as stream:
        assert json.loads(stream.recv(timeout=60))["type"] == "opened"
    hidden = base64.urlsafe_b64encode(b"open sesame").decode().rstrip("=")
    with connect(url, subprotocols=["indrnn", f"indrnn.token.{hidden}"]) as stream:  # type: ignore[list-item]
        assert stream.subprotocol == "indrnn"
        assert json.loads(stream.recv(timeout=60))["type"] == "opened"


def test_limits_of_sessions_and_sockets(start: Callable[..., Any]) -> None:
    with start("--sessions", "2", "--connections", "1") as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(2):
            assert http.post("/v1/models/channels/sessions").status_code == 201
        answer = http.post("/v1/models/channels/sessions")
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (429, "too_many", "5")
        with connect(f"{server.ws}/v1/models/channels/stream"), connect(f"{server.ws}/v1/models/channels/stream") as second:
            assert json.loads(second.recv(timeout=60))["code"] == "too_many"
            with pytest.raises(ConnectionClosed):
                second.recv(timeout=60)
            assert second.close_code == 4429


def test_an_overloaded_service_says_so(start: Callable[..., Any]) -> None:
    clip = example_frames(CHANNELS, 100_000).tobytes()

    async def flood(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            posts = [http.post("/v1/models/channels/predict", content=clip, headers={"content-type": "application/octet-stream"}) for _ in range(6)]
            return await asyncio.gather(*posts)

    with start("--queue", "1") as server:
        answers = asyncio.run(flood(server.url))
        codes = [answer.json().get("code", "fine") for answer in answers]
        assert "overloaded" in codes
        assert "fine" in codes
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.headers["retry-after"] == "1"


def test_a_message_that_waits_too_long(start: Callable[..., Any]) -> None:
    clip = example_frames(CHANNELS, 1_000_000).tobytes()
    with start("--deadline-s", "0.05") as server, httpx.Client(base_url=server.url, timeout=60) as http:
        answer = http.post("/v1/models/channels/predict", content=clip, headers={"content-type": "application/octet-stream"})
        assert (answer.status_code, answer.json()["code"]) == (408, "deadline")
        assert http.post("/v1/models/channels/predict", json={"frames": [[0, 0, 0]]}).status_code in (200, 408)


def _half_a_request(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    half = socket.create_connection((host, int(port)), timeout=60)
    half.sendall(b'POST /v1/models/channels/predict HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{"frames"')
    return half


def test_a_request_that_never_ends_does_not_hold_up_the_end(start: Callable[..., Any]) -> None:
    with start(INDRNN_DRAIN_S="0.5") as server, _half_a_request(server) as half:
        httpx.get(f"{server.url}/health/live").raise_for_status()
        assert server.stop() == 0
        answer = half.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"draining"' in answer
        assert "Traceback" not in server.errors()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure(start: Callable[..., Any]) -> None:
    with start() as server:
        with _half_a_request(server):
            httpx.get(f"{server.url}/health/live").raise_for_status()
        httpx.get(f"{server.url}/health/live").raise_for_status()
        assert server.stop() == 0
        assert "failed" not in server.errors()


def test_what_stops_the_start(models: Path, tmp_path: Path) -> None:
    given = ("--models", str(models))
    assert refuse(*given, INDRNN_PROT="80").startswith("error: unknown setting INDRNN_PROT; did you mean INDRNN_PORT?")
    assert refuse(*given, INDRNN_PORT="eighty").startswith("error: INDRNN_PORT: ")
    assert refuse(*given, "--workers", "2").startswith("error: --workers: only 1 is possible")
    assert refuse("--models", str(tmp_path / "nowhere")).endswith("nowhere does not exist")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert refuse(*given, "--port", port) == f"error: port {port} on 127.0.0.1 is taken; choose another with --port or INDRNN_PORT"


def test_cuda_that_cannot_run_stops_the_start(models: Path) -> None:
    from service.engine import cuda_obstacle

    if not cuda_obstacle():
        pytest.skip("CUDA runs here")
    said = refuse("--models", str(models), "--device", "cuda")
    assert said.startswith("error: device cuda cannot run: ")
    assert cuda_obstacle() in said
