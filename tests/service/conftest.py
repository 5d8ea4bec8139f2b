"""A real server process on a free port with toy models, shared by the tests that only talk to it; and a starter for those that need their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests import toy_models

ROOT = Path(__file__).resolve().parents[2]
START_WITHIN_S = 60.0


@dataclass
class Server:
    """A service that runs; `stop` ends it and returns its exit status."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def ws(self) -> str:
        return self.url.replace("http", "ws", 1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def errors(self) -> str:
        return self.log.read_text()


@contextmanager
def running(models: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Starts `python -m service` and waits for the line that says where it serves."""
    with log.open("w") as stderr:
        command = [sys.executable, "-W", "error", "-m", "service", "--models", str(models), "--port", "0", "--log-format", "json", *options]
        own = {name: value for name, value in os.environ.items() if not name.startswith("INDRNN_")}
        process = subprocess.Popen(command, cwd=ROOT, env={**own, **environment}, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            yield Server(process, _address(process.stdout, log), log)
        finally:
            process.kill()
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()


def _address(output: IO[str] | None, log: Path) -> str:
    assert output is not None
    line = output.readline()
    assert line.startswith("Serving on http"), f"the service did not start: {log.read_text()}"
    return line.split()[-1]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    toy_models.write_toy(directory, "channels", toy_models.CHANNELS)
    toy_models.write_toy(directory, "channels", toy_models.CHANNELS, version="10")
    toy_models.write_toy(directory, "channels", toy_models.CHANNELS, version="9")
    toy_models.write_toy(directory, "skeleton", toy_models.SKELETON)
    toy_models.write_toy(directory, "gappy", toy_models.GAPPY)
    toy_models.write_toy(directory, "gappy-channels", toy_models.GAPPY_CHANNELS)
    toy_models.write_toy(directory, "explosive", toy_models.EXPLOSIVE)
    toy_models.write_failing_self_test(directory, "wrong")
    toy_models.write_without_manifest(directory, "bare")
    return directory


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(models, tmp_path_factory.mktemp("server") / "log", "--deadline-s", "60", INDRNN_BODY_BYTES="200000") as started:
        yield started


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Callable[..., Any]:
    """Starts servers with options of their own; all end with the test."""

    def starter(*options: str, **environment: str) -> Any:
        return running(models, tmp_path / f"log{time.monotonic_ns()}", *options, **environment)

    return starter
