"""Compose projects for tests: started under a name of their own, looked into, and taken away again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stack:
    """A Compose project of its own name that serves on `url`."""

    project: str
    environment: dict[str, str]
    url: str
    token: str
    files: tuple[str, ...] = ("compose.yaml",)

    def compose(self, *arguments: str, timeout_s: float = 60) -> str:
        files = [word for file in self.files for word in ("--file", file)]
        return run(["docker", "compose", "--project-name", self.project, *files, *arguments], self.environment, timeout_s)

    def containers(self, service: str = "indrnn") -> list[dict[str, Any]]:
        found = self.compose("ps", "--all", "--quiet", service).split()
        return list(json.loads(run(["docker", "inspect", *found], self.environment))) if found else []

    def inspect(self) -> dict[str, Any]:
        [found] = self.containers()
        return found

    def inside(self, *command: str, service: str = "indrnn") -> str:
        return self.compose("exec", "--no-TTY", service, *command).strip()

    def wait_until_healthy(self, replicas: int = 1, within_s: float = 90) -> None:
        """Healthy is what the image's own health check says, not what we can reach."""
        end = time.monotonic() + within_s
        states: list[Any] = []
        while time.monotonic() < end:
            states = [container["State"] for container in self.containers()]
            if any(state["Status"] != "running" for state in states):
                break
            if [state["Health"]["Status"] for state in states] == ["healthy"] * replicas:
                return
            time.sleep(0.5)
        pytest.fail(f"not healthy within {within_s:.0f} s: {json.dumps(states, indent=1)}\n{self.compose('logs')}")


def run(command: list[str], environment: dict[str, str] | None = None, timeout_s: float = 60) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def bare_environment() -> dict[str, str]:
    """Ours without settings of the service, which Compose would hand to the container."""
    return {name: value for name, value in os.environ.items() if not name.startswith("INDRNN_")}


def need(*command: str) -> None:
    """Skips, saying what is missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.skip(f"`{' '.join(command)}` does not answer")
    if answer.returncode:
        pytest.skip(f"`{' '.join(command)}` fails: {answer.stderr.strip()[-200:]}")


def need_image(variable: str, *names: str) -> str:
    """The first of these images that the engine has, or the one that the variable names; else skips. Nothing is fetched: a test needs no network."""
    need("docker", "info")
    wanted = [name for name in (os.environ.get(variable), *names) if name]
    for name in wanted:
        if subprocess.run(["docker", "image", "inspect", name], capture_output=True, timeout=30).returncode == 0:
            return name
    pytest.skip(f"none of the images {', '.join(wanted)} is there: docker pull one, or name another in {variable}. What needs it is NOT tested here")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
