"""What a real server with real traffic tells Prometheus; and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from service import protocol
from tests import toy_models
from tests.server_process import ROOT, Server, running
from tests.toy_models import CHANNELS, GESTURES, example_frames, moving_frames

DASHBOARD = ROOT / "docker" / "grafana" / "indrnn-service.json"
CLIP = example_frames(CHANNELS, 40)
MODEL = {"model": "channels", "version": "1"}
OCTETS = {"content-type": "application/octet-stream"}


@dataclass
class Exposition:
    """What `/metrics` said: the value of every sample, by its name and labels."""

    text: str

    def __post_init__(self) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                self.samples[sample.name].append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        """The sum over all that have these labels; it must be there at all."""
        found = [value for own, value in self.samples[name] if labels.items() <= own.items()]
        assert found, f"{name} {labels} is not told"
        return sum(found)

    def labels(self, name: str) -> set[str]:
        return {label for own, _ in self.samples[name] for label in own}


@dataclass
class Told:
    """What was told at the height of the work, and at its end; and what clients had to be kept from, which is nobody's business."""

    height: Exposition
    end: Exposition
    sessions: list[str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Streams over every protocol, in batches; sessions ended by every cause that can be waited for; refusals, events, a model that is refused."""
    directory = tmp_path_factory.mktemp("models")
    toy_models.write_toy(directory, "channels", CHANNELS)
    toy_models.write_toy(directory, "gestures", GESTURES)
    options = ("--sessions", "5", "--idle-s", "4")
    with (
        running(directory, tmp_path_factory.mktemp("server") / "log", *options, INDRNN_WATCH_S="0.05", INDRNN_MANAGEMENT_TOKEN="master key!") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        sessions = _rest(http)
        sessions += _websockets(server)
        height = Exposition(http.get("/metrics").text)
        _refused_model(directory, http)
        _wait_until_all_expired(http)
        yield Told(height, Exposition(http.get("/metrics").text), sessions)


def _rest(http: httpx.Client) -> list[str]:
    sessions = [http.post("/v1/models/channels/sessions").json()["session"] for _ in range(3)]
    for session in sessions:
        http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP.tolist()}).raise_for_status()
    http.delete(f"/v1/sessions/{sessions[0]}").raise_for_status()
    manager = {"authorization": "Bearer master key!"}
    listed = http.get("/v1/sessions", headers=manager).json()["sessions"]
    http.delete(f"/v1/sessions/{listed[0]['digest']}", headers=manager).raise_for_status()
    assert http.post(f"/v1/sessions/{sessions[0]}/frames", json={"first": 0, "frames": CLIP.tolist()}).status_code == 404
    assert http.post("/v1/models/channels/predict", json={"frames": [[0, 0]]}).status_code == 422
    frames = moving_frames(GESTURES, 600)
    http.post("/v1/models/gestures/predict", content=frames.tobytes(), headers=OCTETS).raise_for_status()
    _triton(http)
    return sessions


def _triton(http: httpx.Client) -> None:
    """A batch of clips of unequal length, which pads; and a sequence that is begun twice, and one whose first frames fail."""
    clips = np.stack([CLIP, CLIP[::-1]])
    tensor = {"name": "frames", "shape": list(clips.shape), "datatype": "FP32", "data": clips.ravel().tolist()}
    lengths = {"name": "lengths", "shape": [2], "datatype": "INT64", "data": [40, 25]}
    http.post("/v2/models/channels/infer", json={"inputs": [tensor, lengths]}).raise_for_status()
    step: dict[str, Any] = {"name": "frames", "shape": [1, 1, 3], "datatype": "FP32", "data": [0.1, 0.2, 0.3]}
    for _ in range(2):
        body = {"inputs": [step], "parameters": {"sequence_id": 7, "sequence_start": True}}
        http.post("/v2/models/channels/infer", json=body).raise_for_status()
    body = {"inputs": [{**step, "data": [1e30, 0, 0]}], "parameters": {"sequence_id": 8, "sequence_start": True}}
    assert http.post("/v2/models/channels/infer", json=body).status_code == 422


def _websockets(server: Server) -> list[str]:
    """As many streams as there is room for, at once; the next is refused."""
    url = f"{server.ws}/v1/models/channels/stream?scores=last"
    with connect(url) as one, connect(url) as two, connect(url) as three, connect(url) as refused:
        sessions = [json.loads(stream.recv(timeout=60))["session"] for stream in (one, two, three)]
        assert json.loads(refused.recv(timeout=60))["code"] == "too_many"
        for first in range(0, 40, 4):
            for stream in (one, two, three):
                stream.send(protocol.write_frames(first, CLIP[first : first + 4]))
            for stream in (one, two, three):
                stream.recv(timeout=60)
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        assert re.search(r"^indrnn_sockets_live [34]\.0$", text, re.MULTILINE)
    return sessions


def _refused_model(directory: Path, http: httpx.Client) -> None:
    toy_models.write_failing_self_test(directory, "channels")
    _wait_for(lambda: http.get("/v1/models").json()["failed"])


def _wait_until_all_expired(http: httpx.Client) -> None:
    _wait_for(lambda: not http.get("/v1/stats").json()["sessions"]["live"])


def _wait_for(condition: Any) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_requests_by_route_and_status(told: Told) -> None:
    assert told.height.value("indrnn_requests_total", route="/v1/sessions/{session_id}/frames", status="200") == 3
    assert told.height.value("indrnn_requests_total", route="/v1/sessions/{session_id}/frames", status="404") == 1
    assert told.height.value("indrnn_request_seconds_count", route="/v1/sessions/{session_id}/frames") == 4
    assert told.height.value("indrnn_request_seconds_sum", route="/v1/sessions/{session_id}/frames") > 0


def test_errors_by_code_of_http_and_of_websockets(told: Told) -> None:
    codes = {labels["code"]: value for labels, value in told.height.samples["indrnn_errors_total"]}
    assert codes == {"session_not_found": 1, "wrong_shape": 1, "not_finite": 1, "too_many": 1}


def test_latency_and_wait_of_every_message(told: Told) -> None:
    """Three steps over REST, two clips, two steps of a sequence and ten messages on each of three websockets."""
    for name in ("indrnn_message_seconds", "indrnn_queue_seconds"):
        assert told.height.value(f"{name}_count", **MODEL) == 3 + 2 + 2 + 30
        assert told.height.value(f"{name}_bucket", le="+Inf", **MODEL) == 37
    assert told.height.value("indrnn_message_seconds_sum", **MODEL) > told.height.value("indrnn_queue_seconds_sum", **MODEL) > 0


def test_batches_frames_and_padding(told: Told) -> None:
    height = told.height
    runs = height.value("indrnn_run_seconds_count", **MODEL)
    assert height.value("indrnn_batch_rows_count", **MODEL) == runs
    assert height.value("indrnn_batch_rows_sum", **MODEL) >= runs > 0
    assert height.value("indrnn_run_seconds_sum", **MODEL) > 0
    frames = 3 * 40 + 40 + 25 + 2 + 3 * 40
    assert height.value("indrnn_frames_total", **MODEL) == frames
    assert frames <= height.value("indrnn_padded_frames_total", **MODEL) < 1.5 * frames
    assert height.value("indrnn_frames_total", model="gestures", version="1") == 600
    assert height.value("indrnn_events_total", model="gestures", version="1") > 0


def test_sessions_live_opened_refused_and_ended_by_one_cause_each(told: Told) -> None:
    opened, ended = told.end.value("indrnn_sessions_opened_total", **MODEL), told.end.samples["indrnn_sessions_ended_total"]
    assert told.height.value("indrnn_sessions_live", **MODEL) > 0
    assert told.end.value("indrnn_sessions_live", **MODEL) == 0
    assert {labels["cause"]: value for labels, value in ended} == {"closed": 1, "deleted": 1, "restarted": 1, "failed": 1, "expired": 5}
    assert sum(value for _, value in ended) == opened == 9
    assert told.height.value("indrnn_sessions_refused_total") == 1


def test_the_pool_of_states(told: Told) -> None:
    live = told.height.value("indrnn_sessions_live", **MODEL)
    assert told.height.value("indrnn_state_rows", kind="taken", **MODEL) == live
    assert told.height.value("indrnn_state_rows", kind="capacity", **MODEL) >= live
    assert told.end.value("indrnn_state_rows", kind="taken", **MODEL) == 0


def test_models_their_device_memory_and_loading(told: Told) -> None:
    height = told.height
    assert height.value("indrnn_device_info", device="cpu", provider="CPUExecutionProvider", **MODEL) == 1
    assert 0 < height.value("indrnn_model_load_seconds", **MODEL) < 60
    assert height.value("indrnn_model_bytes", **MODEL) > 0
    assert height.value("indrnn_waiting", **MODEL) == 0
    assert "indrnn_models_refused_total" not in height.samples
    assert told.end.value("indrnn_models_refused_total", **MODEL) == 1


def test_websockets_and_the_process(told: Told) -> None:
    assert told.end.value("indrnn_sockets_live") == 0
    assert told.end.value("process_resident_memory_bytes") > 10 * 2**20
    assert told.end.value("process_cpu_seconds_total") > 0


def test_no_session_is_given_away(told: Told) -> None:
    assert len(told.sessions) == 6
    for session in told.sessions:
        assert session not in told.height.text
        assert session not in told.end.text


def test_everything_counted_is_documented(told: Told) -> None:
    page = (ROOT / "service" / "README.md").read_text()
    names = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in told.end.samples if name.startswith("indrnn_") and not name.endswith("_created")}
    assert not {name for name in names if f"`{name.removeprefix('indrnn_')}`" not in page}


# The dashboard

WORDS = {
    "sum", "rate", "by", "histogram_quantile", "label_values", "job",
}  # of PromQL and Grafana, as far as the dashboard has them  # fmt: skip


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return panels + [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]


EXPRESSIONS = _expressions(json.loads(DASHBOARD.read_text()))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_asks_for_what_there_is(told: Told, expression: str) -> None:
    """Every metric is told by the server above with every label that is asked of it; `job` comes from Prometheus."""
    bare = re.sub(r'"[^"]*"', '""', expression).replace("[$__rate_interval]", "")
    metrics = set(re.findall(r"\b(?:indrnn|process)_\w+", bare))
    assert metrics, "no metric of ours"
    selectors = {label for body in re.findall(r"\{([^}]*)\}", bare) for label in re.findall(r"(\w+)\s*[=!]", body)}
    grouped = {label for body in re.findall(r"by \(([^)]*)\)", bare) for label in re.findall(r"\w+", body)}
    for metric in metrics:
        assert metric in told.end.samples, f"{metric} is not told by a service at work"
        own = told.end.labels(metric) | {"job"}
        assert selectors <= own, f"{metric} has no label {selectors - own}"
        assert grouped <= own, f"{metric} has no label {grouped - own}"
    rest = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", bare)
    words = set(re.findall(r"[a-z_]\w*", rest)) - metrics - WORDS - told.end.labels("indrnn_device_info")
    assert not words, f"unknown words {words}"


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """The classic form, schema 42, which Grafana 12 writes; its data source is asked for at import, as a variable."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] == 42
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["source", "job", "model", "version"]
    assert variables["source"]["type"] == "datasource"
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        assert panel["title"]
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${source}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    asked = set(re.findall(r"\$(\w+)", json.dumps(EXPRESSIONS))) - {"__rate_interval"}
    assert asked == {"job", "model", "version"}
    assert not _overlaps([panel["gridPos"] for panel in panels])


def _overlaps(places: list[dict[str, int]]) -> list[tuple[dict[str, int], dict[str, int]]]:
    def apart(a: dict[str, int], b: dict[str, int]) -> bool:
        return a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]

    return [(a, b) for i, a in enumerate(places) for b in places[:i] if not apart(a, b)]
