from __future__ import annotations

import httpx

from service.open_inference import HOT
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 3)
BODY = {"inputs": [{"name": "frames", "shape": [1, 3, 3], "datatype": "FP32", "data": CLIP.ravel().tolist()}]}


def test_hot_handlers_are_on_the_api_page_and_in_the_figures(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()["paths"]
    assert [route.path for route in HOT] == ["/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"]
    for route in HOT:
        assert "post" in described[route.path]
    assert http.post("/v2/models/channels/versions/9/infer", json=BODY).json()["model_version"] == "9"
    assert 'indrnn_requests_total{route="/v2/models/{name}/versions/{version}/infer",status="200"}' in http.get("/metrics").text


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
