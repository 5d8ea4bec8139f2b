"""HTTP inside uvicorn, with a direct way for requests that need no task of their own.

For each request uvicorn makes a task, an event and a cycle of messages, which takes as long as all that we do for a frame. A request that is whole, not
large and all of whose work is that its frames go to the model is read here where it comes, and answered where its batch has landed. All others go on
as ever, and so does one of which more turns out to be to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.errors import ServiceError
from service.runner import Suspect
from service.shortcut import Departure, Found, Service

_LONGEST = 2**16  # bytes of a body; what is longer is read piece by piece, and refused before all of it is there


class Passage:
    """A request on its direct way; to uvicorn the connection's cycle, behind which others wait."""

    __slots__ = (
        "began",
        "body",
        "departure",
        "disconnected",
        "found",
        "headers",
        "id",
        "keep_alive",
        "message_event",
        "parts",
        "response_complete",
        "scope",
        "url",
    )

    def __init__(self, found: Found, headers: Mapping[bytes, bytes], scope: Scope, url: bytes) -> None:
        self.found = found
        self.headers = headers
        self.scope = scope
        self.url = url
        self.parts: list[bytes] = []
        self.body = b""
        self.began = time.perf_counter()
        self.id = ""
        self.departure: Departure
        self.keep_alive = True
        self.disconnected = self.response_complete = False
        self.message_event = _Nobody()


class _Nobody:
    """Nobody waits for further pieces."""

    def set(self) -> None: ...


class Direct(HttpToolsProtocol):
    """uvicorn's `http` class for a `Service`."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        service = config.app
        assert isinstance(service, Service)
        self._service = service
        self._plain = not self.root_path and self.limit_concurrency is None
        self._coming: Passage | None = None  # its body is not all here

    def on_headers_complete(self) -> None:
        self._coming = self._look() if self._plain else None
        if self._coming is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._coming is None:
            super().on_body(body)
        else:
            self._coming.parts.append(body)

    def on_message_complete(self) -> None:
        passage, self._coming = self._coming, None
        if passage is None:
            return super().on_message_complete()
        passage.body = passage.parts[0] if len(passage.parts) == 1 else b"".join(passage.parts)
        self.cycle = passage  # type: ignore[assignment]
        if not self._depart(passage):
            self._hand_over(passage, more=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_the_long_way()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._go_the_long_way()
        super().shutdown()

    def _look(self) -> Passage | None:
        """The request, if it may go directly as far as its head tells."""
        parser, cycle, url = self.parser, self.cycle, self.url
        if parser.get_method() != b"POST" or b"%" in url or b"#" in url or not url.isascii() or not url.startswith(b"/"):
            return None
        path, _, query = url.partition(b"?")
        found = self._service.find(path.decode(), query)
        if found is None or found[0].route.path not in self._service.readers:
            return None
        if (cycle is not None and not cycle.response_complete) or self.expect_100_continue or self.flow.write_paused:
            return None
        if parser.get_http_version() != "1.1" or not parser.should_keep_alive() or parser.should_upgrade():
            return None
        headers = dict(reversed(self.headers))
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 6 or int(length) > _LONGEST or b"transfer-encoding" in headers or not self._service.edge.admits(headers):
            return None
        return Passage(found, headers, cast("Scope", self.scope), url)

    def _depart(self, passage: Passage) -> bool:
        hot, path, asked = passage.found
        passage.id = self._service.edge.begin()
        try:
            departure = self._service.readers[hot.route.path](path, asked, passage.headers, passage.body)
        except Exception:  # the handler comes upon it again, and says it
            return False
        if departure is None:
            return False
        passage.departure = departure
        return departure.launch(partial(self._land, passage))

    def _land(self, passage: Passage, error: BaseException | None, flight: Any) -> None:
        if isinstance(error, Suspect):
            return self._hand_over(passage, more=False)
        edge, route = self._service.edge, passage.found[0].route.path
        try:
            if error is not None:
                raise error
            response = passage.departure.write(flight)
        except (ServiceError, asyncio.CancelledError) as refusal:
            response = edge.refused(refusal)
        except Exception as failure:
            response = edge.failed(failure, passage.id, "POST", route)
        passage.response_complete = True
        if not self.transport.is_closing():
            headers = [*self.server_state.default_headers, *response.raw_headers, (b"x-request-id", passage.id.encode())]
            if not passage.keep_alive:
                headers.append((b"connection", b"close"))
            lines = [b"%b: %b\r\n" % header for header in headers]
            self.transport.write(b"".join((STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body))))
            if not passage.keep_alive:
                self.transport.close()
        edge.count(route, response.status_code, time.perf_counter() - passage.began)
        self.on_response_complete()

    def _go_the_long_way(self) -> None:
        """What has not come whole by now is uvicorn's to end."""
        passage, self._coming = self._coming, None
        if passage is not None:
            passage.body = b"".join(passage.parts)
            self.cycle = passage  # type: ignore[assignment]
            self._hand_over(passage, more=True)

    def _hand_over(self, passage: Passage, *, more: bool) -> None:
        """As uvicorn does when a request's headers are there; `more` of the body is to come."""
        path, _, query = passage.url.partition(b"?")
        scope = passage.scope
        scope["method"], scope["path"], scope["raw_path"], scope["query_string"] = "POST", path.decode(), path, query
        cycle = RequestResponseCycle(
            scope=scope,  # type: ignore[arg-type]
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=passage.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.body += passage.body
        cycle.more_body = more
        cycle.disconnected = passage.disconnected
        cycle.message_event.set()
        if self.cycle is passage:  # type: ignore[comparison-overlap]
            self.cycle = cycle
        self._start_asgi_task(cycle, self.app)
