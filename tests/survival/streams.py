"""Clients that lose nothing: what the protocol asks of a client whose server may die at any moment, and no more, on bare websockets and HTTP.

Every answer is held against the one before it and against what may come: an answer that is missing, doubled or for another frame ends a client with an
`AssertionError`. Its frames become due at a fixed pace, however its connection does; `waits` is how long each waited for its answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from picows import WSCloseCode, WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from service import protocol
from tests.toy_models import Toy, example_frames

Floats = npt.NDArray[np.float32]
Where = Callable[[], str]  # the address to try next, http://host:port

AGAIN_S = 0.05  # between two attempts
ACK_EVERY = 6  # frames
PATIENCE_S = 30.0  # of a client without an answer, and of one step over HTTP
HEARD_S = 3.0  # a connection on which nothing comes for so long, though answers are missing, is given up


class Broken(Exception):
    """The connection is of no use any more; the session goes on elsewhere."""


class _Wire(WSListener):
    """One websocket: what comes is put into `inbox`, None at its end."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[dict[str, Any] | bytes | None] = asyncio.Queue()
        self.transport: WSTransport
        self._lost = False

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY:
            self.inbox.put_nowait(frame.get_payload_as_bytes())
        elif frame.msg_type == WSMsgType.TEXT:
            self.inbox.put_nowait(json.loads(frame.get_payload_as_utf8_text()))
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._lost = True
        self.inbox.put_nowait(None)

    def say(self, message: bytes | None = None, /, **fields: Any) -> None:
        if self._lost:
            return
        if message is None:
            self.transport.send(WSMsgType.TEXT, json.dumps(fields).encode())
        else:
            self.transport.send(WSMsgType.BINARY, message)

    def leave(self) -> None:
        if not self._lost:
            self.transport.send_close(WSCloseCode.OK)
            self.transport.disconnect()


class Client:
    """What a stream over a websocket and one over HTTP have in common: frames that become due, answers, one for each."""

    def __init__(self, where: Where, model: str, frames: Floats, classes: int, fps: float, chance: random.Random) -> None:
        self.session: str | None = None
        self.scores = np.full((len(frames), classes), np.nan, np.float32)
        self.answered = 0  # frames
        self.waits = np.zeros(len(frames))
        self.repeated = 0  # answers that had come before, and were computed again or sent again
        self.moves = 0  # from one connection to another
        self.refusals: Counter[str] = Counter()
        self._where, self._model, self._frames, self._fps, self._chance = where, model, frames, fps, chance
        self._began = 0.0
        self._same_from = 0  # frames from here on are answered by the model that answers now

    @property
    def stall(self) -> float:
        """The longest that a frame waited for its answer, in seconds."""
        return float(self.waits.max())

    def _due(self) -> int:
        """Frames that are there by now."""
        return min(len(self._frames), int((time.monotonic() - self._began) * self._fps))

    def _due_at(self, frame: int) -> float:
        return self._began + (frame + 1) / self._fps

    def _heard(self, first: int, scores: Floats) -> None:
        now = time.monotonic()
        for frame, row in enumerate(scores, first):
            if frame < self.answered:
                assert frame < self._same_from or self.scores[frame].tobytes() == row.tobytes(), f"frame {frame} was answered in two ways"
                self.repeated += 1
            else:
                assert frame == self.answered, f"the answer of frame {frame} came, and that of {self.answered} has not"
                self.scores[frame] = row
                self.waits[frame] = now - self._due_at(frame)
                self.answered += 1


class Streaming(Client):
    """A stream on one websocket after another, as section 9 of the protocol has it. Keeps frames from `min(answered, durable)` on."""

    durable = 0
    version = ""
    _warm_from = 2**64
    begun_anew = 0  # sessions that nothing was promised of and that went down with their server
    changes: list[dict[str, Any]]

    async def run(self) -> None:
        """To the last frame's answer."""
        born = time.monotonic()
        self.changes = []
        while self.answered < len(self._frames):
            try:
                wire = await self._connect()
            except (OSError, WSError, TimeoutError):
                await asyncio.sleep(AGAIN_S)
                continue
            try:
                await self._serve(wire)
            except Broken as broken:
                self.moves += 1
                if str(broken):
                    self.refusals[str(broken)] += 1
                    await asyncio.sleep(AGAIN_S)
            finally:
                wire.leave()
            since = self._due_at(self.answered) if self._began else born
            assert time.monotonic() - since < PATIENCE_S, f"no answer for frame {self.answered}: {self.refusals}"

    async def _connect(self) -> _Wire:
        address = f"{self._where().replace('http', 'ws', 1)}/v1/models/{self._model}/stream"
        _, wire = await ws_connect(_Wire, address, websocket_handshake_timeout=HEARD_S)
        if wire is None:
            raise ConnectionResetError("lost as soon as it was there")
        assert isinstance(wire, _Wire)
        return wire

    async def _serve(self, wire: _Wire) -> None:
        known = {} if self.session is None else {"session": self.session, "ack": self.answered}
        wire.say(type="open", answers="binary", **known)
        opened = await self._opened(wire)
        place = opened["next_frame"]
        if self.version not in ("", opened["version"]):
            place = await self._renewed(wire)
        self.version = opened["version"]
        assert place >= min(self.answered, self.durable, self._warm_from), f"{place} is asked for; {self.durable} are durable, {self.answered} acknowledged"
        assert place <= len(self._frames)
        cursor = min(self.answered, place)  # of answers on this connection
        await self._converse(wire, cursor, place, opened["window"])

    async def _renewed(self, wire: _Wire) -> int:
        """The model is another one: returns where the frames begin that warm it up. What it says of those that were answered is dropped."""
        message = await self._hear(wire)
        assert isinstance(message, dict)
        assert message["type"] == "model_changed"
        assert message["frame"] >= min(self.answered, self.durable)
        self.changes.append(message)
        self._same_from, self._warm_from = self.answered, int(message["warm_from"])
        return self._warm_from

    async def _opened(self, wire: _Wire) -> dict[str, Any]:
        while True:
            try:
                message = await self._hear(wire)
            except TimeoutError:
                raise Broken("silence") from None
            if isinstance(message, dict) and message["type"] == "opened":
                self.session = message["session"]
                self._began = self._began or time.monotonic()
                return message

    async def _converse(self, wire: _Wire, cursor: int, sent: int, window: int) -> None:
        acknowledged = cursor
        while self.answered < len(self._frames):
            while (ready := min(self._due(), cursor + window) - sent) > 0:
                count = min(ready, self._chance.randint(1, 8))  # whatever it was split into before
                wire.say(protocol.write_frames(sent, self._frames[sent : sent + count]))
                sent += count
            try:
                message = await self._hear(wire, HEARD_S if sent > cursor else max(0.0, self._due_at(sent) - time.monotonic()))
            except TimeoutError:
                if sent > cursor:
                    raise Broken("silence") from None
                continue
            if isinstance(message, bytes):
                _, kind, _, count, first = protocol.HEADER.unpack_from(message)
                assert kind == protocol.KIND_SCORES
                assert first == cursor, f"an answer from frame {first} on, where one from {cursor} on should come"
                cursor = first + count
                assert cursor <= sent, f"an answer for frames that were not sent: to {cursor} of {sent}"
                self._heard(first, np.frombuffer(message, np.float32, offset=protocol.HEADER.size).reshape(count, -1))
                if cursor - acknowledged >= ACK_EVERY:  # also those that come again to warm a model up: the server keeps only so many
                    acknowledged = cursor
                    wire.say(type="ack", first=acknowledged)
            elif message["type"] == "durable":
                self.durable = max(self.durable, message["frame"])

    async def _hear(self, wire: _Wire, within_s: float = HEARD_S) -> dict[str, Any] | bytes:
        """The next message; raises `Broken` where the session is to go on elsewhere."""
        async with asyncio.timeout(within_s):
            message = await wire.inbox.get()
        if message is None:
            raise Broken
        if isinstance(message, dict) and message["type"] in ("error", "draining"):
            code = message.get("code", message["type"])
            if code == "session_not_found" and self.durable == 0 and self.session is not None:
                self.session = None  # killed before anything of it was promised: every frame is still here
                self.begun_anew += 1
            else:
                assert code in ("draining", "store_unavailable", "taken_over", "gap", "model_loading"), message
            raise Broken(code)
        return message


class Steps(Client):
    """A session over REST: each step is sent until it is answered, to whoever is there.

    An answer is certain unless its header warns that a crash would lose it; frames of such answers are kept, and sent again where they are missing.
    """

    certain = 0  # frames

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            await self._begin(http)
            self._began = time.monotonic()
            place = 0
            while self.answered < len(self._frames):
                await asyncio.sleep(max(0.0, self._due_at(min(place + 3, len(self._frames)) - 1) - time.monotonic()))
                try:
                    place = await self._step(http, place, min(len(self._frames), place + self._chance.randint(1, 3)))
                except _Behind as behind:
                    place, gone = behind.place, behind.gone
                    self._check_place(place)
                    if gone:
                        await self._begin(http)

    def _check_place(self, place: int) -> None:
        assert place >= self.certain, f"frame {place} is asked for again, and {self.certain} were certain"

    async def _begin(self, http: httpx.AsyncClient) -> None:
        answer = await self._until_answered(lambda url: http.post(f"{url}/v1/models/{self._model}/sessions?scores=all", json={}))
        self.session = answer.json()["session"]

    async def _step(self, http: httpx.AsyncClient, first: int, end: int) -> int:
        """Returns the place where the next step begins."""
        body, headers = self._frames[first:end].tobytes(), {"content-type": "application/octet-stream"}
        ask = f"v1/sessions/{self.session}/frames?first={first}&ack={self.certain}&answers=binary"
        answer = await self._until_answered(lambda url: http.post(f"{url}/{ask}", content=body, headers=headers))
        _, _, _, count, at = protocol.HEADER.unpack_from(answer.content)
        assert (at, count) == (first, end - first)
        self._heard(first, np.frombuffer(answer.content, np.float32, offset=protocol.HEADER.size).reshape(count, -1))
        if "warning" not in answer.headers:
            self.certain = end
        return end

    async def _until_answered(self, ask: Callable[[str], Any]) -> httpx.Response:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                answer: httpx.Response = await ask(self._where())
            except httpx.TransportError as error:
                self.refusals[type(error).__name__] += 1
            else:
                if answer.is_success:
                    return answer
                said = answer.json()
                code = said.get("code", answer.text)
                if code == "gap":
                    raise _Behind(said["next_frame"])
                if code == "session_not_found":
                    raise _Behind(0, gone=True)
                assert code in ("draining", "store_unavailable", "taken_over"), answer.text
                self.refusals[code] += 1
            self.moves += 1
            await asyncio.sleep(AGAIN_S)
        raise AssertionError(f"frame {self.answered} was not answered: {self.refusals}")


class _Behind(Exception):
    """The session is not as far as we are."""

    def __init__(self, place: int, *, gone: bool = False) -> None:
        super().__init__(place)
        self.place = place
        self.gone = gone


class Sequence(Steps):
    """A sequence of the Open Inference Protocol that says which step each request is."""

    async def _begin(self, http: httpx.AsyncClient) -> None:
        self.session = str(self._chance.getrandbits(60))

    async def _step(self, http: httpx.AsyncClient, first: int, end: int) -> int:
        frames = self._frames[first:end]
        parameters = {"sequence_id": int(self.session or 0), "sequence_step": first, "sequence_start": first == 0}
        inputs = [{"name": "frames", "datatype": "FP32", "shape": [1, *frames.shape], "data": frames.ravel().tolist()}]
        body = {"inputs": inputs, "parameters": parameters}
        answer = await self._until_answered(lambda url: http.post(f"{url}/v2/models/{self._model}/infer", json=body))
        [output] = answer.json()["outputs"]
        self._heard(first, np.array(output["data"], np.float32).reshape(end - first, -1))
        self.certain = end
        return end


def clips(toy: Toy, count: int, length: int) -> list[Floats]:
    """One for each client, all different."""
    frames = example_frames(toy, length + 7 * count, seed=61)
    return [frames[7 * number : 7 * number + length] for number in range(count)]


async def undisturbed(url: str, model: str, clip: Floats) -> Floats:
    """Scores of all frames, run in one piece."""
    async with httpx.AsyncClient(timeout=60) as http:
        headers = {"content-type": "application/octet-stream"}
        answer = await http.post(f"{url}/v1/models/{model}/predict?scores=all&answers=binary", content=clip.tobytes(), headers=headers)
    answer.raise_for_status()
    return np.frombuffer(answer.content, np.float32, offset=protocol.HEADER.size).reshape(len(clip), -1)


async def differing(clients: list[Client], frames: list[Floats], url: str, model: str = "channels") -> list[tuple[int, int]]:
    """(client, frame) of each first frame whose scores are not the bits of the undisturbed run."""
    found = []
    for number, (client, clip) in enumerate(zip(clients, frames, strict=True)):
        expected = await undisturbed(url, model, clip)
        found += [(number, int(frame)) for frame in np.flatnonzero((client.scores != expected).any(1))[:1]]
    return found


def percentiles(values: list[float]) -> str:
    p50, p99 = np.percentile(values, [50, 99])
    return f"p50 {p50:.3f} s, p99 {p99:.3f} s, longest {max(values):.3f} s"
