from __future__ import annotations

import io
import json

import httpx
import numpy as np

from service import protocol
from service.catalog import SHIPPED
from tests.toy_models import CHANNELS, GAPPY, SKELETON, example_frames

CLIP = example_frames(CHANNELS, 20, seed=2)


def test_models_and_failures_are_listed(http: httpx.Client) -> None:
    value = http.get("/v1/models").json()
    served = {model["name"]: model for model in value["models"]}
    shipped = {folder.name for folder in SHIPPED.iterdir()}
    assert set(served) - shipped == {"channels", "explosive", "gappy", "gappy-channels", "gappy-gestures", "gestures", "skeleton"}
    assert served["channels"]["versions"] == ["1", "9", "10"]
    assert served["channels"]["device"]["provider"] == "CPUExecutionProvider"
    reasons = {failure["name"]: failure["reason"] for failure in value["failed"]}
    assert reasons["wrong"].startswith("self-test: scores differ")
    assert "manifest" in reasons["bare"]


def test_a_model_explains_itself(http: httpx.Client) -> None:
    value = http.get("/v1/models/skeleton").json()
    assert value["manifest"]["classes"] == list(SKELETON.classes)
    assert "self_test" not in value["manifest"]
    assert "kinect-v2" in value["layouts"]
    assert set(value["live"]) == {"sessions", "waiting", "frames", "batches", "mean_batch_rows", "padding"}
    assert http.get("/v1/models/channels?version=9").json()["version"] == "9"


def test_all_bodies_give_the_same_answer(http: httpx.Client) -> None:
    stream = io.BytesIO()
    np.save(stream, CLIP)
    url = "/v1/models/channels/predict?scores=all"
    octets = {"content-type": "application/octet-stream"}
    answers = [
        http.post(url, json={"frames": CLIP.tolist()}),
        http.post(url, content=CLIP.tobytes(), headers=octets),
        http.post(url, content=stream.getvalue(), headers=octets),
        http.post(url, content=stream.getvalue(), headers={"content-type": "application/x-npy"}),
        http.post(url, content=json.dumps({"frames": CLIP.tolist()}), headers={"content-type": "application/x-www-form-urlencoded"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len({answer.content for answer in answers}) == 1
    value = answers[0].json()
    assert (value["first"], value["count"], value["frame"], len(value["scores"]), len(value["top"])) == (0, 20, 19, 20, 4)
    assert value["top"][0] == {"label": value["label"], "score": value["score"]}


def test_options_shape_the_answer(http: httpx.Client) -> None:
    body = {"frames": CLIP.tolist()}
    assert "scores" not in http.post("/v1/models/channels/predict?scores=none&top_k=1", json=body).json()
    data = http.post("/v1/models/channels/predict?scores=all&answers=binary", json=body).content
    assert protocol.HEADER.unpack_from(data) == (1, 2, 0, 20, 0)
    assert len(data) == 16 + 20 * 4 * 4


def test_missing_joints(http: httpx.Client) -> None:
    frames = example_frames(GAPPY, 4).tolist()
    frames[1][3] = None
    frames[2] = None
    answer = http.post("/v1/models/gappy/predict", json={"frames": frames})
    assert answer.status_code == 200, answer.text
    assert np.isfinite(answer.json()["scores"]).all()


def test_a_degenerate_skeleton_is_legal(http: httpx.Client) -> None:
    answer = http.post("/v1/models/skeleton/predict", json={"frames": [[[1, 1, 1]] * 13]})
    assert np.isfinite(answer.json()["scores"]).all()


def test_a_layout_of_the_client(http: httpx.Client) -> None:
    answer = http.post("/v1/models/skeleton/predict?layout=mediapipe-33", json={"frames": np.zeros((2, 33, 3)).tolist()})
    assert answer.status_code == 200, answer.text


def test_the_life_of_a_session(http: httpx.Client) -> None:
    opened = http.post("/v1/models/channels/sessions", json={"scores": "all", "version": "9"})
    assert opened.status_code == 201
    value = opened.json()
    assert (value["next_frame"], value["model"], value["version"], value["options"]["scores"]) == (0, "channels", "9", "all")
    url = opened.headers["location"]
    assert url == f"/v1/sessions/{value['session']}"
    whole = http.post("/v1/models/channels/predict?scores=all&version=9", json={"frames": CLIP.tolist()}).json()["scores"]
    first = http.post(f"{url}/frames", json={"first": 0, "frames": CLIP[:8].tolist()}).json()
    rest = http.post(f"{url}/frames?first=8&ack=8", content=CLIP[8:].tobytes(), headers={"content-type": "application/octet-stream"}).json()
    assert first["scores"] + rest["scores"] == whole
    facts = http.get(url).json()
    assert (facts["next_frame"], facts["kept_from"], facts["streaming"]) == (20, 8, False)
    assert value["session"] not in json.dumps(facts)
    assert http.post(f"{url}/reset", json={"at": 20}).json() == {"next_frame": 20, "reset_at": 20}
    again = http.post(f"{url}/frames", json={"first": 20, "frames": CLIP.tolist()}).json()
    assert again["scores"] == whole
    assert http.delete(url).status_code == 200
    assert http.delete(url).json()["code"] == "session_not_found"


def test_health_and_where_things_are(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json()["status"] == "ready"
    for url in ("docs", "openapi", "ready", "metrics", "models"):
        assert http.get(http.get("/").json()[url]).status_code == 200


def test_metrics_count_and_give_no_session_away(http: httpx.Client) -> None:
    session = http.post("/v1/models/channels/sessions").json()["session"]
    http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP.tolist()})
    text = http.get("/metrics").text
    assert session not in text
    assert 'indrnn_requests_total{route="/v1/sessions/{session_id}/frames",status="200"}' in text
    for name in ("indrnn_frames_total", "indrnn_batch_rows_bucket", "indrnn_queue_seconds_bucket", "indrnn_sessions_live", "indrnn_device_info"):
        assert name in text


def test_head_is_get_without_a_body(http: httpx.Client) -> None:
    for path in ("/", "/health/live", "/v1/models", "/v1/models/channels", "/metrics"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
    assert http.head("/v1/models/nothing").status_code == 404


def test_a_refused_method_names_those_that_are_allowed(http: httpx.Client) -> None:
    assert http.put("/v1/models").headers["allow"] == "GET"


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    ids = {http.get(path).headers["x-request-id"] for path in ("/health/live", "/nothing")}
    assert len(ids) == 2


def test_the_api_page_describes_every_route(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    assert set(page["paths"]["/v1/models/{name}/predict"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "application/octet-stream",
        "application/x-npy",
    }
    for path, calls in page["paths"].items():
        for method, call in calls.items():
            assert call["summary"], (path, method)
    names = {parameter["name"] for parameter in page["paths"]["/v1/models/{name}/predict"]["post"]["parameters"]}
    assert names == {"name", "version", "layout", "fps", "scores", "answers", "top_k", "events"}
    assert "ErrorBody" in page["components"]["schemas"]
