"""The gRPC server's start and end, and what it says of a port that it cannot have."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): gRPC's server is not tested")

import grpc

from service.app import create_app
from service.catalog import Catalog
from service.errors import StartupError
from service.grpc_messages import message_class
from service.grpc_server import GrpcServer
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import Settings, load_settings

PREFIX = "/inference.GRPCInferenceService/"
LIVE = f"{PREFIX}ServerLive"


@asynccontextmanager
async def application(models: Path, settings: Settings) -> AsyncIterator[Any]:
    """The state of an application that is at work."""
    predictor = Predictor(Catalog.load([models], "cpu", 1), settings, Metrics())
    app = create_app(predictor, settings)
    async with predictor:
        yield app.state


async def live(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await channel.unary_unary(LIVE)(b"", timeout=10)
        return bool(message_class("ServerLiveResponse").FromString(answer).live)


def test_without_a_port_it_does_nothing() -> None:
    async def case() -> None:
        server = GrpcServer(load_settings({}))
        await server.start(None)
        await server.stop()
        assert server.greeting == ""

    asyncio.run(case())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_it_serves_where_it_says(models: Path, host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback: it is not tested there")

    async def case() -> None:
        settings = load_settings({}, host=host, grpc_port=0)
        async with application(models, settings) as state:
            server = GrpcServer(settings)
            await server.start(state)
            address = server.greeting.split()[-1]
            assert await live(address)
            await server.stop()
            with pytest.raises(grpc.RpcError):
                await live(address)

    asyncio.run(case())


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_a_port_that_is_taken_is_told_at_once_and_when_it_is_taken_meanwhile(models: Path) -> None:
    async def case() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            settings = load_settings({}, grpc_port=port)
            words = f"port {port} on 127.0.0.1 is taken; choose another with INDRNN_GRPC_PORT"
            with pytest.raises(StartupError, match=words):
                GrpcServer(settings)
        async with application(models, settings) as state:
            server = GrpcServer(settings)
            with socket.create_server(("127.0.0.1", port)), pytest.raises(StartupError, match=words):
                await server.start(state)
            await server.stop()

    asyncio.run(case())


def test_two_services_never_share_a_port(models: Path) -> None:
    async def case() -> None:
        first = load_settings({}, grpc_port=0)
        async with application(models, first) as state:
            server = GrpcServer(first)
            await server.start(state)
            port = int(server.greeting.rpartition(":")[2])
            with pytest.raises(StartupError, match="is taken"):
                GrpcServer(load_settings({}, grpc_port=port))
            await server.stop()

    asyncio.run(case())


def test_a_connection_has_as_many_calls_at_a_time_as_streams_may_be_open_and_requests_may_wait(models: Path) -> None:
    """More wait at its own end, and other connections do not notice."""

    async def case() -> None:
        settings = load_settings({}, grpc_port=0, connections=2, queue=1)
        async with application(models, settings) as state:
            server = GrpcServer(settings)
            await server.start(state)
            address = server.greeting.split()[-1]
            async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                await channel.unary_unary(LIVE)(b"", timeout=10)
                held = [channel.stream_stream(f"{PREFIX}ModelInfer")() for _ in range(3)]  # their message does not come
                await asyncio.sleep(0.1)
                with pytest.raises(grpc.RpcError) as caught:
                    await channel.unary_unary(LIVE)(b"", timeout=0.3)
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                assert await live(address)
                held[0].cancel()
                await channel.unary_unary(LIVE)(b"", timeout=10)
            await server.stop()

    asyncio.run(case())
