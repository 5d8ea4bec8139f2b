from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import ServiceError, StartupError
from service.settings import PREFIX, Settings, load_settings

README = Path(__file__).resolve().parents[2] / "service" / "README.md"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDRNN_PORT", "81")
    monkeypatch.setenv("INDRNN_ORIGINS", "http://a.example, http://b.example")
    monkeypatch.setenv("INDRNN_TOKEN", "")  # as compose files leave it: not set
    assert load_settings().port == 81
    assert load_settings(port=82, host=None).port == 82
    assert load_settings().origins == ("http://a.example", "http://b.example")
    assert load_settings().token is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("INDRNN_PROT", "80", "did you mean INDRNN_PORT"),
        ("INDRNN_IDLE", "80", "did you mean INDRNN_IDLE_S"),
        ("INDRNN_PORT", "x", "INDRNN_PORT: "),
        ("INDRNN_DEVICE", "tpu", "INDRNN_DEVICE: "),
        ("INDRNN_WORKERS", "2", "INDRNN_WORKERS: only 1 is possible"),
        ("INDRNN_DEADLINE_S", "0", "INDRNN_DEADLINE_S: "),
        ("INDRNN_DRAIN_S", "inf", "INDRNN_DRAIN_S: "),
        ("INDRNN_TOKEN", "pässword", "INDRNN_TOKEN: a token is made of printable ASCII"),
        ("INDRNN_MANAGEMENT_TOKEN", "password ", "INDRNN_MANAGEMENT_TOKEN: a token is made of printable ASCII"),
    ],
)
def test_faults_name_the_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match=re.escape(said)):
        load_settings()


def test_tokens_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDRNN_TOKEN", "secret")
    with pytest.raises(StartupError, match="at least 8 characters") as caught:
        load_settings()
    assert "secret" not in str(caught.value)
    assert "open sesame" not in repr(load_settings(token="open sesame", management_token=None) if monkeypatch.delenv("INDRNN_TOKEN") is None else "")


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1  # type: ignore[misc]
    with pytest.raises(StartupError):
        load_settings(prot=1)


def test_every_setting_is_documented() -> None:
    text = README.read_text()
    absent = [PREFIX + name.upper() for name in Settings.model_fields if f"`{PREFIX}{name.upper()}`" not in text]
    assert not absent


def test_every_error_is_documented() -> None:
    def codes(kind: type[ServiceError]) -> set[str]:
        return {kind.code}.union(*(codes(child) for child in kind.__subclasses__()))

    text = README.read_text()
    abstract = {"conflict", "unprocessable", "unavailable"}
    assert not [code for code in codes(ServiceError) - abstract if f"`{code}`" not in text]
