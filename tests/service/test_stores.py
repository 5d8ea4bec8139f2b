"""Which store a URL names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import StartupError
from service.store import StoreSettings
from service.store_memory import MemoryStore
from service.store_redis import RedisStore
from service.store_sqlite import SqliteStore
from service.stores import KINDS, open_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory://", MemoryStore),
        ("sqlite:///var/lib/a%20file", SqliteStore),
        ("sqlite:sessions", SqliteStore),
        ("redis://host", RedisStore),
        ("rediss://user:password@host:7000/3", RedisStore),
        ("redis+sentinel://one,two:26380/primary/3", RedisStore),
        ("rediss+sentinel://:password@one/primary?sentinel_password=other&ssl_ca_certs=file", RedisStore),
        ("redis+cluster://one:7000,two:7000", RedisStore),
        ("rediss+cluster://[::1]:7000", RedisStore),
    ],
)
def test_each_kind(url: str, kind: type) -> None:
    assert url.split(":")[0] in KINDS
    assert type(open_store(StoreSettings(url=url))) is kind


@pytest.mark.parametrize("url", ["", "sessions.db", "postgres://host", "sqlite://", "sqlite://host/file", "sqlite:///folder/", "redis+other://host"])
def test_what_names_none(url: str) -> None:
    with pytest.raises(StartupError, match="URL"):
        open_store(StoreSettings(url=url))


def test_files_are_where_they_were_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, path in {f"sqlite://{tmp_path}/a%20file": tmp_path / "a file", "sqlite:other": tmp_path / "other"}.items():
        store = open_store(StoreSettings(url=url))
        assert isinstance(store, SqliteStore)
        assert store._path.absolute() == path


def test_no_password_is_told() -> None:
    for url in ("redis://:hush@one,two", "redis://:hush@host/name", "redis://:hush@host?what=1", "redis://:hush@host:port", "redis+sentinel://:hush@host"):
        with pytest.raises(StartupError) as caught:
            open_store(StoreSettings(url=url))
        assert "hush" not in str(caught.value)
    assert "hush" not in repr(StoreSettings(url="redis://:hush@host"))


def test_without_the_package_of_the_server() -> None:
    """The service starts without it, and says what is missing to who asks for it."""
    script = """
import sys
sys.modules["redis"] = None
from service.stores import open_store
from service.store import StoreSettings
from service.errors import StartupError
open_store(StoreSettings(url="sqlite:///file"))
try:
    open_store(StoreSettings(url="redis://host"))
except StartupError as error:
    assert "needs the package redis" in str(error), error
else:
    raise SystemExit("it was there")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
