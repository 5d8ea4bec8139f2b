"""The gRPC service on a socket, with clients that send what is wrong, leave, or do not read: it lets go of what was theirs, and finds no fault with itself."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): gRPC's service is not tested")

import grpc

from service.app import create_app
from service.catalog import Catalog
from service.grpc_messages import ModelInferRequest
from service.grpc_server import GrpcServer
from service.grpc_service import PREFIX
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import load_settings

CHANNEL = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))  # a window that stays as it is, and a connection of its own


@asynccontextmanager
async def serving(models: Path, **changes: Any) -> AsyncIterator[tuple[Any, Metrics]]:
    """A connection to a service in this process, and its figures."""
    settings = load_settings({}, grpc_port=0, **changes)
    predictor = Predictor(Catalog.load([models], "cpu", 1), settings, Metrics())
    server = GrpcServer(settings)
    app = create_app(predictor, settings)
    async with predictor:
        await server.start(app.state)
        try:
            async with grpc.aio.insecure_channel(server.greeting.split()[-1], options=CHANNEL) as channel:
                yield channel, predictor.metrics
        finally:
            await server.stop()


def request(frames: Any = (1, 2, 3), **fields: Any) -> Any:
    """A clip of zeros."""
    message = ModelInferRequest(**{"model_name": "channels", **fields})
    message.inputs.add(name="frames", datatype="FP32", shape=frames)
    message.raw_input_contents.append(bytes(4 * int(np.prod(frames))))
    return message


def infer(channel: Any, message: Any, **options: Any) -> Any:
    return channel.unary_unary(f"{PREFIX}ModelInfer")(message.SerializeToString(), **options)


def stream(channel: Any, messages: list[Any], **options: Any) -> Any:
    return channel.stream_stream(f"{PREFIX}ModelStreamInfer")(iter([one.SerializeToString() for one in messages]), **options)


async def refused(call: Any) -> str:
    """The code of the error that ends the call."""
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(call, 10)
    return str(dict(caught.value.trailing_metadata()).get("error-code", caught.value.code().name))


async def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not true():
        assert time.monotonic() < limit
        await asyncio.sleep(0.01)


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def requests_kept() -> int:
    return sum(type(one) is ModelInferRequest for one in gc.get_objects())


def faults() -> list[Any]:
    """Requests that are refused at different places, the deeper the later."""
    datatype, sequence, late, huge = request(), request(), request((3, 2, 3)), request((2, 40, 3))
    datatype.inputs[0].datatype = "FP64"
    sequence.parameters["sequence_id"].int64_param = 1
    late.parameters["timeout"].int64_param = 1
    huge.raw_input_contents[0] = np.full(240, np.inf, np.float32).tobytes()
    return [datatype, request(model_name="nothing"), request((1, 2, 4)), sequence, late, huge]


@pytest.mark.parametrize("way", ["call", "stream", "stream that ends at an error"])
def test_what_was_refused_is_let_go_of_at_once(models: Path, way: str) -> None:
    """Not when the collector looks, which is seldom: large clips of a wrong shape would be kept by the hundred."""

    async def case() -> None:
        async with serving(models) as (channel, metrics):
            with no_collector():
                for _ in range(3):
                    for one in faults():
                        if way == "call":
                            await refused(infer(channel, one))
                        elif way == "stream":
                            assert len([answer async for answer in stream(channel, [one, one])]) == 2
                        else:
                            await refused(stream(channel, [one], metadata=(("triton_grpc_error", "true"),)).read())
                    del one
                await until(lambda: requests_kept() == 0)
            assert 'code="internal"' not in metrics.text().decode()

    asyncio.run(case())
