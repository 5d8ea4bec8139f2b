"""Configurations of the programs around the service, judged by these programs, and in agreement with the service and with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from service.settings import Settings
from tests.docker.compose_stack import ROOT, bare_environment, need, need_image, run

SCALE = ROOT / "docker" / "scale"
HAPROXY = ("haproxy:3.2", "haproxy:3-trixie")
NGINX = ("nginx:1", "nginx:1-trixie")
PROMETHEUS = ("prom/prometheus:v3.5.0", "prom/prometheus:latest")
VALKEY = ("valkey/valkey:8", "valkey/valkey:8-trixie")
SCALED = ("compose.yaml", "docker/compose.scale.yaml")


def docker(image: str, mount: tuple[Path, str], *command: str) -> list[str]:
    return ["docker", "run", "--rm", "--network", "none", "--volume", f"{mount[0]}:{mount[1]}:ro", "--entrypoint", command[0], image, *command[1:]]


@pytest.mark.docker
def test_haproxy_takes_its_configuration() -> None:
    run(docker(need_image("HAPROXY_IMAGE", *HAPROXY), (SCALE, "/scale"), "haproxy", "-c", "-f", "/scale/haproxy.cfg"))


@pytest.mark.docker
def test_nginx_takes_its_configuration() -> None:
    run(docker(need_image("NGINX_IMAGE", *NGINX), (SCALE / "nginx.conf", "/etc/nginx/nginx.conf"), "nginx", "-t"))


@pytest.mark.docker
def test_prometheus_takes_its_configuration() -> None:
    run(docker(need_image("PROMETHEUS_IMAGE", *PROMETHEUS), (SCALE, "/scale"), "promtool", "check", "config", "/scale/prometheus.yml"))


@pytest.mark.parametrize("profile", [(), ("--profile", "watch")])
def test_the_files_of_compose_fit_together(profile: tuple[str, ...]) -> None:
    need("docker", "compose", "version")
    files = [word for file in SCALED for word in ("-f", file)]
    stack = json.loads(run(["docker", "compose", *files, *profile, "config", "--format", "json"], bare_environment() | {"REPLICAS": "5"}))
    services = stack["services"]
    assert set(services) == {"indrnn", "valkey", "haproxy"} | ({"prometheus", "grafana"} if profile else set())
    assert services["indrnn"]["deploy"]["replicas"] == 5
    assert not services["indrnn"].get("ports")  # replicas cannot share a port of the host
    assert services["indrnn"]["read_only"]  # the rest is the same as that of one replica
    assert services["indrnn"]["environment"]["INDRNN_STORE"] == "redis://valkey:6379/0"
    assert [port["host_ip"] for port in services["haproxy"]["ports"]] == ["127.0.0.1"]
    assert set(services["valkey"]["networks"]) == {"store"}
    assert stack["networks"]["store"]["internal"]
    assert "store" not in services["haproxy"]["networks"]
    for service in services.values():
        for volume in service.get("volumes", []):
            assert volume["type"] != "bind" or Path(volume["source"]).exists(), volume


def test_haproxy_asks_whether_replicas_are_ready_and_tells_a_drain_from_a_death() -> None:
    from service.errors import Draining

    text = (SCALE / "haproxy.cfg").read_text()
    backends = re.split(r"^backend ", text, flags=re.MULTILINE)[1:]
    assert len(backends) == 2
    for backend in backends:
        assert "http-check send meth GET uri /health/ready" in backend
        assert re.search(r"server-template \S+ \d+ indrnn:8000$", backend, re.MULTILINE)
        [pattern] = re.findall(r"expect ! rstring '(.+)' error-status L7OKC", backend)
        assert re.search(pattern, json.dumps(Draining("going").to_dict()))
        assert re.search(pattern, json.dumps(Draining("going").to_dict(), separators=(",", ":")))
        assert not re.search(pattern, '{"status":"ready"}')


def seconds(value: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m)", value).groups()  # type: ignore[union-attr]
    return float(number) * {"ms": 0.001, "s": 1.0, "m": 60.0}[unit]


def test_what_waits_waits_longer_than_the_service() -> None:
    """The service closes what is silent and answers what is late; a balancer that is quicker would cut streams that are well."""
    haproxy, nginx = (SCALE / "haproxy.cfg").read_text(), (SCALE / "nginx.conf").read_text()
    for name in ("tunnel", "client", "server"):
        limit = re.findall(rf"timeout {name} (\S+)", haproxy)[0]  # a later one is of a frontend for people
        assert seconds(limit) > 2 * 20 + Settings.model_fields["deadline_s"].default
    [limit] = re.findall(r"proxy_read_timeout (\w+);", nginx)
    assert seconds(limit) > 2 * 20 + Settings.model_fields["deadline_s"].default
    [body] = re.findall(r"client_max_body_size (\d+)m;", nginx)
    assert int(body) * 2**20 == Settings.model_fields["body_bytes"].default


def test_grafana_is_given_the_dashboard_and_prometheus_every_replica() -> None:
    grafana = yaml.safe_load((ROOT / SCALED[1]).read_text().replace("!reset", ""))["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    [provider] = yaml.safe_load((SCALE / "grafana-dashboards.yml").read_text())["providers"]
    assert mounts["./docker/grafana"] == provider["options"]["path"]
    assert list((ROOT / "docker" / "grafana").glob("*.json"))
    [source] = yaml.safe_load((SCALE / "grafana-datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    jobs = {job["job_name"]: job for job in yaml.safe_load((SCALE / "prometheus.yml").read_text())["scrape_configs"]}
    [found] = jobs["indrnn"]["dns_sd_configs"]
    assert (found["names"], found["type"], found["port"]) == (["indrnn"], "A", 8000)
