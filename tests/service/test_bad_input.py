"""Bad input as a table: every fault gets the code of the protocol and leaves the session as it was, over REST and over websocket."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.server_process import Server
from tests.toy_models import CHANNELS, EXPLOSIVE, GAPPY, SKELETON, example_frames

STATUS = {
    "malformed": (400, 4400), "wrong_shape": (422, 4422), "not_finite": (422, 4422), "empty": (422, 4422), "diverged": (422, 4422), "wrong_time": (422, 4422),
    "gap": (409, 4409), "answers_forgotten": (409, 4409), "track_not_open": (409, 4409), "too_large": (413, 1009),
}  # fmt: skip
TAKEN = 3  # frames that each session has when the fault comes


@dataclass(frozen=True)
class Fault:
    name: str
    code: str
    model: str = "channels"
    frames: Any = None  # JSON value, or bytes of float32
    first: Any = TAKEN
    t: Any = None

    @property
    def fields(self) -> dict[str, Any]:
        return {"first": self.first, "frames": self.frames, **({} if self.t is None else {"t": self.t})}


def _floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def _spoilt(model: Any, place: tuple[int, ...], value: Any) -> Any:
    frames: Any = example_frames(model, 4).tolist()
    inner = frames
    for i in place[:-1]:
        inner = inner[i]
    inner[place[-1]] = value
    return frames


FAULTS = [
    Fault("null where nothing may be missing", "not_finite", frames=[[0.1, None, 0.3]]),
    Fault("nan", "not_finite", frames=_floats(0.1, np.nan, 0.3)),
    Fault("inf", "not_finite", frames=_floats(0.1, np.inf, 0.3)),
    Fault("minus inf where things may be missing", "not_finite", "gappy-channels", _floats(0.1, -np.inf, 0.3)),
    Fault("too large a number", "not_finite", frames=[[0.1, 1.1e6, 0.3]]),
    Fault("too large for a float32", "not_finite", frames=[[0.1, -1e39, 0.3]]),
    Fault("the least integer", "not_finite", frames=[[0.1, -(2**63), 0.3]]),
    Fault("a number of 400 digits", "not_finite", frames=[[0.1, 10**399, 0.3]]),
    Fault("a place of 400 digits", "malformed", frames=[[0.1, 0.2, 0.3]], first=10**399),
    Fault("half a joint missing", "not_finite", "gappy", _spoilt(GAPPY, (1, 2, 0), None)),
    Fault("a joint missing in a whole skeleton", "not_finite", "skeleton", _spoilt(SKELETON, (1, 2), None)),
    Fault("too few numbers", "wrong_shape", frames=[[0.1, 0.2]]),
    Fault("too many numbers", "wrong_shape", frames=[[0.1, 0.2, 0.3, 0.4]]),
    Fault("nested too deep", "wrong_shape", frames=[[[0.1, 0.2, 0.3]]]),
    Fault("a flat list", "wrong_shape", frames=[0.1, 0.2, 0.3]),
    Fault("a string for a number", "wrong_shape", frames=[[0.1, "0.2", 0.3]]),
    Fault("true for a number", "wrong_shape", frames=[[0.1, True, 0.3]]),
    Fault("an object for a frame", "wrong_shape", frames=[{"x": 1}]),
    Fault("a ragged list", "wrong_shape", frames=[[0.1, 0.2, 0.3], [0.1]]),
    Fault("not whole frames", "wrong_shape", frames=_floats(0.1, 0.2)),
    Fault("no frames", "empty", frames=[]),
    Fault("no bytes", "empty", frames=b""),
    Fault("a gap", "gap", frames=[[0.1, 0.2, 0.3]], first=TAKEN + 2),
    Fault("a gap in bytes", "gap", frames=_floats(0.1, 0.2, 0.3), first=2**64 - 1),
    Fault("a negative place", "malformed", frames=[[0.1, 0.2, 0.3]], first=-1),
    Fault("a place that is no number", "malformed", frames=[[0.1, 0.2, 0.3]], first="3"),
    Fault("a place that is true", "malformed", frames=[[0.1, 0.2, 0.3]], first=True),
    Fault("a place beyond 64 bits", "malformed", frames=[[0.1, 0.2, 0.3]], first=2**64),
    Fault("times of frames that began without", "wrong_time", frames=[[0.1, 0.2, 0.3]], t=[0.1]),
    Fault("too few times", "wrong_time", frames=[[0.1, 0.2, 0.3]] * 2, t=[0.1]),
    Fault("a time that is a string", "wrong_time", frames=[[0.1, 0.2, 0.3]], t=["0.1"]),
    Fault("a time that is too large", "wrong_time", frames=[[0.1, 0.2, 0.3]], t=[10**399]),
    Fault("legal but extreme", "diverged", "explosive", [[1e6, 1e6], [-1e6, 1e6]]),
    Fault("extreme in its third slice", "diverged", "explosive", [*example_frames(EXPLOSIVE, 70).tolist(), [1e6, -1e6], [-1e6, 1e6]]),
]


def _good(model: str) -> list[Any]:
    toy = {"channels": CHANNELS, "gappy-channels": CHANNELS, "skeleton": SKELETON, "gappy": GAPPY, "explosive": EXPLOSIVE}[model]
    frames: list[Any] = example_frames(toy, TAKEN + 1, seed=1).tolist()
    return frames


def _rest_session(http: httpx.Client, model: str) -> str:
    session: str = http.post(f"/v1/models/{model}/sessions").json()["session"]
    http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": _good(model)[:TAKEN]}).raise_for_status()
    return session


def _expected(http: httpx.Client, model: str) -> Any:
    """Scores of the good frames with nothing wrong in between."""
    return http.post(f"/v1/models/{model}/predict", json={"frames": _good(model)}).json()["scores"]


def _unchanged(http: httpx.Client, model: str, session: str) -> None:
    facts = http.get(f"/v1/sessions/{session}").json()
    assert facts["next_frame"] == TAKEN
    answer = http.post(f"/v1/sessions/{session}/frames", json={"first": TAKEN, "frames": _good(model)[TAKEN:]}).json()
    assert answer["scores"] == _expected(http, model)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_rest(http: httpx.Client, fault: Fault) -> None:
    session = _rest_session(http, fault.model)
    if isinstance(fault.frames, bytes):
        answer = http.post(
            f"/v1/sessions/{session}/frames", params={"first": fault.first}, content=fault.frames, headers={"content-type": "application/octet-stream"}
        )
    else:
        answer = http.post(f"/v1/sessions/{session}/frames", json=fault.fields)
    assert (answer.status_code, answer.json()["code"]) == (STATUS[fault.code][0], fault.code), answer.text
    assert answer.json()["error"]
    _unchanged(http, fault.model, session)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_websocket(http: httpx.Client, server: Server, fault: Fault) -> None:
    session = _rest_session(http, fault.model)
    if isinstance(fault.frames, bytes):
        count = -(-len(fault.frames) // 12)  # whole frames, the last one perhaps cut
        message: Any = struct.pack("<BBHIQ", 1, 1, 0, count, fault.first) + fault.frames
    else:
        message = json.dumps({"type": "frames", **fault.fields})
    _refused(server, fault.model, session, message, fault.code)
    _unchanged(http, fault.model, session)


def _refused(server: Server, model: str, session: str, message: Any, code: str) -> None:
    with connect(f"{server.ws}/v1/models/{model}/stream?session={session}&ack={TAKEN}", max_size=None) as socket:
        assert json.loads(socket.recv())["type"] == "opened"
        socket.send(message)
        error = json.loads(socket.recv(timeout=60))
        assert (error["type"], error["code"], error["track"]) == ("error", code, 0)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
        assert socket.close_code == STATUS[code][1]


BROKEN_MESSAGES = {
    "no JSON": "{",
    "NaN literal": '{"type": "frames", "first": 3, "frames": [[NaN, 0, 0]]}',
    "NaN literal behind a number that is too large": '{"type": "frames", "first": 3, "frames": [[1e999, NaN, 0]]}',
    "a place of 5000 digits": '{"type": "ack", "first": 1' + 5000 * "0" + "}",
    "deeply nested behind a number that is too large": '{"type": "frames", "x": 1e999, "first": 3, "frames": ' + "[" * 9000 + "]" * 9000 + "}",
    "no object": "[1, 2]",
    "no type": '{"first": 3}',
    "type is a list": '{"type": ["frames"]}',
    "unknown type": '{"type": "frame", "first": 3}',
    "unknown field": '{"type": "frames", "first": 3, "frames": [[0, 0, 0]], "frist": 1}',
    "no frames": '{"type": "frames", "first": 3}',
    "frames are a string": '{"type": "frames", "first": 3, "frames": "abc"}',
    "second open": '{"type": "open"}',
    "times that are no list": '{"type": "frames", "first": 3, "frames": [[0, 0, 0]], "t": 0.1}',
    "track is no number": '{"type": "frames", "track": "0", "first": 3, "frames": [[0, 0, 0]]}',
    "ack without a place": '{"type": "ack"}',
    "reset at a float": '{"type": "reset", "at": 3.5}',
    "short header": b"\x01\x01",
    "no bytes": b"",
    "unknown version": struct.pack("<BBHIQ", 2, 1, 0, 1, TAKEN) + _floats(0, 0, 0),
    "unknown kind": struct.pack("<BBHIQ", 1, 9, 0, 1, TAKEN) + _floats(0, 0, 0),
    "a kind for clients": struct.pack("<BBHIQ", 1, 2, 0, 1, TAKEN) + _floats(0, 0, 0),
    "count does not fit": struct.pack("<BBHIQ", 1, 1, 0, 2, TAKEN) + _floats(0, 0, 0),
    "huge count": struct.pack("<BBHIQ", 1, 1, 0, 2**32 - 1, TAKEN) + _floats(0, 0, 0),
    "ack with a payload": struct.pack("<BBHIQ", 1, 3, 0, 0, TAKEN) + b"1234",
}


@pytest.mark.parametrize(
    "message", ['{"type": "frames", "track": 1, "first": 3, "frames": [[0, 0, 0]]}', struct.pack("<BBHIQ", 1, 1, 5, 1, TAKEN) + _floats(0, 0, 0)]
)
def test_a_track_that_was_not_opened(http: httpx.Client, server: Server, message: Any) -> None:
    session = _rest_session(http, "channels")
    _refused(server, "channels", session, message, "track_not_open")
    _unchanged(http, "channels", session)


@pytest.mark.parametrize("name", BROKEN_MESSAGES)
def test_broken_websocket_message(http: httpx.Client, server: Server, name: str) -> None:
    session = _rest_session(http, "channels")
    _refused(server, "channels", session, BROKEN_MESSAGES[name], "malformed")
    _unchanged(http, "channels", session)


BROKEN_BODIES: dict[str, tuple[str, dict[str, str], Any, int, str]] = {
    "no JSON": ("", {}, "{", 400, "malformed"),
    "NaN literal": ("", {}, '{"first": 3, "frames": [[NaN, 0, 0]]}', 400, "malformed"),
    "nothing": ("", {}, "", 400, "malformed"),
    "a list": ("", {}, "[]", 400, "malformed"),
    "unknown field": ("", {}, '{"first": 3, "frames": [[0, 0, 0]], "x": 1}', 400, "malformed"),
    "no first": ("", {}, '{"frames": [[0, 0, 0]]}', 400, "malformed"),
    "infinity spelt as a number": ("", {}, '{"first": 3, "frames": [[1e999, 0, 0]]}', 422, "not_finite"),
    "deeply nested": ("", {}, '{"first": 3, "frames": ' + "[" * 2000 + "]" * 2000 + "}", 400, "malformed"),
    "deeply nested infinity": ("", {}, '{"first": 3, "frames": ' + "[" * 1000 + "1e999" + "]" * 1000 + "}", 400, "malformed"),
    "null for the place": ("", {}, '{"first": null, "frames": [[0, 0, 0]]}', 400, "malformed"),
    "unknown content type": ("", {"content-type": "text/csv"}, "1,2,3", 400, "malformed"),
    "compressed": ("", {"content-encoding": "gzip"}, '{"first": 3, "frames": [[0, 0, 0]]}', 400, "malformed"),
    "unknown query": ("?fist=3", {}, '{"first": 3, "frames": [[0, 0, 0]]}', 400, "malformed"),
    "bad choice": ("?scores=some", {}, '{"first": 3, "frames": [[0, 0, 0]]}', 400, "malformed"),
    "bytes without first": ("", {"content-type": "application/octet-stream"}, _floats(0, 0, 0), 400, "malformed"),
    "cut .npy": ("?first=3", {"content-type": "application/x-npy"}, b"\x93NUMPY\x01\x00", 400, "malformed"),
    "no .npy": ("?first=3", {"content-type": "application/x-npy"}, b"abc", 400, "malformed"),
    "too large": ("", {}, '{"first": 3, "frames": [' + "[0, 0, 0]," * 30_000 + "[0, 0, 0]]}", 413, "too_large"),
}


@pytest.mark.parametrize("name", BROKEN_BODIES)
def test_broken_body(http: httpx.Client, name: str) -> None:
    query, headers, body, status, code = BROKEN_BODIES[name]
    session = _rest_session(http, "channels")
    answer = http.post(f"/v1/sessions/{session}/frames{query}", content=body, headers={"content-type": "application/json", **headers})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    _unchanged(http, "channels", session)


def test_too_large_without_saying_so(http: httpx.Client) -> None:
    """The limit holds for the bytes that arrive, not only for the header that announces them."""
    session = _rest_session(http, "channels")

    def drip() -> Any:
        for _ in range(300):
            yield b"\0" * 1200

    answer = http.post(f"/v1/sessions/{session}/frames?first=3", content=drip(), headers={"content-type": "application/octet-stream"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    _unchanged(http, "channels", session)


def test_repeat_answers_without_running(http: httpx.Client) -> None:
    session = _rest_session(http, "channels")
    whole = http.post("/v1/models/channels/predict?scores=all", json={"frames": _good("channels")}).json()["scores"]
    again = http.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": 1, "frames": [[9, 9, 9], [8, 8, 8]]}).json()
    assert again["scores"] == whole[1:TAKEN]
    over = http.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": 1, "frames": _good("channels")[1:]}).json()
    assert over["scores"] == whole[1:]


def test_forgotten_answers(http: httpx.Client) -> None:
    session = http.post("/v1/models/channels/sessions").json()["session"]
    frames = example_frames(CHANNELS, 90).tolist()
    for first in range(0, 90, 10):
        http.post(f"/v1/sessions/{session}/frames", json={"first": first, "frames": frames[first : first + 10]}).raise_for_status()
    answer = http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": frames[:10]})
    assert (answer.status_code, answer.json()["code"]) == (409, "answers_forgotten")
    assert http.get(f"/v1/sessions/{session}").json()["kept_from"] == 26


NEXT = {"first": TAKEN, "frames": [[0.1, 0.2, 0.3]]}
MISSING: list[tuple[str, Callable[[httpx.Client], httpx.Response], int, str]] = [
    ("model", lambda http: http.post("/v1/models/nothing/predict", json={"frames": [[0, 0, 0]]}), 404, "model_not_found"),
    ("version", lambda http: http.post("/v1/models/channels/predict?version=2", json={"frames": [[0, 0, 0]]}), 404, "model_not_found"),
    ("model that failed to load", lambda http: http.get("/v1/models/wrong"), 404, "model_not_found"),
    ("session", lambda http: http.post("/v1/sessions/nothing/frames", json={"first": 0, "frames": [[0, 0, 0]]}), 404, "session_not_found"),
    ("session to close", lambda http: http.delete("/v1/sessions/nothing"), 404, "session_not_found"),
    ("session to reset", lambda http: http.post("/v1/sessions/nothing/reset", json={"at": 0}), 404, "session_not_found"),
    ("path", lambda http: http.get("/v3"), 404, "not_found"),
    ("path with a slash too many", lambda http: http.get("/v1/models/"), 404, "not_found"),
    ("method", lambda http: http.put("/v1/models"), 405, "method_not_allowed"),
    ("layout", lambda http: http.post("/v1/models/skeleton/sessions?layout=lego"), 422, "layout_unknown"),
    ("layout of a model without", lambda http: http.post("/v1/models/channels/sessions?layout=body-13"), 422, "layout_unknown"),
    ("too high a frame rate", lambda http: http.post("/v1/models/channels/sessions?fps=1000.5"), 400, "malformed"),
    ("too low a frame rate", lambda http: http.post("/v1/models/gestures/predict?fps=1e-308", json={"frames": [[0, 0, 0]] * 3}), 400, "malformed"),
    ("no frame rate", lambda http: http.post("/v1/models/channels/sessions?fps=0"), 400, "malformed"),
    ("an endless frame rate", lambda http: http.post("/v1/models/channels/predict?fps=inf", json={"frames": [[0, 0, 0]]}), 400, "malformed"),
    ("events of a model without", lambda http: http.post("/v1/models/channels/sessions?events=true"), 422, "no_events"),
    ("events of a clip's model without", lambda http: http.post("/v1/models/channels/predict?events=true", json={"frames": [[0, 0, 0]]}), 422, "no_events"),
    ("events in a step", lambda http: http.post(f"/v1/sessions/{_rest_session(http, 'channels')}/frames?events=true", json=NEXT), 422, "no_events"),
    ("events that are a number", lambda http: http.post("/v1/models/gestures/sessions", json={"events": 1}), 400, "malformed"),
    ("reset elsewhere", lambda http: http.post(f"/v1/sessions/{_rest_session(http, 'channels')}/reset", json={"at": 1}), 409, "gap"),
    ("management is off", lambda http: http.get("/v1/sessions"), 403, "forbidden"),
]


@pytest.mark.parametrize(("name", "call", "status", "code"), MISSING, ids=[row[0] for row in MISSING])
def test_what_is_not_there(http: httpx.Client, name: str, call: Callable[[httpx.Client], httpx.Response], status: int, code: str) -> None:
    answer = call(http)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


@pytest.mark.parametrize(
    ("path", "headers", "close"),
    [
        ("/v1/models/nothing/stream?scores=all", {}, 4404),
        ("/v1/models/channels/stream?session=nothing", {}, 4404),
        ("/v1/models/channels/stream?scores=some", {}, 4400),
        (f"/v1/models/channels/stream?ack={5000 * '9'}", {}, 4400),
        ("/v1/models/channels/stream?skores=all", {}, 4400),
        ("/v1/models/skeleton/stream?layout=lego", {}, 4422),
        ("/v1/models/channels/stream?scores=all", {"Origin": "http://elsewhere.example"}, 4403),
        ("/v1/models/channels/stream?scores=all", {"Origin": "http://[::1"}, 4403),
    ],
)
def test_refused_websocket(server: Server, path: str, headers: dict[str, str], close: int) -> None:
    with connect(server.ws + path, additional_headers=headers) as socket:
        assert json.loads(socket.recv(timeout=60))["type"] == "error"
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
        assert socket.close_code == close


def test_own_origin_passes(server: Server) -> None:
    with connect(f"{server.ws}/v1/models/channels/stream?scores=all", additional_headers={"Origin": server.url}) as socket:
        assert json.loads(socket.recv(timeout=60))["type"] == "opened"


def test_too_large_websocket_message(http: httpx.Client, server: Server) -> None:
    session = _rest_session(http, "channels")
    with connect(f"{server.ws}/v1/models/channels/stream?session={session}") as socket:
        socket.recv(timeout=60)
        with pytest.raises(ConnectionClosed):  # noqa: PT012 - sent in pieces, noticed anywhere
            socket.send(b"\0" * (2**20 + 1))
            while True:
                socket.recv(timeout=60)
        assert socket.close_code == 1009
    _unchanged(http, "channels", session)
