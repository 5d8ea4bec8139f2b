"""The server process around the application: its socket, its start with a word on what to try next, its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from service.app import create_app
from service.catalog import SHIPPED, Catalog
from service.direct import Direct
from service.errors import StartupError, StoreUnavailable
from service.grpc_server import GrpcServer
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import Settings
from service.store import Store, StoreSettings
from service.stores import open_store
from service.websocket import Upgrade

SAMPLES = Path(__file__).parent / "samples"
DEFAULT_MODELS = Path("models")

GARBAGE = 20_000  # objects between two collections; messages leave none in circles, and Python's 700 would be looked through for every tenth batch

log = structlog.get_logger("server")


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM; raises `StartupError` when it cannot start."""
    with _listen(settings) as listening:
        host, port = settings.host, listening.getsockname()[1]
        grpc = GrpcServer(settings)
        catalog = Catalog.load(model_directories(settings), settings.device, settings.threads)
        predictor = Predictor(catalog, settings, Metrics())
        if settings.store is not None:
            predictor.keep_in(_store(settings, settings.store))
        app = create_app(predictor, settings)
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=Direct,
            ws=Upgrade,
            ws_max_size=settings.message_bytes,
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, int(settings.drain_s)),
        )
        server = _Server(config, app, settings, grpc)
        server.greeting = greeting(catalog, f"http://{_spoken(host)}:{port}", settings)
        server.run(sockets=[listening])


def _store(settings: Settings, url: SecretStr) -> Store:
    """Where sessions are kept; raises `StartupError` for a store that will never do. One that is only down will be waited for."""
    chosen = StoreSettings(url.get_secret_value(), settings.store_durability, settings.idle_s, settings.age_s)

    async def prove() -> None:
        store = open_store(chosen)
        try:
            await store.start()
        finally:
            await store.close()

    with contextlib.suppress(StoreUnavailable):
        asyncio.run(prove())
    return open_store(chosen)


def model_directories(settings: Settings) -> list[Path]:
    """Where models are looked for, first to last; raises `StartupError` when a directory that was named is not there."""
    if settings.models is not None and not settings.models.is_dir():
        raise StartupError(f"the models directory {settings.models} does not exist")
    own = settings.models or (DEFAULT_MODELS if DEFAULT_MODELS.is_dir() else None)
    return [*([own] if own else []), SHIPPED]


def greeting(catalog: Catalog, url: str, settings: Settings) -> str:
    """What to try next, ready to be pasted."""
    header = ' -H "Authorization: Bearer $INDRNN_TOKEN"' if settings.token else ""
    lines = [f"Serving on {url}", f"  models   {', '.join(catalog.names())}", f"  API      {url}/docs"]
    skeletons_first = sorted(catalog.names(), key=lambda name: catalog.find(name, None).engine.manifest.layout is None)
    for name in skeletons_first:
        if sample := _sample(name):
            lines.append(f"  clip     curl -s{header} {url}/v1/models/{name}/predict -d @{_short(sample)}")
            lines.append(f"  stream   {_short(Path(sys.executable))} -m service stream {sample.stem} --model {name} --url {url}")
            break
    else:
        lines.append(f"  model    curl -s{header} {url}/v1/models/{catalog.names()[0]}")
    return "\n".join(lines)


def _sample(name: str) -> Path | None:
    """A shipped recording for this model."""
    return min((SAMPLES / name).glob("*.json"), default=None)


def _short(path: Path) -> Path:
    """As a person in this folder would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class _Server(uvicorn.Server):
    """uvicorn, but streams are told before their sockets close, and a signal is a normal end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings, grpc: GrpcServer) -> None:
        super().__init__(config)
        self.greeting = ""
        self._state = app.state
        self._grpc = grpc
        self._drain_s = settings.drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()  # what is here now stays
        gc.set_threshold(GARBAGE, 20, 100)
        try:
            await self._grpc.start(self._state)
        except StartupError:
            await self.shutdown(sockets)
            raise
        print(self.greeting + self._grpc.greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever comes meanwhile is told 503 `draining`, balancers that ask /health/ready among them, before the socket closes."""
        log.info("draining", sessions=len(self._state.predictor.sessions))
        await self._state.predictor.drain()  # what clients are told to take up elsewhere is saved by then
        await asyncio.gather(self._state.sockets.drain(self._drain_s), self._grpc.stop())
        await super().shutdown(sockets)
        log.info("stopped")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but does not raise the signal again after an orderly end: that would be a traceback or a failed exit status."""
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _listen(settings: Settings) -> socket.socket:
    """A bound socket: a port that is taken is said at once, before any model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise StartupError(f"host {settings.host} is unknown: {error.strerror}") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1)  # two bound sockets may share a port until one listens
        return listening
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"port {settings.port} on {settings.host} is taken; choose another with --port or INDRNN_PORT") from None
        raise StartupError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None


def _spoken(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
