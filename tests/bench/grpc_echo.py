"""The limit to compare gRPC with: a bare service on gRPC's own asyncio server and uvloop that answers every request with a ready message.

python tests/bench/grpc_echo.py CLASSES    prints `Serving on URL` and serves until it is told to stop
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import asyncio

import grpc
import uvloop
from grpc import aio

from service.grpc_messages import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, classes: int) -> None:
        self._answer = ModelInferResponse(model_name="bench", model_version="1", raw_output_contents=[bytes(4 * classes)])
        self._answer.outputs.add(name="scores", datatype="FP32", shape=[1, 1, classes])
        self._unary = grpc.unary_unary_rpc_method_handler(self._infer, ModelInferRequest.FromString, ModelInferResponse.SerializeToString)
        self._stream = grpc.stream_stream_rpc_method_handler(self._infer_all, ModelInferRequest.FromString, ModelStreamInferResponse.SerializeToString)

    def service(self, details: Any) -> Any:
        return self._stream if details.method.endswith("ModelStreamInfer") else self._unary

    async def _infer(self, message: Any, context: Any) -> Any:
        return self._answer

    async def _infer_all(self, _: Any, context: Any) -> None:
        while (message := await context.read()) is not aio.EOF:
            answer = ModelStreamInferResponse(infer_response=self._answer)
            answer.infer_response.id = message.id
            await context.write(answer)


async def main() -> None:
    server = aio.server()
    server.add_generic_rpc_handlers((Echo(int(sys.argv[1])),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"Serving on http://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
