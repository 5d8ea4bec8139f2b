"""The Kubernetes manifests: valid by Kubernetes' own schemas, in agreement with each other, with the service and with the image."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "docker" / "kubernetes"
BASE = KUBERNETES / "base"
VARIANTS = ("base", "gpu", "managed-store")
VERSIONS = ("1.30", "1.34")  # of Kubernetes: the oldest that the manifests are written for, and a late one

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def base() -> list[Manifest]:
    """What the kustomization names, and nothing that it forgot."""
    named = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted([*named, "kustomization.yaml"]) == sorted(path.name for path in BASE.iterdir())
    return [document for name in named for document in documents(BASE / name)]


def one(kind: str, name: str, manifests: list[Manifest] | None = None) -> Manifest:
    [found] = [each for each in (base() if manifests is None else manifests) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def service_container(manifests: list[Manifest] | None = None) -> Manifest:
    [container] = one("Deployment", "indrnn", manifests)["spec"]["template"]["spec"]["containers"]
    return dict(container)


def built(variant: str) -> list[Manifest]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: the variants of the manifests are NOT built here, only the base is checked as it is written")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES / variant)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_base_is_valid(version: str) -> None:
    for manifest in base():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_find_faults() -> None:
    """Else the test above could not fail."""
    misspelt, mistyped = copy.deepcopy(one("Deployment", "indrnn")), copy.deepcopy(one("Deployment", "indrnn"))
    misspelt["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    mistyped["spec"]["minReadySeconds"] = "five"
    for faulty in (misspelt, mistyped):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(faulty, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_can_be_built_and_is_valid(variant: str) -> None:
    manifests = built(variant)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "indrnn"
    assert ("StatefulSet" in {each["kind"] for each in manifests}) == (variant != "managed-store")


def test_the_gpu_variant_asks_for_one_and_keeps_the_rest() -> None:
    manifests = built("gpu")
    container, plain = service_container(manifests), service_container()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"] == "indrnn-service:gpu"
    assert one("ConfigMap", "indrnn-settings", manifests)["data"]["INDRNN_DEVICE"] == "cuda"
    changed = {"image", "resources"}
    assert {key: value for key, value in container.items() if key not in changed} == {key: value for key, value in plain.items() if key not in changed}


def environment() -> dict[str, str]:
    """All variables that a replica gets."""
    container = service_container()
    values: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            values |= one("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            values |= one("Secret", source["secretRef"]["name"])["stringData"]
    return values


def test_the_environment_is_one_that_the_service_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {f"INDRNN_{name.upper()}" for name in Settings.model_fields}
    values = environment()
    assert values
    assert set(values) <= known
    for name in known:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.device == "cpu"
    assert settings.token is not None


def test_kubernetes_adds_no_variables_of_its_own() -> None:
    """For a Service named indrnn it would set INDRNN_PORT=tcp://..., and INDRNN_SERVICE_HOST, which is no setting: the replica would not start."""
    assert one("Service", "indrnn")
    assert one("Deployment", "indrnn")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_a_replica_gets_the_time_to_drain() -> None:
    pod = one("Deployment", "indrnn")["spec"]["template"]["spec"]
    command = service_container()["lifecycle"]["preStop"]["exec"]["command"]
    [pause_s] = re.findall(r"sleep\((\d+)\)", command[-1])
    compile(command[-1], "preStop", "exec")
    assert pod["terminationGracePeriodSeconds"] >= int(pause_s) + float(environment()["INDRNN_DRAIN_S"]) + 5


def paths_of_probes() -> Iterator[str]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = service_container()[name]["httpGet"]
        assert probe["port"] == "http"
        yield probe["path"]
    yield one("Deployment", "indrnn")["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]


def test_probes_ask_what_the_service_answers() -> None:
    from service.routes import router

    served = {getattr(route, "path", None) for route in router.routes}
    assert set(paths_of_probes()) == {"/health/ready", "/health/live", "/metrics"}
    assert set(paths_of_probes()) <= served
    assert service_container()["livenessProbe"]["httpGet"]["path"] == "/health/live"  # never ready: a store that is down would restart every replica


def test_ports_are_those_of_the_image() -> None:
    image = (ROOT / "docker" / "serve.Dockerfile").read_text()
    [port] = re.findall(r"INDRNN_PORT=(\d+)", image)
    assert [(each["name"], str(each["containerPort"])) for each in service_container()["ports"]] == [("http", port)]
    annotations = one("Deployment", "indrnn")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == port
    assert one("Service", "indrnn")["spec"]["ports"][0]["targetPort"] == "http"
    pod = one("Deployment", "indrnn")["spec"]["template"]["spec"]
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in image


def test_the_store_is_where_the_service_looks_for_it() -> None:
    from urllib.parse import urlsplit

    url = urlsplit(environment()["INDRNN_STORE"])
    store = one("Service", "indrnn-valkey")
    assert url.hostname == store["metadata"]["name"] == one("StatefulSet", "indrnn-valkey")["spec"]["serviceName"]
    assert url.port == store["spec"]["ports"][0]["port"]
    assert url.password == one("Secret", "indrnn-valkey")["stringData"]["password"]
    [container] = one("StatefulSet", "indrnn-valkey")["spec"]["template"]["spec"]["containers"]
    assert [(each["name"], each["containerPort"]) for each in container["ports"]] == [(store["spec"]["ports"][0]["targetPort"], url.port)]


@pytest.mark.parametrize("workload", [("Deployment", "indrnn"), ("StatefulSet", "indrnn-valkey")])
def test_labels_and_selectors_meet(workload: tuple[str, str]) -> None:
    kind, name = workload
    spec = one(kind, name)["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert one("Service", name)["spec"]["selector"].items() <= labels.items()
    policy = one("NetworkPolicy", name)["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    names = {each["name"] for each in spec["template"]["spec"]["containers"][0]["ports"]}
    for rule in policy["ingress"]:
        for port in rule["ports"]:
            assert port["port"] in names or port["port"] == 6379


def test_the_service_may_reach_the_store_and_the_store_lets_it_in() -> None:
    replica = one("Deployment", "indrnn")["spec"]["template"]["metadata"]["labels"]
    store = one("StatefulSet", "indrnn-valkey")["spec"]["template"]["metadata"]["labels"]
    out = one("NetworkPolicy", "indrnn")["spec"]["egress"]
    assert any(rule["to"][0].get("podSelector", {}).get("matchLabels", {}).items() <= store.items() and rule["ports"][0]["port"] == 6379 for rule in out)
    inside = one("NetworkPolicy", "indrnn-valkey")["spec"]
    assert [each["from"][0]["podSelector"]["matchLabels"].items() <= replica.items() for each in inside["ingress"]] == [True]
    assert "Egress" in inside["policyTypes"]
    assert "egress" not in inside  # nothing


def test_scaling_and_disruptions_are_about_the_service() -> None:
    scaler, deployment = one("HorizontalPodAutoscaler", "indrnn")["spec"], one("Deployment", "indrnn")
    assert scaler["scaleTargetRef"] == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"]
    assert one("PodDisruptionBudget", "indrnn")["spec"]["selector"] == deployment["spec"]["selector"]
    metrics = {each["type"]: each for each in scaler["metrics"]}
    streams = metrics["Pods"]["pods"]["metric"]["name"]
    assert metrics["Resource"]["resource"]["name"] == "cpu"
    assert service_container()["resources"]["requests"]["cpu"]  # a share of which the processor's target is
    assert f"# TYPE {streams} gauge" in Metrics().text().decode()
    [rule] = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(streams + "{")
    assert rule["name"]["as"] == streams


def test_nothing_runs_with_privileges() -> None:
    for kind, name in (("Deployment", "indrnn"), ("StatefulSet", "indrnn-valkey")):
        pod = one(kind, name)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def test_the_store_never_drops_a_stream() -> None:
    in_kubernetes = one("ConfigMap", "indrnn-valkey")["data"]["valkey.conf"].splitlines()
    in_compose = (ROOT / "docker" / "scale" / "valkey.conf").read_text().splitlines()
    for lines in (in_kubernetes, in_compose):
        assert {"appendonly yes", "maxmemory-policy noeviction", "dir /data"} <= set(lines), json.dumps(lines)
