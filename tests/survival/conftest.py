"""A store that is a real server, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import toy_models
from tests.toy_models import CHANNELS
from tests.valkey_process import Valkey, running


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    toy_models.write_toy(directory, "channels", CHANNELS)
    return directory


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """With an append-only file, which its process writes before it answers: killed, it loses nothing."""
    with running(tmp_path_factory.mktemp("valkey"), "--appendonly", "yes", "--appendfsync", "everysec", "--save", "") as server:
        yield server
