"""A real server process on a free port with toy models, shared by the tests that only talk to it; and a starter for those that need their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import toy_models
from tests.server_process import Server, running


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
    toy_models.write_toy(directory, "gestures", toy_models.GESTURES)
    toy_models.write_toy(directory, "gappy-gestures", toy_models.GAPPY_GESTURES)
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
