"""Triton's own gRPC clients, and gRPC's stubs for what those cannot send (`raw`), against a service in a process of its own; fixtures and requests.

A file that imports it is skipped where a library is missing, and takes the fixtures with `models, served, server, triton, raw = FIXTURES`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests.server_process import Server, running
from tests.triton_clients import CLIP, MANAGER, Floats, OnLoop, each_of, utils, write_models

grpc = pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): the Open Inference Protocol is not tested over gRPC")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed (extra `test`): gRPC is not tested with it")
aio = pytest.importorskip("tritonclient.grpc.aio")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
service_pb2_grpc = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")

PREFIX = "/inference.GRPCInferenceService/"


class Async(OnLoop):
    """The asynchronous client."""

    def __init__(self, url: str) -> None:
        super().__init__(lambda: aio.InferenceServerClient(url))

    def stream(self, calls: list[dict[str, Any]], **options: Any) -> list[Any]:
        """All sent over one stream without waiting; what came back, results and errors. An error that ends the stream is the last."""

        async def run() -> list[Any]:
            async def requests() -> Any:
                for call in calls:
                    yield call

            found: list[Any] = []
            try:
                async for result, error in self.client.stream_infer(requests(), **options):
                    found.append(result or error)
            except grpc.RpcError as error:  # this client hands it on as it is
                found.append(utils.InferenceServerException(error.details(), str(error.code())))
            return found

        return list(self.run(asyncio.wait_for(run(), 30)))


class Blocking:
    """The client that blocks."""

    def __init__(self, url: str) -> None:
        self.client = triton_grpc.InferenceServerClient(url)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def together(self, calls: list[dict[str, Any]]) -> list[Any]:
        answers: dict[int, Any] = {}
        done = threading.Semaphore(0)

        def note(at: int) -> Any:
            def callback(result: Any, error: Any) -> None:
                answers[at] = result or error
                done.release()

            return callback

        for at, call in enumerate(calls):
            self.client.async_infer(callback=note(at), **call)
        for _ in calls:
            assert done.acquire(timeout=30)
        return [answers[at] for at in range(len(calls))]

    def stream(self, calls: list[dict[str, Any]], **options: Any) -> list[Any]:
        found: Queue[Any] = Queue()
        self.client.start_stream(lambda result, error: found.put(result or error), **options)
        try:
            for call in calls:
                self.client.async_stream_infer(**call)
        except utils.InferenceServerException:  # it has ended already; why, the callback was told
            pass
        finally:
            self.client.stop_stream()
        return list(found.queue)

    def close(self) -> None:
        self.client.close()


CLIENTS: dict[str, Any] = {"blocking": Blocking, "async": Async}


def both(address: str) -> AbstractContextManager[list[Any]]:
    return each_of(CLIENTS.values(), address)


@contextmanager
def serving(models: Path, log: Path, *options: str, **environment: str) -> Iterator[tuple[Server, str]]:
    """A service and the address of its gRPC port, as its greeting says."""
    with running(models, log, "--grpc-port", "0", *options, **environment) as server:
        yield server, _address(server)


def _address(server: Server) -> str:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        if line.startswith("  gRPC "):
            return line.split()[-1]
    raise AssertionError(f"the greeting names no port for gRPC: {server.errors()}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def served(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    with serving(models, tmp_path_factory.mktemp("server") / "log", INDRNN_MANAGEMENT_TOKEN=MANAGER, INDRNN_BODY_BYTES="500000") as started:
        yield started


@pytest.fixture(scope="module")
def server(served: tuple[Server, str]) -> Server:
    return served[0]


@pytest.fixture(scope="module", params=CLIENTS)
def triton(served: tuple[Server, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Either client."""
    dialled = CLIENTS[request.param](served[1])
    yield dialled
    dialled.close()


@pytest.fixture(scope="module")
def raw(served: tuple[Server, str]) -> Iterator[Any]:
    with grpc.insecure_channel(served[1]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


FIXTURES = models, served, server, triton, raw


def tensor(frames: npt.NDArray[Any] = CLIP[None], *, name: str = "frames") -> Any:
    return triton_grpc.InferInput(name, list(frames.shape), utils.np_to_triton_dtype(frames.dtype)).set_data_from_numpy(frames)


def steps(clip: npt.NDArray[Any], sequence: int | str, size: int = 1, model: str = "channels") -> list[dict[str, Any]]:
    """A clip as the requests of a sequence; each one's id is the sequence and its first frame."""
    cuts = range(0, len(clip), size)
    return [
        {
            "model_name": model,
            "inputs": [tensor(clip[None, at : at + size])],
            "request_id": f"{sequence}/{at}",
            "sequence_id": sequence,
            "sequence_start": at == 0,
            "sequence_end": at == cuts[-1],
        }
        for at in cuts
    ]


def request_of(frames: npt.NDArray[Any] = CLIP[None], model: str = "channels", sequence: int | str | None = None, **flags: bool) -> Any:
    """As the stubs take it; sequences beyond int64 go as uint64."""
    message = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[frames.tobytes()])
    message.inputs.add(name="frames", datatype="FP32", shape=frames.shape)
    if isinstance(sequence, str):
        message.parameters["sequence_id"].string_param = sequence
    elif sequence is not None:
        message.parameters["sequence_id"].uint64_param = sequence
    for name, value in flags.items():
        message.parameters[f"sequence_{name}"].bool_param = value
    return message


def scores_of(response: Any) -> Floats:
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(list(response.outputs[0].shape))


def figures(server: Server, name: str) -> dict[str, float]:
    """Prometheus' samples that begin with this name."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def wait_until(true: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)
