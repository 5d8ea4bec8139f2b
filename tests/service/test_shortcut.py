from __future__ import annotations

import re

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import open_inference, routes
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 3)
BODY = {"inputs": [{"name": "frames", "shape": [1, 3, 3], "datatype": "FP32", "data": CLIP.ravel().tolist()}]}
OCTETS = {"content-type": "application/octet-stream"}


def test_hot_handlers_are_on_the_api_page_and_in_the_figures(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()["paths"]
    hot = [one.route.path for one in (*open_inference.HOT, *routes.HOT)]
    tensors = ["/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"]
    assert hot == [*tensors, "/v1/sessions/{session_id}/frames", "/v1/models/{name}/predict"]
    for path in hot:
        assert "post" in described[path]
    assert http.post("/v2/models/channels/versions/9/infer", json=BODY).json()["model_version"] == "9"
    assert 'indrnn_requests_total{route="/v2/models/{name}/versions/{version}/infer",status="200"}' in http.get("/metrics").text


def the_long_way(query: str) -> str:
    """The same query, written so that no shortcut reads it."""
    return re.sub("[a-z0-9]", lambda found: f"%{ord(found[0]):02x}", query, count=1)


names = st.sampled_from(["scores", "answers", "top_k", "events", "first", "ack", "version", "layout", "fps", "nonsense"])
values = st.sampled_from(
    [
        "last",
        "all",
        "none",
        "binary",
        "json",
        "0",
        "2",
        "-1",
        "007",
        "1.5",
        "1e3",
        "true",
        "false",
        "1",
        "0x1",
        "",
        "9",
        "latest",
        "nan",
        "10001",
        "99999999999999999999",
    ]
)
queries = st.lists(st.tuples(names, values), max_size=4).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))


def outcome(answer: httpx.Response) -> tuple[object, ...]:
    return answer.status_code, answer.content, {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=queries.filter(bool) | st.sampled_from(["scores", "scores=all&", "&scores=all", "scores=all&&top_k=1", "first=0&first=0", "scores=a=b"]))
def test_queries_mean_the_same_on_both_ways(http: httpx.Client, query: str) -> None:
    for path in ("/v1/models/channels/predict", "/v1/models/gestures/predict"):
        assert outcome(http.post(f"{path}?{query}", content=CLIP.tobytes(), headers=OCTETS)) == outcome(
            http.post(f"{path}?{the_long_way(query)}", content=CLIP.tobytes(), headers=OCTETS)
        )
    answers = []
    for written in (query, the_long_way(query)):
        session = http.post("/v1/models/channels/sessions").json()["session"]
        answers.append([outcome(http.post(f"/v1/sessions/{session}/frames?{written}", content=CLIP.tobytes(), headers=OCTETS))])
        answers[-1].append(outcome(http.post(f"/v1/sessions/{session}/frames?{written}", json={"first": 3, "frames": CLIP.tolist()})))
        answers[-1].append(http.get(f"/v1/sessions/{session}").json()["kept_from"])
        http.delete(f"/v1/sessions/{session}")
    assert answers[0] == answers[1]


@pytest.mark.parametrize("path", ["/v1/models/channels/predict", "/v1/sessions/{session}/frames"])
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {}),
        (b"{", {}),
        (b"[]", {}),
        (b'{"frames": [[0, true, 1]], "first": 0}', {}),
        (b'{"frames": [[0, null, 1]], "first": 0}', {}),
        (b'{"frames": [[0, 1, 1]], "first": "0"}', {}),
        (b'{"frames": [[0, 1, 1e400]], "first": 0}', {}),
        (b"\xff", {"content-type": "text/plain"}),
        (b"\xff", {"content-type": "application/JSON; charset=utf-8"}),
        (b"\xff", {"content-type": "application/octet-stream"}),
        (b"", {"content-type": "application/octet-stream"}),
        (CLIP.tobytes(), {"content-type": "application/octet-stream", "content-encoding": "gzip"}),
        (bytes(200_001), {"content-type": "application/octet-stream"}),
    ],
)
def test_bodies_are_refused_alike_on_both_ways(http: httpx.Client, path: str, body: bytes, headers: dict[str, str]) -> None:
    path = path.format(session=http.post("/v1/models/channels/sessions").json()["session"])
    quick, slow = (outcome(http.post(f"{path}?{query}", content=body, headers=headers)) for query in ("scores=last", the_long_way("scores=last")))
    assert quick == slow
    assert quick[0] in (400, 413, 422)


def test_a_body_in_pieces_is_one_body(http: httpx.Client) -> None:
    data = CLIP.tobytes()
    answer = http.post("/v1/models/channels/predict", content=iter([data[:7], b"", data[7:20], data[20:]]), headers=OCTETS)
    assert answer.content == http.post("/v1/models/channels/predict", content=data, headers=OCTETS).content
    assert http.post("/v1/models/channels/predict", content=iter([bytes(150_000), bytes(60_000)]), headers=OCTETS).json()["code"] == "too_large"


def test_other_methods_and_paths_take_the_long_way(http: httpx.Client) -> None:
    answer = http.get("/v2/models/channels/infer")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    for path in ("/v2/models/channels/infer/", "/v2/models//infer", "/v2/models/a/b/infer", "/x/v2/models/channels/infer"):
        assert http.post(path, json=BODY).json()["code"] == "not_found"


def test_what_they_raise_is_answered_and_counted(http: httpx.Client) -> None:
    def count() -> float:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith('indrnn_errors_total{code="model_not_found"}')]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = count()
    answer = http.post("/v2/models/nothing/infer", json=BODY)
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert answer.headers["x-request-id"]
    assert count() == before + 1


def test_plain_queries_are_read_without_fastapi() -> None:
    assert routes._read_frames_query(b"scores=all&first=12&ack=0") == (12, 0, (("scores", "all"),))
    assert routes._read_frames_query(b"") == (None, None, ())
    assert routes._read_clip_query(b"version=9&top_k=2&fps=12.5") == ("9", (("top_k", 2), ("fps", 12.5)))
    for query in (b"first=1&first=2", b"first=-1", b"scores=%61ll", b"scores=some", b"scores", b"version=9", b"first=99999999999999999999"):
        assert routes._read_frames_query(query) is None, query


numbers = st.integers(-2, 4) | st.floats(-3, 3, width=32) | st.sampled_from([1e6, 1000000.01, -1e7, 2**64, True, None, "1"])
frame = st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3) | st.lists(numbers, min_size=2, max_size=4) | numbers
bodies = st.fixed_dictionaries(
    {"first": st.integers(0, 2) | numbers, "frames": st.lists(frame, max_size=3) | numbers},
    optional={"ack": numbers, "t": st.lists(numbers, max_size=3), "more": numbers},
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(bodies | bodies.map(lambda body: {**body, "first": 0}), min_size=1, max_size=3),
    name=st.sampled_from(["channels", "gappy-channels", "gestures"]),
)
def test_json_bodies_mean_the_same_on_both_ways(http: httpx.Client, messages: list[dict[str, object]], name: str) -> None:
    answers = []
    for query in ("scores=all", the_long_way("scores=all")):
        session = http.post(f"/v1/models/{name}/sessions").json()["session"]
        answers.append([outcome(http.post(f"/v1/sessions/{session}/frames?{query}", json=body)) for body in messages])
        answers[-1].append([http.get(f"/v1/sessions/{session}").json()[place] for place in ("next_frame", "kept_from")])
        http.delete(f"/v1/sessions/{session}")
    assert answers[0] == answers[1]
