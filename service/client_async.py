"""The asynchronous client: the calls of a service, and its streams."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, Unpack
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from service.client_addresses import Addresses, read_addresses
from service.client_errors import ELSEWHERE, ClientError, NobodyThere, Unreachable, http_refusal, nobody_at
from service.client_notices import OnNotice
from service.client_patience import Patience
from service.client_socket import Dialer
from service.client_stream import AsyncStream
from service.client_tracks import AsyncTracks
from service.client_values import TOP, Answer, Model, OnEvent, Retry, StreamOptions, as_times, opening
from service.errors import Draining, ModelLoading, ServiceError, StoreUnavailable
from service.protocol import encode, for_json

ScoresOption = Literal["last", "all", "none"]

_PASSING = (Unreachable, Draining, ModelLoading, StoreUnavailable)  # what a step that may be repeated is repeated after


class AsyncClient:
    """Talks to one service, at `url` or, where its replicas share a store and no balancer stands before them, at any of several. Use it as `async with`.

    Calls raise the service's errors as classes of `service.errors`, and `Unreachable`. Those that name the place in their session, `advance` and
    `reset_session`, may be repeated without harm, and are until `retry.give_up_s` have passed, while nobody is there or the session's store is not.
    """

    def __init__(
        self, url: str | Sequence[str] = "http://127.0.0.1:8000", *, token: str | None = None, timeout_s: float = 30.0, retry: Retry | None = None
    ) -> None:
        self.urls = read_addresses(url)
        if token and not (token.isascii() and token.isprintable()):
            raise ClientError("a token is made of printable ASCII characters")
        self._addresses = Addresses(self.urls)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        self._retry = retry or Retry()
        self._http = httpx.AsyncClient(headers=self._headers, timeout=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """A summary of each: name, version, frame shape, ..."""
        return list((await self._call("GET", "/v1/models"))["models"])

    async def model(self, name: str, version: str | None = None) -> Model:
        return Model.from_json(await self._call("GET", f"/v1/models/{_part(name)}", version=version))

    async def predict(
        self,
        name: str,
        frames: npt.ArrayLike,
        *,
        t: npt.ArrayLike | None = None,
        version: str | None = None,
        layout: str | None = None,
        fps: float | None = None,
        scores: ScoresOption = "last",
        top_k: int = TOP,
    ) -> Answer:
        """Classifies a clip (count, *frame_shape) on its own; NaN is missing. `fps` where it is not the model's, or the times `t` (count,) in seconds."""
        query: dict[str, Any] = {"version": version, "layout": layout, "fps": fps, "scores": scores, "top_k": top_k}
        body = _raw(frames) if t is None else _timed(frames, t)
        return Answer.from_json(await self._call("POST", f"/v1/models/{_part(name)}/predict", body, **query))

    def stream(self, name: str, *, on_event: OnEvent | None = None, on_notice: OnNotice | None = None, **options: Unpack[StreamOptions]) -> AsyncStream:
        """A stream on a new session, or on `session`; then `ack` asks for its kept answers from that frame on. It has a connection of its own."""
        return AsyncStream(self._dialer(name), opening(options), self._retry, on_event, on_notice)

    def tracks(self, name: str) -> AsyncTracks:
        """Streams of one model on one connection: one for each person in view."""
        return AsyncTracks(self._dialer(name), self._retry)

    def _dialer(self, name: str) -> Dialer:
        return Dialer(Addresses(self.urls), f"/v1/models/{_part(name)}/stream", self._headers, self._timeout_s)

    # Sessions over REST: for programs that post frames now and then.

    async def open_session(self, name: str, *, version: str | None = None, layout: str | None = None, fps: float | None = None) -> dict[str, Any]:
        """A new session; `session` in the result is its id, `next_frame` the number of its first frame."""
        return await self._call("POST", f"/v1/models/{_part(name)}/sessions", version=version, layout=layout, fps=fps)

    async def session(self, session: str) -> dict[str, Any]:
        return await self._call("GET", f"/v1/sessions/{_part(session)}")

    async def advance(
        self,
        session: str,
        first: int,
        frames: npt.ArrayLike,
        *,
        t: npt.ArrayLike | None = None,
        ack: int | None = None,
        scores: ScoresOption = "last",
        top_k: int = TOP,
    ) -> Answer:
        """Sends frames (count, *frame_shape) of which the first has number `first`, with their times `t` (count,) if the stream began with times.

        It is repeated when the answer was lost.
        """
        numbers = _given({"first": first, "ack": ack})
        query = {"scores": scores, "top_k": top_k}
        body, query = (_raw(frames), query | numbers) if t is None else (_timed(frames, t, **numbers), query)
        return Answer.from_json(await self._call("POST", f"/v1/sessions/{_part(session)}/frames", body, Patience(self._retry), **query))

    async def reset_session(self, session: str, at: int) -> None:
        await self._call("POST", f"/v1/sessions/{_part(session)}/reset", {"json": {"at": at}}, Patience(self._retry))

    async def touch_session(self, session: str) -> float | None:
        """Keeps it from expiring; the seconds until it would, None where it does not. A stream's connection does so by itself."""
        expires_in_s: float | None = (await self._call("POST", f"/v1/sessions/{_part(session)}/touch"))["expires_in_s"]
        return expires_in_s

    async def close_session(self, session: str) -> None:
        await self._call("DELETE", f"/v1/sessions/{_part(session)}")

    async def save_session(self, session: str) -> bytes:
        """Its record, taken between two of its messages; it goes on. The record holds the session's id: keep it as secret."""
        return (await self._request("GET", f"/v1/sessions/{_part(session)}/state")).content

    async def restore_session(self, name: str, record: bytes, *, version: str | None = None) -> dict[str, Any]:
        """A new session of a model of the same fingerprint, which goes on where the record's was, with the same bits; as `open_session` answers.

        Frames go on from `next_frame`; `client.stream(name, session=..., ack=...)` streams them, and hears the kept answers from `ack` on.
        The client's token must be that for management.
        """
        body = {"content": record, "headers": {"Content-Type": "application/octet-stream"}}
        return await self._call("POST", f"/v1/models/{_part(name)}/sessions", body, version=version)

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None, patience: Patience | None = None, **query: Any) -> dict[str, Any]:
        response = await self._request(method, path, body, patience, **query)
        with suppress(ValueError, TypeError):  # no JSON object: another server listens there
            return dict(response.json())
        raise http_refusal(response.status_code, response.content)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None, patience: Patience | None = None, **query: Any) -> httpx.Response:
        """With `patience`, of a call that may be repeated, again and again."""
        call = {"method": method, "params": _given(query), **(body or {})}
        if patience is None:
            return await self._anywhere(path, call, repeats=False)
        clock = asyncio.get_running_loop().time
        while True:
            try:
                return await self._anywhere(path, call, repeats=True)
            except _PASSING as error:
                patience.failed(error, clock())
                if (pause := patience.pause_s(clock())) is None:
                    raise
            await asyncio.sleep(pause)

    async def _anywhere(self, path: str, call: Mapping[str, Any], *, repeats: bool) -> httpx.Response:
        """From the first address where it is not refused for reasons of one server; raises what the last of them said.

        A call that does not repeat goes on to the next address only if it was certainly not heard at the one before.
        """
        urls = self._addresses.round()
        for url in urls:
            self._addresses.use(url)
            try:
                return await self._at(url, path, call)
            except ELSEWHERE as error:
                if url is urls[-1] or not (repeats or isinstance(error, ServiceError | NobodyThere)):
                    raise
        raise AssertionError("there is no service without an address")

    async def _at(self, url: str, path: str, call: Mapping[str, Any]) -> httpx.Response:
        try:
            response = await self._http.request(url=f"{url}{path}", **call)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise nobody_at(url, error) from None
        except httpx.TimeoutException:
            raise Unreachable(f"{url} did not answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise Unreachable(f"the connection to {url} was lost ({str(error) or type(error).__name__})") from None
        if response.is_success:
            return response
        raise http_refusal(response.status_code, response.content)


def _raw(frames: npt.ArrayLike) -> dict[str, Any]:
    """The body that carries frames alone."""
    return {"content": np.ascontiguousarray(frames, "<f4").tobytes(), "headers": {"Content-Type": "application/octet-stream"}}


def _timed(frames: npt.ArrayLike, t: npt.ArrayLike, **fields: Any) -> dict[str, Any]:
    """The body that carries frames with their times: JSON, the other has no room for them. Raises `WrongTime`."""
    array = np.asarray(frames, np.float32)
    value = {**fields, "frames": for_json(array), "t": as_times(t, len(array) if array.ndim else 0)}
    return {"content": encode(value), "headers": {"Content-Type": "application/json"}}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _part(name: str) -> str:
    return quote(name, safe="")
