"""The direct way through HTTP, byte by byte: whatever a connection does, it gets the answers that uvicorn's own way gives."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server_process import Server
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 40, seed=11)
JSON = "content-type: application/json\r\n"
RAW = "content-type: application/octet-stream\r\n"


@contextmanager
def connection(server: Server) -> Iterator[socket.socket]:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=20) as sock:
        yield sock


def request(path: str, body: bytes, headers: str = RAW, version: str = "1.1", length: bool = True) -> bytes:
    announced = f"content-length: {len(body)}\r\n" if length else ""
    return f"POST {path} HTTP/{version}\r\nhost: x\r\n{headers}{announced}\r\n".encode() + body


def step(url: str, first: int, count: int = 1, headers: str = RAW, version: str = "1.1") -> bytes:
    return request(f"{url}/frames?first={first}&scores=all", CLIP[first : first + count].tobytes(), headers, version)


def answers(sock: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    data, found = b"", []
    while len(found) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        if end:
            status, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            size = int(headers["content-length"])
            if len(rest) >= size:
                found.append((int(status.split()[1]), headers, rest[:size]))
                data = rest[size:]
                continue
        more = sock.recv(65536)
        assert more, f"the connection ended after {len(found)} answers, with {data!r}"
        data += more
    assert not data
    return found


def is_closed(sock: socket.socket) -> bool:
    return sock.recv(100) == b""


def session(http: httpx.Client) -> str:
    return str(http.post("/v1/models/channels/sessions").headers["location"])


def whole(http: httpx.Client) -> Any:
    return http.post("/v1/models/channels/predict?scores=all", content=CLIP.tobytes(), headers={"content-type": "application/octet-stream"}).json()["scores"]


def counted(http: httpx.Client, status: int) -> float:
    found = re.search(rf'indrnn_requests_total{{route="/v1/sessions/{{session_id}}/frames",status="{status}"}} (\S+)', http.get("/metrics").text)
    return float(found[1]) if found else 0.0


def test_requests_that_come_in_pieces_or_several_at_once(http: httpx.Client, server: Server) -> None:
    url, expected = session(http), whole(http)
    sent = b"".join(step(url, at) for at in range(12))
    with connection(server) as sock:
        for size in (1, 7, 50, 333, len(sent)):  # the last pieces hold many requests, which wait for each other
            sock.sendall(sent[:size])
            sent = sent[size:]
            time.sleep(0.005)
        got = answers(sock, 12)
    assert [status for status, _, _ in got] == [200] * 12
    assert [json.loads(body)["scores"][0] for _, _, body in got] == expected[:12]
    assert len({headers["x-request-id"] for _, headers, _ in got}) == 12


def test_requests_of_all_kinds_on_one_connection_are_answered_in_order(http: httpx.Client, server: Server) -> None:
    url, expected = session(http), whole(http)
    gap, nowhere = step(url, 30), request("/v1/nothing", b"")
    facts = f"GET {url} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    reset = request(f"{url}/reset", b'{"at": 3}', JSON)
    with connection(server) as sock:
        sock.sendall(step(url, 0) + gap + step(url, 1) + facts + step(url, 2) + nowhere + reset + step(url, 1, 3))
        got = answers(sock, 8)
    assert [status for status, _, _ in got] == [200, 409, 200, 200, 200, 404, 200, 200]
    assert json.loads(got[1][2])["code"] == "gap"
    assert json.loads(got[3][2])["next_frame"] == 2
    assert json.loads(got[7][2])["scores"][:2] == expected[1:3]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_that_is_to_be_closed_is(http: httpx.Client, server: Server, version: str) -> None:
    url = session(http)
    with connection(server) as sock:
        sock.sendall(step(url, 0, headers=RAW + ("connection: close\r\n" if version == "1.1" else ""), version=version))
        ((status, headers, _),) = answers(sock, 1)
        assert (status, headers["connection"]) == (200, "close")
        assert is_closed(sock)


def test_who_asks_before_sending_is_told_to_go_on(http: httpx.Client, server: Server) -> None:
    url = session(http)
    sent = step(url, 0, headers=RAW + "expect: 100-continue\r\n")
    head, _, body = sent.partition(b"\r\n\r\n")
    with connection(server) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert answers(sock, 1)[0][0] == 200


def test_chunked_bodies_and_long_ones(http: httpx.Client, server: Server) -> None:
    url = session(http)
    body = CLIP[:2].tobytes()
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:])) + b"0\r\n\r\n"
    long = request(f"{url}/frames?first=2&scores=last", np.zeros((6000, 3), np.float32).tobytes())
    with connection(server) as sock:
        sock.sendall(request(f"{url}/frames?first=0", chunked, RAW + "transfer-encoding: chunked\r\n", length=False) + long)
        got = answers(sock, 2)
    assert [(status, json.loads(data)["count"]) for status, _, data in got] == [(200, 2), (200, 6000)]


def test_a_client_that_leaves_inside_its_body_or_before_its_answer(http: httpx.Client, server: Server) -> None:
    url, left, done = session(http), counted(http, 499), counted(http, 200)
    with connection(server) as sock:
        sock.sendall(step(url, 0)[:-3])
        time.sleep(0.05)
    with connection(server) as sock:
        sock.sendall(step(url, 0))
    deadline = time.monotonic() + 10
    while (counted(http, 499), counted(http, 200)) != (left + 1, done + 1):
        assert time.monotonic() < deadline, (counted(http, 499) - left, counted(http, 200) - done)
        time.sleep(0.02)
    assert http.get(url).json()["next_frame"] == 1
    assert "Traceback" not in server.errors()


@pytest.mark.parametrize(("body", "code"), [(np.array([[0, np.nan, 1]], np.float32).tobytes(), "not_finite"), (b"1234567", "wrong_shape"), (b"", "empty")])
def test_frames_that_are_none_get_the_error_that_says_so(http: httpx.Client, server: Server, body: bytes, code: str) -> None:
    url = session(http)
    with connection(server) as sock:
        sock.sendall(request(f"{url}/frames?first=0", body) + step(url, 0))
        refused, taken = answers(sock, 2)
    assert (refused[0], json.loads(refused[2])["code"]) == (422, code)
    assert taken[0] == 200


def test_a_token_is_asked_for_on_this_way_too(start: Callable[..., Any]) -> None:
    with start(INDRNN_TOKEN="a secret") as server, httpx.Client(base_url=server.url) as http:
        right = {"authorization": "Bearer a secret"}
        url = http.post("/v1/models/channels/sessions", headers=right).headers["location"]
        with connection(server) as sock:
            sock.sendall(
                step(url, 0) + step(url, 0, headers=RAW + "Authorization: Bearer wrong\r\n") + step(url, 0, headers=RAW + "Authorization: bearer a secret\r\n")
            )
            assert [status for status, _, _ in answers(sock, 3)] == [401, 401, 200]


def test_at_a_stop_whole_requests_are_answered_and_others_told(start: Callable[..., Any]) -> None:
    with start("--deadline-s", "2", INDRNN_DRAIN_S="1") as server, httpx.Client(base_url=server.url) as http:
        url = session(http)
        with connection(server) as half, connection(server) as idle:
            idle.sendall(step(url, 0))
            assert answers(idle, 1)[0][0] == 200
            half.sendall(step(url, 1)[:-1])
            time.sleep(0.1)
            assert server.stop() == 0
            status, _, body = answers(half, 1)[0]
            assert (status, json.loads(body)["code"]) == (503, "draining")
            assert is_closed(idle)
    assert "Traceback" not in server.errors()


def test_whoever_listens_hears_of_every_request(start: Callable[..., Any]) -> None:
    with start("--log-level", "debug") as server, httpx.Client(base_url=server.url) as http:
        url = session(http)
        with connection(server) as sock:
            sock.sendall(step(url, 0))
            ((status, headers, _),) = answers(sock, 1)
        server.stop()  # a line is written after its answer
        lines = [json.loads(line) for line in server.errors().splitlines()]
    assert status == 200
    (heard,) = [line for line in lines if line["event"] == "request" and line["request"] == headers["x-request-id"]]
    assert (heard["route"], heard["status"]) == ("/v1/sessions/{session_id}/frames", 200)
