"""What settings make of the service over gRPC: tokens, limits, its port; and what it counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np

from tests.server_process import ROOT, Server
from tests.triton_clients import MANAGER, refused
from tests.triton_over_grpc import FIXTURES, PREFIX, Async, both, figures, grpc, service_pb2_grpc, serving, tensor, wait_until

models, served, server, triton, raw = FIXTURES


def test_a_token(models: Path, tmp_path: Path) -> None:
    changes = {"INDRNN_TOKEN": "correct horse", "INDRNN_MANAGEMENT_TOKEN": MANAGER, "INDRNN_CONNECTIONS": "1"}
    with serving(models, tmp_path / "log", **changes) as (server, address), both(address) as clients:
        for client in clients:
            assert client.is_server_live() is True
            assert client.is_server_ready() is True
            for headers in (None, {"authorization": "Bearer wrong horse"}, {"authorization": "correct horse"}):
                refused("UNAUTHENTICATED", "token", client.infer, "channels", [tensor()], headers=headers)
                refused("UNAUTHENTICATED", "token", client.get_server_metadata, headers=headers)
                refused("UNAUTHENTICATED", "token", client.is_model_ready, "channels", headers=headers)
                # The asynchronous client, which is refused before it has sent a message, may stumble over that itself.
                [error] = client.stream([{"model_name": "channels", "inputs": [tensor()]}], headers=headers)
                assert error.status() == "StatusCode.UNAUTHENTICATED" or (isinstance(client, Async) and "Internal error from Core" in error.message())
            for token in ("correct horse", MANAGER):
                headers = {"authorization": f"Bearer {token}"}
                assert client.infer("channels", [tensor()], headers=headers).as_numpy("scores").shape == (1, 40, 4)
                [result] = client.stream([{"model_name": "channels", "inputs": [tensor()]}], headers=headers)
                assert result.as_numpy("scores").shape == (1, 40, 4)
            origin = {"authorization": "Bearer correct horse", "origin": "http://elsewhere.example"}
            refused("PERMISSION_DENIED", "elsewhere", client.infer, "channels", [tensor()], sequence_id=1, sequence_start=True, headers=origin)
        text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer correct horse"}).text
        assert re.search(r'indrnn_errors_total\{code="unauthenticated"\} 2[4-9]', text)
        metadata = (("authorization", "Bearer correct horse"),)
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            held: list[Any] = []

            def full() -> Any:
                if not held or not held[-1].is_active():  # streams of before were still being ended
                    held.append(stub.ModelStreamInfer(iter(Queue().get, None), metadata=metadata))
                return refusal_of(stub, metadata)

            wait_until(full)
            assert refusal_of(stub, metadata) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too_many")
            held[-1].cancel()


def refusal_of(stub: Any, metadata: Any) -> Any:
    """Why a stream is refused; None where it is not."""
    try:
        assert list(stub.ModelStreamInfer(iter([]), metadata=metadata)) == []
    except grpc.RpcError as error:
        return error.code(), dict(error.trailing_metadata())["error-code"]


def test_expiry_capacity_and_strictness(models: Path, tmp_path: Path) -> None:
    changes = {"INDRNN_SESSIONS": "2", "INDRNN_IDLE_S": "0.6", "INDRNN_RESTART_SEQUENCES": "false"}
    with serving(models, tmp_path / "log", **changes) as (_, address), both(address) as clients:
        for sequence, client in enumerate(clients, 1):
            client.infer("channels", [tensor()], sequence_id=sequence, sequence_start=True)
        for sequence, client in enumerate(clients, 1):
            refused("RESOURCE_EXHAUSTED", "2 sessions are live", client.infer, "channels", [tensor()], sequence_id=3, sequence_start=True)
            refused("ALREADY_EXISTS", "under way", client.infer, "channels", [tensor()], sequence_id=sequence, sequence_start=True)
        time.sleep(1)
        words = "must specify the START flag on the first request of the sequence; it has expired"
        for sequence, client in enumerate(clients, 1):
            refused("INVALID_ARGUMENT", words, client.infer, "channels", [tensor()], sequence_id=sequence)
            client.infer("channels", [tensor()], sequence_id=3, sequence_start=True, sequence_end=True)


def test_requests_are_counted(server: Server, triton: Any) -> None:
    def counted(method: str, status: str) -> float:
        return figures(server, "indrnn_requests_total").get(f'indrnn_requests_total{{route="{PREFIX}{method}",status="{status}"}}', 0)

    before = counted("ModelInfer", "OK"), counted("ModelInfer", "NOT_FOUND"), counted("ModelStreamInfer", "OK"), counted("ModelStreamInfer", "NOT_FOUND")
    triton.infer("channels", [tensor()])
    refused("NOT_FOUND", "", triton.infer, "nothing", [tensor()])
    triton.stream([{"model_name": "channels", "inputs": [tensor()]}] * 3 + [{"model_name": "nothing", "inputs": [tensor()]}])
    after = counted("ModelInfer", "OK"), counted("ModelInfer", "NOT_FOUND"), counted("ModelStreamInfer", "OK"), counted("ModelStreamInfer", "NOT_FOUND")
    assert np.subtract(after, before).tolist() == [1, 1, 3, 1]
    assert figures(server, f'indrnn_request_seconds_count{{route="{PREFIX}ModelInfer"}}').popitem()[1] >= 2


def start(*options: str, prelude: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; {prelude}; sys.argv[1:] = {list(options)!r}; from service.__main__ import app; app()"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_a_start_that_cannot_be_says_why(served: tuple[Server, str]) -> None:
    taken = served[1].rpartition(":")[2]
    done = start("--port", "0", INDRNN_GRPC_PORT=taken)
    assert (done.returncode, f"port {taken} on 127.0.0.1 is taken; choose another with INDRNN_GRPC_PORT" in done.stderr) == (1, True), done.stderr
    for missing in ("grpc", "google.protobuf"):
        done = start("--port", "0", "--grpc-port", "0", prelude=f"sys.modules[{missing!r}] = None")
        assert (done.returncode, "needs the extra `grpc`: pip install" in done.stderr) == (1, True), done.stderr


def test_without_the_setting_grpc_is_not_even_imported() -> None:
    script = "import sys, service.server, service.app; sys.exit(any(name.split('.')[0] == 'grpc' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
