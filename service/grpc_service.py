"""The Open Inference Protocol's gRPC service: thin handlers between its messages and the predictor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from grpc import aio

from service import calls
from service.errors import Malformed, NotSupported, ServiceError, TooMany
from service.gate import Gate
from service.grpc_edge import Edge, abort
from service.grpc_gather import Gather
from service.grpc_messages import ModelInferRequest, ModelStreamInferResponse, message_class
from service.grpc_status import facts_of
from service.grpc_stream import Stream
from service.grpc_tensors import read_request, set_parameter, size_of, write_response
from service.metadata import INPUTS, OUTPUTS, model_config, server_metadata
from service.predictor import Predictor
from service.sequences import Sequences
from service.settings import Settings

PREFIX = "/inference.GRPCInferenceService/"

Headers = Mapping[str, str]
Handler = Callable[[Any, Headers], Awaitable[dict[str, Any]]]

_WITHOUT_TOKEN = (f"{PREFIX}ServerLive", f"{PREFIX}ServerReady")
_INFER, _STREAM = f"{PREFIX}ModelInfer", f"{PREFIX}ModelStreamInfer"
_HOST = {"host": "?"}  # gRPC does not say by which name it was called, so that no page is of the same host; one of no host, `null`, neither
_ENDS_AT_ERROR = "triton_grpc_error"  # with this in its metadata a stream ends at its first error, with its status


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds the handler of every method, and checks the token before a message is read."""

    def __init__(self, predictor: Predictor, sequences: Sequences, gate: Gate, settings: Settings) -> None:
        self._predictor, self._sequences, self._gate, self._settings = predictor, sequences, gate, settings
        self._edge = Edge(predictor.metrics, predictor.traces, settings.log_level == "debug")
        self._gather = Gather()
        self._streams: set[Stream] = set()
        self._draining = False
        self._handlers = {
            _INFER: grpc.unary_unary_rpc_method_handler(self._infer, _reader(ModelInferRequest), _to_bytes),
            _STREAM: grpc.stream_stream_rpc_method_handler(self._stream, _reader(ModelInferRequest), _to_bytes),
        }
        for name, handler in {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }.items():
            self._handlers[PREFIX + name] = self._plain(name, handler)

    def service(self, details: Any) -> Any:
        """The handler of a call, None where it is of another service."""
        method = details.method
        if not method.startswith(PREFIX):
            return None
        handler = self._handlers.get(method)
        if handler is None:
            return self._refusing(method, NotSupported(f"{method[:140]} is not supported"))
        if method not in _WITHOUT_TOKEN:
            try:
                self._gate.check_token(dict(details.invocation_metadata))
            except ServiceError as error:
                return self._refusing(method, error)
        return handler

    def drain(self) -> None:
        """Streams end when what was read of them is answered."""
        self._draining = True
        for stream in self._streams:
            stream.drain()

    # Inference

    async def _infer(self, message: Any, context: Any) -> Any:
        headers = _headers(context)
        with self._edge.work(_INFER) as work:
            request = self._edge.begin(headers)
            try:
                _check_read(message)
                answer = await self._answer(message, headers, context.time_remaining())
            except Exception as error:
                known = self._edge.known(error, _INFER, request)
                work.failed(known)
                del message  # what `abort` raises stays with the call, in a circle with this frame, until the collector looks
                await abort(context, known, request)
            work.done()
            return answer

    async def _answer(self, message: Any, headers: Headers, wait_s: float | None) -> Any:
        asked = read_request(message, INPUTS, OUTPUTS, wait_s)
        if asked.step is not None:
            self._gate.check_origin(headers)  # the id may be guessed, by any page that the user has open
        name, version = message.model_name, message.model_version or None
        await self._gather.join()
        with self._gather.under_way():
            done = await calls.infer(self._predictor, self._sequences, name, version, asked, size_of(message))
        return write_response(asked, name, done)

    async def _stream(self, _: Any, context: Any) -> None:
        headers = _headers(context)
        request = self._edge.begin(headers)
        if len(self._streams) >= self._settings.connections:
            error = TooMany(f"{self._settings.connections} streams are open, no more are allowed", retry_after=5)
            await abort(context, self._edge.known(error, _STREAM, request), request)
        stream = self._stream_of(context, headers, request)
        self._streams.add(stream)
        if self._draining:
            stream.drain()
        try:
            await stream.run()
        except Exception as error:
            known = self._edge.known(error, _STREAM, request)
            await stream.flushed()  # sooner, gRPC would not let us end it
            await abort(context, known, request)
        finally:
            self._streams.discard(stream)

    def _stream_of(self, context: Any, headers: Headers, request: str) -> Stream:
        left = context.time_remaining()
        ends_at_error = headers.get(_ENDS_AT_ERROR, "").lower() == "true"
        ends = None if left is None else time.monotonic() + left

        async def answer(message: Any, came: float) -> Any:
            with self._edge.work(_STREAM) as work:
                until = came + self._settings.deadline_s
                try:
                    response = await self._answer(message, headers, (until if ends is None else min(until, ends)) - time.monotonic())
                except Exception as error:
                    if ends_at_error:
                        work.failed(error if isinstance(error, ServiceError) else ServiceError())
                        raise
                    known = self._edge.known(error, _STREAM, request)
                    work.failed(known)
                    return _refusal(known, message)
                work.done()
                response.parameters["triton_final_response"].bool_param = True  # no request has more than one
                return ModelStreamInferResponse(infer_response=response)

        async def read() -> Any:
            message = await context.read()
            _check_read(message)
            return message

        async def write(answer: Any) -> None:
            try:
                await context.write(answer)
            except aio.InternalError:  # the client has left, and we are about to be told
                raise asyncio.CancelledError from None

        return Stream(read, write, aio.EOF, answer)

    # Health and metadata

    async def _live(self, message: Any, headers: Headers) -> dict[str, Any]:
        return {"live": True}

    async def _ready(self, message: Any, headers: Headers) -> dict[str, Any]:
        return {"ready": not self._predictor.draining}

    async def _model_ready(self, message: Any, headers: Headers) -> dict[str, Any]:
        try:
            calls.find_runner(self._predictor, message.name, message.version or None)
        except ServiceError:
            return {"ready": False}
        return {"ready": not self._predictor.draining}

    async def _server_metadata(self, message: Any, headers: Headers) -> dict[str, Any]:
        return server_metadata()

    async def _model_metadata(self, message: Any, headers: Headers) -> dict[str, Any]:
        return calls.metadata(self._predictor, message.name, message.version or None)

    async def _model_config(self, message: Any, headers: Headers) -> dict[str, Any]:
        runner = calls.find_runner(self._predictor, message.name, message.version or None)
        return {"config": model_config(runner.name, runner.manifest, self._settings)}

    async def _model_statistics(self, message: Any, headers: Headers) -> dict[str, Any]:
        return {"model_stats": calls.statistics(self._predictor, message.name or None, message.version or None)}

    # The model repository

    async def _index(self, message: Any, headers: Headers) -> dict[str, Any]:
        return {"models": calls.index(self._predictor, message.ready)}

    async def _load(self, message: Any, headers: Headers) -> dict[str, Any]:
        self._gate.check_management(headers)
        await calls.load(self._predictor, message.model_name, message.parameters)
        return {}

    async def _unload(self, message: Any, headers: Headers) -> dict[str, Any]:
        self._gate.check_management(headers)
        await self._predictor.models.unload(message.model_name)
        return {}

    # Handlers of other calls

    def _plain(self, name: str, handler: Handler) -> Any:
        """A call whose answer is as small as its request: a dict with the message's fields."""
        method, response_class = PREFIX + name, message_class(f"{name}Response")

        async def run(message: Any, context: Any) -> Any:
            headers = _headers(context)
            with self._edge.work(method) as work:
                request = self._edge.begin(headers)
                try:
                    _check_read(message)
                    answer = ParseDict(await handler(message, headers), response_class(), ignore_unknown_fields=True)
                except Exception as error:
                    known = self._edge.known(error, method, request)
                    work.failed(known)
                    del message  # as in `_infer`
                    await abort(context, known, request)
                work.done()
                return answer

        return grpc.unary_unary_rpc_method_handler(run, _reader(message_class(f"{name}Request")), _to_bytes)

    def _refusing(self, method: str, error: ServiceError) -> Any:
        """Refuses a call whatever it sends. As a stream, for its first message would be read whole before it is answered otherwise."""

        async def refuse(_: Any, context: Any) -> None:
            with self._edge.work(method if method in self._handlers else "unmatched") as work:
                work.failed(error)
                request = self._edge.begin(_headers(context))
                await abort(context, self._edge.known(error, method, request), request)

        return grpc.stream_stream_rpc_method_handler(refuse)


def _headers(context: Any) -> Headers:
    return _HOST | dict(context.invocation_metadata())


def _reader(kind: Any) -> Callable[[bytes], Any]:
    """From bytes to a message, or to the error that they are none: gRPC itself would tell the client what went wrong inside."""

    def read(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return Malformed("the message cannot be read")

    return read


def _check_read(message: Any) -> None:
    if isinstance(message, Malformed):
        raise message


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]


def _refusal(error: ServiceError, message: Any) -> Any:
    """Says in a stream what was wrong with one request; its id tells with which."""
    response = ModelStreamInferResponse(error_message=error.message or error.code)
    response.infer_response.model_name = message.model_name
    response.infer_response.id = message.id
    for name, value in facts_of(error).items():
        set_parameter(response.infer_response.parameters[name], value)
    return response
