"""The gRPC server on its own port, on the event loop of the HTTP server: its start, its options, its orderly end.

It needs the extra `grpc`, which is imported only where `INDRNN_GRPC_PORT` is set.
"""

from __future__ import annotations

import errno
import importlib
import logging
import socket
from typing import Any

import structlog

from service.errors import StartupError
from service.settings import Settings

_KEEPALIVE_S = 20  # as of websockets: a client that is gone without a word is found out, and what it left under way is dropped
_LEAST_PING_S = 5  # clients may ask as often whether we are there

_OF_CLIENTS = ("ExecuteBatchError raised in core", "Invalid encoding on")

log = structlog.get_logger("grpc")


class GrpcServer:
    """Serves the Open Inference Protocol over gRPC where the settings name a port; else it does nothing.

    Raises `StartupError` where the extra is missing or the port is taken, before anything else is begun.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: Any = None
        self._service: Any = None
        self.greeting = ""
        if settings.grpc_port is not None:
            _check_extra()
            _check_port(settings.host, settings.grpc_port)

    async def start(self, state: Any) -> None:
        """`state` is the application's: the same predictor, sequences and gate serve both. Raises `StartupError`."""
        settings = self._settings
        if settings.grpc_port is None:
            return
        from grpc import aio

        from service.grpc_service import Service

        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)
        self._service = Service(state.predictor, state.sequences, state.gate, settings)
        self._server = aio.server(options=_options(settings))
        self._server.add_generic_rpc_handlers((self._service,))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            port = self._server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError:
            raise StartupError(_taken(settings.host, settings.grpc_port)) from None
        await self._server.start()
        spoken = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else host
        self.greeting = f"\n  gRPC     {spoken}:{port}"

    async def stop(self) -> None:
        """Takes no more calls, ends streams when what was read of them is answered, and cuts off what takes longer than the settings allow."""
        if self._server is not None:
            self._service.drain()
            await self._server.stop(self._settings.drain_s)


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", settings.connections + settings.queue),  # of a connection: a client may leave answers unread
        ("grpc.so_reuseport", 0),  # else a second service could share the port, and half of the calls
        ("grpc.keepalive_time_ms", 1000 * _KEEPALIVE_S),
        ("grpc.keepalive_timeout_ms", 1000 * _KEEPALIVE_S),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000 * _LEAST_PING_S),
    ]


def _is_ours(record: logging.LogRecord) -> bool:
    """False for what gRPC takes for a failure and is a client that left before it was answered, or a header in no encoding, which may be a token."""
    return not record.getMessage().startswith(_OF_CLIENTS)


def _check_extra() -> None:
    for module in ("grpc.aio", "google.protobuf.json_format"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise StartupError(f"INDRNN_GRPC_PORT is set, and gRPC needs the extra `grpc`: pip install grpcio protobuf ({error})") from None


def _check_port(host: str, port: int) -> None:
    """Says at once what `start` would find out when the models are loaded."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise StartupError(_taken(host, port) if error.errno == errno.EADDRINUSE else f"cannot listen on {host}:{port}: {error.strerror}") from None


def _taken(host: str, port: int) -> str:
    return f"port {port} on {host} is taken; choose another with INDRNN_GRPC_PORT"
