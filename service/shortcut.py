"""A way round the walk through all routes, and what FastAPI does for each request, for handlers that are called for every frame."""

from __future__ import annotations

import re
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Hot:
    """The handler of a route that is called for every frame; on the API page the route is as ever.

    `read` makes of the query, as it is in the URL, what `handle` takes beside the request; None sends the request the long way, where FastAPI reads
    the query or says what is wrong with it.
    """

    route: APIRoute
    read: Callable[[bytes], Any]
    handle: Callable[[Request, Any], Awaitable[Response]]


class Departure(Protocol):
    """A request whose frames are ready to go to the model, and its answer back, without a task that waits."""

    def launch(self, landed: Callable[[BaseException | None, Any], None]) -> bool:
        """Lets them go; False where there is more to it than that. `landed` is called with an error or with the flight."""

    def write(self, flight: Any) -> Response:
        """The answer."""


Reader = Callable[[Mapping[str, str], Any, Mapping[bytes, bytes], bytes], Departure | None]  # of path, query, headers and body
Found = tuple[Hot, dict[str, str], Any]  # the handler, and what path and query say


class Edge(Protocol):
    """What is around the handlers: `service.edge`'s."""

    async def around(self, scope: Scope, receive: Receive, send: Send, app: ASGIApp) -> None: ...
    def admits(self, headers: Mapping[bytes, bytes]) -> bool: ...
    def begin(self) -> str: ...
    def refused(self, error: ServiceError | CancelledError) -> Response: ...
    def failed(self, error: BaseException, request_id: str, method: str, route: str) -> Response: ...
    def count(self, route: str, status: int, seconds: float) -> None: ...


class Service(FastAPI):
    """FastAPI, but requests to hot handlers go to them directly, with nothing around them but the edge.

    A walk through forty routes takes as long as all the rest of a request but the model, and what FastAPI does besides as long again.
    """

    edge: Edge
    readers: Mapping[str, Reader] = {}
    _hot: Sequence[tuple[Callable[[str], re.Match[str] | None], Hot]] = ()

    def open_shortcut(self, hot: Sequence[Hot], edge: Edge, readers: Mapping[str, Reader]) -> None:
        """The routes take POST; `readers`, by their paths, are of those whose requests may do without a task."""
        self._hot = [(one.route.path_regex.match, one) for one in hot]
        self.edge = edge
        self.readers = readers

    def find(self, path: str, query: bytes) -> Found | None:
        for match, hot in self._hot:
            found = match(path)
            if found is not None:
                asked = hot.read(query)
                return None if asked is None else (hot, found.groupdict(), asked)
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            found = self.find(scope["path"], scope["query_string"])
            if found is not None:
                hot, path, asked = found
                scope["app"], scope["path_params"], scope["route"] = self, path, hot.route
                return await self.edge.around(scope, receive, send, partial(_handle, hot, asked))
        await super().__call__(scope, receive, send)


class Ready(Response):
    """An answer whose body is there as bytes, made in a third of the time."""

    def __init__(self, body: bytes, media_type: bytes = b"application/json", headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", media_type), *headers]


async def _handle(hot: Hot, asked: Any, scope: Scope, receive: Receive, send: Send) -> None:
    response = await hot.handle(Request(scope, receive), asked)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
