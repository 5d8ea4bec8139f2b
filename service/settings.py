"""Settings: read once from the environment (`INDRNN_...`) and the command line, frozen, handed down by value."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import StartupError

PREFIX = "INDRNN_"
Seconds = Annotated[float, Field(allow_inf_nan=False)]


class Settings(BaseSettings):
    """Every setting of the service; the variable is the field's name in capitals after `INDRNN_`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, populate_by_name=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="port of the Open Inference Protocol over gRPC (extra `grpc`); default: off; 0 takes a free one"
    )
    models: Path | None = Field(
        None, description="directory of models, <name>/<version>/model.onnx; default ./models where present. Shipped models come after it"
    )
    watch_s: Seconds = Field(1.0, ge=0, description="seconds between two looks at the models' folders; 0: they are read at the start and when asked only")
    unload_s: Seconds = Field(3600.0, ge=0, description="seconds that the sessions of a version get to finish when it is unloaded or replaced")
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="auto proves CUDA with a run and else takes the CPU, and says so; cuda that cannot run is an error"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="threads inside one model run on the CPU; default: chosen from the cores this process may use")
    max_batch: int = Field(64, ge=1, le=4096, description="most streams in one model run")
    queue: int = Field(1024, ge=1, description="most messages waiting or running per model; beyond it 503 overloaded")
    deadline_s: Seconds = Field(10.0, gt=0, description="seconds a message may wait before it is answered 408 deadline")
    sessions: int = Field(10_000, ge=1, description="most live sessions; beyond it 429 too_many")
    restart_sequences: bool = Field(
        True, description="whether sequence_start of the Open Inference Protocol begins a sequence that is live anew; false: 409 sequence_live"
    )
    idle_s: Seconds = Field(600.0, gt=0, description="seconds without a message after which a session that no websocket streams expires")
    age_s: Seconds | None = Field(None, gt=0, description="seconds after which a session expires however busy it is; default: never")
    body_bytes: int = Field(64 * 2**20, ge=1024, description="largest body of a request")
    message_bytes: int = Field(2**20, ge=1024, description="largest websocket message")
    connections: int = Field(2000, ge=1, description="most open websockets; beyond it 4429 too_many")
    token: SecretStr | None = Field(None, description="bearer token asked for everything but /health")
    management_token: SecretStr | None = Field(None, description="bearer token for management calls, which are off until it is set")
    origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins whose pages may open websockets, comma separated, * for any; default: the same host"
    )
    drain_s: Seconds = Field(5.0, ge=0, description="seconds that messages under way get to finish at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else JSON lines")
    traces: str | None = Field(
        None,
        validation_alias=AliasChoices("INDRNN_TRACES", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="OpenTelemetry collector that takes traces (OTLP over HTTP), such as http://127.0.0.1:4318; needs the extra otel; default: no traces",
    )
    store: SecretStr | None = Field(
        None, description="where sessions are kept beside memory: sqlite:///PATH, redis://HOST, rediss:, redis+sentinel:, redis+cluster:; default: nowhere"
    )
    store_durability: Literal["memory", "fsynced", "replicated"] = Field(
        "memory", description="when the store is believed to have a session: it holds it, its disk does, or a replica of it as well"
    )
    store_down: Literal["serve", "refuse"] = Field("serve", description="what happens while the store is down: work goes on from memory alone, or is refused")
    checkpoint_frames: int = Field(8, ge=1, le=4096, description="frames of a stream after which it is saved to the store")
    checkpoint_ms: Seconds = Field(200.0, gt=0, le=60_000, description="milliseconds after which a stream that has taken frames is saved to the store")
    workers: int = Field(1, description="processes; only 1: several services on one store are what scales")

    @field_validator("origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("workers")
    @classmethod
    def _one_worker(cls, value: int) -> int:
        if value != 1:
            raise ValueError("only 1 is possible: start several services with one INDRNN_STORE and a balancer before them instead")
        return value

    @field_validator("traces")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("http", "https"):
            raise ValueError("the address of an OpenTelemetry collector that speaks HTTP is needed, such as http://127.0.0.1:4318")
        return value

    @field_validator("token", "management_token")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 8:
            raise ValueError("a token needs at least 8 characters")
        if value is not None and not _can_be_sent(value.get_secret_value()):
            raise ValueError("a token is made of printable ASCII characters, with no space at either end: no other can be sent in a header")
        return value


def _can_be_sent(token: str) -> bool:
    return token.isascii() and token.isprintable() and token == token.strip()


def load_settings(environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Reads the environment; `overrides` that are not None win over it.

    Raises `StartupError` naming the variable that is misspelt or has a bad value.
    """
    _refuse_unknown(os.environ if environment is None else environment)
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise StartupError("; ".join(_describe(fault, overrides) for fault in error.errors())) from None


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)
            raise StartupError(f"unknown setting {name}; did you mean {near[0]}? Known: {', '.join(known)}")


def _describe(fault: Any, overrides: Mapping[str, Any]) -> str:
    name = str(fault["loc"][0]).removeprefix(PREFIX).lower()  # a setting with several variables stands as the first of them
    given_on_command_line = overrides.get(name) is not None
    spoken = "--" + name.replace("_", "-") if given_on_command_line else PREFIX + name.upper()
    shown = "" if "token" in name else f" (got {fault['input']!r})"
    return f"{spoken}: {fault['msg'].removeprefix('Value error, ')}{shown}"
