"""The Open Inference Protocol as bytes on a socket: what clients other than Triton's may send, and what must never come back."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service import open_inference
from service.app import create_app
from service.catalog import Catalog
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import Settings
from tests import toy_models
from tests.server_process import Server
from tests.toy_models import CHANNELS, EXPLOSIVE, GESTURES, SKELETON, Toy, example_frames, moving_frames

CLIP = example_frames(CHANNELS, 20, seed=2)
INFER = "/v2/models/channels/infer"
LENGTH = "inference-header-content-length"


def described(frames: Any = CLIP[None], **changes: Any) -> dict[str, Any]:
    return {"name": "frames", "shape": list(frames.shape), "datatype": "FP32", "data": frames.ravel().tolist(), **changes}


def asking(frames: Any = CLIP[None], **parameters: Any) -> dict[str, Any]:
    return {"inputs": [described(frames)], **({"parameters": parameters} if parameters else {})}


def packed(frames: Any = CLIP[None], **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """A body of JSON and bytes, and its header."""
    tensor = {"name": "frames", "shape": list(frames.shape), "datatype": "FP32", "parameters": {"binary_data_size": frames.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}).encode()
    return head + frames.tobytes(), {LENGTH: str(len(head))}


def scores_of(answer: httpx.Response) -> Any:
    """(batch, time, classes) of an answer of either form."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get(LENGTH)
    value = json.loads(answer.content[: None if length is None else int(length)])
    [output] = value["outputs"]
    found = np.array(output["data"], np.float32) if length is None else np.frombuffer(answer.content[int(length) :], np.float32)
    return found.reshape(output["shape"])


def whole(http: httpx.Client, frames: Any = CLIP, model: str = "channels") -> Any:
    url = f"/v1/models/{model}/predict?scores=all&answers=binary"
    answer = http.post(url, content=frames.tobytes(), headers={"content-type": "application/octet-stream"})
    return np.frombuffer(answer.raise_for_status().content[16:], np.float32).reshape(len(frames), -1)


@pytest.mark.parametrize("kind", [None, "application/json", "application/octet-stream", "text/plain", "multipart/form-data"])
def test_the_content_type_means_nothing(http: httpx.Client, kind: str | None) -> None:
    expected = whole(http)[None].tobytes()
    headers = {} if kind is None else {"content-type": kind}
    content, length = packed()
    assert scores_of(http.post(INFER, content=json.dumps(asking()).encode(), headers=headers)).tobytes() == expected
    assert scores_of(http.post(INFER, content=content, headers={**headers, **length})).tobytes() == expected
    assert http.post("/v2/repository/index", content=b"", headers=headers).status_code == 200


@pytest.mark.parametrize(("model", "toy"), [("channels", CHANNELS), ("gestures", GESTURES), ("skeleton", SKELETON)])
@pytest.mark.parametrize("count", [1, 33, 150])
def test_the_bits_of_the_rest_api(http: httpx.Client, model: str, toy: Toy, count: int) -> None:
    frames = moving_frames(toy, count, seed=count)
    expected = whole(http, frames, model)
    content, length = packed(frames[None])
    for body, headers in ((json.dumps(asking(frames[None])).encode(), {}), (content, length)):
        assert scores_of(http.post(f"/v2/models/{model}/infer", content=body, headers=headers)).tobytes() == expected[None].tobytes()


def test_nested_lists_as_people_type_them(http: httpx.Client) -> None:
    answer = http.post(INFER, json={"inputs": [described(data=[CLIP.tolist()])]})
    assert scores_of(answer).tobytes() == whole(http)[None].tobytes()


@pytest.mark.parametrize("accepted", ["gzip, deflate, br", "br", "gzip;q=1.0", "*", "identity", None])
def test_only_who_asks_for_one_encoding_gets_it(http: httpx.Client, accepted: str | None) -> None:
    content, headers = packed()
    for path, options in ((INFER, {"content": content, "headers": headers}), ("/v2/repository/index", {})):
        request = http.build_request("POST", path, **options)  # type: ignore[arg-type]
        request.headers.pop("accept-encoding")
        if accepted is not None:
            request.headers["accept-encoding"] = accepted
        assert "content-encoding" not in http.send(request).headers


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_answers(http: httpx.Client, encoding: str) -> None:
    content, headers = packed()
    answer = http.post(INFER, content=content, headers={**headers, "accept-encoding": encoding})
    assert answer.headers["content-encoding"] == encoding
    assert scores_of(answer).tobytes() == whole(http)[None].tobytes()  # the header's length is that of the JSON before it was compressed
    refusal = http.post("/v2/models/nothing/infer", content=content, headers={**headers, "accept-encoding": encoding})
    assert "content-encoding" not in refusal.headers
    assert "content-encoding" not in http.get("/v2", headers={"accept-encoding": encoding}).headers


FAULTS: dict[str, tuple[Any, dict[str, str], int, str]] = {
    "nothing": (b"", {}, 400, "malformed"),
    "no JSON": (b"{", {}, 400, "malformed"),
    "truncated JSON": (json.dumps(asking()).encode()[:-20], {}, 400, "malformed"),
    "deep JSON": (b'{"inputs": ' + b"[" * 3000 + b"]" * 3000 + b"}", {}, 400, "malformed"),
    "NaN": (json.dumps(asking()).replace("0.", "NaN, 0.", 1).encode(), {}, 400, "malformed"),
    "no UTF-8": (b'{"id": "\xff"}', {}, 400, "malformed"),
    "an infinite number": ({"inputs": [described(np.zeros((1, 1, 3)), data=[1e300, 0, 0])]}, {}, 422, "not_finite"),
    "a number too large for a double": (
        b'{"inputs": [{"name": "frames", "shape": [1, 1, 3], "datatype": "FP32", "data": [1e999, 0, 0]}]}',
        {},
        422,
        "not_finite",
    ),
    "another datatype": ({"inputs": [described(datatype="FP64")]}, {}, 400, "malformed"),
    "another shape": (asking(np.zeros((1, 2, 4))), {}, 422, "wrong_shape"),
    "flat frames of the right size": (asking(np.zeros((1, 2, 3, 1))), {}, 422, "wrong_shape"),
    "no batch axis": (asking(np.zeros((2, 3))), {}, 422, "wrong_shape"),
    "no frames": (asking(np.zeros((1, 0, 3))), {}, 422, "empty"),
    "a batch of two": (asking(np.zeros((2, 1, 3))), {}, 400, "malformed"),
    "a missing value": ({"inputs": [described(np.zeros((1, 1, 3)), data=[0, None, 0])]}, {}, 422, "not_finite"),
    "short bytes": (packed()[0][:-1], packed()[1], 400, "malformed"),
    "long bytes": (packed()[0] + b"x", packed()[1], 400, "malformed"),
    "a negative header": (packed()[0], {LENGTH: "-1"}, 400, "malformed"),
    "a header of letters": (packed()[0], {LENGTH: "ten"}, 400, "malformed"),
    "a header beyond the body": (packed()[0], {LENGTH: "100000000"}, 400, "malformed"),
    "no header": (packed()[0], {}, 400, "malformed"),
    "too large": (b" " * 200_001, {}, 413, "too_large"),
    "too large inflated": (gzip.compress(b" " * 10_000_000), {"content-encoding": "gzip"}, 413, "too_large"),
    "not gzip": (json.dumps(asking()).encode(), {"content-encoding": "gzip"}, 400, "malformed"),
    "cut gzip": (gzip.compress(json.dumps(asking()).encode())[:-1], {"content-encoding": "gzip"}, 400, "malformed"),
    "unknown encoding": (json.dumps(asking()).encode(), {"content-encoding": "br"}, 415, "unknown_encoding"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_leave_the_sequence_as_it_was(http: httpx.Client, name: str) -> None:
    body, headers, status, code = FAULTS[name]
    sequence = {"sequence_id": f"fault {name}"}
    scores_of(http.post(INFER, json=asking(CLIP[None, :5], **sequence, sequence_start=True)))
    for change in ({}, {"sequence_start": True}, {"sequence_end": True}):
        if isinstance(body, dict):
            answer = http.post(INFER, json={**body, "parameters": {**sequence, **change}})
        else:
            answer = http.post(INFER, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert answer.json()["error"]
        assert "\n" not in answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"
    assert ("accept-encoding" in answer.headers) == (status == 415)
    rest = http.post(INFER, json=asking(CLIP[None, 5:], **sequence, sequence_end=True))
    assert scores_of(rest)[0].tobytes() == whole(http)[5:].tobytes()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "FP32", "scores", "\U0001f9ff"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "shape", "data", "sequence_id"]), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value inside a JSON value can be replaced."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


WHOLE = {
    "id": "a",
    "inputs": [described(CLIP[None, :2]), {"name": "lengths", "shape": [1], "datatype": "INT64", "data": [2]}],
    "outputs": [{"name": "scores", "parameters": {"binary_data": True, "classification": 2}}],
    "parameters": {"sequence_id": "any", "sequence_start": True, "sequence_end": True, "sequence_step": 0, "timeout": 10**7, "priority": 1},
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(places(WHOLE)[1:]), VALUES), min_size=1, max_size=2))
def test_whatever_is_sent_nothing_breaks(http: httpx.Client, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    body: Any = copy.deepcopy(WHOLE)
    for path, value in changes:
        inner = body
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
        except (TypeError, IndexError, KeyError):  # the change before has taken that place away
            continue
    answer = http.post(INFER, content=json.dumps(body).encode())
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]


STEPPED = st.lists(
    st.tuples(
        st.integers(0, 3),  # frames
        st.sampled_from([None, None, None, 0, 1, -2]),  # sequence_step, from the next one
        st.sampled_from(["", "", "", "bad", "wide", "tail", "id", "end", "start", "json", "9"]),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPPED)
def test_lean_requests_are_answered_as_others_are(http: httpx.Client, messages: list[tuple[int, int | None, str]]) -> None:
    """A timeout makes a request one that is read and run in the ordinary way, and changes nothing else."""
    answers: list[list[Any]] = []
    for timeout in ({}, {"timeout": 50_000_000}):
        http.post(INFER, json=asking(CLIP[None, :1], sequence_id="lean", sequence_start=True))
        answers.append([])
        at = 1
        for count, off, kind in messages:
            clip = CLIP[None, at : at + count].copy()
            if kind == "bad" and count:
                clip[0, -1, 0] = np.nan
            clip = clip[..., :2] if kind == "wide" else clip
            parameters: dict[str, Any] = {"sequence_id": "lean", **timeout, **({} if off is None else {"sequence_step": at + off})}
            parameters |= {"sequence_end": True} if kind == "end" else {"sequence_start": True} if kind == "start" else {}
            described = {"name": "frames", "shape": list(clip.shape), "datatype": "FP32", "parameters": {"binary_data_size": clip.nbytes}}
            wanted = {"name": "scores", "parameters": {"binary_data": kind != "json"}}
            head = json.dumps({"inputs": [described], "outputs": [wanted], "parameters": parameters, **({"id": "x"} if kind == "id" else {})}).encode()
            url = INFER.replace("/infer", "/versions/9/infer") if kind == "9" else INFER
            answer = http.post(url, content=head + clip.tobytes() + (b"x" if kind == "tail" else b""), headers={LENGTH: str(len(head))})
            answers[-1].append((answer.status_code, answer.content, answer.headers.get(LENGTH), answer.headers["content-type"]))
            if answer.status_code == 200 and not (off or 0) < 0:
                at = count if kind == "start" and off is None else at + count
    assert answers[0] == answers[1]


def test_too_large_without_saying_so(http: httpx.Client) -> None:
    answer = http.post(INFER, content=(b" " * 1200 for _ in range(300)))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_legal_but_extreme_frames(http: httpx.Client) -> None:
    url, extreme = "/v2/models/explosive/infer", np.array([[[1e6, 1e6], [-1e6, 1e6]]])
    for parameters in ({}, {"sequence_id": "extreme", "sequence_start": True}):
        answer = http.post(url, json=asking(extreme, **parameters))
        assert (answer.status_code, answer.json()["code"]) == (422, "diverged")
    both = np.concatenate([example_frames(EXPLOSIVE, 2)[None], extreme])
    assert http.post(url, json=asking(both)).json()["error"].startswith("clip 1: ")
    assert http.post(url, json=asking(extreme, sequence_id="extreme")).json()["code"] == "sequence_not_found"


FRAMEWORK: list[tuple[str, str, int, str]] = [
    ("GET", "/v2/nothing", 404, "not_found"),
    ("GET", "/v2/models/", 404, "not_found"),
    ("GET", "/v2/models/channels/", 404, "not_found"),
    ("GET", INFER, 405, "method_not_allowed"),
    ("PUT", "/v2", 405, "method_not_allowed"),
    ("GET", "/v2/repository/index", 405, "method_not_allowed"),
    ("GET", "/v2/models/nothing", 404, "model_not_found"),
    ("GET", "/v2/models/channels/versions/2", 404, "model_not_found"),
    ("GET", "/v2/models/channels/versions/2/stats", 404, "model_not_found"),
    ("GET", "/v2/models/wrong/ready", 503, "model_not_ready"),
    ("POST", "/v2/models/bare/infer", 503, "model_not_ready"),
    ("GET", "/v2/systemsharedmemory/status", 501, "not_supported"),
    ("POST", "/v2/cudasharedmemory/region/a/register", 501, "not_supported"),
    ("GET", "/v2/trace/setting", 501, "not_supported"),
    ("GET", "/v2/models/channels/trace/setting", 501, "not_supported"),
    ("POST", "/v2/logging", 501, "not_supported"),
    ("POST", "/v2/models/channels/generate", 501, "not_supported"),
    ("POST", "/v2/models/channels/versions/1/generate_stream", 501, "not_supported"),
    ("POST", "/v2/repository/models/channels/load", 403, "forbidden"),
    ("POST", "/v2/repository/models/channels/unload", 403, "forbidden"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), FRAMEWORK)
def test_every_refusal_says_why(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert isinstance(answer.json()["error"], str)


def test_a_slash_behind_the_servers_path(http: httpx.Client) -> None:
    assert http.get("/v2/").json() == http.get("/v2").json()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": true}', b'{"ready": false}'])
def test_the_index(http: httpx.Client, body: bytes) -> None:
    listed = http.post("/v2/repository/index", content=body).json()
    states = {one["name"]: one["state"] for one in listed}
    assert states["channels"] == "READY"
    assert states.get("wrong") == (None if b"true" in body else "UNAVAILABLE")


@pytest.mark.parametrize("body", [b"[]", b'{"ready": 1}', b"{"])
def test_a_broken_index_request(http: httpx.Client, body: bytes) -> None:
    assert http.post("/v2/repository/index", content=body).status_code == 400


def test_pages_of_other_hosts_may_not_touch_sequences(http: httpx.Client, server: Server) -> None:
    """Their ids can be guessed, and a page needs no leave for a POST whose answer it does not read."""
    for origin, status in (("https://example.com", 403), (server.url, 200), (None, 200)):
        headers = {} if origin is None else {"origin": origin}
        assert http.post(INFER, json=asking(sequence_id=6, sequence_start=True, sequence_end=True), headers=headers).status_code == status
    assert http.post(INFER, json=asking(), headers={"origin": "https://example.com"}).status_code == 200
    scores_of(http.post(INFER, json=asking(sequence_id=6, sequence_start=True)))
    for origin, status in (("https://example.com", 403), (server.url, 200)):
        for path, body in (("frames", {"first": len(CLIP) - 1, "frames": CLIP[-1:].tolist()}), ("reset", {"at": len(CLIP)})):
            assert http.post(f"/v1/sessions/channels:uint64:6/{path}", json=body, headers={"origin": origin}).status_code == status
    http.delete("/v1/sessions/channels:uint64:6").raise_for_status()


def test_a_model_called_stats_is_not_served(tmp_path: Path) -> None:
    toy_models.write_toy(tmp_path, "stats", CHANNELS)
    toy_models.write_toy(tmp_path, "channels", CHANNELS)
    catalog = Catalog.load([tmp_path], "cpu", 1)
    assert catalog.names() == ["channels"]
    assert "choose another" in catalog.failures[0].reason


# Raw sockets


@pytest.fixture
def raw(server: Server) -> Iterator[Callable[[], socket.socket]]:
    opened: list[socket.socket] = []

    def dial() -> socket.socket:
        host, _, port = server.url.removeprefix("http://").partition(":")
        opened.append(socket.create_connection((host, int(port)), timeout=30))
        return opened[-1]

    yield dial
    for one in opened:
        one.close()


def request_bytes(body: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"POST {INFER} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answers(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Status and body of the next answers on a connection."""
    found, rest = [], b""
    while len(found) < count:
        head, separator, behind = rest.partition(b"\r\n\r\n")
        size = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), None)
        if separator and size is not None and len(behind) >= size:
            found.append((int(head.split()[1]), behind[:size]))
            rest = behind[size:]
            continue
        part = connection.recv(65536)
        assert part, "the service hung up"
        rest += part
    return found


def test_requests_on_one_connection_one_after_another_and_all_at_once(http: httpx.Client, raw: Callable[[], socket.socket]) -> None:
    expected = whole(http)
    steps = [json.dumps(asking(CLIP[None, i : i + 1], sequence_id="pipelined", sequence_start=i == 0, sequence_end=i == 19)).encode() for i in range(20)]
    connection = raw()
    for _ in range(2):
        found = []
        for step in steps:
            connection.sendall(request_bytes(step))
            found += answers(connection, 1)
        scores = [json.loads(body)["outputs"][0]["data"] for status, body in found if status == 200]
        assert np.array(scores, np.float32).tobytes() == expected.tobytes()
    connection.sendall(b"".join(map(request_bytes, steps)))
    scores = [json.loads(body)["outputs"][0]["data"] for _, body in answers(connection, 20)]
    assert np.array(scores, np.float32).tobytes() == expected.tobytes()


def test_a_refusal_leaves_the_connection_usable(raw: Callable[[], socket.socket]) -> None:
    connection = raw()
    body, headers = packed()
    connection.sendall(request_bytes(b"{") + request_bytes(body, headers) + request_bytes(body[:-1], headers) + request_bytes(body, headers))
    assert [status for status, _ in answers(connection, 4)] == [400, 200, 400, 200]


def test_a_client_that_leaves_in_the_middle(http: httpx.Client, raw: Callable[[], socket.socket]) -> None:
    """In its body: nothing has happened. While it waits: its step counts, and the end of its sequence too."""
    url = INFER.replace("infer", "stats")
    body = json.dumps(asking(CLIP[None, 10:], sequence_id="leaving", sequence_end=True)).encode()
    scores_of(http.post(INFER, json=asking(CLIP[None, :10], sequence_id="leaving", sequence_start=True)))
    connection = raw()
    connection.sendall(request_bytes(body)[:-10])
    connection.close()
    facts = http.get("/v1/sessions/channels:string:leaving").json()
    assert facts["next_frame"] == 10
    connection = raw()
    connection.sendall(request_bytes(body))
    connection.close()
    until = time.monotonic() + 10
    while http.get("/v1/sessions/channels:string:leaving").status_code != 404:
        assert time.monotonic() < until
    assert http.get(url).json()["model_stats"]


# Inside one process


def serving(models: Path, **changes: Any) -> tuple[Any, Predictor]:
    chosen = Settings(**changes)
    predictor = Predictor(Catalog.load([models], "cpu", 1), chosen, Metrics())
    return create_app(predictor, chosen), predictor


def test_what_fails_inside_tells_nothing_of_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the secret word is swordfish")

    async def scenario() -> None:
        app, predictor = serving(models)
        async with predictor, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            monkeypatch.setattr(open_inference, "read_request", broken)
            with capture_logs() as lines:
                answer = await client.post(INFER, json=asking())
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["request failed"]
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "swordfish" not in answer.text

    asyncio.run(scenario())


def test_a_service_that_shuts_down_is_not_ready(models: Path) -> None:
    async def scenario() -> None:
        app, predictor = serving(models)
        async with predictor, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            assert (await client.get("/v2/health/ready")).json() == {"ready": True}
            predictor.draining = True
            for method, path in (("GET", "/v2/health/ready"), ("GET", "/v2/models/channels/ready"), ("POST", INFER)):
                answer = await client.request(method, path, json=asking())
                assert (answer.status_code, answer.json()["code"]) == (503, "draining")
                assert int(answer.headers["retry-after"]) > 0
            assert (await client.get("/v2/health/live")).json() == {"live": True}
            index = (await client.post("/v2/repository/index")).json()
            assert {one["state"] for one in index} == {"UNAVAILABLE"}

    asyncio.run(scenario())


def test_large_bodies_of_every_kind(tmp_path: Path) -> None:
    """Those above 1 MiB are read, packed and unpacked beside the event loop."""
    toy = Toy(shape=(150,))
    toy_models.write_toy(tmp_path, "wide", toy)
    clip = example_frames(toy, 2000)[None]

    async def scenario() -> None:
        app, predictor = serving(tmp_path)
        async with predictor, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service", timeout=60) as client:
            url = "/v2/models/wide/infer"
            content, length = packed(clip)
            expected = scores_of(await client.post(url, content=content, headers=length))
            for body, headers in (
                (json.dumps(asking(clip)).encode(), {}),
                (zlib.compress(content, 1), {**length, "content-encoding": "deflate"}),
                (content, {**length, "accept-encoding": "gzip"}),
            ):
                assert scores_of(await client.post(url, content=body, headers=headers)).tobytes() == expected.tobytes()

    asyncio.run(scenario())
