"""The gRPC service with clients that send what is wrong, leave, or do not read: it lets go of what was theirs, and finds no fault with itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): gRPC's service is not tested")

import grpc

from service.app import create_app
from service.catalog import Catalog
from service.grpc_messages import ModelInferRequest, ModelStreamInferResponse
from service.grpc_server import GrpcServer
from service.grpc_service import PREFIX, Service
from service.grpc_stream import Stream
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import load_settings

INFER, STREAM = f"{PREFIX}ModelInfer", f"{PREFIX}ModelStreamInfer"
OPTIONS = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))  # a window that stays as it is, and a connection of one's own


class Served(NamedTuple):
    """A service in this process, and a connection to it."""

    address: str
    channel: Any
    metrics: Metrics

    def counted(self, sample: str) -> float:
        """The sum of the figures whose names begin so."""
        return sum(float(line.rpartition(" ")[2]) for line in self.metrics.text().decode().splitlines() if line.startswith(sample))


@contextlib.asynccontextmanager
async def serving(models: Path, **changes: Any) -> AsyncIterator[Served]:
    settings = load_settings({}, grpc_port=0, **changes)
    predictor = Predictor(Catalog.load([models], "cpu", 1), settings, Metrics())
    server = GrpcServer(settings)
    app = create_app(predictor, settings)
    async with predictor:
        await server.start(app.state)
        address = server.greeting.split()[-1]
        try:
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                yield Served(address, channel, predictor.metrics)
        finally:
            await server.stop()


def request(frames: tuple[int, ...] = (1, 2, 3), **fields: Any) -> Any:
    """A clip of zeros."""
    message = ModelInferRequest(**{"model_name": "channels", **fields})
    message.inputs.add(name="frames", datatype="FP32", shape=frames)
    message.raw_input_contents.append(bytes(4 * int(np.prod(frames))))
    return message


def infer(channel: Any, message: Any, **options: Any) -> Any:
    return channel.unary_unary(INFER)(message.SerializeToString(), **options)


def stream(channel: Any, messages: list[Any], **options: Any) -> Any:
    return channel.stream_stream(STREAM)(iter([one.SerializeToString() for one in messages]), **options)


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


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def messages_kept() -> int:
    return sum(type(one) in (ModelInferRequest, ModelStreamInferResponse) for one in gc.get_objects())


def faults() -> list[Any]:
    """Requests that are refused at different places, the deeper the later."""
    datatype, sequence, late, infinite = request(), request(), request((3, 2, 3)), request((2, 40, 3))
    datatype.inputs[0].datatype = "FP64"
    sequence.parameters["sequence_id"].int64_param = 1
    late.parameters["timeout"].int64_param = 1
    infinite.raw_input_contents[0] = np.full(240, np.inf, np.float32).tobytes()
    return [datatype, request(model_name="nothing"), request((1, 2, 4)), sequence, late, infinite]


@pytest.mark.parametrize("way", ["call", "stream", "stream that ends at an error"])
def test_what_was_refused_is_let_go_of_at_once(models: Path, way: str) -> None:
    """Not when the collector looks, which is seldom: large clips of a wrong shape would be kept by the hundred."""

    async def case() -> None:
        async with serving(models) as served:
            with no_collector():
                for _ in range(3):
                    for one in faults():
                        if way == "call":
                            await refused(infer(served.channel, one))
                        elif way == "stream":
                            assert len([answer async for answer in stream(served.channel, [one, one])]) == 2
                        else:
                            await refused(stream(served.channel, [one], metadata=(("triton_grpc_error", "true"),)).read())
                    del one
                await until(lambda: messages_kept() == 0)
            assert served.counted('indrnn_errors_total{code="internal"}') == 0

    asyncio.run(case())


@pytest.mark.parametrize("when", ["nothing is under way", "the model runs", "an answer is unread"])
def test_what_a_client_leaves_is_let_go_of_at_once(models: Path, when: str) -> None:
    async def case() -> None:
        async with serving(models) as served:
            with no_collector():
                for _ in range(3):
                    call = served.channel.stream_stream(STREAM)()
                    await call.write(request().SerializeToString())
                    await call.read()
                    if when == "an answer is unread":
                        for _ in range(3):
                            await call.write(request((1, 20_000, 3)).SerializeToString())
                        await asyncio.sleep(0.3)
                    elif when == "the model runs":
                        await call.write(request((1, 100_000, 3)).SerializeToString())
                        await until(lambda: served.counted("indrnn_waiting") == 1)
                    call.cancel()
                    await until(lambda: served.counted("indrnn_waiting") == 0)
                await until(lambda: messages_kept() == 0)

    asyncio.run(case())


@pytest.mark.parametrize("origin", ["null", "http://[", "http://elsewhere.example"])
def test_pages_of_no_host_may_not_send_sequences_either(models: Path, origin: str) -> None:
    """By which name it was called gRPC does not say: that must not be taken for the name of an origin that has none."""

    async def case() -> None:
        message, metadata = request(), (("origin", origin),)
        async with serving(models) as served:
            await infer(served.channel, message, metadata=metadata)
            message.parameters["sequence_id"].string_param = "guessed"
            message.parameters["sequence_start"].bool_param = True
            assert await refused(infer(served.channel, message, metadata=metadata)) == "forbidden"
        async with serving(models, origins="*") as served:
            await infer(served.channel, message, metadata=metadata)

    asyncio.run(case())


def test_an_error_with_a_long_name_in_it_still_arrives(models: Path) -> None:
    """As a header, which may have 8 KB."""

    async def case() -> None:
        message = request(model_name="größer" * 5000)
        message.parameters["sequence_id"].int64_param = 1
        async with serving(models) as served:
            with pytest.raises(grpc.RpcError) as caught:
                await infer(served.channel, message)
            assert dict(caught.value.trailing_metadata())["error-code"] == "sequence_not_found"
            assert caught.value.details().startswith("inference request for sequence 1 to model 'größergrößer")
            assert len([one async for one in stream(served.channel, [message])]) == 1

    asyncio.run(case())


class Gone:
    """A call whose client leaves while the first answer is on its way."""

    def __init__(self) -> None:
        self.messages = iter([request()])

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def read(self) -> Any:
        for message in self.messages:
            return message
        await asyncio.Event().wait()

    async def write(self, answer: Any) -> None:
        raise grpc.aio.InternalError("the call is over")

    async def abort(self, *_: Any) -> None:
        raise AssertionError("there is nobody to be told")


def test_who_leaves_while_an_answer_is_sent_is_no_fault_of_ours(models: Path) -> None:
    async def case() -> None:
        settings = load_settings({}, grpc_port=0)
        predictor = Predictor(Catalog.load([models], "cpu", 1), settings, Metrics())
        state = create_app(predictor, settings).state
        async with predictor:
            service = Service(predictor, state.sequences, state.gate, settings)
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(service._stream(None, Gone()), 10)
        assert 'code="internal"' not in predictor.metrics.text().decode()

    asyncio.run(case())


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """HTTP/2's."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


ODD = header(b":method", b"POST") + header(b":scheme", b"http") + header(b":path", INFER.encode()) + header(b":authority", b"x")
ODD += header(b"content-type", b"application/grpc") + header(b"te", b"trailers") + header(b"authorization", b"Bearer secret \xff")


def test_clients_that_leave_or_send_odd_headers_are_not_logged_as_failures(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What such a header has, perhaps a token, is not logged at all."""

    async def case() -> None:
        async with serving(models) as served:
            for left in range(1, 4):
                call = served.channel.stream_stream(INFER)()  # unlike a call with one answer it may leave that where it is
                await call.write(request((1, 20_000, 3)).SerializeToString())
                await call.done_writing()
                await until(lambda left=left: served.counted("indrnn_requests_total") == left)  # type: ignore[misc]
                await asyncio.sleep(0.05)
                call.cancel()
            host, _, port = served.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, ODD) + frame(0, 1, 1, bytes(5)))
            found = b""
            while b"inputs must have tensors" not in found:
                found += await asyncio.wait_for(reader.read(2**16), 10)
            writer.close()

    asyncio.run(case())
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    assert "secret" not in caplog.text


@pytest.mark.parametrize("reads_at_last", [True, False])
def test_a_slow_reader_has_its_place_until_it_takes_the_end_of_its_stream_or_leaves(models: Path, monkeypatch: pytest.MonkeyPatch, reads_at_last: bool) -> None:
    """gRPC has the stream as long: there must not be more of those than of others."""

    async def case() -> None:
        async with serving(models, connections=1) as served:
            call = served.channel.stream_stream(STREAM)()
            for _ in range(3):
                await call.write(request((1, 20_000, 3)).SerializeToString())
            await until(lambda: served.counted('indrnn_errors_total{code="slow_reader"}') == 1)
            assert await refused(stream(served.channel, []).read()) == "too_many"
            if reads_at_last:
                assert len(await asyncio.wait_for(call.read(), 10)) > 300_000
                assert await refused(call.read()) == "slow_reader"
            else:
                call.cancel()
            answers: list[Any] = []
            while not answers:
                with contextlib.suppress(grpc.RpcError):  # the other one is just being ended
                    answers = [one async for one in stream(served.channel, [request()])]

    monkeypatch.setattr("service.grpc_service.Stream", partial(Stream, patience_s=0.2))
    asyncio.run(asyncio.wait_for(case(), 30))
