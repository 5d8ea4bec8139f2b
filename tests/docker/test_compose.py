"""What people get from `docker compose up`: the stack is really built and run, and a stream served from the container."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from service.client import Client
from service.settings import Settings
from tests import toy_models
from tests.docker.compose_stack import ROOT, Stack, bare_environment, free_port, need, run

SHIPPED = sorted(path.name for path in (ROOT / "service" / "models").glob("*") if path.is_dir())
OWN = "own-model"
SET_BY_THE_IMAGE = {"host", "port", "models"}


@pytest.fixture(scope="module")
def own_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as a user has one, readable for the container's user."""
    directory = tmp_path_factory.mktemp("models")
    toy_models.write_toy(directory, OWN, toy_models.SKELETON)
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def stack(own_models: Path) -> Iterator[Stack]:
    need("docker", "info")
    need("docker", "compose", "version")
    port, token = free_port(), secrets.token_hex(16)
    environment = {**bare_environment(), "INDRNN_PORT": str(port), "INDRNN_MODELS": str(own_models), "INDRNN_TOKEN": token}
    started = Stack(f"indrnn-test-{secrets.token_hex(4)}", environment, f"http://127.0.0.1:{port}", token)
    try:
        started.compose("up", "--build", "--detach", timeout_s=800)
        started.wait_until_healthy()
        yield started
    finally:
        started.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")


pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]


def test_it_serves_the_shipped_models_and_the_users_own(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/health/ready").status_code == 200
    with Client(stack.url, token=stack.token) as client:
        assert sorted(model["name"] for model in client.models()) == sorted([*SHIPPED, OWN])


@pytest.mark.parametrize("name", [*SHIPPED, OWN])
def test_a_stream_from_the_container_says_what_a_clip_says(stack: Stack, name: str) -> None:
    with Client(stack.url, token=stack.token) as client:
        model = client.model(name)
        clip = np.random.default_rng(0).normal(size=(40, *model.frame_shape)).astype(np.float32)
        whole = client.predict(name, clip)
        with client.stream(name) as stream:
            answers = list(stream.play([clip[:1], clip[1:14], clip[14:]]))
    assert [answer.frame for answer in answers] == list(range(40))
    assert answers[-1].label == whole.label
    np.testing.assert_array_equal(answers[-1].scores, whole.scores)


def test_settings_reach_the_service(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/v1/models").status_code == 401
    assert httpx.get(f"{stack.url}/v1/models", headers={"Authorization": f"Bearer {stack.token}"}).status_code == 200


def test_it_runs_without_privileges(stack: Stack) -> None:
    assert stack.inside("id", "-u") == "10001"
    host = stack.inspect()["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    writable = "import os; print([path for path in ('/', '/app', '/models', '/opt/venv', '/tmp') if os.access(path, os.W_OK)])"
    assert stack.inside("python", "-c", writable) == "['/tmp']"


def test_it_holds_the_serving_half_alone(stack: Stack) -> None:
    found = "import importlib.util as u; print([name for name in ('torch', 'training', 'onnx', 'pip', 'service') if u.find_spec(name)])"
    assert stack.inside("python", "-c", found) == "['service']"


def test_sigterm_ends_it_in_order(stack: Stack) -> None:
    try:
        with Client(stack.url, token=stack.token) as client, client.stream(OWN) as stream:
            stream.send(np.zeros((1, *client.model(OWN).frame_shape), np.float32))
            next(stream)
            began = time.monotonic()
            stack.compose("stop")
            took_s = time.monotonic() - began
            stream.close(keep=True)
        state = stack.inspect()["State"]
        assert state["ExitCode"] == 0, stack.compose("logs", "--tail", "20")
        assert took_s < 10  # Docker would kill it after 15
    finally:
        stack.compose("start")
        stack.wait_until_healthy()


def test_the_gpu_override_fits() -> None:
    need("docker", "compose", "version")
    command = ["docker", "compose", "-f", "compose.yaml", "-f", "docker/compose.gpu.yaml", "config", "--format", "json"]
    service = json.loads(run(command, bare_environment()))["services"]["indrnn"]
    assert service["build"]["args"]["DEVICE"] == "gpu"
    assert service["environment"]["INDRNN_DEVICE"] == "cuda"
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert service["read_only"]  # the rest is the same stack
    assert service["cap_drop"] == ["ALL"]


def test_the_grpc_override_fits() -> None:
    need("docker", "compose", "version")
    command = ["docker", "compose", "-f", "compose.yaml", "-f", "docker/compose.grpc.yaml", "config", "--format", "json"]
    for chosen, port in (({}, "8001"), ({"INDRNN_GRPC_PORT": "9001"}, "9001")):
        service = json.loads(run(command, bare_environment() | chosen))["services"]["indrnn"]
        assert service["environment"]["INDRNN_GRPC_PORT"] == port
        published = {str(one["target"]): (one["published"], one["host_ip"]) for one in service["ports"]}
        assert published == {"8000": ("8000", "127.0.0.1"), port: (port, "127.0.0.1")}


def test_compose_hands_over_every_setting() -> None:
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["indrnn"]
    settings = {f"INDRNN_{name.upper()}" for name in Settings.model_fields if name not in SET_BY_THE_IMAGE | {"workers"}}
    assert set(service["environment"]) == settings
